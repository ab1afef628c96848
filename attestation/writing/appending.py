"""Step "record": the hot path: an Entry checked, spelled, hashed and handed to the kernel.

``append`` encodes outside of the lock, takes its place in the log inside it, and makes one
write(2). What a failure leaves behind is never appended to: Health keeps the first one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from threading import Lock
from typing import Final, cast

from safeconduct.attestation.bodies import spell_body
from safeconduct.attestation.chain import Chains
from safeconduct.attestation.encoding import MAX_ENTRY_BYTES, MAX_INTEGER
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.journal import frame, write_failed
from safeconduct.attestation.layout import stored_bytes
from safeconduct.attestation.privacy.openings import OpeningStore, Salts, Sealed, seal_all
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.call import Durability, EntryKind, Json
from safeconduct.errors import TraceInvalid

from .checkpointing import CHECKPOINT_ENTRIES, Checkpointing, Unsigned
from .commits import Commits
from .heads import OnCheckpoint
from .health import Health
from .journal_writer import Journal
from .recovery import Recovered
from .sessions import keep_sessions, note_sessions

# Kinds that only the writer itself may append: they begin, end or repair what it keeps track of.
# Tuples, as hashing an Enum member runs Python code and comparing one does not.
_OWN_KINDS = (
    EntryKind.LOG_OPEN,
    EntryKind.LOG_RECOVERED,
    EntryKind.SESSION_OPEN,
    EntryKind.SESSION_CLOSE,
)
# Kinds that stand in the log's own session only: ``append_own``.
_OF_THE_LOG = (EntryKind.KEY_ROTATE, EntryKind.REDACTION, EntryKind.HEARTBEAT)
_RESERVED = _OWN_KINDS + _OF_THE_LOG
# Most entries have one of these.
_OF_CALLS = (EntryKind.CALL_INTENT, EntryKind.CALL_DECISION, EntryKind.CALL_OUTCOME)
# Kinds that begin something: beyond the quota they are refused, and what runs may end.
_BEGINNINGS = (EntryKind.CALL_INTENT, EntryKind.SESSION_OPEN)
# LIMIT: what stands around a body in an Entry: keys, kind, hash, session and three numbers.
_HEADER_BYTES = 320
# What an Entry takes at last beyond its frame, for the quota: 34 bytes in the tiles, and two before
# it in its bundle where the frame has twelve. The heads that stay are few.
_TREE_BYTES = 24
# How long an Entry of durability ``batch`` may wait for the disk.
BATCH_S = 0.01
HEARTBEAT_S = 3600.0
# Keys in the one order; each value is spelled as the encoder would: names need no escapes.
_ENTRY = b'{"body":%b,"kind":"%b","mono_ns":%d,"prev":%b,"session":"%b","sseq":%d,"time":%d,"v":1}'
# Looking up a member of an Enum runs Python code; these are looked up for every entry.
_SYNC, _BATCH = Durability.SYNC, Durability.BATCH
_NOTHING: Final[dict[str, Json]] = {}
# RFC 6962 §2.1; copying a hash that has begun is quicker than beginning one.
_new_leaf: Final = sha256(b"\x00").copy


@dataclass(frozen=True, slots=True)
class Clock:
    """Where times come from: nanoseconds since the epoch, and by a clock that never steps back."""

    wall_ns: Callable[[], int] = time.time_ns
    mono_ns: Callable[[], int] = time.monotonic_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a trace is kept. ``batch_s`` is how long entries of durability ``batch`` may wait.

    ``vault`` encrypts openings and blobs. ``on_checkpoint`` is called with each published head and
    its note, in the thread that published it; a TraceInvalid from it ends all recording. Beyond
    ``quota_bytes`` no session and no call is begun. ``heartbeat_s`` is how long nothing may happen
    before the log says that it still lives.
    """

    clock: Clock
    vault: Vault | None = None
    on_checkpoint: OnCheckpoint | None = None
    quota_bytes: int | None = None
    batch_s: float = BATCH_S
    heartbeat_s: float | None = HEARTBEAT_S


SYSTEM_CLOCK: Final = Clock()


