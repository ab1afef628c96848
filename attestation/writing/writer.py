"""Step "record": the writer of one trace, the only thing that may change it.

``append`` is the hot path: encode, hash, one write(2). Signatures, tiles and their fsyncs are made
behind it, every 256 entries or every second, by a thread (checkpointing.py). After any failure to
record nothing is accepted any more, so that no Call runs unrecorded.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from types import TracebackType

from safeconduct.attestation.bodies import spell_body
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.journal import (
    journal_files,
    write_failed,
)
from safeconduct.attestation.layout import lock_trace, open_ours, prepare
from safeconduct.attestation.privacy.openings import OpeningStore
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.attestation.signing.signer import SignerClient
from safeconduct.call import EntryKind, Json
from safeconduct.errors import TraceInvalid

from .appending import BATCH_S, HEARTBEAT_S, SYSTEM_CLOCK, Clock, Settings
from .checkpointing import Checkpointing, Log
from .heads import Heads, OnCheckpoint
from .recovery import Recovered, recover
from .run import Run
from .sessions import forget_sessions, note_sessions


class TraceWriter(Run):
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
        settings: Settings,
    ) -> None:
        """Take over a recovered trace; use ``open``."""
        super().__init__(folder, recovered, settings)
        self.origin = origin
        self._lock_fd = lock_fd
        self._closing = RLock()
        heads = Heads(
            folder,
            signer,
            origin=origin,
            tiles=recovered.tiles,
            signed=recovered.signed,
            on_checkpoint=settings.on_checkpoint,
        )
        log = Log(
            lock=self._lock,
            health=self._health,
            take=self._take,
            pending=lambda: bool(self._unsigned.entries),
            sessions=lambda: note_sessions(self._chains),
            heartbeat=self._heartbeat,
        )
        self._checkpointing = Checkpointing(
            log, folder, heads, self._journal, self._openings, heartbeat_s=settings.heartbeat_s
        )
        self.session = self._begin(recovered, signer)
        """Id of the session of this run of the log itself, for entries such as policy.load."""

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        origin: str | None = None,
        signer: SignerClient,
        clock: Clock = SYSTEM_CLOCK,
        vault: Vault | None = None,
        on_checkpoint: OnCheckpoint | None = None,
        quota_bytes: int | None = None,
        batch_s: float = BATCH_S,
        heartbeat_s: float | None = HEARTBEAT_S,
    ) -> TraceWriter:
        """Create a trace or continue one; ``Settings`` says what the options are.

        A new trace without ``origin`` is named after the signer's key and a random number. Raise
        TraceInvalid: ``trace.locked`` (somebody else writes it), ``trace.foreign`` (the folder
        holds something else), ``trace.origin`` (it is another log), ``trace.write_failed``, and
        what recovery and the signer raise.
        """
        settings = Settings(
            clock=clock,
            vault=vault,
            on_checkpoint=on_checkpoint,
            quota_bytes=quota_bytes,
            batch_s=batch_s,
            heartbeat_s=heartbeat_s,
        )
        try:
            folder = open_ours(directory)
        except OSError as error:
            raise write_failed(error) from error
        lock_fd = -1
        try:
            lock_fd = lock_trace(folder)
            origin = prepare(folder, origin, f"{signer.name}/{os.urandom(8).hex()}")
            recovered = recover(folder, origin, signer)
            writer = cls(
                folder,
                lock_fd,
                origin=origin,
                signer=signer,
                recovered=recovered,
                settings=settings,
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

    @property
    def openings(self) -> OpeningStore:
        """Return where openings are kept, for those who erase them."""
        return self._openings

    def open_session(self, caller: str, origin: str, **facts: Json) -> str:
        """Begin a session and return its id. ``facts`` stand in its first Entry in clear text."""
        session = os.urandom(8).hex()
        body = {"caller": caller, "origin": origin, **facts}
        data = spell_body(EntryKind.SESSION_OPEN, body, {})
        self._health.refuse_fork()
        with self._lock:  # a session refused leaves no key
            self._require_room(EntryKind.SESSION_OPEN)
        try:
            self._openings.prepare(session)
        except OSError as error:  # the vault's disk; the trace itself goes on
            raise write_failed(error) from error
        self._append(EntryKind.SESSION_OPEN, data, session)
        return session

    def close_session(self, session: str) -> None:
        """End a session and sign what is there. Calls still open become ``unknown``.

        In a fork nothing is done: the session goes on where it was opened.
        """
        if self._health.is_fork:
            return
        self._end(session, "closed")
        self.checkpoint()

    def sign(self) -> Checkpoint:
        """Make everything recorded so far durable and signed; return the signed head.

        On return the signer remembers the head on its own disk and will sign nothing that
        contradicts it. The trace's readers find it there within a second.
        """
        self._health.refuse_fork()  # the thread exists only in the process that opened the trace
        return self._checkpointing.sign()

    def checkpoint(self, *, keep: bool = False) -> Checkpoint:
        """Do the same, and put the signed head and its tree on disk for everybody to read.

        ``keep`` has the head stay in ``checkpoints/`` when later ones come. Runs in a thread of
        the writer: an interrupt of the caller must not leave it half done.
        """
        self._health.refuse_fork()
        return self._checkpointing.checkpoint(keep=keep)

    @contextmanager
    def held(self) -> Generator[Checkpoint]:
        """Do the same, and sign no further head inside the block; recording goes on meanwhile.

        For what is shown to the signer about the head that it signed last.
        """
        self._health.refuse_fork()
        with self._checkpointing.held() as head:
            yield head

    def empty_journal(self) -> Checkpoint:
        """Do the same, and leave in the journal no opening of what was recorded before."""
        self._health.refuse_fork()
        return self._checkpointing.checkpoint(turn_over=True)

    def add_cosignatures(self, note: bytes, lines: Sequence[str]) -> None:
        """Put witnesses' lines beside the log's own in what is stored of one of its signed notes.

        What fails here is raised and harms no entry: ``trace.write_failed``, ``note.invalid``.
        """
        self._health.refuse_fork()
        self._health.require_usable()
        self._checkpointing.add_cosignatures(note, lines)

    def close(self) -> None:
        """Close open sessions, sign, and release the trace. Raise what kept it from that.

        Never waits on a lost signer, and always releases the lock; what an interrupt broke off is
        done by calling it again. Of several threads, the others wait for the first. In a fork it
        only closes that process's copies of the descriptors; the lock stays with the process that
        opened the trace.
        """
        if self._health.is_fork:
            self._drop()
            return
        with self._closing:
            if self._lock_fd < 0:
                return  # somebody else was quicker
            try:
                if self._health.failure is None and not self._health.closed:
                    self._end_all()
                    self.checkpoint(keep=True)
            finally:
                self._release()
            if self._health.failure is not None:
                raise self._health.failure

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

    def _release(self) -> None:
        """End the threads, close the files and give the trace back, each whatever came before."""
        with self._lock:
            self._health.ended = self._health.closed = True
        try:
            self._stop()
        finally:
            try:
                self._close_files()
            finally:
                self._give_back()

    def _stop(self) -> None:
        try:
            self._commits.close()
        finally:
            try:
                self._checkpointing.close()
            finally:
                self._journal.stop()

    def _close_files(self) -> None:
        # What fails is kept by Health: ``close`` raises it.
        with suppress(TraceInvalid), self._health.fatal():
            try:
                self._openings.close()
            finally:
                self._journal.close()
            if self._health.failure is None and self._checkpointing.published == self._size:
                # Oldest first: what stays must follow on without a gap. What a failure
                # leaves of it, the next open takes for a crash.
                self._journal.remove(journal_files(self._folder))
                forget_sessions(self._folder, before=self._size + 1)

    def _give_back(self) -> None:
        lock_fd, self._lock_fd = self._lock_fd, -1
        try:
            self._folder.close()
        finally:
            os.close(lock_fd)

    def _drop(self) -> None:
        """Close a fork's copies of the descriptors, and wait for nothing: no thread came along.

        The lock is one of the open file, flock(2): it is held as long as the other copy is open.
        """
        if self._health.closed:
            return
        self._health.ended = self._health.closed = True
        for close in (self._openings.close, self._journal.close, self._give_back):
            # Where another thread was between two steps at the fork, a number may be stale.
            with suppress(OSError):
                close()
