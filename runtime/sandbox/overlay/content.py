"""Step "sandbox": what a hostile file holds, read bounded: digests, modes and link targets."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from safeconduct.errors import SandboxFailed

from . import kernel

_CHUNK: Final = 1 << 20


class Moved(SandboxFailed):
    """Something is not what it was a moment ago, though no process of the tool should live."""

    default_code = "workspace.moved"

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} while it was looked at.", step="overlay")


class Budget:
    """LIMIT: bytes that may still be read."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def take(self, size: int) -> bool:
        """Use up ``size`` bytes, if there are as many left."""
        if size > self._left:
            return False
        self._left -= size
        return True


def open_upper(folder: int, name: str, flags: int) -> int:
    """Open an entry of the upper folder, also where the tool took our permission away.

    Without root the tool's files are our own, so we may give it back. Raises OSError.
    """
    try:
        fd = os.open(name, flags, dir_fd=folder)
    except PermissionError:
        handle = os.open(name, kernel.HANDLE, dir_fd=folder)
    else:
        return _entered(fd) if flags & os.O_DIRECTORY else fd
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISLNK(mode):
            raise PermissionError(name)
        # fchmod(2) takes no O_PATH descriptor; the link in /proc leads to the object itself.
        os.chmod(
            f"/proc/self/fd/{handle}", (mode & 0o7777) | (0o700 if stat.S_ISDIR(mode) else 0o400)
        )
        # INVARIANT: a mode copied out has these bits anyway, so what a diff says stays the same.
        return os.open(name, flags, dir_fd=folder)
    finally:
        os.close(handle)


def enter(folder: int) -> None:
    """Give ourselves the right to search an open folder of the upper layer, if the tool took it.

    It is another right than to read it. Raises OSError.
    """
    try:
        os.stat(".", dir_fd=folder)
    except PermissionError:
        os.fchmod(folder, stat.S_IMODE(os.fstat(folder).st_mode) | 0o700)


def _entered(folder: int) -> int:
    try:
        enter(folder)
    except OSError:
        os.close(folder)
        raise
    return folder


@contextmanager
def regular(fd: int) -> Generator[int]:
    """Close ``fd`` in the end; Moved where it is no regular file."""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Moved("A file turned into something else")
        yield fd
    finally:
        os.close(fd)


def digest(fd: int, size: int) -> str:
    """Return the SHA-256 of a regular file of ``size`` bytes, in hex.

    Moved where it is longer or shorter by now: then somebody is writing it.
    """
    seen, found = hashlib.sha256(), 0
    while part := os.read(fd, min(_CHUNK, size + 1 - found)):
        found += len(part)
        seen.update(part)
        if found > size:
            break
    if found != size:
        raise Moved("A file changed")
    return seen.hexdigest()


def file_mode(mode: int, base: int = 0) -> int:
    """Return what a commit makes of a tool's file mode.

    No set-ID and sticky bits; nobody else may write it unless they could before; the owner may
    read it.
    """
    return (mode & 0o775) | (mode & base & 0o002) | 0o400


def folder_mode(mode: int, base: int = 0) -> int:
    """Return what a commit makes of a tool's folder mode; its owner keeps every right."""
    return (mode & 0o775) | (mode & base & 0o002) | 0o700


def link_leads_out(workspace: int, path: str, target: str) -> bool:
    """Tell whether a link at ``path`` may lead out of the workspace.

    What cannot be told without looking at other links (`a/../b`) counts as leading out.
    """
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = next((at for at, part in enumerate(parts) if part != ".."), len(parts))
    if target.startswith("/") or ups > path.count("/") or ".." in parts[ups:]:
        return True
    above = path.split("/")[:-1]
    return kernel.leads_out(workspace, "/".join([*above[: len(above) - ups], *parts[ups:]]))
