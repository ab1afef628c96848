"""Step "verify": read the entries and openings of a trace, whether or not anybody vouches for it.

Reading believes nothing: ``verify.py`` says what the signature covers. Memory is constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safeconduct.errors import TraceInvalid

from .checkpoint import Checkpoint
from .entry import Entry, committed_digest, parse_entry
from .folder import Folder
from .journal import JournalTail, read_journal
from .note import MAX_NOTE_BYTES, Note
from .openings import Opening, open_commitment, parse_line, read_lines
from .tiles import TILE_WIDTH, bundle_path, read_bundle, split_bundle

CHECKPOINT = "checkpoint"


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
        for index, data in read_journal(folder, JournalTail()):
            if index >= size:
                yield index, parse_entry(data)


@dataclass(frozen=True, slots=True)
class Missing:
    """An opening that is not there (erased, or never handed on) or that is false."""

    code: str
    reason: str


class Openings:
    """Looks openings up entry by entry, in the order of the log, in constant memory per session."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._sessions: dict[str, Iterator[tuple[int, bytes]]] = {}
        self._waiting: dict[str, bytes] = {}

    def of(self, index: int, entry: Entry) -> dict[str, Opening | Missing]:
        """Return what the openings say about each commitment of an Entry.

        Call with ascending indices. A false opening becomes Missing ``opening.false``: it is
        reported, never believed.
        """
        found: dict[str, Opening | Missing] = {
            name: Missing("opening.missing", "there is no opening")
            for name, value in entry.body.items()
            if committed_digest(value) is not None
        }
        if not found:
            return found
        while (raw := self._next(entry.session)) is not None:
            line = parse_line(raw)
            if line is None or line.index < index:
                continue
            if line.index > index:
                self._waiting[entry.session] = raw
                break
            if line.field in found and not isinstance(found[line.field], Opening):
                try:
                    found[line.field] = open_commitment(self._folder, line, entry)
                except TraceInvalid as error:
                    found[line.field] = Missing(error.code, error.message)
        return found

    def _next(self, session: str) -> bytes | None:
        waiting = self._waiting.pop(session, None)
        if waiting is not None:
            return waiting
        lines = self._sessions.get(session)
        if lines is None:
            lines = self._sessions[session] = read_lines(self._folder, session)
        return next(lines, (0, None))[1]

    def close_session(self, session: str) -> None:
        """Forget a session that is over."""
        self._sessions.pop(session, None)
        self._waiting.pop(session, None)


def read_opened(directory: Path) -> Iterator[tuple[int, Entry, dict[str, Opening | Missing]]]:
    """Yield (index, Entry, what its commitments open to) of a whole trace."""
    with Folder(directory) as folder:
        openings = Openings(folder)
        for index, entry in read_entries(directory):
            yield index, entry, openings.of(index, entry)
            if entry.kind == "session.close":
                openings.close_session(entry.session)
