"""Step "verify": read the entries of a trace, whether or not anybody vouches for it.

Reading believes nothing: ``verify.py`` says what the signature covers. Memory is constant.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from errno import ENXIO
from pathlib import Path

from safeconduct.errors import TraceInvalid

from .checkpoint import Checkpoint
from .entry import Entry, parse_entry
from .folder import Folder
from .journal import JournalTail, read_journal
from .note import MAX_NOTE_BYTES, Note
from .tiles import TILE_WIDTH, bundle_path, read_bundle, split_bundle

CHECKPOINT = "checkpoint"
_OPENINGS = "openings"
_CHUNK_BYTES = 1 << 20
_MARKS = (b'"field":"document"', b'{"sealed":"')
_KEPT_BYTES = max(map(len, _MARKS))
# LIMIT: bytes of openings that are looked through, holes not counted. A hostile file may be of any
# length, and one file have any number of names.
_MAX_COUNTED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An entry's bytes as stored, and where: ``path`` and byte ``offset`` inside that file."""

    index: int
    data: bytes
    path: str
    offset: int


def read_checkpoint(folder: Folder) -> tuple[Note, Checkpoint]:
    """Parse the trace's checkpoint. Nothing is verified.

    Raise TraceInvalid ``trace.missing``, ``note.invalid`` or ``checkpoint.invalid``.
    """
    note = Note.parse(folder.read(CHECKPOINT, limit=MAX_NOTE_BYTES))
    return note, Checkpoint.parse(note.text)


def stored_entries(folder: Folder, size: int) -> Iterator[Stored]:
    """Yield the first ``size`` entries from their bundles.

    Raise TraceInvalid ``trace.missing`` or ``trace.tile`` at the first that cannot be read.
    """
    for number in range((size + TILE_WIDTH - 1) // TILE_WIDTH):
        first = number * TILE_WIDTH
        width = min(TILE_WIDTH, size - first)
        bundle = read_bundle(folder, number, width)
        path = bundle_path(number, width)
        for at, (offset, data) in enumerate(split_bundle(bundle, width=width, path=path)):
            yield Stored(index=first + at, data=data, path=path, offset=offset + 2)


def read_entries(directory: Path) -> Iterator[tuple[int, Entry]]:
    """Yield (index, Entry) of a whole trace: the signed entries, then the journal's.

    Nothing is verified. Raise TraceInvalid where an entry cannot be read.
    """
    with Folder(directory) as folder:
        size = 0
        try:
            size = read_checkpoint(folder)[1].size
        except TraceInvalid as error:
            if error.code != "trace.missing":
                raise
        for stored in stored_entries(folder, size):
            yield stored.index, parse_entry(stored.data)
        tail = JournalTail.bounded()
        for index, data in read_journal(folder, tail, size=size):
            if index >= size:
                yield index, parse_entry(data)
        if tail.cut:
            raise TraceInvalid("the journal is longer than is read of one", code="trace.hostile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayable:
    """What the openings in a folder offer: ``documents`` of calls, and ``sealed`` entries.

    Counted, not believed: replay holds each opening against its commitment. ``cut`` tells that
    counting stopped before the end.
    """

    documents: int = 0
    sealed: int = 0
    cut: bool = False


def count_openings(folder: Folder) -> Replayable:
    """Count openings without parsing them. Raise TraceInvalid for odd folders, or OSError.

    Inside a JSON text the quotes of these marks would be escaped, so they count once a line.
    """
    found = [0, 0]
    left = _MAX_COUNTED_BYTES
    for name in folder.names(_OPENINGS):
        if not name.endswith(".jsonl"):
            continue
        with folder.open(f"{_OPENINGS}/{name}") as fd:
            rest = b""
            for part in _parts(fd):
                left -= len(part)
                for at, mark in enumerate(_MARKS):
                    # No mark fits into what is kept of the part before: none counts twice.
                    found[at] += (rest[1 - len(mark) :] + part).count(mark)
                rest = (rest + part)[-_KEPT_BYTES:]
                if left <= 0:
                    return Replayable(documents=found[0], sealed=found[1], cut=True)
    return Replayable(documents=found[0], sealed=found[1])


def _parts(fd: int) -> Iterator[bytes]:
    """Yield what is in a file. Holes of a sparse one, which cost no disk, are one zero byte each.

    lseek(2): ENXIO says that only a hole is left; a file system without holes says EINVAL, or
    finds data everywhere.
    """
    at = 0
    while True:
        start = at
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == ENXIO:
                return
        part = os.read(fd, _CHUNK_BYTES)
        if not part:
            return
        yield part if start == at else b"\0" + part
        at = start + len(part)
