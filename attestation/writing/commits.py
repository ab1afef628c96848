"""Step "record": syncs for those who wait in no thread of their own.

Tasks of an event loop wait here for the disk, and entries that may reach it some milliseconds
later are taken there: one thread, one fdatasync for all.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Thread

from safeconduct.errors import TraceInvalid

from .health import Health, closed
from .journal_writer import Journal

_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class _Task:
    """A task that waits until entry ``index`` is on disk."""

    index: int
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]


class Commits:
    """The thread and who waits for it."""

    def __init__(self, journal: Journal, health: Health) -> None:
        self._journal, self._health = journal, health
        self._change = Condition()
        self._due: float | None = None
        self._index = -1
        self._tasks: list[_Task] = []
        self._closed = False
        self._thread = Thread(target=self._run, name="trace-commits", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def within(self, index: int, wait_s: float) -> None:
        """Have entry ``index`` on disk in so many seconds; others may come along."""
        with self._change:
            self._index = max(self._index, index)
            due = time.monotonic() + wait_s
            if self._due is None or due < self._due:
                self._due = due
                self._change.notify()

    async def reached(self, index: int) -> None:
        """Return once entry ``index`` is on disk.

        Raise TraceInvalid ``trace.write_failed``, or ``trace.closed`` for one that comes too late.
        """
        loop = asyncio.get_running_loop()
        task = _Task(index, loop, loop.create_future())
        with self._change:
            if self._closed:
                raise closed()
            self._tasks.append(task)
            self._change.notify()
        await task.done

    def close(self) -> None:
        """End the thread, once whoever still waits has an answer."""
        with self._change:
            self._closed = True
            self._change.notify()
        if self._thread.ident is not None:
            self._thread.join(_STOP_TIMEOUT_S)

    def _run(self) -> None:
        ends = False
        while not ends:
            with self._change:
                while not self._is_time():
                    due = self._due
                    self._change.wait(None if due is None else max(0.0, due - time.monotonic()))
                ends = self._closed
                tasks, self._tasks = self._tasks, []
                index, self._index, self._due = self._index, -1, None
            failure: TraceInvalid | None = None
            try:
                with self._health.fatal():
                    self._journal.sync(max([index, *(task.index for task in tasks)]))
            except TraceInvalid as error:  # kept: every later append raises it
                failure = error
            except BaseException as error:  # nobody may be left waiting
                failure = self._health.interrupted(error)
                with self._change:
                    self._closed = ends = True
                    tasks += self._tasks
            _answer(tasks, failure)

    def _is_time(self) -> bool:
        return (
            self._closed
            or bool(self._tasks)
            or (self._due is not None and self._due <= time.monotonic())
        )


def _answer(tasks: list[_Task], failure: TraceInvalid | None) -> None:
    """Wake the tasks, those of one loop together."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for task in tasks:
        loops.setdefault(task.loop, []).append(task.done)
    for loop, futures in loops.items():
        with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            loop.call_soon_threadsafe(_settle, futures, failure)


def _settle(futures: list[asyncio.Future[None]], failure: TraceInvalid | None) -> None:
    for future in futures:
        if future.done():  # cancelled
            continue
        if failure is None:
            future.set_result(None)
        else:
            future.set_exception(failure)
