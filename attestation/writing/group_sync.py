"""Step "record": one fdatasync(2) for all who wait for the disk at the same time.

Who comes alone syncs in its own thread. Those who come meanwhile wait, and a thread of ours goes
on for them, group after group, until nobody waits: between two syncs nobody has to be woken first.

An interrupt may end a leader, or a waiter that is to wake the next, between any two steps. What
they leave is then handed to that thread, which no interrupt reaches (signal(7): Python runs
handlers in the main thread alone), by one call of C code: none can come in before it. Each step
can be done again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EBADF, EIO
from queue import SimpleQueue
from threading import Lock, Thread

from safeconduct.attestation.journal import write_failed

_EVERY = 2**63
_STOP_TIMEOUT_S = 60.0


@dataclass(slots=True, eq=False)
class _Waiter:
    """One that waits until entry ``index`` is on disk, or leads until it is."""

    index: int
    gate: Lock = field(default_factory=Lock)
    following: _Waiter | None = None

    def wake_next(self) -> None:
        """Wake one more of those who were done at the same time.

        Each wakes the next: all at once would only queue up for the interpreter's lock, which
        takes longer than their work.
        """
        if self.following is not None:
            self.following.wake()

    def wake(self) -> None:
        """Have it look whether it is done or leads; it may be told so twice."""
        with suppress(RuntimeError):
            self.gate.release()


class GroupSync:
    """Who leads, who waits, and up to which entry all is on disk.

    ``sync`` makes everything durable that was put so far, and returns how many entries that are.
    Only the leader calls it. After one failure nothing is accepted any more.
    """

    def __init__(self, sync: Callable[[], int]) -> None:
        self._sync = sync
        self._synced = 0
        self._turn = Lock()
        self._leader: _Waiter | None = None
        self._waiting: list[_Waiter] = []
        # Who left something to the thread: work to lead, or others to wake. None ends it.
        self._left: SimpleQueue[_Waiter | None] = SimpleQueue()
        self._ours = _Waiter(-1)  # stands for the thread
        self._thread: Thread | None = None
        self.failure: OSError | None = None

    def start(self) -> None:
        """Start the thread that leads while many wait; until then they lead in turn."""
        self._thread = Thread(target=self._lead_on, name="trace-sync", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Whoever still waits, or comes later, finds the journal closed."""
        with self._turn:
            self.failure = self.failure or OSError(EBADF, "the trace is closed")
            for one in self._waiting:
                one.wake()
            self._waiting = []
        if self._thread is not None:
            self._left.put(None)
            self._thread.join(_STOP_TIMEOUT_S)

    def require_sound(self) -> None:
        """Raise TraceInvalid ``trace.write_failed`` after the first failure."""
        if self.failure is not None:
            raise write_failed(self.failure)

    def reach(self, index: int) -> None:
        """Return once entry ``index`` is on disk."""
        self._take_turn(index, self._sync)

    def alone(self, work: Callable[[], int]) -> None:
        """Do work of its own as the leader: nobody syncs meanwhile. It returns as ``sync`` does."""
        self._take_turn(_EVERY, work)

    def _take_turn(self, index: int, work: Callable[[], int]) -> None:
        mine = _Waiter(index)
        try:
            if self._leads(mine):
                self.require_sound()
                self._lead(work)
                self._pass_on(mine)
                if self._leader is self._ours:
                    self._left.put(mine)
        except BaseException:
            self._left.put(mine)  # the first call here, and C code: no interrupt comes before it
            if self._thread is None:
                self._take_over(mine)
            raise

    def _leads(self, mine: _Waiter) -> bool:
        """Wait until the entry is on disk, or until it is this one's turn to lead."""
        with self._turn:
            if self._synced > mine.index:
                return False
            self.require_sound()
            if self._leader is None:
                self._leader = mine
                return True
            mine.gate.acquire()
            self._waiting.append(mine)
        while True:
            mine.gate.acquire()  # until a leader releases it
            if self._leader is mine:
                mine.wake_next()
                return True
            if self._synced > mine.index or self.failure is not None:
                mine.wake_next()
                if self._synced <= mine.index:
                    self.require_sound()
                return False

    def _lead(self, work: Callable[[], int]) -> None:
        try:
            reached = work()
        except OSError as error:
            self.failure = self.failure or error
            raise write_failed(error) from error
        with self._turn:
            self._synced = max(self._synced, reached)

    def _pass_on(self, mine: _Waiter) -> None:
        """Wake all whose entries are on disk, and have somebody lead where others wait."""
        with self._turn:
            if self._leader is mine:
                self._choose(mine)
        mine.wake_next()

    def _choose(self, mine: _Waiter) -> None:
        """Line up those to wake behind this leader, and name the next one."""
        waiting, done = self._waiting, []
        if self.failure is None:
            waiting = [one for one in waiting if one.index >= self._synced]
            done = [one for one in self._waiting if one.index < self._synced]
        else:
            waiting, done = [], waiting
        leader = self._heir(waiting) if waiting else None
        if leader is not None and leader is not self._ours:
            waiting = [one for one in waiting if one is not leader]
            done.append(leader)
        following: _Waiter | None = None
        for one in done:
            one.following = following
            following = one
        # No call from here on: an interrupt finds all of it done, or nothing.
        mine.following = following
        self._waiting = waiting
        self._leader = leader

    def _heir(self, waiting: list[_Waiter]) -> _Waiter:
        """Return which waiter is to lead, as it has work of its own, or else the thread."""
        if self._thread is None:
            return waiting[0]
        return next((one for one in waiting if one.index == _EVERY), self._ours)

    def _lead_on(self) -> None:
        while (left := self._left.get()) is not None:
            self._take_over(left)
            while self._leader is self._ours:
                try:
                    self._lead(self._sync)
                except BaseException as error:
                    # Those who wait raise it themselves.
                    self.failure = self.failure or OSError(EIO, f"sync: {error}")
                self._pass_on(self._ours)

    def _take_over(self, left: _Waiter) -> None:
        """Do what somebody left: nobody may wait for one that went away."""
        with self._turn:
            if left in self._waiting:
                self._waiting.remove(left)
        self._pass_on(left)
