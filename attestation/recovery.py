"""Step "record": take up a trace again, after a clean close or after a crash.

The signed checkpoint is checked against the tiles, the journal replayed on top of it, what a
crash tore is dropped, and the result held against what the signer remembers having signed: a
trace that was put back to an earlier state is refused, not continued.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from safeconduct.errors import TraceInvalid

from .chain import Chains
from .checkpoint import Checkpoint
from .entry import parse_entry
from .folder import Folder
from .journal import JournalTail, journal_files, journal_path, read_journal
from .merkle import EMPTY_ROOT, leaf_hash
from .note import Note, VerifierKey
from .openings import OPENINGS, parse_line, read_lines
from .reader import read_checkpoint, stored_entries
from .signer import SignerClient
from .tiles import TileStore

_BATCH = 1024


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
    tiles = TileStore.load(folder, head.size)
    if tiles.root() != head.root:
        raise _corrupt("the tiles do not hash to the signed checkpoint")
    chains = Chains()
    tail: JournalTail | None = None
    if journal_files(folder):
        tail = JournalTail()
        for stored in stored_entries(folder, head.size):
            _follow(chains, stored.index, stored.data)
        _replay(folder, tiles, chains, tail)
        if tail.last_file != journal_files(folder)[-1]:
            raise _corrupt("the journal breaks off before its last file")
        folder.truncate(journal_path(tail.last_file), tail.good_bytes)
        for session in chains.open:
            _prune_openings(folder, session, tiles.size)
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
    _require_signed(note, key)
    return head


def _require_signed(note: Note, key: VerifierKey) -> None:
    made = [signature for signature in note.signatures if key.made(signature)]
    if not any(key.verifies(signature, note.text) for signature in made):
        raise TraceInvalid(
            f"the checkpoint is not signed by {key.name}",
            code="trace.key",
            hint="continue a trace with the key it was begun with, or start a new trace",
        )


def _replay(folder: Folder, tiles: TileStore, chains: Chains, tail: JournalTail) -> None:
    """Put the journal's entries beyond the checkpoint back into the tree."""
    signed_size = tiles.size
    batch: list[tuple[bytes, bytes]] = []
    first = True
    for index, data in read_journal(folder, tail):
        if first and index > signed_size:
            raise _corrupt(f"entries {signed_size} to {index - 1} are missing")
        first = False
        if index < signed_size:
            continue
        batch.append((data, _follow(chains, index, data)))
        if len(batch) == _BATCH:
            tiles.append(batch)
            batch = []
    tiles.append(batch)
    if tail.next_index < signed_size:
        raise _corrupt(f"the journal ends at entry {tail.next_index}, {signed_size} are signed")


def _follow(chains: Chains, index: int, data: bytes) -> bytes:
    leaf = leaf_hash(data)
    try:
        chains.follow(index, parse_entry(data), leaf.hex())
    except TraceInvalid as error:
        raise _corrupt(f"entry {index}: {error.message}") from error
    return leaf


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
