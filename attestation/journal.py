"""Step "record": the write-ahead journal on disk: its frames, and reading them.

``journal/<first index>.wal`` is a run of frames: length (4 bytes, big-endian), the first 8 bytes
of the entry's leaf hash, the entry. A length with its highest bit set is of the openings of the
entry before, behind their CRC-32 in 8 bytes. A frame that does not match its mark ends the journal:
what a crash tore is dropped on the next open, and zeros behind the last frame are room for more.
Files go away once a signed checkpoint covers them and its tiles are on disk. journal_writer.py is
the other end.
"""

from __future__ import annotations

import os
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from zlib import crc32

from safeconduct.errors import TraceInvalid

from .encoding import MAX_ENTRY_BYTES
from .files import read_some
from .folder import Folder
from .merkle import leaf_hash

JOURNAL = "journal"
_MARK_BYTES = 8
_HEADER_BYTES = 4 + _MARK_BYTES
_OPENINGS = 1 << 31
# LIMIT: the openings of one entry: a few fields, each kept in line up to 16 KiB, or 32 spelled.
MAX_OPENINGS_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 20
# LIMIT: frames of any kind, and their bytes, that are read of a journal somebody else may have
# prepared: what they cost has nothing to do with the size of its files, which may be hard links.
# An honest one holds what waits for the next head, some hundreds of entries.
MAX_READ_FRAMES = 1_000_000
MAX_READ_BYTES = 256 << 20
# LIMIT: a dropped tail is hashed for the record up to here; a torn tail is far smaller.
_MAX_DROPPED_BYTES = 64 << 20
# Zeros are set aside up to a multiple of this; those in a file of another length are torn.
ASIDE_BYTES = 4096
_ENTRY_HEADER = struct.Struct(">I8s").pack  # takes the first 8 bytes of the leaf hash
_OPENINGS_HEADER = struct.Struct(">IQ").pack
_FILE_NAME = re.compile(r"([0-9]{16})\.wal")


def journal_path(first: int) -> str:
    """Return the path of the journal file whose first entry has this index."""
    return f"{JOURNAL}/{first:016d}.wal"


def frame(data: bytes, leaf: bytes, lines: bytes = b"") -> bytes:
    """Return an entry as the journal holds it, with its openings behind it."""
    if not lines:
        return _ENTRY_HEADER(len(data), leaf) + data
    openings = _OPENINGS_HEADER(_OPENINGS | len(lines), crc32(lines))
    return b"".join((_ENTRY_HEADER(len(data), leaf), data, openings, lines))


def journal_files(folder: Folder) -> list[int]:
    """Return the first index of each journal file, ascending."""
    matches = (_FILE_NAME.fullmatch(name) for name in folder.names(JOURNAL))
    return [int(match[1]) for match in matches if match]


@dataclass(slots=True)
class JournalTail:
    """Where reading a journal ended: the last file, its good bytes and what was dropped.

    ``frames_left`` and ``bytes_left``, where given, are how much is read at most; ``cut`` tells
    that there was more.
    """

    next_index: int = 0
    last_file: int = -1
    good_bytes: int = 0
    dropped_bytes: int = 0
    dropped_sha256: str = sha256(b"").hexdigest()
    frames_left: int | None = None
    bytes_left: int | None = None
    cut: bool = False

    @classmethod
    def bounded(cls) -> JournalTail:
        """Begin to read a journal that is not our own."""
        return cls(frames_left=MAX_READ_FRAMES, bytes_left=MAX_READ_BYTES)

    def spend(self, size_bytes: int) -> bool:
        """Take a frame from what may be read; False, and ``cut``, when it is too much."""
        if self.frames_left is None or self.bytes_left is None:
            return True
        self.frames_left -= 1
        self.bytes_left -= size_bytes
        self.cut = self.frames_left < 0 or self.bytes_left < 0
        return not self.cut


@dataclass(frozen=True, slots=True)
class Frame:
    """An entry, or where ``is_openings`` the openings of entry ``index``."""

    index: int
    data: bytes
    is_openings: bool = False


