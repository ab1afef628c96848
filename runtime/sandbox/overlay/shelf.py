"""Step "sandbox": changes kept after their session, for a person to look at and decide about.

An overlay ends with the processes that hold its mount. What it changed is copied to a folder of
ours, absent in every sandbox: ``changes.json`` and, below ``tree``, the new content of each file.
Such a folder stands for the upper folder in ``unified`` and ``commit``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from safeconduct.errors import SandboxFailed

from . import content, kernel
from .changes import Change, Changes, Conflict, Kind, Node
from .recovery import remove_tree
from .stage import copy_bytes

_ID: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{6}")
_FILE, _TREE, _SIZE = "changes.json", "tree", "bytes"
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# LIMIT: bytes of one list of changes that is read back; sets and bytes that are kept before the
# next call is refused, so that an agent cannot fill the state folder's disk.
_LIST_BYTES_MAX: Final = 512 << 20
_SETS_MAX: Final = 1_000
_BYTES_MAX: Final = 8 << 30
# Nobody takes so long to make a set.
_DRAFT_SECONDS: Final = 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelved:
    """One set of kept changes: its name, the absolute path of its workspace, and what it holds.

    ``bases`` tell by their path in the workspace which folders the overlays lay over.
    """

    id: str
    workspace: str
    changes: Changes
    bases: Mapping[str, str] = field(default_factory=dict[str, str])

    def refuse_others(self, workspace: int) -> None:
        """Raise Conflict where another folder has taken the place of one of them.

        What was made in it would have nothing to be compared with.
        """
        for below, base in self.bases.items():
            found = ""
            with suppress(OSError):
                folder = kernel.open_beneath(workspace, below.rstrip("/"), kernel.FOLDER)
                try:
                    found = _named(folder)
                finally:
                    os.close(folder)
            if found != base:
                why = "another folder has taken its place"
                raise Conflict([below.rstrip("/") or "."], why=why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one overlay of a set holds: its upper folder, and where it lies in the workspace.

    ``below`` is "" for the workspace itself, else a path that ends with a slash. The paths of
    ``changes`` begin with it. ``base`` is the folder under the overlay, -1 for one that may be
    another by the time of a commit.
    """

    changes: Changes
    upper: int
    below: str = ""
    base: int = -1


