"""Step "verify": what a range of bundles came to, as it crosses from a worker to the verifier."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from itertools import pairwise

import msgspec

from safeconduct.attestation.merkle import HASH_BYTES
from safeconduct.attestation.tiles import TILE_WIDTH
from safeconduct.call import EntryKind

# LIMIT: changes of key that one range hands on, and the bytes of each; an honest log has few.
_MAX_ROTATIONS = 64
_MAX_ROTATION_BYTES = 8 << 10
# LIMIT: characters of what a log.open claims; names and key lines are shorter.
_MAX_CLAIM = 512
# Where a call was opened before this range.
BEFORE = -1


class Part(msgspec.Struct, array_like=True, gc=False):
    """What a range holds of one session.

    A part that ``starts`` is whole from its first entry; of another one ``first_sseq`` and
    ``first_prev`` must follow what came before. ``needed`` calls must have been open before the
    range, ``taken`` are those of them that it ended, ``absent`` calls must not have been open.
    ``calls`` are open at its end, with the index of their intent (``BEFORE``: in ``needed``).
    """

    session: str
    starts: bool
    is_log: bool
    first_index: int
    first_sseq: int
    first_prev: str | None
    sseq: int
    prev: str | None = None
    closed: bool = False
    calls: dict[str, int] = {}
    needed: set[str] = set()
    taken: list[str] = []
    absent: set[str] = set()


class Summary(msgspec.Struct, array_like=True, gc=False):
    """What a range of bundles came to.

    ``roots`` are the hashes of its full bundles, ``leaves`` those of the entries of a partial
    one. ``fault`` names the first bundle that must be read again entry by entry, or is -1. ``back``
    is the first entry whose wall clock is behind that of the entry before, or -1.
    """

    size: int = 0
    roots: list[bytes] = []
    leaves: bytes = b""
    fault: int = -1
    parts: list[Part] = []
    sessions: int = 0
    calls: int = 0
    isolation: str = ""
    key_line: str = ""
    recoveries: int = 0
    redactions: int = 0
    rotations: list[tuple[int, bytes]] = []
    first_time: int = -1
    last_time: int = -1
    back: int = -1

    def tell(self, index: int, kind: str, body: Mapping[str, object], data: bytes) -> None:
        """Note an entry that the report speaks of. Bounded, however many a hostile log has."""
        if kind == EntryKind.LOG_OPEN:
            self.isolation = str(body["signer_isolation"])[:_MAX_CLAIM]
            self.key_line = str(body["key"])[:_MAX_CLAIM]
        elif kind == EntryKind.LOG_RECOVERED:
            self.recoveries += 1
        elif kind == EntryKind.REDACTION:
            self.redactions += 1
        elif kind == EntryKind.KEY_ROTATE:
            small = len(data) <= _MAX_ROTATION_BYTES
            if small and len(self.rotations) < _MAX_ROTATIONS:
                self.rotations.append((index, data))

    def see_times(self, index: int, times: list[int]) -> None:
        """Note the wall clock of the next entries, the first of them ``index``."""
        if self.first_time < 0:
            self.first_time = self.last_time = times[0]
        if self.back < 0:
            ordered = [self.last_time, *times]
            if ordered != sorted(ordered):
                pairs = enumerate(pairwise(ordered), index)
                self.back = next(at for at, (before, after) in pairs if after < before)
        self.last_time = times[-1]

    def at(self, bundles: range) -> int:
        """Return the index of the entry after those read of these bundles."""
        return bundles.start * TILE_WIDTH + self.size


def full_root(hashes: bytes) -> bytes:
    """Return the root over a power of two of sibling hashes, given one after the other."""
    while len(hashes) > HASH_BYTES:
        hashes = b"".join(
            [
                sha256(b"\x01" + hashes[at : at + 2 * HASH_BYTES]).digest()
                for at in range(0, len(hashes), 2 * HASH_BYTES)
            ]
        )
    return hashes
