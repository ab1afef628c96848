"""Step "sandbox": private folders on the host, and the removal of what hostile programs left."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

from safeconduct.errors import SandboxFailed

_PREFIX = "safeconduct-scratch-"
_BASE_MODE = 0o711  # entered, never listed
_HANDLE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Scratches:
    """The folder that private folders are made in, and the removal of those whose call is over.

    The launcher makes them, so that each belongs to its sandbox's own user. Safe to use from
    several threads.
    """

    def __init__(self) -> None:
        self._base: str | None = None
        self._held: int | None = None
        self._left: list[str] = []
        self._lock = threading.Lock()

    @property
    def base(self) -> str:
        """The folder on the host; made when first asked for. Raises OSError."""
        with self._lock:
            if self._base is None:
                _remove_abandoned(tempfile.gettempdir())
                self._base, self._held = _make_base()
            # Landlock does not cover chmod(2): a program could close the way to the next folders.
            elif self._held is not None and os.fstat(self._held).st_mode & 0o7777 != _BASE_MODE:
                os.fchmod(self._held, _BASE_MODE)
            return self._base

    def path(self, name: str | None) -> str:
        """Return what a program calls its private folder."""
        return "/tmp" if name is None else f"{self.base}/{name}"  # noqa: S108 - a private tmpfs

    def remove(self, name: str | None) -> None:
        """Remove a folder; one that resists (no descriptors left) is tried again later."""
        if name is None:
            return
        with self._lock:
            left, self._left = [name, *self._left], []
        failed: OSError | None = None
        for one in left:
            try:
                remove_tree(self.path(one))
            except OSError as error:
                failed = error
                with self._lock:
                    self._left.append(one)
        if failed is not None:
            raise SandboxFailed(
                f"{failed.filename} could not be removed: {failed.strerror}.",
                step="scratch",
                errno=failed.errno or 0,
            ) from failed

    def close(self) -> None:
        """Remove the folder with all that is left in it."""
        with self._lock:
            base, self._base = self._base, None
            held, self._held = self._held, None
        if base is not None:
            with suppress(OSError):
                remove_tree(base)
        if held is not None:
            os.close(held)


def _make_base() -> tuple[str, int]:
    """Make the folder, and hold a lock on it for as long as this process lives."""
    while True:
        base = os.path.realpath(tempfile.mkdtemp(prefix=_PREFIX))
        # Sandboxes of root have other users, and have to get to their own folder.
        os.chmod(base, _BASE_MODE)
        held = os.open(base, _FOLDER)
        fcntl.flock(held, fcntl.LOCK_SH)
        if os.path.isdir(base):
            return base, held
        os.close(held)  # before it was held it looked abandoned to another supervisor


def _remove_abandoned(place: str) -> None:
    """Remove what supervisors of this user left that were killed: nobody holds it any more."""
    with os.scandir(place) as entries:
        found = [entry for entry in entries if entry.name.startswith(_PREFIX)]
    for entry in found:
        with suppress(OSError):
            if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            held = os.open(entry.path, _FOLDER)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(entry.path)
            finally:
                os.close(held)


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
        os.rmdir(path)
    except FileNotFoundError:
        return


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
