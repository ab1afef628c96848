"""Canonical paths: a path argument is judged as the real path of the object it opens.

This file meets hostile strings and the kernel. The object is opened with openat2(2), which
refuses magic links, and for paths of the workspace everything that leads out of it; its name
is then read back from the descriptor. The descriptor is what our own tools use afterwards,
so nothing is judged on one object and executed on another. Nothing is cached.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from safeconduct.errors import Denied

# https://man7.org/linux/man-pages/man2/openat2.2.html, Linux 5.6; one number on every
# architecture whose table began after the syscall numbers were unified.
_SYS_OPENAT2: Final = 437
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_BENEATH: Final = 0x08
# LIMIT: openat2 answers EAGAIN when a rename raced with a `..` inside a symlink.
_MAX_RACES: Final = 16
MAX_PATH_BYTES: Final = 4096
_EXPANDED = re.compile(r"^~|^[A-Za-z][A-Za-z0-9+.-]+:|\\|\$|`|%[0-9A-Fa-f]{2}|^[ ]|[ ]$")
_OPEN: Final = os.O_PATH | os.O_CLOEXEC

_CODES: Final = {
    errno.ENOENT: ("path.not_found", "there is nothing at this path"),
    errno.ENOTDIR: ("path.not_folder", "the path goes through a file"),
    errno.ELOOP: ("path.link", "the path goes through a link that may not be followed"),
    errno.EXDEV: ("path.escape", "the path leads out of the workspace"),
    errno.EACCES: ("path.refused", "the kernel refuses this path"),
    errno.EPERM: ("path.refused", "the kernel refuses this path"),
    errno.ENAMETOOLONG: ("path.too_long", "the path is too long"),
    errno.EAGAIN: ("path.race", "the path kept changing while it was resolved"),
    errno.ENOSYS: ("path.unsupported", "this kernel has no openat2, so no path can be judged"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What a path argument leads to.

    ``fd`` is an O_PATH descriptor of the object, or None where it does not exist; then
    ``parent_fd`` is its folder and ``name`` what to create there. INVARIANT for who creates
    it: O_CREAT | O_EXCL | O_NOFOLLOW relative to ``parent_fd``, since the name may be taken
    after it was judged.
    """

    path: str
    fd: int | None = None
    parent_fd: int | None = None
    name: str | None = None


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


@functools.cache
def _syscall() -> Callable[..., int]:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    function.argtypes = (
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.POINTER(_OpenHow),
        ctypes.c_size_t,
    )
    return function


def _openat2(folder_fd: int, path: str, *, flags: int, resolve: int) -> int:
    """Open with resolution rules; raise OSError. The caller owns the descriptor."""
    how = _OpenHow(flags, 0, resolve)
    code = 0
    for _ in range(_MAX_RACES):
        # SAFETY: `how` outlives the call and its true size is passed; the path is a
        # NUL-terminated copy without inner NULs (split_path refuses them).
        fd = _syscall()(
            _SYS_OPENAT2, folder_fd, path.encode(), ctypes.byref(how), ctypes.sizeof(how)
        )
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        if code not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(code, os.strerror(code))


def show(text: str) -> str:
    """Quote hostile text for a message: ASCII only, at most 80 characters of it."""
    return ascii(text[:80]) + ("…" if len(text) > 80 else "")


def split_path(text: str) -> list[str]:
    """Split a path into components after the refusals that need no kernel."""
    if not text:
        raise Denied("the path is empty", code="path.empty")
    if "\0" in text:
        raise Denied("the path holds a NUL", code="path.nul")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise Denied("the path is not valid Unicode", code="path.encoding") from error
    if size > MAX_PATH_BYTES:
        raise Denied(f"the path is longer than {MAX_PATH_BYTES} bytes", code="path.too_long")
    # Legal in a name, but its only known use is to forge lines in logs and prompts.
    if any(character < " " or "\x7f" <= character < "\xa0" for character in text):
        raise Denied("the path holds a control character", code="path.control")
    components = [component for component in text.split("/") if component not in ("", ".")]
    if ".." in components:
        hint = "write the path without .."
        raise Denied("the path holds ..", code="path.dotdot", hint=hint)
    return components


@dataclass(frozen=True, slots=True)
class _Start:
    """Where a resolution begins: the workspace, which it may not leave, or the root."""

    fd: int
    resolve: int
    components: list[str]

    def open(self, count: int, flags: int = 0) -> int:
        """Open the first ``count`` components."""
        path = "/".join(self.components[:count]) or "."
        return _openat2(self.fd, path, flags=_OPEN | flags, resolve=self.resolve)


