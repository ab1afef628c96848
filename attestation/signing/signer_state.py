"""Step "record": what the signer remembers having signed, one small file for each log.

Before a signature leaves, the head it covers is on disk, so that no crash makes the signer sign a
smaller tree or another tree of the same size. A file has two slots of one sector, 4 KiB apart; a
head goes into the slot that does not hold the newest one, in place, so that it costs one
fdatasync(2) and a torn write leaves the other slot. No signature has left for a torn one.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Final

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.files import begin_sync
from safeconduct.attestation.merkle import EMPTY_ROOT
from safeconduct.errors import TraceInvalid

from .key import sync_folder, write_at

# The smallest sector of a disk is written whole or not at all; two slots share no larger one.
_SLOT_BYTES: Final = 512
_SLOTS: Final = (0, 4096)
_FILE_BYTES: Final = _SLOTS[1] + _SLOT_BYTES
_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# LIMIT: logs whose files stay open; a runtime has one.
_OPEN_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered of one log, while its file is open.

    ``remember`` has a head of that log written. It is the last one, after any crash, once what it
    returned was called, which waits for the disk: until then no signature over it may leave.
    """

    last: Checkpoint
    remember: Callable[[Checkpoint], Callable[[], None]]


class SignerState:
    """The folder of heads. Two signers may share it: each looks at it under a lock."""

    def __init__(self, folder: Path) -> None:
        """Make the folder, or refuse one that others can write (``key.permissions``)."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(folder)
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if not ours or status.st_mode & 0o022:
            raise TraceInvalid(
                f"others can write the signer's state in {folder}",
                code="key.permissions",
                hint=f"chmod 700 {folder}",
            )
        self._folder = os.fspath(folder)
        self._open: dict[str, int] = {}
        # Held until the process ends, as is every signer's life: one lock at a time is taken.
        self._lock_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Let one signer at a time look at the state: two runtimes may share a key."""
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def last(self, origin: str) -> Checkpoint:
        """Return the head signed last for this log. Raise ``signer.state`` when it is damaged."""
        with self.opened(origin) as memory:
            return memory.last

    def remember(self, head: Checkpoint) -> None:
        """Put the head on disk; on return it is what ``last`` says, after any crash too."""
        with self.opened(head.origin) as memory:
            memory.remember(head)()

    @contextmanager
    def opened(self, origin: str) -> Generator[Memory]:
        """Look at what is remembered of one log. Raise ``signer.state`` when it is damaged."""
        fd = self._file(origin)
        if fd is None:
            yield Memory(Checkpoint(origin=origin, size=0, root=EMPTY_ROOT), self._begin)
            return
        found = _slots(os.pread(fd, _FILE_BYTES + 1, 0))
        last = max(found.values(), key=_size)
        if last.origin != origin:
            raise TraceInvalid("the signer's state is of another log", code="signer.state")
        yield Memory(last, partial(_write, fd, found, last))

    def _file(self, origin: str) -> int | None:
        """Return the file of one log, None where there is none.

        It stays open: Landlock does not cover chmod(2), so a program of our own user may close a
        folder on the way to it at any time.
        """
        fd = self._open.get(origin)
        if fd is not None and os.fstat(fd).st_nlink:
            return fd
        self._forget(origin)
        if len(self._open) >= _OPEN_MAX:
            self.close()
        try:
            fd = self._open[origin] = os.open(self._path(origin), _FLAGS)
        except FileNotFoundError:
            return None
        return fd

    def _forget(self, origin: str) -> None:
        fd = self._open.pop(origin, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Close the files; what is asked for later is opened again."""
        for origin in list(self._open):
            self._forget(origin)

    def _begin(self, head: Checkpoint) -> Callable[[], None]:
        """Make the file durably, whole under its name: data, then name, then folder."""
        path = self._path(head.origin)
        temporary = f"{path}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600)
        try:
            # Both slots, so that no later write has to grow the file.
            for at in _SLOTS:
                write_at(fd, _slot(head), at)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        return partial(sync_folder, Path(path))

    def _path(self, origin: str) -> str:
        return f"{self._folder}/{sha256(origin.encode()).hexdigest()}"


def _write(
    fd: int, found: dict[int, Checkpoint], newest: Checkpoint, head: Checkpoint
) -> Callable[[], None]:
    """Put a head beside the newest one; return what waits until it is on disk."""
    # Never over the newest one; but one that stands there already is written again in its
    # place: whoever wrote it may have died, or failed, before it was on disk (fsync(2)).
    again = newest == head
    at = next((at for at in _SLOTS if (found.get(at) == newest) is again), _SLOTS[0])
    write_at(fd, _slot(head), at)
    begin_sync(fd)
    return partial(os.fdatasync, fd)


def newest_head(data: bytes) -> Checkpoint:
    """Return the newest head in a file's bytes. Raise ``signer.state`` where there is none."""
    return max(_slots(data).values(), key=_size)


def _slots(data: bytes) -> dict[int, Checkpoint]:
    """Return the heads that stand whole in their slots; there is always one."""
    found: dict[int, Checkpoint] = {}
    for at in _SLOTS if len(data) == _FILE_BYTES else ():
        head = _parse_slot(data[at : at + _SLOT_BYTES])
        if head is not None:
            found[at] = head
    if not found or len({head.origin for head in found.values()}) != 1:
        raise TraceInvalid("the signer's state is damaged", code="signer.state")
    return found


def _slot(head: Checkpoint) -> bytes:
    """Spell a slot: the head's text, its SHA-256 in hex on a line, spaces."""
    text = head.text().encode()
    slot = text + sha256(text).hexdigest().encode() + b"\n"
    return slot.ljust(_SLOT_BYTES)


# The slots are read for each signature, and mostly hold what they held for the one before.
@lru_cache(maxsize=16)
def _parse_slot(slot: bytes) -> Checkpoint | None:
    text, _, digest = slot.rstrip(b" ").removesuffix(b"\n").rpartition(b"\n")
    text += b"\n"
    if sha256(text).hexdigest().encode() != digest:
        return None
    try:
        return Checkpoint.parse(text.decode("ascii"))
    except (TraceInvalid, UnicodeDecodeError):
        return None


def _size(head: Checkpoint) -> int:
    return head.size
