"""openat2(2): how a path of a Call is opened, and what its resolution may not do.

https://man7.org/linux/man-pages/man2/openat2.2.html, Linux 5.6.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from typing import Final

# One number on every architecture whose table began after the syscall numbers were unified.
_SYS_OPENAT2: Final = 437
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_NO_SYMLINKS: Final = 0x04
_RESOLVE_BENEATH: Final = 0x08
# LIMIT: openat2 answers EAGAIN when a rename raced with a `..` inside a symlink.
_MAX_RACES: Final = 16
_AT_FDCWD: Final = -100
_FLAGS: Final = os.O_PATH | os.O_CLOEXEC


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


_SIZE: Final = ctypes.sizeof(_OpenHow)


@functools.cache
def _syscall() -> Callable[..., int]:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    # An address instead of a pointer to a structure: ctypes then takes half of the time.
    function.argtypes = (
        *(ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p),
        ctypes.c_size_t,
    )
    return function


@functools.cache
def _how(flags: int, resolve: int) -> tuple[_OpenHow, int]:
    """Return one way to open, and its address; the kernel only reads it, and it stays for good."""
    how = _OpenHow(_FLAGS | flags, 0, resolve)
    return how, ctypes.addressof(how)


def _open(folder_fd: int, path: str, flags: int, resolve: int) -> int:
    address = _how(flags, resolve)[1]
    syscall, name, code = _syscall(), path.encode(), 0
    for _ in range(_MAX_RACES):
        # SAFETY: what lies at the address is kept for good and its true size is passed; the path
        # is a NUL-terminated copy without inner NULs (split_path refuses them).
        fd = syscall(_SYS_OPENAT2, folder_fd, name, address, _SIZE)
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        if code not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(code, os.strerror(code))


def open_beneath(folder_fd: int, path: str, flags: int = 0) -> int:
    """Open an O_PATH descriptor of what lies inside a folder; nothing leads out of it."""
    return _open(folder_fd, path, flags, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)


def open_from(folder_fd: int, path: str, flags: int = 0) -> int:
    """Open an O_PATH descriptor; links may lead anywhere, but not through /proc/*/fd."""
    return _open(folder_fd, path, flags, _RESOLVE_NO_MAGICLINKS)


def open_plain(path: str, flags: int = os.O_DIRECTORY) -> int:
    """Open an O_PATH descriptor of what is at this absolute path, in which nothing is a link."""
    # Not O_NOFOLLOW as well: the kernel would then say ENOTDIR of a link, not ELOOP.
    resolve = _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
    return _open(_AT_FDCWD, path, flags, resolve)
