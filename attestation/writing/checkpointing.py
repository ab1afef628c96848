"""Step "record": what happens behind the hot path: when heads are signed and published.

A thread signs every 256 entries, or a second after the first that is not signed yet, and says
once an hour that the log still lives. INVARIANT: entries are on disk in the journal before the
signer is asked, and a journal file goes only when tiles, openings and a note over its entries are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event, Lock, RLock, Thread, current_thread, main_thread
from time import monotonic

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.journal import write_failed
from safeconduct.attestation.privacy.openings import OpeningStore
from safeconduct.errors import TraceInvalid

from .heads import Heads
from .health import Health
from .journal_writer import Journal
from .sessions import forget_sessions, keep_sessions

CHECKPOINT_ENTRIES = 256
CHECKPOINT_INTERVAL_S = 1.0
# A signature takes some fsyncs of the signer: many entries a second share one, and the disk.
_SIGN_PAUSE_S = 0.02
# LIMIT: what waits to be signed, and to be published; beyond it append has to wait itself.
_MAX_UNSIGNED = 8192
_MAX_WAITING_BYTES = 32 << 20
_TURN_OVER_BYTES = 4 << 20
_CLOSE_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Unsigned:
    """What was appended since the last signature, and the openings and ends not yet in files."""

    entries: list[tuple[bytes, bytes]] = field(default_factory=list[tuple[bytes, bytes]])
    lines: list[tuple[str, bytes]] = field(default_factory=list[tuple[str, bytes]])
    ended: list[str] = field(default_factory=list[str])
    bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What is shared with the writer. Its lock guards what ``take`` takes and ``pending`` sees."""

    lock: Lock
    health: Health
    take: Callable[[], Unsigned]
    pending: Callable[[], bool]
    sessions: Callable[[], bytes]
    heartbeat: Callable[[], object]