def read_journal(
    folder: Folder, tail: JournalTail, *, size: int = 0
) -> Iterator[tuple[int, bytes]]:
    """Yield (index, entry) of all good frames in order, and leave in ``tail`` where they end.

    Files that by their names hold nothing from entry ``size`` on are not read.
    """
    for one in read_frames(folder, tail, size=size):
        if not one.is_openings:
            yield one.index, one.data


def read_frames(folder: Folder, tail: JournalTail, *, size: int = 0) -> Iterator[Frame]:
    """Yield all good frames in order, and leave in ``tail`` where they end. Constant memory.

    A file that does not continue the one before ends the journal as a torn frame does. Files that
    by their names hold nothing from entry ``size`` on are not read.
    """
    files = journal_files(folder)
    files = files[max(bisect_right(files, size) - 1, 0) :]
    tail.next_index = files[0] if files else 0
    for first in files:
        if first != tail.next_index or tail.dropped_bytes or tail.cut:
            break
        tail.last_file = first
        yield from _read_file(folder, first, tail)


def _read_file(folder: Folder, first: int, tail: JournalTail) -> Iterator[Frame]:
    path = journal_path(first)
    with folder.open(path) as fd:
        buffer = bytearray()
        tail.good_bytes = at = 0
        while True:
            at = _fill(fd, path, buffer, at, _HEADER_BYTES)
            header = bytes(buffer[at : at + _HEADER_BYTES])
            length = int.from_bytes(header[:4], "big")
            openings, length = bool(length & _OPENINGS), length & ~_OPENINGS
            if not 0 < length <= (MAX_OPENINGS_BYTES if openings else MAX_ENTRY_BYTES):
                break
            at = _fill(fd, path, buffer, at, _HEADER_BYTES + length)
            data = bytes(buffer[at + _HEADER_BYTES : at + _HEADER_BYTES + length])
            mark = crc32(data).to_bytes(_MARK_BYTES, "big") if openings else leaf_hash(data)
            torn = len(data) != length or mark[:_MARK_BYTES] != header[4:]
            if torn or (openings and tail.next_index == first):
                break
            if not tail.spend(_HEADER_BYTES + length):
                return
            yield Frame(tail.next_index - openings, data, openings)
            at += _HEADER_BYTES + length
            tail.good_bytes += _HEADER_BYTES + length
            tail.next_index += not openings
        _note_dropped(fd, path, bytes(buffer[at:]), tail)


def _fill(fd: int, path: str, buffer: bytearray, at: int, count: int) -> int:
    """Read until ``count`` bytes follow ``at`` or the file ends; return where they begin now."""
    if len(buffer) - at >= count:
        return at
    del buffer[:at]
    while len(buffer) < count and (part := read_some(fd, path, _CHUNK_BYTES)):
        buffer += part
    return 0


def _note_dropped(fd: int, path: str, rest: bytes, tail: JournalTail) -> None:
    """Note what follows the last good frame. Zeros to the end were only set aside for frames."""
    digest, zeros, left = sha256(), 0, _MAX_DROPPED_BYTES
    aside = os.fstat(fd).st_size % ASIDE_BYTES == 0
    while rest:
        left -= len(rest)
        # Nobody sets that much aside: then zeros are as torn as anything.
        torn = rest.rstrip(b"\0") if aside and left > 0 else rest
        if torn:
            tail.dropped_bytes += zeros + len(torn)
            while zeros:
                digest.update(bytes(min(zeros, _CHUNK_BYTES)))
                zeros -= min(zeros, _CHUNK_BYTES)
            digest.update(torn)
        zeros += len(rest) - len(torn)
        rest = read_some(fd, path, _CHUNK_BYTES) if left > 0 else b""
    tail.dropped_sha256 = digest.hexdigest()


def write_failed(error: OSError) -> TraceInvalid:
    """Return the error of a record that could not be written; the Call must not run."""
    return TraceInvalid(
        f"the trace cannot be written: {error.strerror or error}",
        code="trace.write_failed",
        hint="free space or repair the disk, then open the trace again",
    )
