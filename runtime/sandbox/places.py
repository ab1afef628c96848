"""Step "sandbox": hold, look for and set aside names in a workspace that a tool may be changing.

Every step down from the workspace's descriptor follows no link: a running tool could swap a folder
for one, and the supervisor, which may be root, would act outside. A folder on the way that was
closed to us is opened, and where that fails the call is refused: only what is certainly not there
counts as absent (folders.py says why).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress

from safeconduct.errors import SandboxFailed

from . import folders

# Marks the folders we made, so that whoever is last knows which to remove, xattr(7).
_MARK = "user.safeconduct.placeholder"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def look(path: str) -> os.stat_result | None:
    """Return what is at an absolute path, a link itself; None where certainly nothing is.

    Raises SandboxFailed where this cannot be told.
    """
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SandboxFailed(
            f"What is at {path[:200]} cannot be looked at: {error.strerror}.",
            step="shield",
            errno=error.errno or 0,
            hint="Give your user the right to enter the folders above it, chmod(1).",
        ) from error


def hold(workspace: int, name: str) -> bool:
    """Make an empty folder at ``name``, owned as the workspace is; False where one exists."""
    with _parent(workspace, name) as (parent, last):
        if parent is None:
            return False
        try:
            os.mkdir(last, 0o755, dir_fd=parent)
            made = os.open(last, _FOLDER, dir_fd=parent)
        except FileExistsError:
            return False
        except OSError as error:
            raise SandboxFailed(
                f"{name} cannot be protected: {error.strerror}.", step="shield"
            ) from error
        try:
            if os.geteuid() == 0:
                owner = os.fstat(workspace)
                os.fchown(made, owner.st_uid, owner.st_gid)
            with suppress(OSError):
                os.setxattr(made, _MARK, b"1")
        finally:
            os.close(made)
        return True


def is_held(workspace: int, name: str) -> bool:
    """Tell whether the folder at ``name`` was made only to hold its place."""
    with _parent(workspace, name) as (parent, last):
        if parent is None:
            return False
        handle = _below(parent, last, name)
        if handle is None:
            return False
        try:
            folder = folders.list_again(handle)
        except OSError as error:
            if folders.is_ours(os.fstat(handle)):
                raise _unseen(name, error) from error
            return False  # made by us it would belong to us, or to the one who owns the workspace
        finally:
            os.close(handle)
        try:
            return os.getxattr(folder, _MARK) == b"1"
        except OSError:
            return False
        finally:
            os.close(folder)


def release(workspace: int, name: str, *, made: bool = False) -> None:
    """Remove the folder at ``name`` if it is empty, and ours: ``made`` by us or marked so."""
    with suppress(SandboxFailed):  # what cannot be looked at stays
        if made or is_held(workspace, name):
            with _parent(workspace, name) as (parent, last), suppress(OSError):
                os.rmdir(last, dir_fd=parent)


def set_aside(workspace: int, name: str) -> bool:
    """Rename whatever is at ``name``, in its folder; False where there is nothing.

    Raises SandboxFailed where it cannot be moved.
    """
    with _parent(workspace, name) as (parent, last):
        if parent is None:
            return False
        try:
            folders.look_at(parent, last)
            _rename(parent, last, f"{last}.refused-{os.urandom(4).hex()}")
        except FileNotFoundError:
            return False
        except OSError as error:
            raise SandboxFailed(
                f"{name} appeared during the call and cannot be set aside: {error.strerror}.",
                step="shield",
                code="sandbox.protected_made",
            ) from error
        return True


def _rename(parent: int, name: str, to: str) -> None:
    try:
        os.rename(name, to, src_dir_fd=parent, dst_dir_fd=parent)
    except PermissionError:
        # The tool may have made the folder read-only to keep what it put there.
        if not folders.admit(parent, folders.CHANGE):
            raise
        os.rename(name, to, src_dir_fd=parent, dst_dir_fd=parent)


@contextmanager
def _parent(workspace: int, name: str) -> Generator[tuple[int | None, str]]:
    """Open the folder that holds ``name``; None where it is missing, or a file is in its place.

    Raises SandboxFailed where it cannot be told what is there, or where a link leads.
    """
    *above, last = name.rstrip("/").split("/")
    current = os.dup(workspace)
    try:
        for folder in above:
            below = _below(current, folder, name)
            if below is None:
                yield None, last
                return
            os.close(current)
            current = below
        yield current, last
    finally:
        os.close(current)


def _below(current: int, folder: str, name: str) -> int | None:
    try:
        try:
            return folders.step_down(current, folder)
        except NotADirectoryError:
            # So the kernel also says of a link: O_PATH opens it, O_DIRECTORY then refuses it.
            if stat.S_ISLNK(folders.look_at(current, folder).st_mode):
                raise
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unseen(name, error) from error


def _unseen(name: str, error: OSError) -> SandboxFailed:
    return SandboxFailed(
        f"{name} cannot be looked at, so it may have been made: {error.strerror}.",
        step="shield",
        code="sandbox.protected_made",
        errno=error.errno or 0,
        hint="Look at what is there, and at the permissions of the folders above it.",
    )
