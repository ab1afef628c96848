"""Step "verify": other signed heads of the log that lie in its own folder.

They vouch for nothing, as whoever writes the folder can leave them out. But what a trusted key
signed it cannot take back: each of them must be a head of this tree, and none be larger.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from heapq import nlargest, nsmallest
from itertools import islice

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.files import unreadable
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import verify_consistency
from safeconduct.attestation.note import MAX_NOTE_BYTES, Note, VerifierKey
from safeconduct.attestation.reader import CHECKPOINT
from safeconduct.attestation.tiles import TileStore
from safeconduct.errors import TraceInvalid

from .witnessed import CHECKPOINTS

# What witnesses showed of another history, kept by the recorder.
_FORKS = "anchors/forks"
# LIMIT: the newest heads of each folder that are held against the tree; each costs a signature
# and a proof, and an honest log keeps one for each of its runs.
_MAX_HELD = 256
# LIMIT: names of one folder that are looked at, in the order in which they lie there.
_MAX_NAMES = 1_000_000
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


def compare_kept(
    folder: Folder,
    head: Checkpoint,
    keys: Sequence[VerifierKey],
    accuse: Callable[[TraceInvalid, str], None],
    *,
    whole: bool = True,
) -> None:
    """Hold the log against the heads in its folder that one of these keys signed.

    A larger one is ``head.newer``, one of another tree ``head.fork``, a false signature in the
    name of a key ``checkpoint.signature``; of each kind the first is told. What is no note, is of
    another log or signed by none of the keys says nothing. Without the ``whole`` tree only heads of
    the same size can be compared.
    """
    told: set[str] = set()
    # A hostile key holder may have handed its log over thousands of times.
    by_id: dict[bytes, list[VerifierKey]] = {}
    for key in keys:
        by_id.setdefault(key.of_log(head.origin).id, []).append(key.of_log(head.origin))
    tiles = cache(lambda: TileStore.load(folder, head.size)) if whole else None
    notes = list(_notes(folder))
    grown = _size_now(folder, head)
    for path, note in notes:
        error = _refutes(path, note, head, by_id, tiles, grown)
        if error is not None and error.code not in told:
            told.add(error.code)
            accuse(error, path)


def _size_now(folder: Folder, head: Checkpoint) -> int:
    """Return how large the log is by now: its recorder may be at work."""
    try:
        now = Checkpoint.parse(Note.parse(folder.read(CHECKPOINT, limit=MAX_NOTE_BYTES)).text)
    except TraceInvalid:
        return head.size
    return now.size if now.origin == head.origin else head.size


def _notes(folder: Folder) -> Iterator[tuple[str, Note]]:
    sizes = (int(name) for name in _names(folder, CHECKPOINTS) if _SIZE.fullmatch(name))
    paths = [f"{CHECKPOINTS}/{size}" for size in nlargest(_MAX_HELD, sizes)]
    paths += [f"{_FORKS}/{name}" for name in nsmallest(_MAX_HELD, _names(folder, _FORKS))]
    for path in paths:
        try:
            yield path, Note.parse(folder.read(path, limit=MAX_NOTE_BYTES))
        except TraceInvalid:  # it lies outside of what is signed, and a power cut may tear it
            continue


def _names(folder: Folder, path: str) -> Iterator[str]:
    """Yield the names in a folder, of which there may be more than are kept in memory."""
    try:
        with folder.scan(path) as entries:
            yield from (one.name for one in islice(entries, _MAX_NAMES))
    except TraceInvalid as error:
        if error.code != "trace.missing":
            raise
    except OSError as error:
        raise unreadable(path, error) from error


def _refutes(
    path: str,
    note: Note,
    head: Checkpoint,
    keys: Mapping[bytes, Sequence[VerifierKey]],
    tiles: Callable[[], TileStore] | None,
    grown: int,
) -> TraceInvalid | None:
    """Return what a note says against the log; None where it says nothing or agrees.

    Up to ``grown`` it may have been signed while we read.
    """
    try:
        kept = Checkpoint.parse(note.text)
        if kept.origin != head.origin:
            return None
    except TraceInvalid:
        return None
    signed = False
    for line in note.signatures:
        named = keys.get(line.id, ()) if line.name == head.origin else ()
        if named and not any(key.verifies(line, note.text) for key in named):
            message = f"the signature of the log's key on {path} is false"
            return TraceInvalid(message, code="checkpoint.signature")
        signed = signed or bool(named)
    if not signed or head.size < kept.size <= grown:
        return None
    if kept.size > head.size:
        return TraceInvalid(
            f"{path} is a signed head of {kept.size} entries, and this log ends after {head.size}:"
            " entries were cut off, or files of two copies are mixed here",
            code="head.newer",
        )
    if _agrees(kept, head, tiles):
        return None
    return TraceInvalid(
        f"{path}, signed for {kept.size} entries, is of another history of this log:"
        " the two were signed apart",
        code="head.fork",
    )


def _agrees(kept: Checkpoint, head: Checkpoint, tiles: Callable[[], TileStore] | None) -> bool:
    if kept.size == head.size:
        return kept.root == head.root
    if tiles is None:
        return True
    # From hashes that need not be believed: the proof is held against both roots.
    proof = tiles().prove_consistency(kept.size, head.size)
    return verify_consistency(kept.size, kept.root, head.size, head.root, proof)
