"""Step "verify": what a range of bundles came to, as it crosses from a worker to the verifier."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from itertools import pairwise

import msgspec

from safeconduct.attestation.encoding import MAX_ROTATION_BYTES
from safeconduct.attestation.merkle import HASH_BYTES
from safeconduct.attestation.tiles import TILE_WIDTH
from safeconduct.call import EntryKind

# LIMIT: changes of key that one range hands on; an honest log has few. More are told of.
_MAX_ROTATIONS = 64
# Of any two different ones, one at least is another log's.
_MAX_ORIGINS = 2
# LIMIT: characters of what a log.open claims; names and key lines are shorter.
_MAX_CLAIM = 512
# Where a call was opened before this range.
BEFORE = -1


class Part(msgspec.Struct, array_like=True, gc=False):
    """What a range holds of one session.

    A part that ``starts`` is whole from its first entry; of another one ``first_sseq`` and
    ``first_prev`` must follow what came before. ``needed`` calls must have been open before the
    range, ``taken`` are those of them that it ended, ``begun`` calls must be new to the session
    (left out of a session that is whole in the range); ``fresh`` are those not put there yet.
    ``calls`` are open at its end, with the index of their intent (``BEFORE``: in ``needed``).
    ``barred`` are calls open at its end that a decision here keeps from running (story.py); of
    ``needed`` calls, ``freed`` are those that a person said yes to, ``ran`` those that then ran.
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
    begun: list[str] = []
    fresh: list[str] = []
    barred: dict[str, str] = {}
    freed: list[str] = []
    ran: list[str] = []

    def gather(self) -> None:
        """Put the ids at hand with those before. So many short texts, kept, cost a tenth of all."""
        if self.fresh:
            self.begun.append("\n".join(self.fresh))
            self.fresh = []

    def ids(self) -> list[str]:
        """Return the ids of the calls it began, which hold no newline."""
        return "\n".join(self.begun).split("\n") if self.begun else []


class Summary(msgspec.Struct, array_like=True, gc=False):
    """What a range of bundles came to. A session is one part of it at most.

    ``roots`` are the hashes of its full bundles, ``leaves`` those of the entries of a partial
    one. ``fault`` names the first bundle that must be read again entry by entry, or is -1. ``back``
    is the first entry whose wall clock is behind that of the entry before, or -1, and ``cut`` the
    first ``key.rotate`` that is too large, or one too many, to be among ``rotations``. ``origins``
    are what its log.open entries call the log, two at most, each with the first that does.
    """

    size: int = 0
    roots: list[bytes] = []
    leaves: bytes = b""
    fault: int = -1
    parts: list[Part] = []
    sessions: int = 0
    calls: int = 0
    origins: dict[str, int] = {}
    isolation: str = ""
    key_line: str = ""
    recoveries: int = 0
    redactions: int = 0
    rotations: list[tuple[int, bytes]] = []
    cut: int = -1
    first_time: int = -1
    last_time: int = -1
    back: int = -1

    def tell(self, index: int, kind: str, body: Mapping[str, object], data: bytes) -> None:
        """Note an entry that the report speaks of. Bounded, however many a hostile log has."""
        if kind == EntryKind.LOG_OPEN:
            self.isolation = str(body["signer_isolation"])[:_MAX_CLAIM]
            self.key_line = str(body["key"])[:_MAX_CLAIM]
            if len(self.origins) < _MAX_ORIGINS:
                self.origins.setdefault(str(body["origin"]), index)
        elif kind == EntryKind.LOG_RECOVERED:
            self.recoveries += 1
        elif kind == EntryKind.REDACTION:
            self.redactions += 1
        elif kind == EntryKind.KEY_ROTATE:
            small = len(data) <= MAX_ROTATION_BYTES
            if small and len(self.rotations) < _MAX_ROTATIONS:
                self.rotations.append((index, data))
            elif self.cut < 0:
                self.cut = index

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
