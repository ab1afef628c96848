"""Step "adapter": blocking calls in worker threads, beside any event loop.

anyio lends forty threads to the whole program. Forty calls that hang, or wait for a person, would
hold up every other session, what else the program does in threads, and the end of this session.
So each session, and each sub-agent, borrows from a number of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import anyio.to_thread
from anyio.lowlevel import RunVar

# LIMIT: calls of one session, or of one of its sub-agents, that an event loop waits for.
_THREADS_MAX = 40

_ResultT = TypeVar("_ResultT")
_Limiters = WeakKeyDictionary[object, anyio.CapacityLimiter]
# A limiter belongs to one event loop, and a Runtime to none.
_limiters: RunVar[_Limiters] = RunVar("safeconduct-threads")


async def in_thread(owner: object, work: Callable[[], _ResultT]) -> _ResultT:
    """Do ``work`` in a thread; waits for one while ``owner`` uses as many as it may.

    Cancelling ends the waiting, not the work.
    """
    limiters = _limiters.get(None)
    if limiters is None:
        limiters = _Limiters()
        _limiters.set(limiters)
    limiter = limiters.get(owner)
    if limiter is None:
        limiter = limiters[owner] = anyio.CapacityLimiter(_THREADS_MAX)
    return await anyio.to_thread.run_sync(work, limiter=limiter)


async def in_own_thread(work: Callable[[], _ResultT]) -> _ResultT:
    """Do ``work`` at once, however many threads are in use."""
    return await anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1))
