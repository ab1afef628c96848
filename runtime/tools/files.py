"""Step "execute": the ``fs.*`` tools, run by us on the very descriptors that were judged.

Enforcement is ``object``: no path is opened a second time. The supervisor reads and writes
hostile files here but never interprets what is in them.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager

from safeconduct.call import Json, Outcome, Usage, WorkspaceMode
from safeconduct.errors import LimitExceeded, SandboxUnavailable, ToolFailed

from .task import Object, Task

_READ_BYTES = 1 << 20
# LIMIT: names looked at for one listing, shown or not; if there are more, the Outcome says so.
_ENTRIES_MAX = 10_000


def read(task: Task) -> Outcome:
    """Read a regular file: ``stdout`` holds its bytes, ``value`` its text if it is UTF-8."""
    _refuse_session(task)
    started = time.monotonic()
    limit = task.profile.limits.output_bytes
    data = read_bytes(task.objects["path"], limit + 1)
    kept = data[:limit]
    try:
        text: Json = kept.decode()
    except UnicodeDecodeError:
        text = None
    cut = len(data) > limit
    return Outcome(call=task.call, value=text, stdout=kept, truncated=cut, usage=_usage(started))


def read_bytes(item: Object, limit: int) -> bytes:
    """Return at most ``limit`` bytes of the judged file, for tools that work on them."""
    with _reopen(item, os.O_RDONLY) as fd:
        return _read_up_to(fd, limit)


def list_folder(task: Task) -> Outcome:
    """List a folder: ``value`` is a sorted list of names, folders with a trailing slash.

    Names that are not printable are left out: no rule could be written for them and no path
    argument may hold them. ``truncated`` says that names were left out, for this or for the limit;
    what the profile hides does not count, it is not there.
    """
    _refuse_session(task)
    started = time.monotonic()
    item = task.objects["path"]
    if item.fd is None:
        raise ToolFailed(f"There is no {item.path}.", code="tool.not_found")
    try:
        # /proc/self/fd follows to the object that was judged, whatever its name is by now.
        with os.scandir(f"/proc/self/fd/{item.fd}") as entries:
            looked = [entry for _, entry in zip(range(_ENTRIES_MAX), entries, strict=False)]
            cut = next(entries, None) is not None
            visible = [one for one in looked if not task.hides(os.path.join(item.path, one.name))]
            printable = [entry for entry in visible if entry.name.isprintable()]
            names = [_listed(entry) for entry in printable]
    except OSError as error:
        raise _failed(item, error) from error
    cut = cut or len(printable) < len(visible)
    return Outcome(call=task.call, value=sorted(names), truncated=cut, usage=_usage(started))


def _listed(entry: os.DirEntry[str]) -> str:
    return entry.name + ("/" if entry.is_dir(follow_symlinks=False) else "")


def write(task: Task) -> Outcome:
    """Replace the content of a file, or create it; ``value`` is the number of bytes written."""
    if task.profile.workspace.overlaid:
        # We write on the very object that was judged, and that one lies in the workspace itself.
        raise SandboxUnavailable(
            f"fs.write has no overlay, and {task.profile.name} asks for one.",
            missing="overlay:fs.write",
            hint="Name a profile with workspace: direct in the rule, or write with shell.run.",
        )
    started = time.monotonic()
    content = str(task.document.arguments["content"]).encode()
    if len(content) > task.profile.limits.disk_bytes:
        raise LimitExceeded(f"{len(content)} bytes are more than may be written.", limit="disk")
    item = task.objects["path"]
    with _reopen(item, os.O_WRONLY) if item.fd is not None else _create(item) as fd:
        try:
            os.truncate(fd, 0)
            _write_all(fd, content)
        except OSError as error:
            raise _failed(item, error) from error
    return Outcome(call=task.call, value=len(content), usage=_usage(started))


def _refuse_session(task: Task) -> None:
    """Refuse to show the workspace where the profile promises what the session made of it."""
    if task.profile.workspace is WorkspaceMode.SESSION:
        tool = task.document.tool
        raise SandboxUnavailable(
            f"{tool} does not see the session's overlay, and {task.profile.name} asks for it.",
            missing=f"overlay:{tool}",
            hint="Name a profile with workspace: direct in the rule, or read with shell.run.",
        )


@contextmanager
def _reopen(item: Object, flags: int) -> Generator[int]:
    """Open the judged object itself, if it is a regular file with one name."""
    if item.fd is None:
        raise ToolFailed(f"There is no {item.path}.", code="tool.not_found")
    status = os.fstat(item.fd)
    if not stat.S_ISREG(status.st_mode):
        raise ToolFailed(f"{item.path} is not a regular file.", code="tool.not_a_file")
    if flags == os.O_WRONLY and status.st_nlink > 1:
        raise ToolFailed(
            f"{item.path} has other names too, which were not judged.", code="tool.hard_link"
        )
    try:
        fd = os.open(f"/proc/self/fd/{item.fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _failed(item, error) from error
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _create(item: Object) -> Generator[int]:
    """Create the judged name in the judged folder; it must still be free."""
    if item.parent_fd is None or item.name is None:
        raise ToolFailed(f"{item.path} cannot be created.", code="tool.not_found")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(item.name, flags, 0o644, dir_fd=item.parent_fd)
    except OSError as error:
        raise _failed(item, error) from error
    try:
        if os.geteuid() == 0:
            # Started by root, a file belongs to whom its folder belongs.
            owner = os.fstat(item.parent_fd)
            os.fchown(fd, owner.st_uid, owner.st_gid)
        yield fd
    finally:
        os.close(fd)


def _read_up_to(fd: int, limit: int) -> bytes:
    parts: list[bytes] = []
    while limit > 0 and (part := os.read(fd, min(limit, _READ_BYTES))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _usage(started: float) -> Usage:
    return Usage(wall_ms=int((time.monotonic() - started) * 1000))


def _failed(item: Object, error: OSError) -> ToolFailed:
    return ToolFailed(f"{item.path}: {error.strerror}.", code="tool.io", errno=error.errno or 0)