class Appending:
    """The state of an open trace, and how entries are added to it. Thread-safe."""

    _checkpointing: Checkpointing

    def __init__(self, folder: Folder, recovered: Recovered, settings: Settings) -> None:
        self._folder, self._settings = folder, settings
        self._wall_ns, self._mono_ns = settings.clock.wall_ns, settings.clock.mono_ns
        self._started_ns = self._mono_ns()
        self._lock, self._health = Lock(), Health()
        self._chains: Chains = recovered.chains
        self._size = recovered.tiles.size
        self._unsigned, self._salts = Unsigned(), Salts()
        self._room_bytes: int | None = None
        if settings.quota_bytes is not None:
            self._room_bytes = settings.quota_bytes - stored_bytes(folder)
        first = recovered.tail.last_file if recovered.tail else self._size
        if recovered.tail is None:
            keep_sessions(folder, first, note_sessions(self._chains))
        self._openings = OpeningStore(folder, vault=settings.vault)
        self._journal = Journal(folder, self._lock, first=first, size=self._size)
        self._commits = Commits(self._journal, self._health)

    def append(
        self,
        kind: EntryKind,
        body: Mapping[str, Json],
        *,
        session: str,
        committed: Mapping[str, Json | bytes] | None = None,
        durability: Durability = Durability.VOLATILE,
        more: bool = False,
        beyond_quota: bool = False,
    ) -> int:
        """Record one Entry and return its index; on return it is as durable as asked.

        ``committed`` fields enter the body as salted commitments; their openings are kept beside
        the tree. With ``more`` nothing is promised before the next Entry, of whatever session, is
        recorded; both then cost one write. ``beyond_quota`` is for what sums up calls that are
        over: it may begin a call although no others are begun any more.

        Raise TraceInvalid: ``trace.body``, ``trace.encoding``, ``trace.too_large``,
        ``trace.quota``, ``chain.*`` and ``call.*`` refuse this Entry alone; ``trace.write_failed``,
        ``trace.interrupted``, ``signer.*``, ``trace.closed`` and ``trace.forked`` mean that nothing
        can be recorded any more.
        """
        data, sealed = self._spell(kind, body, session, committed, beyond_quota)
        later = more or durability is _SYNC
        call = body.get("call")
        index = self._append(kind, data, session, call, sealed, not later, beyond_quota)
        if later:
            if not more:
                self._sync(index)
        elif durability is _BATCH:
            self._commits.within(index, self._settings.batch_s)
        return index

    async def append_async(
        self,
        kind: EntryKind,
        body: Mapping[str, Json],
        *,
        session: str,
        committed: Mapping[str, Json | bytes] | None = None,
    ) -> int:
        """Record one Entry durably, as ``append`` with ``sync`` does, and let other tasks run."""
        data, sealed = self._spell(kind, body, session, committed)
        index = self._append(kind, data, session, body.get("call"), sealed, write=False)
        await self._commits.reached(index)
        return index

    def _spell(
        self,
        kind: EntryKind,
        body: Mapping[str, Json],
        session: str,
        committed: Mapping[str, Json | bytes] | None,
        beyond_quota: bool = False,
    ) -> tuple[bytes, Sequence[Sealed]]:
        if kind not in _OF_CALLS and kind in _RESERVED:
            raise TraceInvalid(f"{kind} is written by the writer itself", code="trace.body")
        if not committed:
            return spell_body(kind, body, _NOTHING), ()
        self._health.refuse_fork()  # a fork has our salts
        commitments, sealed = seal_all(committed, self._salts)
        data = spell_body(kind, body, commitments)
        for one in sealed:
            if one.blob is not None:
                self._write_blobs(kind, session, sealed, beyond_quota)
                break
        return data, sealed

    def _write_blobs(
        self, kind: EntryKind, session: str, sealed: Sequence[Sealed], beyond_quota: bool
    ) -> None:
        """Put blobs on disk before their Entry: only where that may come, and within the quota."""
        size_bytes = sum(len(one.blob or b"") for one in sealed)
        with self._lock:
            self._require_room(kind, beyond_quota, size_bytes)
            if session not in self._chains.open:
                raise no_session(session)
            if self._room_bytes is not None:
                self._room_bytes -= size_bytes
        with self._health.fatal():
            self._openings.blobs(session, sealed)

    def _append(
        self,
        kind: EntryKind,
        body: bytes,
        session: str,
        call: Json = None,
        sealed: Sequence[Sealed] = (),
        write: bool = True,
        beyond_quota: bool = False,
    ) -> int:
        if len(body) > MAX_ENTRY_BYTES - _HEADER_BYTES:
            raise TraceInvalid(
                f"a body of {len(body)} bytes",
                code="trace.too_large",
                hint="commit to large values instead of writing them in clear",
            )
        health = self._health
        if os.getpid() != health.owner_pid:
            health.refuse_fork()  # before the lock: who held it at the fork never lets it go here
        with self._lock:
            index = self._place(kind, body, session, call, sealed, write, beyond_quota)
        unsigned = self._unsigned
        if len(unsigned.entries) >= CHECKPOINT_ENTRIES:
            self._checkpointing.appended(len(unsigned.entries), unsigned.bytes)
        return index

    def _place(
        self,
        kind: EntryKind,
        body: bytes,
        session: str,
        call: Json = None,
        sealed: Sequence[Sealed] = (),
        write: bool = True,
        beyond_quota: bool = False,
    ) -> int:
        """Give an Entry its place in the log; the caller holds the lock."""
        health = self._health
        if health.ended or health.failure is not None or self._room_bytes is not None:
            self._require_room(kind, beyond_quota)
        index, chain = self._size, None
        try:
            chain = self._chains.extend(index, kind, session, cast("str", call))
            data = _ENTRY % (
                body,
                kind.encode(),
                min(self._mono_ns() - self._started_ns, MAX_INTEGER),
                b'"%b"' % chain.prev.encode() if chain.prev else b"null",
                session.encode(),
                chain.sseq,
                self._wall_ns() // 1_000_000,
            )
            hashed = _new_leaf()
            hashed.update(data)
            leaf = hashed.digest()
            chain.prev = leaf.hex()
            lines = self._openings.lines(session, index, sealed) if sealed else b""
            framed = frame(data, leaf, lines)
            self._journal.put(framed, write=write)
            self._size = index + 1
            self._keep(session, data, leaf, lines, len(framed))
        except BaseException as error:
            if chain is not None or not isinstance(error, TraceInvalid):
                self._half_done(error)
            raise  # else it does not fit its chain, and nothing was changed
        return index

    def _keep(
        self, session: str, data: bytes, leaf: bytes, lines: bytes, framed_bytes: int
    ) -> None:
        """Keep what is to be signed and carried on."""
        unsigned = self._unsigned
        unsigned.entries.append((data, leaf))
        if len(unsigned.entries) == 1:
            self._checkpointing.begun()
        if lines:
            unsigned.lines.append((session, lines))
        unsigned.bytes += framed_bytes
        if self._room_bytes is not None:
            self._room_bytes -= framed_bytes + _TREE_BYTES

    def _half_done(self, error: BaseException) -> None:
        """Have nothing appended after half an entry: the next open recovers what was written."""
        if isinstance(error, OSError):
            raise self._health.fail(write_failed(error)) from error
        if isinstance(error, TraceInvalid):
            self._health.fail(error)
        else:
            self._health.interrupted(error)

    def _require_room(
        self, kind: EntryKind, beyond_quota: bool = False, size_bytes: int = 0
    ) -> None:
        """Refuse an Entry, with blobs of this size, that may not come; the caller has the lock."""
        self._health.require_recording()
        room_bytes = self._room_bytes
        if room_bytes is None or beyond_quota or kind not in _BEGINNINGS:
            return
        if room_bytes <= size_bytes:
            raise _over_quota(self._settings.quota_bytes)

    def _sync(self, index: int) -> None:
        with self._health.fatal():
            self._journal.sync(index)

    def _take(self) -> Unsigned:
        """Hand over what is not signed yet; the caller holds the lock."""
        self._journal.write()
        taken, self._unsigned = self._unsigned, Unsigned()
        return taken


def no_session(session: str) -> TraceInvalid:
    """Return the error of an Entry whose session is not open."""
    return TraceInvalid(f"no session {session[:80]!r} is open", code="chain.start")


def _over_quota(quota_bytes: int | None) -> TraceInvalid:
    return TraceInvalid(
        f"the trace has reached its quota of {quota_bytes} bytes",
        code="trace.quota",
        hint="raise the quota, erase old sessions, or begin a new trace",
    )