def shelve(folder: Path, parts: Sequence[Part], *, workspace: str) -> tuple[str, str]:
    """Keep changes below ``folder``, a private folder of ours; return name and digest of the set.

    Call it after the last process of the tool is gone; afterwards the overlays may be dropped.
    Raises Moved where an upper folder is not what the diff read, and OSError for a full disk;
    then nothing is kept. The digest is the SHA-256 of its list of changes.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"
    draft = folder / f".{name}"
    draft.mkdir(mode=0o700)
    try:
        (draft / _TREE).mkdir(mode=0o700)
        with _opened(draft / _TREE) as tree:
            kept = sum(_keep(tree, change, part) for part in parts for change in part.changes)
        data = {
            "version": 1,
            "workspace": workspace,
            "bases": {part.below: _named(part.base) for part in parts if part.base >= 0},
            "changes": [change.to_json() for part in parts for change in part.changes],
        }
        text = json.dumps(data, ensure_ascii=True)
        if len(text) > _LIST_BYTES_MAX:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))  # it could not be read back
        (draft / _FILE).write_text(text)
        (draft / _SIZE).write_text(str(kept + len(text)))
        # As lasting as what a call writes directly: a power cut may lose it, and a commit compares
        # every digest.
        draft.rename(folder / name)
    except BaseException:
        _remove(folder, draft.name)
        raise
    return name, hashlib.sha256(text.encode()).hexdigest()


def shelved(folder: Path) -> list[str]:
    """Return the names of the kept sets, newest first."""
    try:
        with os.scandir(folder) as entries:
            sets = [
                (one.stat().st_mtime_ns, one.name) for one in entries if _ID.fullmatch(one.name)
            ]
    except FileNotFoundError:
        return []
    return [name for _, name in sorted(sets, reverse=True)]


def refuse_full(folder: Path) -> None:
    """Raise SandboxFailed (`workspace.changes_full`) where no other set may be kept."""
    names = shelved(folder)
    if len(names) >= _SETS_MAX or sum(_size(folder / name) for name in names) > _BYTES_MAX:
        raise SandboxFailed(
            f"{len(names)} sets of changes wait for a decision; no more are kept.",
            step="changes",
            code="workspace.changes_full",
            hint="Look at them with `safeconduct changes ls`; commit them or roll them back.",
        )


def sweep(folder: Path) -> None:
    """Remove what a killed process left half made or half removed, if it is a day old."""
    before = time.time() - _DRAFT_SECONDS
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            draft = entry.name.startswith(".") and _ID.fullmatch(entry.name[1:])
            if draft and entry.stat(follow_symlinks=False).st_mtime < before:
                _remove(folder, entry.name)


def _size(kept: Path) -> int:
    try:
        return int((kept / _SIZE).read_text())
    except (OSError, ValueError):
        return 0  # dropped meanwhile


def load(folder: Path, name: str) -> Shelved:
    """Read one set. SandboxFailed (`workspace.no_changes`) where there is none of this name."""
    try:
        if not _ID.fullmatch(name):
            raise FileNotFoundError(name)
        with (folder / name / _FILE).open("rb") as file:
            data = cast("Mapping[str, object]", json.loads(file.read(_LIST_BYTES_MAX)))
        entries = cast("list[Mapping[str, object]]", data["changes"])
        changes = Changes(entries=tuple(Change.from_json(entry) for entry in entries))
    except FileNotFoundError as error:
        raise SandboxFailed(
            f"There are no kept changes named {name[:80]!a}.",
            step="changes",
            code="workspace.no_changes",
            hint="`safeconduct changes ls` lists those that are kept.",
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise SandboxFailed(
            f"The kept changes {name} cannot be read.", step="changes", code="workspace.changes"
        ) from error
    # Sets of an earlier version say nothing of it.
    bases = cast("Mapping[str, str]", data.get("bases", {}))
    return Shelved(id=name, workspace=str(data["workspace"]), changes=changes, bases=bases)


@contextmanager
def opened(folder: Path, name: str) -> Generator[int]:
    """Open what stands for the upper folder of a set."""
    with _opened(folder / name / _TREE) as fd:
        yield fd


def drop(folder: Path, name: str) -> None:
    """Remove a set: after its commit, or to roll it back."""
    if _ID.fullmatch(name):
        # Renamed first: a set that is half removed is no set.
        with suppress(FileNotFoundError):
            (folder / name).rename(folder / f".{name}")
        _remove(folder, f".{name}")


def _named(folder: int) -> str:
    """Tell an open folder from any other of its file system, also from a later one that was given
    its number; only by that where there is nothing better.
    """
    handle = kernel.file_handle(folder, ".")
    return handle.hex() if handle else str(os.fstat(folder).st_ino)


def _keep(tree: int, change: Change, part: Part) -> int:
    """Copy what a file holds; return how many bytes it has."""
    if change.refused or change.node is not Node.FILE or change.kind is Kind.DELETED:
        return 0
    above, _, name = change.path.rpartition("/")
    inside = change.path.removeprefix(part.below)
    folder = _make_folders(tree, above)
    try:
        with content.regular(kernel.open_beneath(part.upper, inside, kernel.FILE)) as source:
            target = os.open(name, _NEW, 0o600, dir_fd=folder)
            try:
                if copy_bytes(source, target, change.size) != change.after:
                    raise content.Moved(f"{change.path!a} changed")
            finally:
                os.close(target)
    finally:
        os.close(folder)
    return change.size


def _make_folders(tree: int, path: str) -> int:
    try:
        return kernel.open_beneath(tree, path, kernel.FOLDER)
    except FileNotFoundError:
        parts = path.split("/")
    for count in range(1, len(parts) + 1):
        with (
            kernel.parent_of(tree, "/".join(parts[:count])) as (above, name),
            suppress(FileExistsError),
        ):
            os.mkdir(name, 0o700, dir_fd=above)
    return kernel.open_beneath(tree, path, kernel.FOLDER)


def _remove(folder: Path, name: str) -> None:
    with _opened(folder) as fd:
        remove_tree(fd, name)


@contextmanager
def _opened(folder: Path) -> Generator[int]:
    fd = os.open(folder, kernel.FOLDER)
    try:
        yield fd
    finally:
        os.close(fd)
