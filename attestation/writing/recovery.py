"""Step "record": take up a trace again, after a clean close or after a crash.

The signed checkpoint is checked against the tiles, the journal replayed on top of it, what a
crash tore is dropped, and the result held against what the signer remembers having signed: a
trace that was put back to an earlier state is refused, not continued.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from safeconduct.attestation.chain import Chains
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.entry import Entry, parse_entry
from safeconduct.attestation.files import write_whole
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.journal import JournalTail, journal_files, journal_path, read_frames
from safeconduct.attestation.merkle import EMPTY_ROOT, leaf_hash
from safeconduct.attestation.note import Note, VerifierKey
from safeconduct.attestation.privacy.openings import OPENINGS, parse_line, read_lines
from safeconduct.attestation.reader import read_checkpoint, stored_entries
from safeconduct.attestation.signing.signer import SignerClient
from safeconduct.attestation.tiles import TileStore
from safeconduct.errors import TraceInvalid

from .sessions import noted_sessions

# LIMIT: what is held of the journal while it is replayed.
_BATCH_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """A trace taken up again. ``tail`` is None when it was closed cleanly (or is new).

    ``signed`` is the head the signer signed last, which the next one must extend.
    """

    tiles: TileStore
    chains: Chains
    signed: Checkpoint
    tail: JournalTail | None


def recover(folder: Folder, origin: str, signer: SignerClient) -> Recovered:
    """Bring tiles, journal and chains of a trace back together.

    Raise TraceInvalid ``trace.corrupt`` (the files contradict the checkpoint), ``trace.key`` (it
    was signed by another key), ``trace.rollback`` (the signer has signed more than is here).
    """
    head = _signed_head(folder, origin, signer.key)
    files = journal_files(folder)
    if files:
        replayed = _Replay(folder, head, files[0])
        replayed.run()
        tiles, chains, tail = replayed.tiles, replayed.chains, replayed.tail
    else:
        tiles, chains, tail = TileStore.load(folder, head.size), Chains(), None
        if tiles.root() != head.root:
            raise _corrupt("the tiles do not hash to the signed checkpoint")
    signed = signer.last(origin)
    if signed.size > tiles.size or tiles.root_at(signed.size) != signed.root:
        raise TraceInvalid(
            f"the signer has signed {signed.size} entries of this log that are not here",
            code="trace.rollback",
            hint="restore the newest copy of the trace, or start a new trace",
        )
    return Recovered(tiles=tiles, chains=chains, signed=signed, tail=tail)


def _signed_head(folder: Folder, origin: str, key: VerifierKey) -> Checkpoint:
    try:
        note, head = read_checkpoint(folder)
    except TraceInvalid as error:
        if error.code == "trace.missing":
            return Checkpoint(origin=origin, size=0, root=EMPTY_ROOT)
        raise
    if head.origin != origin:
        raise _corrupt(f"the checkpoint is of another log, {head.origin}")
    _require_signed(note, key.of_log(origin))
    return head


def _require_signed(note: Note, key: VerifierKey) -> None:
    made = [signature for signature in note.signatures if key.made(signature)]
    if not any(key.verifies(signature, note.text) for signature in made):
        raise TraceInvalid(
            f"the checkpoint is not signed by {key.name}",
            code="trace.key",
            hint="continue a trace with the key it was begun with, or start a new trace",
        )


class _Replay:
    """Puts what the journal has back into tree, chains and openings.

    All before its first entry is on disk elsewhere; all from there on is made anew, whatever of it
    a crash had left.
    """

    def __init__(self, folder: Folder, head: Checkpoint, first: int) -> None:
        self._folder, self._head, self._first = folder, head, first
        self.tail = JournalTail()
        if first > head.size:
            raise _corrupt(f"entries {head.size} to {first - 1} are missing")
        self.tiles = TileStore.load(folder, first)
        chains = noted_sessions(folder, first)
        if chains is None:  # it is the writer's note alone: then the log itself is read
            chains = Chains()
            for stored in stored_entries(folder, first):
                _follow(chains, stored.index, stored.data)
        self.chains = chains
        self._openings: dict[str, list[bytes]] = {}
        self._entries: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0
        self._pruned: set[str] = set()

    def run(self) -> None:
        """Replay, and cut off what is torn."""
        session = ""
        for one in read_frames(self._folder, self.tail):
            self._pending_bytes += len(one.data)
            if one.is_openings:
                self._openings.setdefault(session, []).append(one.data)
                continue
            entry, leaf = _follow(self.chains, one.index, one.data)
            session = entry.session
            self._entries.append((one.data, leaf))
            signed = one.index + 1 == self._head.size
            if signed or self._pending_bytes >= _BATCH_BYTES:
                self._settle()
            if signed:
                self._require_signed_root()
        self._settle()
        if self._first == self._head.size:
            self._require_signed_root()
        if self.tail.next_index < self._head.size:
            raise _corrupt(
                f"the journal ends at entry {self.tail.next_index}, {self._head.size} are signed"
            )
        if self.tail.last_file != journal_files(self._folder)[-1]:
            raise _corrupt("the journal breaks off before its last file")
        self._folder.truncate(journal_path(self.tail.last_file), self.tail.good_bytes)
        for name in self.chains.open:
            _prune_openings(self._folder, name, self.tiles.size)

    def _require_signed_root(self) -> None:
        if self.tiles.root_at(self._head.size) != self._head.root:
            raise _corrupt("the entries do not hash to the signed checkpoint")

    def _settle(self) -> None:
        self.tiles.append(self._entries)
        self._entries, self._pending_bytes = [], 0
        for session, parts in self._openings.items():
            if session not in self._pruned:
                _prune_openings(self._folder, session, self._first)
                self._pruned.add(session)
            with self._folder.appended(f"{OPENINGS}/{session}.jsonl", mode=0o600) as fd:
                write_whole(fd, b"".join(parts))
                os.fdatasync(fd)
        self._openings = {}


def _follow(chains: Chains, index: int, data: bytes) -> tuple[Entry, bytes]:
    leaf = leaf_hash(data)
    try:
        entry = parse_entry(data)
        chains.follow(index, entry, leaf.hex())
    except TraceInvalid as error:
        raise _corrupt(f"entry {index}: {error.message}") from error
    return entry, leaf


def _prune_openings(folder: Folder, session: str, size: int) -> None:
    """Cut openings of entries that the crash took: their index will be given again."""
    path = f"{OPENINGS}/{session}.jsonl"
    if not folder.exists(path):
        return
    good_bytes = 0
    for offset, raw in read_lines(folder, session):
        line = parse_line(raw)
        if line is None or line.index >= size:
            break
        good_bytes = offset + len(raw) + 1
    with folder.open(path) as fd:
        whole = os.fstat(fd).st_size
    if good_bytes < whole:
        folder.truncate(path, good_bytes)


def _corrupt(why: str) -> TraceInvalid:
    return TraceInvalid(
        f"the trace cannot be continued: {why}",
        code="trace.corrupt",
        hint="keep it as it is, run `safeconduct trace verify` on it, and start a new trace",
    )
