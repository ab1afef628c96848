"""Step "sandbox": private folders on the host, and the removal of what hostile programs left."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

from safeconduct.errors import SandboxFailed

_HANDLE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Scratches:
    """Makes private folders and removes them. Safe to use from several threads."""

    def __init__(self) -> None:
        self._left: list[str] = []
        self._lock = threading.Lock()

    def make(self, uid: int, gid: int) -> str:
        """Make a folder for one call, owned by ``uid`` where we may give it away."""
        with self._lock:
            left, self._left = self._left, []
        for path in left:
            with suppress(SandboxFailed):
                self.remove(path)
        path = os.path.realpath(tempfile.mkdtemp(prefix="safeconduct-"))
        try:
            if os.geteuid() == 0:
                os.chown(path, uid, gid)
        except OSError:
            os.rmdir(path)
            raise
        return path

    def remove(self, path: str) -> None:
        """Remove a folder; one that resists (no descriptors left) is tried again later."""
        try:
            remove_tree(path)
        except OSError as error:
            with self._lock:
                self._left.append(path)
            raise SandboxFailed(
                f"{path} could not be removed: {error.strerror}.",
                step="scratch",
                errno=error.errno or 0,
            ) from error


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
def _opened(path: str, *, at: int | None = None) -> Generator[int]:
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
