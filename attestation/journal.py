"""Step "record": the write-ahead journal, where an Entry is acknowledged.

``journal/<first index>.wal`` is a run of frames: length (4 bytes, big-endian), the first 8 bytes
of the entry's leaf hash, the entry. A frame that does not match its hash ends the journal: what a
crash tore is dropped on the next open. Files go away once a signed checkpoint covers them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from errno import ENOSPC
from hashlib import sha256
from itertools import pairwise
from threading import Condition

from safeconduct.errors import TraceInvalid

from .encoding import MAX_ENTRY_BYTES
from .folder import Folder
from .merkle import leaf_hash

JOURNAL = "journal"
_MARK_BYTES = 8
_HEADER_BYTES = 4 + _MARK_BYTES
_CHUNK_BYTES = 1 << 20
# LIMIT: a dropped tail is hashed for the record up to here; a torn tail is far smaller.
_MAX_DROPPED_BYTES = 64 << 20
_FILE_NAME = re.compile(r"([0-9]{16})\.wal")


def journal_path(first: int) -> str:
    """Return the path of the journal file whose first entry has this index."""
    return f"{JOURNAL}/{first:016d}.wal"


def frame(data: bytes, leaf: bytes) -> bytes:
    """Return an entry as the journal holds it."""
    return len(data).to_bytes(4, "big") + leaf[:_MARK_BYTES] + data


def journal_files(folder: Folder) -> list[int]:
    """Return the first index of each journal file, ascending."""
    matches = (_FILE_NAME.fullmatch(name) for name in folder.names(JOURNAL))
    return [int(match[1]) for match in matches if match]


@dataclass(slots=True)
class JournalTail:
    """Where reading a journal ended: the last file, its good bytes and what was dropped."""

    next_index: int = 0
    last_file: int = -1
    good_bytes: int = 0
    dropped_bytes: int = 0
    dropped_sha256: str = sha256(b"").hexdigest()


def read_journal(folder: Folder, tail: JournalTail) -> Iterator[tuple[int, bytes]]:
    """Yield (index, entry) of all good frames in order, and leave in ``tail`` where they end.

    Constant memory. A file that does not continue the one before ends the journal as a torn
    frame does.
    """
    files = journal_files(folder)
    tail.next_index = files[0] if files else 0
    for first in files:
        if first != tail.next_index or tail.dropped_bytes:
            break
        tail.last_file = first
        yield from _read_file(folder, first, tail)


def _read_file(folder: Folder, first: int, tail: JournalTail) -> Iterator[tuple[int, bytes]]:
    with folder.open(journal_path(first)) as fd:
        buffer = bytearray()
        tail.good_bytes = at = 0
        at_end = False
        while True:
            while not at_end and len(buffer) - at < _HEADER_BYTES + MAX_ENTRY_BYTES:
                part = os.read(fd, _CHUNK_BYTES)
                del buffer[:at]
                at = 0
                buffer += part
                at_end = not part
            data = _good_frame(buffer, at)
            if data is None:
                break
            yield tail.next_index, data
            at += _HEADER_BYTES + len(data)
            tail.good_bytes += _HEADER_BYTES + len(data)
            tail.next_index += 1
        _note_dropped(fd, bytes(buffer[at:]), tail)


def _good_frame(buffer: bytearray, at: int) -> bytes | None:
    length = int.from_bytes(buffer[at : at + 4], "big")
    start = at + _HEADER_BYTES
    if not 0 < length <= MAX_ENTRY_BYTES or start + length > len(buffer):
        return None
    data = bytes(buffer[start : start + length])
    if leaf_hash(data)[:_MARK_BYTES] != bytes(buffer[at + 4 : start]):
        return None
    return data


def _note_dropped(fd: int, rest: bytes, tail: JournalTail) -> None:
    digest = sha256()
    while rest and tail.dropped_bytes < _MAX_DROPPED_BYTES:
        digest.update(rest)
        tail.dropped_bytes += len(rest)
        rest = os.read(fd, _CHUNK_BYTES)
    tail.dropped_sha256 = digest.hexdigest()


class Journal:
    """The open end of the journal.

    ``append`` and ``rotate`` are called under the writer's lock, ``sync`` by any thread without
    it. After one failed write or sync nothing is accepted any more: the kernel may have dropped
    the dirty pages it could not write, so a retry that succeeds proves nothing (fsync(2), EIO).
    """

    def __init__(self, folder: Folder, *, first: int, size: int) -> None:
        """Open ``<first>.wal`` to append entry number ``size`` next."""
        self._folder = folder
        self._file = first
        self._fd = folder.open_append(journal_path(first))
        self._bytes = os.fstat(self._fd).st_size
        self._size = size
        self._synced = 0
        self._syncing = False
        self._turn = Condition()
        self._failure: OSError | None = None

    @property
    def file(self) -> int:
        """Return the first index of the file being written."""
        return self._file

    @property
    def size_bytes(self) -> int:
        """Return the length of the file being written."""
        return self._bytes

    def append(self, data: bytes, leaf: bytes) -> None:
        """Hand one entry to the kernel: from here on it survives a killed process."""
        self._require_sound()
        framed = frame(data, leaf)
        try:
            if os.write(self._fd, framed) != len(framed):
                raise OSError(ENOSPC, "short write: no space left")
        except OSError as error:
            self._failure = error
            raise write_failed(error) from error
        self._bytes += len(framed)
        self._size += 1

    def sync(self, index: int) -> None:
        """Return once entry ``index`` is on disk. One fdatasync serves all who wait."""
        with self._turn:
            while self._synced <= index:
                self._require_sound()
                if self._syncing:
                    self._turn.wait()
                    continue
                self._syncing = True
                fd, reached = self._fd, self._size
                self._turn.release()
                try:
                    failure = _fdatasync(fd)
                finally:  # an interrupt here must not leave the others waiting
                    self._turn.acquire()
                    self._syncing = False
                    self._turn.notify_all()
                self._failure = self._failure or failure
                if failure is None:
                    self._synced = max(self._synced, reached)
            self._require_sound()

    def rotate(self) -> None:
        """Go on in a new file. The old one is durable first; the caller removes it later."""
        self.sync(self._size - 1)
        with self._turn:
            while self._syncing:
                self._turn.wait()
            old, self._file = self._fd, self._size
            self._fd = self._folder.open_append(journal_path(self._size))
            self._bytes = 0
            os.close(old)

    def remove_before(self, index: int) -> None:
        """Remove files that hold only entries before ``index``, never the one in use."""
        files = journal_files(self._folder)
        for first, following in pairwise(files):
            if following <= index and first != self._file:
                self._folder.remove(journal_path(first))

    def close(self) -> None:
        """Close the file and leave it: the next open recovers from it."""
        os.close(self._fd)

    def _require_sound(self) -> None:
        if self._failure is not None:
            raise write_failed(self._failure)


def write_failed(error: OSError) -> TraceInvalid:
    """Return the error of a record that could not be written; the Call must not run."""
    return TraceInvalid(
        f"the trace cannot be written: {error.strerror or error}",
        code="trace.write_failed",
        hint="free space or repair the disk, then open the trace again",
    )


def _fdatasync(fd: int) -> OSError | None:
    try:
        os.fdatasync(fd)
    except OSError as error:
        return error
    return None
