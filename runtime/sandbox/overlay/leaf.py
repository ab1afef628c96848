"""Step "sandbox": compare one file or link of an upper folder with what the base has there."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from typing import Final

from . import content, kernel, later
from .changes import Change, Kind, Node
from .seen import Identity

_EXECUTABLE: Final = "it can be executed"
_OUT: Final = "it is a link that may lead out of the workspace"
_TOO_LARGE: Final = "there is too much to read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """One name, and the folders that hold it on both sides."""

    path: str
    name: str
    upper: int
    base: int | None


@dataclass(frozen=True, slots=True)
class Leaves:
    """Compares files and links; ``budget`` bounds what is read for it on both sides."""

    workspace: int
    budget: content.Budget

    def compare(
        self, sides: Sides, node: Node, upper: os.stat_result, base: os.stat_result | None
    ) -> Change | None:
        """Return what changed, or None where both sides say the same."""
        change = Change(
            path=sides.path,
            kind=Kind.CREATED if base is None else Kind.MODIFIED,
            node=node,
            size=upper.st_size,
            modified_ns=upper.st_mtime_ns,
            later=later.reason(sides.path),
            base=Identity.of(base) if base is not None else None,
        )
        if node is Node.SYMLINK:
            return self._link(sides, change, base)
        return self._file(sides, change, upper, base)

    def base_digest(self, folder: int | None, name: str, status: os.stat_result) -> str | None:
        """Return the digest of a base file; None where it cannot be read or is being written."""
        if folder is None or not stat.S_ISREG(status.st_mode):
            return None
        if not self.budget.take(status.st_size):
            return None
        try:
            with content.regular(kernel.open_beneath(folder, name, kernel.FILE)) as fd:
                return content.digest(fd, status.st_size)
        except (OSError, content.Moved):
            return None

    def _link(self, sides: Sides, change: Change, base: os.stat_result | None) -> Change | None:
        target = os.readlink(sides.name, dir_fd=sides.upper)
        if base is not None and stat.S_ISLNK(base.st_mode) and _target(sides) == target:
            return None
        out = content.link_leads_out(self.workspace, sides.path, target)
        return replace(change, target=target, later=change.later or (_OUT if out else None))

    def _file(
        self, sides: Sides, change: Change, upper: os.stat_result, base: os.stat_result | None
    ) -> Change | None:
        before = base.st_mode if base is not None and stat.S_ISREG(base.st_mode) else 0
        mode = content.file_mode(upper.st_mode, before)
        runs = mode & 0o111 and not (change.later or sides.path.startswith(".git/"))
        change = replace(change, mode=mode, later=_EXECUTABLE if runs else change.later)
        if not self.budget.take(upper.st_size):
            return replace(change, refused=_TOO_LARGE)
        with content.regular(content.open_upper(sides.upper, sides.name, kernel.FILE)) as fd:
            change = replace(change, after=content.digest(fd, upper.st_size))
        if base is None or not before:
            return change
        change = replace(change, before=self.base_digest(sides.base, sides.name, base))
        if change.before != change.after:
            return change
        if stat.S_IMODE(before) in (stat.S_IMODE(upper.st_mode), mode):
            return None  # only copied up, or its times set
        return replace(change, kind=Kind.MODE)


def _target(sides: Sides) -> str | None:
    try:
        return os.readlink(sides.name, dir_fd=sides.base)
    except OSError:
        return None
