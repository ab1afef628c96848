"""Step "sandbox": the plan of a commit, and the journal that lets it survive a crash.

A journal is a folder of ours outside the workspace, one for each workspace. A commit writes there,
each line on disk before the next act: the plan; that everything new is ready under names of our
own (`staged`); that everything stands under its name (`applied`). Until `applied` a crash restores
the workspace, afterwards it completes. ``undo`` says that restoring has begun.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, cast

from safeconduct.errors import SandboxFailed

from .changes import Change, Changes, Kind, Node
from .seen import Identity

_FILE, _LOCK = "commit.jsonl", "lock"
_APPEND: Final = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class Act(StrEnum):
    """What one step does to one name."""

    CREATE = "create"
    REPLACE = "replace"
    DELETE = "delete"
    CHMOD = "chmod"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One act on one name of the workspace, done by one rename or chmod: before it or after it,
    never between. ``aside`` is the name of our own in the same folder.
    """

    act: Act
    path: str
    aside: str
    mode: int = 0
    base: Identity | None = None

    @property
    def aside_path(self) -> str:
        """The path of ``aside``, relative to the workspace."""
        above, slash, _ = self.path.rpartition("/")
        return above + slash + self.aside


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All steps of a commit; they do not depend on one another. ``parts`` are, for each step, the
    changes at and below its path.
    """

    steps: tuple[Step, ...]
    parts: tuple[tuple[Change, ...], ...]


def plan(changes: Changes) -> Plan:
    """Make a plan of all that is not refused. A new tree is one step, and so is a deleted one."""
    mark = f".safeconduct-{secrets.token_hex(16)}"
    steps: list[Step] = []
    parts: list[tuple[Change, ...]] = []
    entries = changes.entries
    at = 0
    while at < len(entries):
        change = entries[at]
        end = at + 1
        act = _act(change)
        while act is not Act.CHMOD and end < len(entries) and _below(entries[end], change):
            end += 1
        if not change.refused:
            aside = f"{mark}-{len(steps)}"
            steps.append(
                Step(act=act, path=change.path, aside=aside, mode=change.mode, base=change.base)
            )
            parts.append(entries[at:end])
        at = end
    return Plan(steps=tuple(steps), parts=tuple(parts))


def _act(change: Change) -> Act:
    if change.kind is Kind.CREATED:
        return Act.CREATE
    if change.kind is Kind.DELETED:
        return Act.DELETE
    # A file is replaced also for its mode: its inode may have another name outside.
    is_folder_mode = change.kind is Kind.MODE and change.node is Node.FOLDER
    return Act.CHMOD if is_folder_mode else Act.REPLACE


def _below(change: Change, top: Change) -> bool:
    return change.path.startswith(top.path + "/")


@dataclass(slots=True)
class Journal:
    """The journal of one commit. INVARIANT: a line is on disk before ``write`` returns."""

    folder: Path
    steps: tuple[Step, ...] = ()
    staged: tuple[Identity | None, ...] = ()
    marks: set[str] = field(default_factory=set[str])

    @classmethod
    def begin(cls, folder: Path, workspace: int, steps: Sequence[Step]) -> Journal:
        """Write the plan to a new journal."""
        journal = cls(folder, tuple(steps))
        status = os.fstat(workspace)
        header = {
            "kind": "plan",
            "version": 1,
            "device": status.st_dev,
            "inode": status.st_ino,
            "steps": [asdict(step) for step in steps],
        }
        # Made under another name first: a journal is either whole or not there.
        draft = folder / f"{_FILE}.new"
        draft.unlink(missing_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write_line(fd, header)
        finally:
            os.close(fd)
        os.rename(draft, folder / _FILE)
        _sync_folder(folder)
        return journal

    def write(self, mark: str, staged: Iterable[Identity | None] = ()) -> None:
        """Add a line."""
        self.marks.add(mark)
        line: dict[str, object] = {"kind": mark}
        if mark == "staged":
            self.staged = tuple(staged)
            line["identities"] = [one and asdict(one) for one in self.staged]
        fd = os.open(self.folder / _FILE, _APPEND)
        try:
            _write_line(fd, line)
        finally:
            os.close(fd)

    def end(self) -> None:
        """Remove the journal: the commit is over, one way or the other."""
        (self.folder / _FILE).unlink()
        _sync_folder(self.folder)

    @classmethod
    def read(cls, folder: Path, workspace: int) -> Journal | None:
        """Read what a crash left, or None. SandboxFailed where it is not for this workspace."""
        try:
            lines = (folder / _FILE).read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        records = [record for line in lines if (record := _parse(line)) is not None]
        status = os.fstat(workspace)
        if (records[0]["device"], records[0]["inode"]) != (status.st_dev, status.st_ino):
            raise SandboxFailed(
                f"The journal in {folder} belongs to another workspace.",
                step="recover",
                code="workspace.journal",
                hint=f"Put that one back where it was; if it is gone, remove {folder / _FILE}.",
            )
        journal = cls(folder, tuple(_step(one) for one in _list(records[0]["steps"])))
        for record in records[1:]:
            journal.marks.add(str(record["kind"]))
            if record["kind"] == "staged":
                journal.staged = tuple(_identity(one) for one in _list(record["identities"]))
        return journal


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold a journal's folder alone; SandboxFailed (`workspace.busy`) where somebody else does."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SandboxFailed(
                "Another commit of this workspace is under way.",
                step="commit",
                code="workspace.busy",
            ) from error
        yield
    finally:
        os.close(fd)


def _write_line(fd: int, record: Mapping[str, object]) -> None:
    # ASCII, so lone surrogates (names that are not UTF-8) come back as they were.
    # The first newline ends a line that a full disk may have cut.
    view = memoryview(b"\n" + json.dumps(record, ensure_ascii=True).encode() + b"\n")
    while view:
        view = view[os.write(fd, view) :]
    os.fsync(fd)


def _parse(line: bytes) -> Mapping[str, object] | None:
    """Read a line; None for one that a crash cut: what it says had not begun yet."""
    try:
        return cast("Mapping[str, object]", json.loads(line))
    except ValueError:
        return None


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _list(value: object) -> list[object]:
    return cast("list[object]", value)


def _identity(value: object) -> Identity | None:
    return None if value is None else Identity(**cast("dict[str, int]", value))


def _step(value: object) -> Step:
    fields = cast("dict[str, object]", value)
    return Step(
        act=Act(str(fields["act"])),
        path=str(fields["path"]),
        aside=str(fields["aside"]),
        mode=cast("int", fields["mode"]),
        base=_identity(fields["base"]),
    )
