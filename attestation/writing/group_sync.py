"""Step "record": one fdatasync(2) for all who wait for the disk at the same time.

Who comes alone syncs in its own thread. Those who come meanwhile wait, and a thread of ours goes
on for them, group after group, until nobody waits. It begins when the last of the group before
has been woken: most come back with their next entry, and a sync in the middle of that would serve
few of them and take turns with them at the interpreter's lock.

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
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from safeconduct.attestation.journal import write_failed

_EVERY = 2**63
_STOP_TIMEOUT_S = 60.0
# From so many on that are woken together, the next sync waits for them, but never longer than this.
_MANY = 4
_GATHER_S = 0.01


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


class _Last(_Waiter):
    """Stands behind the last one of a group: waking it tells the thread that all are awake."""

    __slots__ = ("told",)

    def __init__(self, told: SimpleQueue[_Waiter | None]) -> None:
        super().__init__(-1)
        self.told = told

    def wake(self) -> None:
        self.told.put(self)


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
        self._gathering: _Last | None = None  # the group that is being woken, by its end
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
                    self._left.put(self._ours)
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
        leader = self._heir(waiting, len(done))
        if leader is not None and leader is not self._ours:
            waiting = [one for one in waiting if one is not leader]
            done.append(leader)
        gathering = _Last(self._left) if done and leader is self._ours else None
        following: _Waiter | None = gathering
        for one in done:
            one.following = following
            following = one
        # No call from here on: an interrupt finds all of it done, or nothing.
        mine.following = following
        self._waiting = waiting
        self._gathering = gathering
        self._leader = leader

    def _heir(self, waiting: list[_Waiter], done: int) -> _Waiter | None:
        """Return which waiter is to lead, as it has work of its own, or else the thread.

        The thread also where nobody waits yet, but many are about to come back.
        """
        if self._thread is None:
            return waiting[0] if waiting else None
        if not waiting:
            return self._ours if done >= _MANY and self.failure is None else None
        return next((one for one in waiting if one.index == _EVERY), self._ours)

    def _lead_on(self) -> None:
        goes_on = True
        while goes_on:
            goes_on = self._hear(None)
            while self._leader is self._ours:
                if self._gathering is not None:
                    goes_on = self._hear(_GATHER_S) and goes_on
                if self._waiting:
                    try:
                        self._lead(self._sync)
                    except BaseException as error:
                        # Those who wait raise it themselves.
                        self.failure = self.failure or OSError(EIO, f"sync: {error}")
                self._pass_on(self._ours)

    def _hear(self, within_s: float | None) -> bool:
        """Wait for work; False where it is to end. What somebody left is done here.

        Within so many seconds for the group that is being woken, and not for one before it.
        """
        try:
            left = self._left.get(timeout=within_s)
            while type(left) is _Last and left is not self._gathering:
                left = self._left.get(timeout=within_s)
        except Empty:
            left = self._ours
        self._gathering = None if within_s is not None else self._gathering
        if left is not None and left is not self._ours and type(left) is not _Last:
            self._take_over(left)
        return left is not None

    def _take_over(self, left: _Waiter) -> None:
        """Do what somebody left: nobody may wait for one that went away."""
        with self._turn:
            if left in self._waiting:
                self._waiting.remove(left)
        self._pass_on(left)
