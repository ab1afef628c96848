"""Step "sandbox": hold, look for and set aside names in a workspace that a tool may be changing.

Every step down from the workspace's descriptor follows no link: a running tool could swap a folder
for one, and the supervisor, which may be root, would act outside.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress

from safeconduct.errors import SandboxFailed

# Marks the folders we made, so that whoever is last knows which to remove, xattr(7).
_MARK = "user.safeconduct.placeholder"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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
        try:
            folder = os.open(last, _FOLDER, dir_fd=parent)
        except OSError:
            return False
        try:
            return os.getxattr(folder, _MARK) == b"1"
        except OSError:
            return False
        finally:
            os.close(folder)


def release(workspace: int, name: str, *, made: bool = False) -> None:
    """Remove the folder at ``name`` if it is empty, and ours: ``made`` by us or marked so."""
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
        aside = f"{last}.refused-{os.urandom(4).hex()}"
        try:
            # The tool may have made the folder read-only to keep what it put there.
            mode = os.fstat(parent).st_mode & 0o7777
            if mode & 0o300 != 0o300 and _exists(parent, last):
                os.fchmod(parent, mode | 0o300)
            os.rename(last, aside, src_dir_fd=parent, dst_dir_fd=parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise SandboxFailed(
                f"{name} appeared during the call and cannot be set aside: {error.strerror}.",
                step="shield",
                code="sandbox.protected_made",
            ) from error
        return True


def _exists(parent: int, name: str) -> bool:
    try:
        os.lstat(name, dir_fd=parent)
    except FileNotFoundError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _parent(workspace: int, name: str) -> Generator[tuple[int | None, str]]:
    """Open the folder that holds ``name``; None where it is missing or leads through a link."""
    *folders, last = name.rstrip("/").split("/")
    current = os.dup(workspace)
    try:
        for folder in folders:
            try:
                below = os.open(folder, _FOLDER, dir_fd=current)
            except OSError:
                yield None, last
                return
            os.close(current)
            current = below
        yield current, last
    finally:
        os.close(current)