class Checkpointing:
    """Signs and publishes. Thread-safe; ``sign`` does not wait for publishing to end."""

    def __init__(
        self,
        log: Log,
        folder: Folder,
        heads: Heads,
        journal: Journal,
        openings: OpeningStore,
        *,
        heartbeat_s: float | None,
    ) -> None:
        self._log, self._folder, self._heads = log, folder, heads
        self._journal, self._openings = journal, openings
        self._heartbeat_s = heartbeat_s
        self._waiting = Unsigned()
        self._signing, self._publishing = RLock(), Lock()  # order: _publishing first
        self._active, self._full, self._stop = Event(), Event(), Event()
        self._publish_at = 0.0
        self._aside = ThreadPoolExecutor(2, thread_name_prefix="trace-sign")
        self._thread = Thread(target=self._keep_signed, name="trace-checkpoints", daemon=True)
        log.health.on_failure = self._wake

    @property
    def published(self) -> int:
        """Return the size of the head published last."""
        return self._heads.published

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def begun(self) -> None:
        """Hear, under the lock, of the first Entry that is not signed: no interrupt loses it."""
        self._active.set()

    def appended(self, waiting: int, waiting_bytes: int) -> None:
        """Hear that much is unsigned after an append, which does not hold the lock any more."""
        self._full.set()
        if waiting >= _MAX_UNSIGNED or waiting_bytes >= _MAX_WAITING_BYTES:
            self.sign()
        if self._waiting.bytes >= _MAX_WAITING_BYTES:
            self.checkpoint()

    def sign(self) -> Checkpoint:
        """Have all that was appended on disk and signed; it is published within a second."""
        return self._beside(self._sign_alone)

    def checkpoint(self, *, keep: bool = False, turn_over: bool = False) -> Checkpoint:
        """Have all that was appended on disk, signed and published.

        ``keep`` keeps the head in ``checkpoints/``; ``turn_over`` leaves no published entry and no
        opening in the journal.
        """
        return self._beside(lambda: self._checkpoint_alone(keep=keep, turn_over=turn_over))

    @contextmanager
    def held(self) -> Generator[Checkpoint]:
        """Sign and publish all that was appended; inside the block no further head is signed."""
        with self._publishing, self._signing:
            with self._log.health.unbroken():
                head = self._sign_alone()
                self._publish()
            yield head

    def add_cosignatures(self, note: bytes, lines: Sequence[str]) -> None:
        """Put witnesses' lines into what is stored of a note. What fails harms no entry."""
        try:
            self._heads.add_cosignatures(note, lines)
        except OSError as error:
            raise write_failed(error) from error

    def close(self) -> None:
        """End the threads."""
        try:
            self._wake()
            if self._thread.ident is not None:
                self._thread.join(_CLOSE_TIMEOUT_S)
        finally:
            self._aside.shutdown()
            # Who signs in a thread of their own is waited for as well.
            for lock in (self._publishing, self._signing):
                if lock.acquire(timeout=_CLOSE_TIMEOUT_S):
                    lock.release()

    def _wake(self) -> None:
        self._stop.set()
        self._active.set()
        self._full.set()

    def _beside(self, work: Callable[[], Checkpoint]) -> Checkpoint:
        """Work in a thread of ours: an interrupt of the caller must not leave it half done.

        Python runs handlers of signals in the main thread alone (`signal`, "Signals and threads").
        """
        if current_thread() is not main_thread():
            return work()
        try:
            alone = self._aside.submit(work)
        except RuntimeError:
            # The main thread has ended: no new work for other threads, but this one still lives.
            return work()
        return alone.result()

    def _keep_signed(self) -> None:
        try:
            while not self._stop.is_set():
                with suppress(TraceInvalid):  # kept by Health; every later append raises it
                    self._keep_signed_once()
        except BaseException as error:
            # Not raised: nobody would see it. Else recording would go on, and nothing be signed.
            self._log.health.interrupted(error)

    def _keep_signed_once(self) -> None:
        if not self._active.wait(self._heartbeat_s):
            self._log.heartbeat()
        self._full.wait(CHECKPOINT_INTERVAL_S)
        if self._stop.is_set():
            return
        # Publishing takes many more fsyncs: it waits until there is time, or a second.
        busy = self._full.is_set() and monotonic() < self._publish_at
        if busy and self._waiting.bytes < _MAX_WAITING_BYTES // 2:
            self._sign_alone()
        else:
            self._checkpoint_alone()
        self._stop.wait(_SIGN_PAUSE_S)

    def _checkpoint_alone(self, *, keep: bool = False, turn_over: bool = False) -> Checkpoint:
        with self._publishing, self._log.health.unbroken():
            if turn_over:
                self._log.health.require_usable()
                self._turn_over()
            head = self._sign_alone(keep=keep)
            self._publish()
            return head

    def _sign_alone(self, *, keep: bool = False) -> Checkpoint:
        with self._signing, self._log.health.unbroken():
            self._log.health.require_usable()
            with self._log.lock:
                taken = self._log.take()
                self._full.clear()
            if taken.entries:
                self._journal.sync(self._heads.size + len(taken.entries) - 1)
            self._waiting.lines += taken.lines
            self._waiting.ended += taken.ended
            self._waiting.bytes += taken.bytes
            return self._heads.sign(taken.entries, keep=keep)

    def _publish(self) -> None:
        with self._signing:  # openings and head of the same moment
            waiting, self._waiting = self._waiting, Unsigned()
            news = self._heads.news()
            with self._log.lock:
                if not self._log.pending():
                    self._active.clear()
        self._publish_at = monotonic() + CHECKPOINT_INTERVAL_S
        by_session: dict[str, list[bytes]] = {}
        for session, lines in waiting.lines:
            by_session.setdefault(session, []).append(lines)
        for session, parts in by_session.items():
            self._openings.put(session, b"".join(parts))
        for session in waiting.ended:
            self._openings.close_session(session)
        self._heads.publish(news)
        covered = self._journal.files_before(news.head.size)
        if covered:
            self._openings.sync()
            self._journal.remove(covered)
            forget_sessions(self._folder, before=self._journal.first)
        if self._journal.size_bytes >= _TURN_OVER_BYTES:
            self._turn_over()

    def _turn_over(self) -> None:
        """Begin a new journal file; the old one goes when a published head covers it."""
        sessions: list[tuple[int, bytes]] = []
        self._journal.turn_over(lambda first: sessions.append((first, self._log.sessions())))
        for first, data in sessions:
            keep_sessions(self._folder, first, data)
