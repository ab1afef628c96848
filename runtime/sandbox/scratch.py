"""Step "sandbox": remove a private folder that a hostile program has filled."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager

_HANDLE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str) -> None:
    """Remove ``path`` and all below it, following no link, at any depth. It may be gone already.

    Folders are emptied by moving their subfolders up to the top one, so neither the call stack
    nor a path length grows with the depth of the tree. The program is dead: nothing moves.
    """
    # Names that the program could have taken beforehand would stop the moving.
    prefix, number = f".moved-{secrets.token_hex(8)}", 0
    try:
        with _opened(path) as top:
            while names := os.listdir(top):
                for name in names:
                    number = _remove(top, name, prefix, number)
    except FileNotFoundError:
        return
    os.rmdir(path)


def _remove(top: int, name: str, prefix: str, number: int) -> int:
    if not stat.S_ISDIR(os.lstat(name, dir_fd=top).st_mode):
        os.unlink(name, dir_fd=top)
        return number
    with _opened(name, at=top) as folder:
        for child in os.listdir(folder):
            if not stat.S_ISDIR(os.lstat(child, dir_fd=folder).st_mode):
                os.unlink(child, dir_fd=folder)
                continue
            # Moving a folder rewrites its "..", which needs write permission on itself.
            with _opened(child, at=folder):
                number += 1
            os.rename(child, f"{prefix}-{number}", src_dir_fd=folder, dst_dir_fd=top)
    os.rmdir(name, dir_fd=top)
    return number


@contextmanager
def _opened(path: str, *, at: int | None = None) -> Iterator[int]:
    """Open a folder whose permissions the program may have taken away."""
    handle = os.open(path, _HANDLE, dir_fd=at)
    try:
        os.chmod(f"/proc/self/fd/{handle}", 0o700)
        folder = os.open(".", _FOLDER, dir_fd=handle)
    finally:
        os.close(handle)
    try:
        yield folder
    finally:
        os.close(folder)
