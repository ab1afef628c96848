"""Step "sandbox": on what terms the changes of overlays are compared and kept, one call's or a
session's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from safeconduct.call import KeptChanges
from safeconduct.errors import SandboxFailed, SandboxUnavailable

from . import kernel, later, shelf
from .changes import Bounds, Change, Changes, Kind, Node
from .names import Protects
from .seen import Marks, Snapshot
from .walk import diff

# LIMIT: paths that an Outcome names.
_FLAGGED_MAX: Final = 20


@dataclass(slots=True)
class Root:
    """One overlaid folder: its path, the base under it, when it began and what took its changes.

    ``tree`` is the mount that holds the layer of a session while no call runs.
    """

    path: str
    base: int
    snapshot: Snapshot | None = None
    upper: int = -1
    tree: int = -1

    @classmethod
    def open(cls, path: str) -> Root:
        """Open the base. Raises SandboxUnavailable for what is no folder."""
        try:
            return cls(path, os.open(path, kernel.FOLDER))
        except NotADirectoryError as error:
            raise SandboxUnavailable(
                f"{path} is no folder, so it cannot be written through an overlay.",
                missing="overlay:file",
                hint="Grant the folder it lies in, or use workspace: direct.",
            ) from error
        except OSError as error:
            raise SandboxFailed(
                f"{path} cannot be opened: {error.strerror}.",
                step="overlay",
                errno=error.errno or 0,
            ) from error

    def begin(self) -> None:
        """Remember now as the moment the overlay begins."""
        if self.snapshot is not None:
            self.snapshot.close()
        self.snapshot = Snapshot.take(self.base)

    def is_there(self) -> bool:
        """Tell whether the base is still what its path names."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self.base))
        except OSError:
            return False

    def renew(self, tree: int) -> None:
        """Take over the mount that the next sandbox will attach."""
        if self.tree >= 0:
            os.close(self.tree)
        self.tree = tree

    def close(self) -> None:
        """Let go of it. May be called again."""
        for fd in (self.base, self.upper, self.tree):
            if fd >= 0:
                os.close(fd)
        self.base = self.upper = self.tree = -1
        if self.snapshot is not None:
            self.snapshot.close()
            self.snapshot = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Where sets are kept and what is never copied out of an overlay."""

    folder: Path
    workspace: str
    protects: Protects
    marks: Marks
    # INVARIANT: whoever holds it takes the sandbox that was asked for after the snapshot.
    alone: threading.Lock = field(default_factory=threading.Lock)

    def compare(
        self, roots: Iterable[Root], *, shielded: Collection[str], disk_bytes: int
    ) -> dict[str, list[shelf.Part]]:
        """Return what the overlays changed, by workspace. No process of a tool may live.

        Raises LimitExceeded, SandboxFailed or Moved.
        """
        parts: dict[str, list[shelf.Part]] = {}
        for root in roots:
            workspace, below = self._place(root.path)
            changes = self._diff(root, below, shielded, disk_bytes)
            part = shelf.Part(changes=changes, upper=root.upper, below=below, base=root.base)
            parts.setdefault(workspace, []).append(part)
        return {
            workspace: found
            for workspace, found in parts.items()
            if any(part.changes for part in found)
        }

    def shelve(self, parts: Mapping[str, Sequence[shelf.Part]]) -> tuple[KeptChanges, ...]:
        """Keep what was compared, one set for each workspace: all of them or none."""
        kept: list[KeptChanges] = []
        try:
            for workspace, found in parts.items():
                kept.append(self._shelve(workspace, found))
        except BaseException as error:
            for one in kept:
                with suppress(OSError):
                    shelf.drop(self.folder, one.id)
            if isinstance(error, OSError):
                raise SandboxFailed(
                    f"The changes could not be kept: {error.strerror}.",
                    step="changes",
                    errno=error.errno or 0,
                    code="workspace.not_kept",
                    hint="Make room in the state folder and run it again; "
                    "the workspace is as it was.",
                ) from error
            raise
        return tuple(kept)

    def _place(self, path: str) -> tuple[str, str]:
        """Say to which workspace an overlaid folder belongs, and where in it it lies."""
        if path == self.workspace:
            return path, ""
        inside = self.workspace.rstrip("/") + "/"
        if path.startswith(inside):
            return self.workspace, path.removeprefix(inside) + "/"
        return path, ""

    def _diff(self, root: Root, below: str, shielded: Collection[str], disk_bytes: int) -> Changes:
        if root.snapshot is None or root.upper < 0:
            raise SandboxFailed(f"{root.path} has no overlay.", step="overlay")
        changes = diff(
            root.upper,
            root.base,
            root.snapshot,
            marks=self.marks,
            protected=lambda path: (
                self.protects(below + path) or _is_at_or_below(f"{root.path}/{path}", shielded)
            ),
            bounds=Bounds(read_bytes=min(Bounds().read_bytes, 4 * disk_bytes + (256 << 20))),
        )
        return Changes(entries=tuple(_moved(changes, below))) if below else changes

    def _shelve(self, workspace: str, parts: Sequence[shelf.Part]) -> KeptChanges:
        name, digest = shelf.shelve(self.folder, parts, workspace=workspace)
        changes = [change for part in parts for change in part.changes]
        return replace(_summary(name, workspace, changes), digest=digest)


def _is_at_or_below(path: str, shielded: Collection[str]) -> bool:
    while shielded and path:
        if path in shielded:
            return True
        path = path.rpartition("/")[0]
    return False


def _moved(changes: Changes, below: str) -> Iterator[Change]:
    """Name each change from the workspace on: what lies above may tell what it is obeyed by."""
    for change in changes:
        path = below + change.path
        named = None if change.node is Node.FOLDER else later.reason(path)
        yield replace(change, path=path, later=change.later or named)


def _summary(name: str, workspace: str, changes: Sequence[Change]) -> KeptChanges:
    """Count what a set holds."""
    kinds = [change.kind for change in changes]
    flagged = [change.path for change in changes if change.later and not change.refused]
    return KeptChanges(
        id=name,
        workspace=workspace,
        created=kinds.count(Kind.CREATED),
        modified=kinds.count(Kind.MODIFIED) + kinds.count(Kind.MODE),
        deleted=kinds.count(Kind.DELETED),
        refused=sum(1 for change in changes if change.refused),
        conflicts=sum(1 for change in changes if change.conflict),
        later=len(flagged),
        flagged=tuple(flagged[:_FLAGGED_MAX]),
    )