class PathResolver:
    """Resolve the path arguments of one Call; a context manager that owns its root."""

    def __init__(self, workspace: str) -> None:
        self._workspace = workspace
        self._inside = workspace.strip("/").split("/")
        self._fds: list[int] = []
        try:
            self._home = self._keep(os.open(workspace, _OPEN | os.O_DIRECTORY | os.O_NOFOLLOW))
            if real_path(self._home) != workspace:
                message = "the workspace is no longer where the policy found it"
                raise Denied(message, code="path.workspace")
        except OSError as error:
            self.close()
            raise _denied(error, workspace) from error
        except Denied:
            self.close()
            raise

    def __enter__(self) -> PathResolver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the roots. What was resolved stays open: its owner is the Canonical."""
        while self._fds:
            os.close(self._fds.pop())

    def existing(self, text: str) -> Resolved:
        """Resolve a path to an object that exists."""
        start = self._start(split_path(text), text)
        try:
            fd = start.open(len(start.components))
        except OSError as error:
            raise _denied(error, text) from error
        return Resolved(path=_real_or_close(fd), fd=fd)

    def new(self, text: str) -> Resolved:
        """Resolve a path to an object, or to a free name in a folder that exists."""
        try:
            return self.existing(text)
        except Denied as denied:
            if denied.code != "path.not_found":
                raise
        start = self._start(split_path(text), text)
        try:
            parent = start.open(len(start.components) - 1, os.O_DIRECTORY)
        except OSError as error:
            raise _denied(error, text) from error
        name = start.components[-1]
        folder = _real_or_close(parent)
        try:
            _refuse_taken(parent, name, text)
        except Denied:
            os.close(parent)
            raise
        return Resolved(path=_join(folder, name), parent_fd=parent, name=name)

    def of_tool(self, text: str) -> str:
        """Return the real path of what a tool will open itself.

        It need not exist yet: then its nearest existing folder is resolved and the rest are
        plain names. Spellings that a tool may expand on its own (`~`, `file://`, `%2e`,
        `\\`, `$`) are refused, because it would open something else than was judged.
        """
        components = split_path(text)
        if _EXPANDED.search(text):
            message = f"a tool may read this path in another way: {show(text)}"
            raise Denied(message, code="path.ambiguous", hint="write a plain path")
        start = self._start(components, text)
        count = self._longest_existing(start, text)
        try:
            fd = start.open(count)
        except OSError as error:
            raise _denied(error, text) from error
        try:
            path = real_path(fd)
            missing = start.components[count:]
            if missing:
                _refuse_taken(fd, missing[0], text)
            if any(len(name.encode()) > 255 for name in missing):
                raise Denied("a name in the path is too long", code="path.too_long")
        finally:
            os.close(fd)
        return functools.reduce(_join, missing, path)

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _start(self, components: list[str], text: str) -> _Start:
        inside = len(self._inside)
        if not text.startswith("/"):
            return self._beneath(components)
        if components[:inside] == self._inside:
            return self._beneath(components[inside:])
        root = self._keep(os.open("/", _OPEN | os.O_DIRECTORY))
        return _Start(root, _RESOLVE_NO_MAGICLINKS, components)

    def _beneath(self, components: list[str]) -> _Start:
        return _Start(self._home, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS, components)

    def _longest_existing(self, start: _Start, text: str) -> int:
        # Bisection: 4,096 bytes hold 2,048 components, and each try walks all of them.
        low, high = 0, len(start.components)
        while low < high:
            middle = (low + high + 1) // 2
            try:
                os.close(start.open(middle))
                low = middle
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise _denied(error, text) from error
                high = middle - 1
        return low


def real_path(fd: int) -> str:
    """Read the name of an open object back from the kernel; Denied where it has none."""
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
        path.encode("utf-8")
        status = os.fstat(fd)
        if not path.startswith("/") or status.st_nlink == 0:
            raise Denied("the object has no name any more", code="path.deleted")
        if path.endswith(" (deleted)") and not os.path.samestat(os.lstat(path), status):
            raise Denied("the object has no name any more", code="path.deleted")
    except UnicodeEncodeError as error:
        raise Denied("the real path is not UTF-8", code="path.encoding") from error
    except OSError as error:
        raise Denied("the object has no name any more", code="path.deleted") from error
    if any(character < " " or "\x7f" <= character < "\xa0" for character in path):
        raise Denied("the real path holds a control character", code="path.control")
    if path == "/proc" or path.startswith("/proc/"):
        # We would read our own environment and memory, not the agent's.
        raise Denied("processes are not files", code="path.proc")
    return path


def check_holds(fd: int, *, folder: bool) -> None:
    """Refuse what is not a regular file (or not a folder): FIFOs, devices, sockets."""
    mode = os.fstat(fd).st_mode
    if folder and not stat.S_ISDIR(mode):
        raise Denied("the path is not a folder", code="path.not_folder")
    if not folder and not stat.S_ISREG(mode):
        raise Denied("the path is not a regular file", code="path.not_file")


def _real_or_close(fd: int) -> str:
    try:
        return real_path(fd)
    except Denied:
        os.close(fd)
        raise


def _refuse_taken(folder_fd: int, name: str, text: str) -> None:
    """Make sure a name that did not resolve is free, and not a link to nowhere."""
    try:
        fd = _openat2(folder_fd, name, flags=_OPEN | os.O_NOFOLLOW, resolve=_RESOLVE_BENEATH)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return
        raise _denied(error, text) from error
    os.close(fd)
    raise Denied("the path ends in a link to nothing", code="path.link")


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _denied(error: OSError, text: str) -> Denied:
    code, message = _CODES.get(error.errno or 0, ("path.refused", "the kernel refuses this path"))
    return Denied(f"{message}: {show(text)}", code=code)
