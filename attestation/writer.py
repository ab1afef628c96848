"""Step "record": the writer of one trace, the only thing that may change it.

``append`` is the hot path: encode, hash, one write(2). Tiles, signatures and their fsyncs are
made behind it, every 256 entries or every second, by a thread of the writer. After any failure to
record nothing is accepted any more, so that no Call runs unrecorded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Final

from safeconduct.call import Durability, EntryKind, Json
from safeconduct.errors import TraceInvalid

from .chain import Chains, OpenSession
from .checkpoint import Checkpoint
from .encoding import MAX_INTEGER, require_plain
from .entry import Entry, encode_checked, require_body
from .folder import Folder
from .journal import JOURNAL, Journal, JournalTail, journal_files, journal_path, write_failed
from .layout import lock_trace, prepare, require_ours
from .merkle import leaf_hash
from .openings import OpeningStore, Sealed, seal_into
from .reader import CHECKPOINT
from .recovery import Recovered, recover
from .signer import SignerClient
from .tiles import TileStore

FORMAT = "safeconduct/trace/v1"
CHECKPOINT_ENTRIES = 256
CHECKPOINT_INTERVAL_S = 1.0
# LIMIT: entries that wait for their checkpoint; beyond it append makes one itself.
_MAX_PENDING = 4096
_MAX_PENDING_BYTES = 16 << 20
_ROTATE_BYTES = 1 << 20
_CLOSE_TIMEOUT_S = 60.0
# Kinds that only the writer itself may append: they begin, end or repair what it keeps track of.
# A tuple, as hashing an Enum member runs Python code and comparing one does not.
_OWN_KINDS = (
    EntryKind.LOG_OPEN,
    EntryKind.LOG_RECOVERED,
    EntryKind.SESSION_OPEN,
    EntryKind.SESSION_CLOSE,
)


@dataclass(frozen=True, slots=True)
class Clock:
    """Where times come from: nanoseconds since the epoch, and by a clock that never steps back."""

    wall_ns: Callable[[], int] = time.time_ns
    mono_ns: Callable[[], int] = time.monotonic_ns


SYSTEM_CLOCK: Final = Clock()


class TraceWriter:
    """Appends entries to one trace. Every method may be called from any thread.

    INVARIANT: only the process that opened the trace writes it. A fork has copies of the
    descriptors and of the sizes, but not of the threads, and its entries would take the place of
    ours: there, recording raises ``trace.forked`` and ``close`` only drops the copies.
    """

    def __init__(
        self,
        folder: Folder,
        lock_fd: int,
        *,
        origin: str,
        signer: SignerClient,
        recovered: Recovered,
        clock: Clock,
    ) -> None:
        """Take over a recovered trace; use ``open``."""
        self.origin: Final = origin
        self._folder, self._lock_fd, self._signer, self._clock = folder, lock_fd, signer, clock
        self._owner_pid = os.getpid()
        self._started_ns = clock.mono_ns()
        self._tiles: TileStore = recovered.tiles
        self._chains: Chains = recovered.chains
        self._signed = recovered.signed
        self._size = recovered.tiles.size
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0
        tail = recovered.tail
        self._journal = Journal(
            folder, first=tail.last_file if tail else self._size, size=self._size
        )
        self._openings = OpeningStore(folder)
        self._lock = Lock()  # order: _checkpoint_lock before _lock
        self._checkpoint_lock = Lock()
        self._failure: TraceInvalid | None = None
        self._closed = False
        self._active, self._full = Event(), Event()
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="trace-checkpoint")
        self._thread = Thread(target=self._keep_signed, name="trace-checkpoints", daemon=True)
        self.session: Final = self._begin(recovered)
        """Id of the session of this run of the log itself, for entries such as policy.load."""

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        origin: str | None = None,
        signer: SignerClient,
        clock: Clock = SYSTEM_CLOCK,
    ) -> TraceWriter:
        """Create a trace or continue one.

        A new trace without ``origin`` is named after the signer's key and a random number. Raise
        TraceInvalid: ``trace.locked`` (somebody else writes it), ``trace.foreign`` (the folder
        holds something else), ``trace.origin`` (it is another log), ``trace.write_failed``, and
        what recovery and the signer raise.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = Folder(directory)
        except OSError as error:
            raise write_failed(error) from error
        lock_fd = -1
        try:
            require_ours(folder, directory)
            folder.make(JOURNAL, mode=0o700)
            lock_fd = lock_trace(folder)
            origin = prepare(folder, origin, f"{signer.name}/{os.urandom(8).hex()}")
            recovered = recover(folder, origin, signer)
            writer = cls(
                folder, lock_fd, origin=origin, signer=signer, recovered=recovered, clock=clock
            )
        except BaseException as error:
            if lock_fd >= 0:
                os.close(lock_fd)
            folder.close()
            if isinstance(error, OSError):
                raise write_failed(error) from error
            raise
        return writer

    @property
    def size(self) -> int:
        """Return how many entries the log has."""
        return self._size

    def open_session(self, caller: str, origin: str, **facts: Json) -> str:
        """Begin a session and return its id. ``facts`` stand in its first Entry in clear text."""
        session = os.urandom(8).hex()
        body = {"caller": caller, "origin": origin, **facts}
        require_plain(body)
        self._append(EntryKind.SESSION_OPEN, body, session, [])
        return session

    def append(
        self,
        kind: EntryKind,
        body: Mapping[str, Json],
        *,
        session: str,
        committed: Mapping[str, Json | bytes] | None = None,
        durability: Durability = Durability.VOLATILE,
    ) -> int:
        """Record one Entry and return its index; on return it is as durable as asked.

        ``committed`` fields enter the body as salted commitments; their openings are kept beside
        the tree. Raise TraceInvalid: ``trace.body``, ``trace.encoding``, ``trace.too_large``,
        ``chain.*`` and ``call.*`` refuse this Entry alone; ``trace.write_failed``, ``signer.*``,
        ``trace.closed`` and ``trace.forked`` mean that nothing can be recorded any more.
        """
        if kind in _OWN_KINDS:
            raise TraceInvalid(f"{kind} is written by the writer itself", code="trace.body")
        require_plain(body)  # before commitments enter it: those are ours, and flat is fast
        sealed: list[Sealed] = []
        if committed:
            body, sealed = seal_into(body, committed)
        index = self._append(kind, body, session, sealed)
        if durability is Durability.SYNC:
            self._sync(index)
        return index

    def close_session(self, session: str) -> None:
        """End a session and sign what is there. Calls still open become ``unknown``.

        In a fork nothing is done: the session goes on where it was opened.
        """
        if self._is_fork():
            return
        self._end(session, "closed")
        self.checkpoint()

    def checkpoint(self) -> Checkpoint:
        """Make everything recorded so far durable and signed; return the signed head.

        Runs in a thread of the writer: an interrupt of the caller must not leave it half done.
        """
        self._refuse_fork()  # the thread exists only in the process that opened the trace
        try:
            alone = self._aside.submit(self._checkpoint_alone)
        except RuntimeError:
            # The main thread has ended: no new work for other threads, but this one still lives.
            return self._checkpoint_alone()
        return alone.result()

    def _checkpoint_alone(self) -> Checkpoint:
        with self._checkpoint_lock:
            self._require_usable()
            try:
                return self._checkpoint()
            except OSError as error:
                raise self._poison(write_failed(error)) from error
            except TraceInvalid as error:
                raise self._poison(error) from error

    def close(self) -> None:
        """Close open sessions, sign, and release the trace. Raise what kept it from that.

        Never waits on a lost signer, and always releases the lock. In a fork it only closes that
        process's copies of the descriptors; the lock stays with the process that opened the trace.
        """
        if self._closed:
            return
        if self._is_fork():
            self._drop()
            return
        try:
            if self._failure is None:
                for session in [one for one in self._chains.open if one != self.session]:
                    self._end(session, "left open")
                self._end(self.session, "closed")
                self.checkpoint()
        finally:
            self._release()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            with suppress(TraceInvalid):  # the error under way says more
                self.close()

    # -- the hot path ------------------------------------------------------------------------

    def _append(
        self, kind: EntryKind, body: Mapping[str, Json], session: str, sealed: list[Sealed]
    ) -> int:
        require_body(kind, body)
        self._refuse_fork()  # before the lock: whoever held it at the fork never lets go of it here
        with self._lock:
            self._require_usable()
            index = self._size
            chain = self._chains.open.get(session)
            entry = Entry(
                body=dict(body),
                kind=kind,
                mono_ns=min(self._clock.mono_ns() - self._started_ns, MAX_INTEGER),
                prev=chain.prev if chain else None,
                session=session,
                sseq=chain.sseq + 1 if chain else 0,
                time=self._clock.wall_ns() // 1_000_000,
            )
            data = encode_checked(entry)
            leaf = leaf_hash(data)
            try:
                self._chains.follow(index, entry, leaf.hex())
                self._write(index, session, data, leaf, sealed)
            except (KeyboardInterrupt, SystemExit):
                # Half an append may stand: what was written is recovered when the trace is opened.
                self._poison(TraceInvalid("interrupted", code="trace.interrupted"))
                raise
            waiting = len(self._pending)
        if waiting == 1:
            self._active.set()
        elif waiting >= CHECKPOINT_ENTRIES:
            self._full.set()
            if waiting >= _MAX_PENDING or self._pending_bytes >= _MAX_PENDING_BYTES:
                self.checkpoint()
        return index

    def _write(
        self, index: int, session: str, data: bytes, leaf: bytes, sealed: list[Sealed]
    ) -> None:
        """Entry first, openings second: an opening without its Entry would look forged."""
        try:
            self._journal.append(data, leaf)
            if sealed:
                self._openings.write(session, index, sealed)
        except TraceInvalid as error:
            raise self._poison(error) from error
        except OSError as error:
            raise self._poison(write_failed(error)) from error
        self._size = index + 1
        self._pending.append((data, leaf))
        self._pending_bytes += len(data)

    def _sync(self, index: int) -> None:
        try:
            self._journal.sync(index)
        except TraceInvalid as error:
            raise self._poison(error) from error

    def _require_usable(self) -> None:
        if self._failure is not None:
            raise TraceInvalid(
                self._failure.message, code=self._failure.code, hint=self._failure.hint
            )
        if self._closed:
            raise TraceInvalid("the trace is closed", code="trace.closed")

    def _is_fork(self) -> bool:
        return os.getpid() != self._owner_pid

    def _refuse_fork(self) -> None:
        if self._is_fork():
            raise TraceInvalid(
                "this process is a fork of the one that writes the trace",
                code="trace.forked",
                hint="open a trace of its own in each process",
            )

    def _poison(self, error: TraceInvalid) -> TraceInvalid:
        self._failure = self._failure or error
        self._active.set()
        self._full.set()
        return error

    # -- sessions ----------------------------------------------------------------------------

    def _begin(self, recovered: Recovered) -> str:
        """Write the first entries of this run: log.open and, after a crash, the repairs."""
        run = os.urandom(8).hex()
        lost = {} if recovered.tail is None else dict(self._chains.open)
        body: dict[str, Json] = {
            "format": FORMAT,
            "origin": self.origin,
            "key": self._signer.key.line,
            "signer_isolation": self._signer.isolation,
            "size": self._size,
        }
        try:
            self._append(EntryKind.LOG_OPEN, body, run, [])
            if recovered.tail is not None:
                self._append(EntryKind.LOG_RECOVERED, _lost_facts(recovered.tail, lost), run, [])
            for session in lost:
                self._end(session, "lost")
            self.checkpoint()
        except BaseException:
            self._openings.close()
            self._journal.close()
            raise
        self._thread.start()
        return run

    def _end(self, session: str, status: str) -> None:
        chain = self._chains.open.get(session)
        if chain is None:
            raise TraceInvalid(f"no session {session!r} is open", code="chain.start")
        for call in list(chain.calls):
            unknown: dict[str, Json] = {"call": call, "status": "unknown"}
            self._append(EntryKind.CALL_OUTCOME, unknown, session, [])
        self._append(EntryKind.SESSION_CLOSE, {"status": status}, session, [])
        with self._lock:
            self._openings.close_session(session)

    # -- behind the hot path -----------------------------------------------------------------

    def _keep_signed(self) -> None:
        """Sign every 256 entries, or a second after the first that is not signed yet."""
        while True:
            self._active.wait()
            self._full.wait(CHECKPOINT_INTERVAL_S)
            if self._closed or self._failure is not None:
                return
            with suppress(TraceInvalid):  # kept in _failure; every later append raises it
                self._checkpoint_alone()

    def _checkpoint(self) -> Checkpoint:
        """INVARIANT: journal and tiles are durable before the signer is asked."""
        with self._lock:
            if self._size == self._signed.size and not self._pending:
                return self._signed
            batch, self._pending, self._pending_bytes = self._pending, [], 0
            self._active.clear()
            self._full.clear()
            size = self._size
            if self._journal.size_bytes >= _ROTATE_BYTES:
                self._journal.rotate()
            self._openings.sync()
        if size:
            self._journal.sync(size - 1)
        self._tiles.append(batch)
        self._tiles.flush()
        head = Checkpoint(origin=self.origin, size=size, root=self._tiles.root())
        proof = self._tiles.prove_consistency(self._signed.size, size)
        line = self._signer.sign(head, old_size=self._signed.size, proof=proof)
        note = f"{head.text()}\n{line}".encode()
        self._folder.write(f"checkpoints/{size}", note, durable=False)
        self._folder.write(CHECKPOINT, note)
        self._signed = head
        self._journal.remove_before(size)
        return head

    def _release(self) -> None:
        with self._checkpoint_lock, self._lock:
            self._closed = True
        self._active.set()
        self._full.set()
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._aside.shutdown()
        with suppress(OSError):
            self._openings.close()
        self._journal.close()
        if self._failure is None and self._signed.size == self._size:
            for first in journal_files(self._folder):
                self._folder.remove(journal_path(first))
        os.close(self._lock_fd)
        self._folder.close()

    def _drop(self) -> None:
        """Close a fork's copies of the descriptors, and wait for nothing: no thread came along.

        The lock is one of the open file, flock(2): it is held as long as the other copy is open.
        """
        self._closed = True
        closings = (self._openings.close, self._journal.close, self._folder.close)
        for close in (*closings, lambda: os.close(self._lock_fd)):
            # Where another thread was between two steps at the fork, a number may be stale.
            with suppress(OSError):
                close()


def _lost_facts(tail: JournalTail, lost: Mapping[str, OpenSession]) -> dict[str, Json]:
    return {
        "dropped_bytes": tail.dropped_bytes,
        "dropped_sha256": tail.dropped_sha256,
        "sessions": sum(not one.is_log for one in lost.values()),
        "calls": sum(len(one.calls) for one in lost.values()),
    }
