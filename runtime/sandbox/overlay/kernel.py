"""Step "sandbox": the system calls of the overlay code that Python's ``os`` does not offer.

Everything here works relative to a descriptor and goes through no symbolic link, leaves the folder
by no ``..`` and crosses onto no other mount: a hostile program may have made every name below it.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import select
import struct
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

# Numbers from the unified table, the same on every architecture that began after it.
_SYS_OPENAT2: Final = 437
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x01, 0x02, 0x04, 0x08
_RESOLVE: Final = _NO_XDEV | _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH
_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2
# LIMIT: openat2 answers EAGAIN while something is being renamed.
_RACES_MAX: Final = 16
_HANDLE_BYTES: Final = 128
_TFD_TIMER_ABSTIME, _TFD_TIMER_CANCEL_ON_SET = 1, 2
_CLOCK_REALTIME: Final = 0
_IN_DELETE_SELF: Final = 0x400

FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: what was a file a moment ago may be a FIFO by now, and must not stop us.
FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
HANDLE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def open_beneath(folder: int, path: str, flags: int) -> int:
    """Open what lies below ``folder``, openat2(2). Raises OSError: ELOOP for a link on the way,
    EXDEV for a mount or ``..``. The caller owns the descriptor.
    """
    return _openat2(folder, path, flags, _RESOLVE)


def leads_out(folder: int, path: str) -> bool:
    """Tell whether a path below ``folder``, links followed, ends outside of it."""
    try:
        os.close(_openat2(folder, path, os.O_PATH, _NO_MAGICLINKS | _BENEATH))
    except OSError as error:
        return error.errno == errno.EXDEV
    return False


def _openat2(folder: int, path: str, flags: int, resolve: int) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    code = 0
    for _ in range(_RACES_MAX):
        # SAFETY: `how` outlives the call and its true size is passed; the path is NUL-terminated.
        fd = _libc().syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(folder),
            ctypes.c_char_p(os.fsencode(path or ".")),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return int(fd)
        code = ctypes.get_errno()
        if code not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(code, os.strerror(code), path)


@contextmanager
def parent_of(folder: int, path: str) -> Generator[tuple[int, str]]:
    """Open the folder that holds ``path``, and give the last name with it."""
    above, _, name = path.rpartition("/")
    fd = open_beneath(folder, above, FOLDER)
    try:
        yield fd, name
    finally:
        os.close(fd)


def rename_new(folder: int, old: str, new: str) -> None:
    """Rename inside one folder; FileExistsError where the new name is taken, renameat2(2)."""
    _rename(folder, old, new, _RENAME_NOREPLACE)


def exchange(folder: int, one: str, other: str) -> None:
    """Swap two names of one folder at once, whatever they are, renameat2(2)."""
    _rename(folder, one, other, _RENAME_EXCHANGE)


def _rename(folder: int, old: str, new: str, flags: int) -> None:
    # SAFETY: both names are NUL-terminated copies; descriptors and flags are plain integers.
    done = _libc().renameat2(
        ctypes.c_int(folder),
        ctypes.c_char_p(os.fsencode(old)),
        ctypes.c_int(folder),
        ctypes.c_char_p(os.fsencode(new)),
        ctypes.c_uint(flags),
    )
    if done != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), old, None, new)


def sync_file_system(fd: int) -> None:
    """Write everything of the file system that ``fd`` lies on to disk, syncfs(2)."""
    # SAFETY: one integer argument.
    if _libc().syncfs(ctypes.c_int(fd)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def file_handle(folder: int, name: str) -> bytes | None:
    """Return type and bytes of a file's handle: its inode and generation, name_to_handle_at(2).

    None where the file system has none.
    """
    buffer = ctypes.create_string_buffer(struct.pack("Ii", _HANDLE_BYTES, 0), 8 + _HANDLE_BYTES)
    mount = ctypes.c_int()
    # SAFETY: the buffer holds the header and as many bytes as the header announces; without
    # AT_SYMLINK_FOLLOW the last component is not followed.
    done = _libc().name_to_handle_at(
        ctypes.c_int(folder),
        ctypes.c_char_p(os.fsencode(name)),
        buffer,
        ctypes.byref(mount),
        ctypes.c_int(0),
    )
    if done != 0:
        return None
    size, kind = struct.unpack("Ii", buffer.raw[:8])
    return bytes([kind & 0xFF]) + buffer.raw[8 : 8 + size]


class ClockWatch:
    """Notices that the wall clock was set back since it was made."""

    def __init__(self) -> None:
        self._ahead_ns = _ahead_ns()
        # SAFETY: integers only; the result is looked at.
        self._fd = _libc().timerfd_create(_CLOCK_REALTIME, os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        # No interval, and a first expiry that never comes: only the cancelling matters.
        forever = struct.pack("qqqq", 0, 0, (1 << 62) // 1_000_000_000, 0)
        flags = _TFD_TIMER_ABSTIME | _TFD_TIMER_CANCEL_ON_SET
        # SAFETY: `forever` is a whole struct itimerspec and outlives the call.
        if _libc().timerfd_settime(self._fd, flags, forever, None) != 0:
            os.close(self._fd)
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def set_back(self) -> bool:
        """Tell whether the clock jumped and now shows less than it would have without.

        Slewing (NTP) is no jump. A suspend jumps too, but forwards. A jump back that another one
        made up for is not seen.
        """
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise
        # The read has used up the notice: whoever asks again must remember this answer.
        return _ahead_ns() < self._ahead_ns

    def close(self) -> None:
        """Close the timer. May be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class UnmountWatch:
    """Tells when a file system is gone: no mount of it, no open file, so nobody who could write."""

    def __init__(self, folder: int) -> None:
        """Watch what ``folder`` lies on; it may be closed afterwards. Raises OSError."""
        # SAFETY: integers only; the result is looked at.
        self._fd = _libc().inotify_init1(ctypes.c_int(os.O_CLOEXEC | os.O_NONBLOCK))
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        path = os.fsencode(f"/proc/self/fd/{folder}")
        # The root of a mount is never deleted; IN_UNMOUNT comes unasked for, inotify(7).
        # SAFETY: the path is NUL-terminated; the result is looked at.
        found = _libc().inotify_add_watch(
            ctypes.c_int(self._fd), ctypes.c_char_p(path), ctypes.c_uint32(_IN_DELETE_SELF)
        )
        if found < 0:
            code = ctypes.get_errno()
            self.close()
            raise OSError(code, "inotify_add_watch")

    def wait(self, seconds: float) -> bool:
        """Wait until it is gone; False where it still is not."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        """Watch no more. May be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _ahead_ns() -> int:
    """Return by how much the wall clock is ahead of the time since boot, suspends included."""
    return time.clock_gettime_ns(time.CLOCK_REALTIME) - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
