"""Step "sandbox": sandboxes made ahead of the calls that will take them.

A pool holds the template of one plan; a few sandboxes wait in its queue, and none is ever used
twice. The native side makes them: the first ones when it is told to, and by itself another one in
the place of each that is gone.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress

from safeconduct.errors import SandboxFailed

from .template import Template, Waiting

# LIMIT: sandboxes that wait in each pool, plans that have a pool, seconds a pool lives unused.
AHEAD, PLANS_MAX, IDLE_SECONDS = 2, 8, 60.0
_TAKE_SECONDS = 20.0


class Pool:
    """The waiting sandboxes of one plan. Safe to use from several threads."""

    def __init__(self, template: Template, ahead: int) -> None:
        self.template = template
        self.used_at = time.monotonic()
        self.busy = 0
        self.failed = False
        self._ahead = ahead
        # How many were asked for and did not arrive here yet; how many will always be made again.
        self._asked = self._standing = 0
        self._at_hand: deque[Waiting] = deque()
        self._lock = threading.Lock()

    def take(self) -> Waiting:
        """Take a sandbox, made ahead or now. The caller has counted itself in ``busy``."""
        with suppress(IndexError):
            return self._at_hand.popleft()
        try:
            with self._lock:
                if not self._asked:
                    self._ask()
                self._asked -= 1
            return self.template.take(_TAKE_SECONDS)
        except BaseException:
            self.failed = True
            raise

    def reach(self) -> None:
        """Have the next sandbox at hand, if one waits: for when there is time. Never waits."""
        if self._at_hand or self.failed:
            return
        with self._lock:
            if not self._asked:
                return
            self._asked -= 1
        try:
            waiting = self.template.take_ready()
        except SandboxFailed:
            self.failed = True  # the next call finds out
            return
        if waiting is None:
            with self._lock:
                self._asked += 1
        else:
            self._at_hand.append(waiting)
            self._drop_if_failed()

    def give_back(self, used: Waiting | None = None) -> None:
        """Note that a call is over, and end its sandbox if it still lives."""
        if used is not None:
            used.close()
        with self._lock:
            self.busy -= 1
            self.used_at = time.monotonic()
            if used is not None:
                self._asked += used.again
            if not self.failed:
                with suppress(SandboxFailed):  # the next call finds out
                    while self._standing < self._ahead:
                        self._ask()
            elif not self.busy:
                self._close()

    def _ask(self) -> None:
        again = self._standing < self._ahead
        self.template.ask(again=again)
        self._standing += again
        self._asked += 1

    def close(self) -> None:
        """End the template and all of its sandboxes."""
        self.failed = True
        with self._lock:
            self._close()

    def _close(self) -> None:
        self.template.close()
        self._drop()

    def _drop_if_failed(self) -> None:
        if self.failed:
            self._drop()

    def _drop(self) -> None:
        with suppress(IndexError):  # another thread may be at it too
            while True:
                self._at_hand.popleft().close()


class Pools:
    """The pools of one runtime, by plan. Safe to use from several threads."""

    def __init__(self, *, ahead: int = AHEAD) -> None:
        self._ahead = ahead
        self._pools: dict[Hashable, Pool] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._keeper: threading.Thread | None = None
        self._owner_pid = os.getpid()

    def find(self, key: Hashable) -> Pool | None:
        """Return the pool of a plan as ``reserve`` does, if there is one that works."""
        with self._lock:
            pool = self._pools.get(key)
            if pool is None or pool.failed or os.getpid() != self._owner_pid:
                return None
            pool.busy += 1
            return pool

    def reserve(
        self, key: Hashable, make: Callable[[], Template], *, ahead: int | None = None
    ) -> Pool:
        """Return the pool of a plan, making its template if there is none that works.

        It stays open until ``give_back`` is called on it. ``ahead`` is how many sandboxes shall
        wait in it, where not as many as usual.
        """
        with self._lock:
            if os.getpid() != self._owner_pid:
                raise SandboxFailed("The sandboxes belong to another process.", step="pool")
            pool = self._pools.get(key)
            if pool is None or pool.failed:
                if pool is not None and not pool.busy:
                    pool.close()
                pool = self._pools[key] = Pool(make(), self._ahead if ahead is None else ahead)
                self._make_room()
                self._start_keeper()
            pool.busy += 1
            return pool

    def has(self, key: Hashable) -> bool:
        """Tell whether a plan has a pool that works, as far as is known."""
        pool = self._pools.get(key)
        return pool is not None and not pool.failed

    def distrust(self) -> None:
        """Use no sandbox any more that waits now: something ended one that was in use."""
        with self._lock:
            for key, pool in list(self._pools.items()):
                pool.failed = True
                if not pool.busy:
                    self._pools.pop(key).close()

    def _start_keeper(self) -> None:
        if self._keeper is None:
            self._keeper = threading.Thread(
                target=self._keep, name="safeconduct-pools", daemon=True
            )
            self._keeper.start()

    def close(self) -> None:
        """End every pool. In a fork only the copies of their sockets are closed."""
        self._closing.set()
        with self._lock:
            pools = [*self._pools.values()]
            self._pools.clear()
        for pool in pools:
            pool.close()
        if self._keeper is not None and os.getpid() == self._owner_pid:
            self._keeper.join()

    def _make_room(self) -> None:
        idle = [key for key, pool in self._pools.items() if not pool.busy]
        idle.sort(key=lambda key: self._pools[key].used_at)
        for key in idle[: max(0, len(self._pools) - PLANS_MAX)]:
            self._pools.pop(key).close()

    def _keep(self) -> None:
        """Empty what nobody has used for a while."""
        while not self._closing.wait(IDLE_SECONDS / 4):
            before = time.monotonic() - IDLE_SECONDS
            with self._lock:
                idle = [k for k, p in self._pools.items() if not p.busy and p.used_at < before]
                for key in idle:
                    self._pools.pop(key).close()
