"""Step "sandbox": end a commit that broke off: restore the workspace, or complete what was applied.

Every act here may be done again: it looks at what stands where and does only what is missing.
Nothing is removed that is not known to be ours or to be what the plan displaced.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from safeconduct.errors import SandboxFailed

from . import kernel
from .journal import Act, Journal, Step, locked
from .seen import Identity

_NOTHING: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV)


class Recovered(StrEnum):
    """What recovering did."""

    NOTHING = "nothing"
    RESTORED = "restored"
    COMPLETED = "completed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """How a broken commit ended. ``kept`` are paths where somebody else's work was in the way:
    there both versions stay, ours under a name that begins with `.safeconduct-`.
    """

    done: Recovered = Recovered.NOTHING
    kept: tuple[str, ...] = ()


def recover(journal: Path, workspace: int) -> Recovery:
    """End a commit that a crash broke off, if there is one. Call it before the workspace is used.

    ``journal`` and ``workspace`` are what ``commit`` was given. Raises SandboxFailed where the
    journal belongs to another workspace or another commit is under way; may be called again.
    """
    if not (journal / "commit.jsonl").exists():
        return Recovery()
    with locked(journal):
        return recover_locked(journal, workspace)


def recover_locked(journal: Path, workspace: int) -> Recovery:
    """Do what ``recover`` does; the caller holds the journal."""
    log = Journal.read(journal, workspace)
    if log is None:
        return Recovery()
    if "applied" in log.marks and "undo" not in log.marks:
        return Recovery(done=Recovered.COMPLETED, kept=finish(log, workspace))
    return Recovery(done=Recovered.RESTORED, kept=restore(log, workspace))


def restore(log: Journal, workspace: int) -> tuple[str, ...]:
    """Undo a commit, wherever it stopped. Returns paths where somebody else's work was in the way;
    there both versions are kept.
    """
    try:
        log.write("undo")
    except OSError:
        # A full disk. The mark matters only where `applied` may have got there before.
        if "applied" in log.marks:
            raise
    kept: list[str] = []
    failed: OSError | None = None
    for at in reversed(range(len(log.steps))):
        try:
            if not _restore_step(log, at, workspace):
                kept.append(log.steps[at].path)
        except OSError as error:
            failed = error  # the others are still restored, and the journal stays
    if failed is not None:
        raise SandboxFailed(
            f"The workspace could not be restored wholly: {failed.strerror}.",
            step="recover",
            errno=failed.errno or 0,
            code="workspace.recover",
        ) from failed
    log.end()
    return tuple(kept)


def _restore_step(log: Journal, at: int, workspace: int) -> bool:
    step = log.steps[at]
    with _parent(workspace, step.path) as found:
        if found is None:
            return True
        folder, name = found
        staged = log.staged[at] if log.staged else None
        undone = not log.staged or _undo(folder, name, step, staged)
        return _clear(folder, step, staged, ours=not log.staged) and undone


def finish(
    log: Journal, workspace: int, reached: Callable[[str], None] = lambda point: None
) -> tuple[str, ...]:
    """Remove what the steps displaced. Returns paths where it was kept, being no longer that."""
    kept: list[str] = []
    for at, step in enumerate(log.steps):
        try:
            with _parent(workspace, step.path) as found:
                cleared = found is None or _clear(found[0], step, step.base, ours=False)
        except OSError:
            cleared = False  # the commit itself is done; what cannot be removed is told
        if not cleared:
            kept.append(step.path)
        reached(f"finish:{at}")
    log.end()
    return tuple(kept)


def look(folder: int, path: str) -> os.stat_result | None:
    """Return what stands at a path; None where nothing does, or a link or mount is on the way."""
    try:
        # With O_PATH | O_NOFOLLOW a link in last place is opened itself, openat2(2).
        fd = kernel.open_beneath(folder, path, kernel.HANDLE)
    except OSError as error:
        if error.errno in _NOTHING:
            return None
        raise
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def chmod_entry(folder: int, name: str, identity: Identity, mode: int) -> None:
    """Set the mode of a folder, if it still is that inode."""
    fd = kernel.open_beneath(folder, name, kernel.HANDLE)
    try:
        if os.fstat(fd).st_ino == identity.inode:
            os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(mode))
    finally:
        os.close(fd)


def remove_tree(folder: int, name: str) -> None:
    """Remove what stands at a name, whatever it is; goes onto no other mount."""
    status = look(folder, name)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=folder)
        return
    # Depth is bounded: deeper trees are never planned (changes.Bounds).
    stack = [_Emptied(folder, name, *_empty(_open_folder(folder, name)))]
    try:
        while stack:
            top = stack[-1]
            child = next(top.folders, None)
            if child is not None:
                stack.append(_Emptied(top.fd, child, *_empty(_open_folder(top.fd, child))))
                continue
            os.close(stack.pop().fd)
            os.rmdir(top.name, dir_fd=top.above)
    finally:
        for left in stack:
            os.close(left.fd)


@dataclass(frozen=True, slots=True)
class _Emptied:
    """A folder on the way down that holds nothing but folders any more."""

    above: int
    name: str
    fd: int
    folders: Iterator[str]


def _empty(fd: int) -> tuple[int, Iterator[str]]:
    """Remove what is no folder; return the names of the folders that are left."""
    with os.scandir(fd) as entries:
        names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in names:
        if not is_folder:
            os.unlink(name, dir_fd=fd)
    return fd, iter([name for name, is_folder in names if is_folder])


def _open_folder(above: int, name: str) -> int:
    with suppress(PermissionError):
        fd = kernel.open_beneath(above, name, kernel.FOLDER)
        if os.fstat(fd).st_mode & 0o300 == 0o300:
            return fd
        os.close(fd)
    handle = kernel.open_beneath(above, name, kernel.HANDLE | os.O_DIRECTORY)
    try:
        os.chmod(f"/proc/self/fd/{handle}", 0o700)
    finally:
        os.close(handle)
    return kernel.open_beneath(above, name, kernel.FOLDER)


def _undo(folder: int, name: str, step: Step, staged: Identity | None) -> bool:
    """Put back what one step displaced; False where somebody has changed the outcome since."""
    here, aside = look(folder, name), look(folder, step.aside)
    if step.act is Act.CHMOD and step.base is not None:
        done = here is not None and here.st_ino == step.base.inode
        if done and here is not None and stat.S_IMODE(here.st_mode) == step.mode:
            chmod_entry(folder, name, step.base, step.base.mode)
        return True
    if step.act is Act.DELETE:
        # Whatever stands aside came from the name, also if it was not what the plan expected.
        if here is None and aside is not None:
            kernel.rename_new(folder, step.aside, name)
        return True
    if staged is None or here is None or here.st_ino != staged.inode:
        return True  # not done, or no longer there
    if not staged.moved(here):
        return False
    if step.act is Act.CREATE and aside is None:
        kernel.rename_new(folder, name, step.aside)
    elif step.act is Act.REPLACE and aside is not None:
        kernel.exchange(folder, step.aside, name)
    return True


def _clear(folder: int, step: Step, expected: Identity | None, *, ours: bool) -> bool:
    """Remove what stands aside if it is what is expected there; False where it is kept.

    ``ours`` says that nothing was renamed yet, so whatever has the name is our own.
    """
    status = look(folder, step.aside)
    if status is None:
        return True
    if not ours and not _same(status, expected):
        return False
    remove_tree(folder, step.aside)
    return True


def _same(status: os.stat_result | None, identity: Identity | None) -> bool:
    """Compare by inode alone: a removal that broke off has emptied the folder already."""
    return (
        status is not None
        and identity is not None
        and (status.st_dev, status.st_ino) == (identity.device, identity.inode)
    )


@contextmanager
def _parent(workspace: int, path: str) -> Generator[tuple[int, str] | None]:
    above, _, name = path.rpartition("/")
    try:
        fd = kernel.open_beneath(workspace, above, kernel.FOLDER)
    except OSError as error:
        if error.errno not in _NOTHING:
            raise
        yield None
        return
    try:
        yield fd, name
    finally:
        os.close(fd)
