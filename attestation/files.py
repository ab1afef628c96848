"""Step "record": single files, by the descriptor of the folder that holds them.

No link is followed, and nothing blocks on a FIFO or a device.
"""

from __future__ import annotations

import ctypes
import os
import stat
from errno import ELOOP, ENOENT, ENOTDIR, ENXIO
from functools import cache

from safeconduct.errors import TraceInvalid

CHANGE = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SYNC_FILE_RANGE_WRITE = 2
_EVERYTHING = ctypes.c_int64(0)
_CHUNK = 1 << 20
_PIECE = 1 << 16


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def create(name: str, mode: int, parent: int) -> int:
    """Create a file that nobody else knows; what a crash, or somebody else, left there goes."""
    try:
        return os.open(name, _CREATE, mode, dir_fd=parent)
    except FileExistsError:
        os.unlink(name, dir_fd=parent)
        return os.open(name, _CREATE, mode, dir_fd=parent)


def unreadable(path: str, error: OSError) -> TraceInvalid:
    """Return the error for what cannot be opened or read: absent, no plain file, or out of order.

    Its code is ``trace.missing``, ``trace.hostile`` or ``trace.io``.
    """
    if error.errno == ENOENT:
        return TraceInvalid(f"{path} is missing", code="trace.missing")
    if error.errno in (ELOOP, ENOTDIR, ENXIO):
        return TraceInvalid(f"{path} is a link or no regular file", code="trace.hostile")
    return TraceInvalid(f"{path}: {error.strerror}", code="trace.io")


def read_some(fd: int, path: str, most: int = _CHUNK) -> bytes:
    """Read what one read(2) gives, nothing at the end. Raise TraceInvalid as ``unreadable``."""
    try:
        return os.read(fd, most)
    except OSError as error:  # a disk that fails, a network share that went away
        raise unreadable(path, error) from error


def read_limited(fd: int, path: str, limit: int) -> bytes:
    """Read to the end. Raise TraceInvalid ``trace.hostile`` for more than ``limit`` bytes."""
    size = os.fstat(fd).st_size
    left, parts = limit + 1 if size <= limit else 0, list[bytes]()
    # In one piece where that works: joining pieces takes the memory twice.
    while left and (part := read_some(fd, path, min(left, max(size + 1, _PIECE)))):
        parts.append(part)
        left -= len(part)
    if not left:
        raise TraceInvalid(f"{path} is larger than {limit} bytes", code="trace.hostile")
    return b"".join(parts)


def write_whole(fd: int, data: bytes) -> None:
    """Write all bytes or raise OSError: a disk that fills up mid-way counts as full."""
    done = os.write(fd, data)
    while done < len(data):
        done += os.write(fd, data[done:])


def require_only_name(path: str, fd: int) -> None:
    """Refuse to change what may be another file of ours: through a hard link, or no file at all."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise TraceInvalid(f"{path} is a link or no regular file", code="trace.hostile")


def sync_file_system(fd: int) -> None:
    """Make everything on a file system durable, and hear of any write that failed: syncfs(2)."""
    if _libc().syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def allocate(fd: int, at: int, size_bytes: int) -> bool:
    """Have the file system set zeros aside in a file: fallocate(2). Tell whether it did.

    What was set aside is overwritten in place, so that fdatasync(2) need not wait for a new length
    to be on disk as well.
    """
    return bool(_libc().fallocate(fd, 0, ctypes.c_int64(at), ctypes.c_int64(size_bytes)) == 0)


def begin_sync(fd: int) -> None:
    """Have the disk take what was written while we do something else, sync_file_range(2).

    Nothing is durable before fdatasync(2), which also raises whatever fails: then it takes less.
    """
    _libc().sync_file_range(fd, _EVERYTHING, _EVERYTHING, _SYNC_FILE_RANGE_WRITE)


def shred(parent: int, name: str, *, linked: bool = True) -> bool:
    """Overwrite a file below a descriptor with zeros and remove it; durable, and repeatable.

    Without ``linked`` a file with further names (hard links) only loses this one: where somebody
    else may have made the folder, it may be any file of ours.

    Overwriting is best effort: a file system that copies on write, or a flash disk, may keep what
    was there before. What is no plain file is only removed.
    """
    try:
        fd = os.open(name, CHANGE, dir_fd=parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in (ELOOP, ENXIO):
            raise
    else:
        try:
            if linked or os.fstat(fd).st_nlink == 1:
                _overwrite(fd)
        finally:
            os.close(fd)
    os.unlink(name, dir_fd=parent)
    os.fsync(parent)
    return True


def _overwrite(fd: int) -> None:
    status = os.fstat(fd)
    left = status.st_size if stat.S_ISREG(status.st_mode) else 0
    while left > 0:
        left -= os.write(fd, bytes(min(left, _CHUNK)))
    os.fsync(fd)
