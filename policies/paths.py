"""Canonical paths: a path argument is judged as the real path of the object it opens.

This file meets hostile strings and the kernel. The object is opened with openat2(2), which
refuses magic links, and for paths of the workspace everything that leads out of it; its name
is then read back from the descriptor. The descriptor is what our own tools use afterwards,
so nothing is judged on one object and executed on another. Nothing is cached.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
from dataclasses import dataclass
from typing import Final

from safeconduct.errors import Denied

from .openat2 import open_beneath, open_from, open_plain

MAX_PATH_BYTES: Final = 4096
# A home, a URL, an escape, an expansion, an option, a pipe (perl's and ruby's open), a space.
_EXPANDED = re.compile(r"^[~|-]|^[A-Za-z][A-Za-z0-9+.-]+:|\\|\$|`|%[0-9A-Fa-f]{2}|^[ ]|[ |]$")
_OPEN: Final = os.O_PATH | os.O_CLOEXEC
# Legal in a name, but its only known use is to forge lines in logs and prompts.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

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


def show(text: str) -> str:
    """Quote hostile text for a message: ASCII only, at most 80 characters of it."""
    return ascii(text[:80]) + ("…" if len(text) > 80 else "")


def split_path(text: str) -> list[str]:
    """Split a path into components after the refusals that need no kernel."""
    if not text:
        raise Denied("the path is empty", code="path.empty")
    # Nearly all are printable ASCII, which one look tells.
    if len(text) > MAX_PATH_BYTES or not (text.isascii() and text.isprintable()):
        _refuse_text(text)
    components = [component for component in text.split("/") if component not in ("", ".")]
    if ".." in components:
        hint = "write the path without .."
        raise Denied("the path holds ..", code="path.dotdot", hint=hint)
    return components


def plain_path(text: str) -> str:
    """Return the one spelling of a path as far as its text tells; Denied as `of_tool` raises it.

    A relative one has another spelling, whatever its folder is.
    """
    components = _of_plain(text)
    path = "/" + "/".join(components)
    if text.startswith("/"):
        _refuse_process(path)
    return path


def _of_plain(text: str) -> list[str]:
    components = split_path(text)
    if _EXPANDED.search(text):
        message = f"a tool may read this path in another way: {show(text)}"
        raise Denied(message, code="path.ambiguous", hint="write a plain path")
    return components


def _refuse_process(path: str) -> None:
    if path == "/proc" or path.startswith("/proc/"):
        # We would read our own environment and memory, not the agent's.
        raise Denied("processes are not files", code="path.proc")


def _names_folder(text: str) -> bool:
    """Tell whether only a folder can be at a path: the kernel says ENOTDIR of `file/`."""
    return text.endswith(("/", "/."))


def _refuse_text(text: str) -> None:
    if "\0" in text:
        raise Denied("the path holds a NUL", code="path.nul")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise Denied("the path is not valid Unicode", code="path.encoding") from error
    if size > MAX_PATH_BYTES:
        raise Denied(f"the path is longer than {MAX_PATH_BYTES} bytes", code="path.too_long")
    if _CONTROL.search(text):
        raise Denied("the path holds a control character", code="path.control")


@dataclass(frozen=True, slots=True)
class _Start:
    """Where a resolution begins: the workspace, which it may not leave, or the root.

    ``inside`` is the workspace, or None where the resolution may leave it.
    """

    fd: int
    inside: str | None
    components: list[str]

    def open(self, count: int, flags: int = 0) -> int:
        """Open the first ``count`` components."""
        path = "/".join(self.components[:count]) or "."
        return (open_from if self.inside is None else open_beneath)(self.fd, path, flags)

    def name(self, fd: int) -> str:
        """Read back the name of what was opened; it lies in the workspace if it began there."""
        return real_path(fd) if self.inside is None else _name_inside(fd, self.inside)

    def name_or_close(self, fd: int) -> str:
        """Do the same for a descriptor that is of no use without its name."""
        try:
            return self.name(fd)
        except Denied:
            os.close(fd)
            raise


class PathResolver:
    """Resolve the path arguments of one Call; a context manager that owns its root."""

    def __init__(self, workspace: str) -> None:
        self._workspace = workspace
        self._inside = workspace.strip("/").split("/")
        self._fds: list[int] = []
        self._home: int | None = None

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
        components = split_path(text)
        flags = os.O_DIRECTORY if _names_folder(text) else 0
        found = self._without_links(components, text, flags)
        if found is not None:
            return found
        start = self._start(components, text)
        try:
            fd = start.open(len(start.components), flags)
        except OSError as error:
            raise _denied(error, text) from error
        return Resolved(path=start.name_or_close(fd), fd=fd)

    def _without_links(self, components: list[str], text: str, flags: int) -> Resolved | None:
        """Open an object of the workspace in one step, which works where nothing is a link.

        Without links and without `..` nothing leads out. None for whatever does not open so:
        the long way says what it is.
        """
        inside = self._within(components, text)
        if not inside:
            return None
        try:
            fd = open_plain(f"{self._workspace}/{'/'.join(inside)}", flags)
        except OSError:
            return None
        try:
            return Resolved(path=_name_inside(fd, self._workspace), fd=fd)
        except Denied:
            os.close(fd)
            raise

    def new(self, text: str) -> Resolved:
        """Resolve a path to an object, or to a free name in a folder that exists."""
        try:
            return self.existing(text)
        except Denied as denied:
            if denied.code != "path.not_found" or _names_folder(text):
                raise
        start = self._start(split_path(text), text)
        try:
            parent = start.open(len(start.components) - 1, os.O_DIRECTORY)
        except OSError as error:
            raise _denied(error, text) from error
        name = start.components[-1]
        folder = start.name_or_close(parent)
        try:
            _refuse_taken(parent, name, text)
        except Denied:
            os.close(parent)
            raise
        return Resolved(path=_join(folder, name), parent_fd=parent, name=name)

    def of_tool(self, text: str) -> str:
        """Return the real path of what a tool will open itself.

        It need not exist yet: then its nearest existing folder is resolved and the rest are
        plain names. Spellings that a tool may read on its own (`~`, `file://`, `%2e`,
        `\\`, `$`, a leading `-` or `|`, and `*` or `?` in a name that nothing has) are refused,
        because it would open something else than was judged.
        """
        start = self._start(_of_plain(text), text)
        count = self._longest_existing(start, text)
        try:
            fd = start.open(count)
        except OSError as error:
            raise _denied(error, text) from error
        try:
            path = start.name(fd)
            missing = start.components[count:]
            if missing:
                _refuse_taken(fd, missing[0], text)
                _refuse_pattern(missing, text)
            if any(len(name.encode()) > 255 for name in missing):
                raise Denied("a name in the path is too long", code="path.too_long")
        finally:
            os.close(fd)
        return functools.reduce(_join, missing, path)

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _within(self, components: list[str], text: str) -> list[str] | None:
        """Return the components below the workspace; None for a path of another place."""
        if not text.startswith("/"):
            return components
        above = len(self._inside)
        return components[above:] if components[:above] == self._inside else None

    def _start(self, components: list[str], text: str) -> _Start:
        inside = self._within(components, text)
        if inside is not None:
            return _Start(self._open_home(), self._workspace, inside)
        # Nothing is judged where the workspace is not what the policy means by it.
        self._open_home()
        root = self._keep(os.open("/", _OPEN | os.O_DIRECTORY))
        return _Start(root, None, components)

    def _open_home(self) -> int:
        """Open the workspace, once for a Call."""
        if self._home is None:
            try:
                # Nothing on the way is a link, so this is the folder that the policy found.
                self._home = self._keep(open_plain(self._workspace))
            except OSError as error:
                moved = error.errno == errno.ELOOP
                raise (_moved() if moved else _denied(error, self._workspace)) from error
        return self._home

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
        plain = path.isascii() and path.isprintable()
        if not plain:
            path.encode("utf-8")
        if not path.startswith("/"):
            raise Denied("the object has no name any more", code="path.deleted")
        # The kernel says so of every name that is gone, but a name may also end like this.
        if path.endswith(" (deleted)"):
            status = os.fstat(fd)
            if status.st_nlink == 0 or not os.path.samestat(os.lstat(path), status):
                raise Denied("the object has no name any more", code="path.deleted")
    except UnicodeEncodeError as error:
        raise Denied("the real path is not UTF-8", code="path.encoding") from error
    except OSError as error:
        raise Denied("the object has no name any more", code="path.deleted") from error
    if not plain and _CONTROL.search(path):
        raise Denied("the real path holds a control character", code="path.control")
    _refuse_process(path)
    return path


def check_holds(fd: int, *, folder: bool) -> None:
    """Refuse what is not a regular file (or not a folder): FIFOs, devices, sockets."""
    mode = os.fstat(fd).st_mode
    if folder and not stat.S_ISDIR(mode):
        raise Denied("the path is not a folder", code="path.not_folder")
    if not folder and not stat.S_ISREG(mode):
        raise Denied("the path is not a regular file", code="path.not_file")


def _name_inside(fd: int, workspace: str) -> str:
    path = real_path(fd)
    # The workspace may have been renamed, or lie on a file system that takes several spellings
    # for one name: then no rule of the policy means what it says.
    if not f"{path}/".startswith(f"{workspace}/"):
        raise _moved()
    return path


def _moved() -> Denied:
    message = "the workspace is no longer where the policy found it"
    return Denied(message, code="path.workspace")


def _refuse_taken(folder_fd: int, name: str, text: str) -> None:
    """Make sure a name that did not resolve is free, and not a link to nowhere."""
    try:
        fd = open_beneath(folder_fd, name, os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return
        raise _denied(error, text) from error
    os.close(fd)
    raise Denied("the path ends in a link to nothing", code="path.link")


def _refuse_pattern(missing: list[str], text: str) -> None:
    """Refuse what names nothing as it is, and other things to a tool that expands it (glob(7))."""
    if any("*" in name or "?" in name for name in missing):
        message = f"a tool may take this path for a pattern: {show(text)}"
        raise Denied(message, code="path.ambiguous", hint="name one file")


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _denied(error: OSError, text: str) -> Denied:
    code, message = _CODES.get(error.errno or 0, ("path.refused", "the kernel refuses this path"))
    return Denied(f"{message}: {show(text)}", code=code)
