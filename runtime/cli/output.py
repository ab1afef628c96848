"""A program's output, handed on as it comes to somebody who may never read it."""

from __future__ import annotations

import codecs
import os
import select
import sys
import threading
from collections import deque
from dataclasses import replace

from safeconduct.call import Outcome

from .terminal import printable, tell

# LIMIT: bytes of one write(2): how much must be read for us to see that somebody reads.
_PIECE_BYTES = 16 << 10
# LIMIT: what waits is joined up to so many bytes: an object for each byte would take fifty.
_JOINED_BYTES = 64 << 10
# LIMIT: how long a reader who takes nothing is waited for, where the call was ended by force.
_PATIENCE_SECONDS = 2.0


class Output:
    """Hands a program's output on: raw into files and pipes, escaped to a terminal.

    A context manager. A thread writes, in the order that things came: a reader who reads nothing
    would otherwise hold up whoever looks at the call's limits and signals. What waits is bounded by
    the call's own output limit, and is kept for its Outcome anyway.
    """

    def __init__(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {name: decoder("backslashreplace") for name in ("stdout", "stderr")}
        # The first one is being written, and nothing is added to it any more.
        self._waiting: deque[tuple[int, bytearray]] = deque()
        self._changed = threading.Condition()
        self._written_bytes = 0
        self._failure: OSError | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._wait(_PATIENCE_SECONDS)
        self._abandon()

    def show(self, stream: str, data: bytes) -> None:
        """Have one piece of one stream written; does not wait for its reader.

        Raises OSError where a write failed before, or nobody can read this one.
        """
        if self._failure is not None:
            raise self._failure
        target = sys.stdout if stream == "stdout" else sys.stderr
        if target.isatty():
            text = printable(self._decoders[stream].decode(data), keep="\n\t")
            data = text.encode(target.encoding, target.errors or "backslashreplace")
        else:
            target.flush()
        fd = target.fileno()
        poll = select.poll()
        poll.register(fd, 0)
        # A pipe that nobody reads any more, poll(2): told now, for the program may fall silent.
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            raise BrokenPipeError
        with self._changed:
            self._append(fd, data)
            self._changed.notify_all()
        if self._thread is None:
            # It may wait for a reader for ever, and then ends with us.
            self._thread = threading.Thread(target=self._write_all, daemon=True)
            self._thread.start()

    def deliver(self, outcome: Outcome, *, forced: bool = False) -> Outcome:
        """Wait until all is written; return what the Outcome is then.

        Where the call was ended by a limit or is ``forced`` to end, a reader who takes nothing for
        a while is left: the rest is dropped, and the Outcome is truncated. Raises the OSError of
        a write that failed.
        """
        hurried = forced or outcome.limit is not None
        done = self._wait(_PATIENCE_SECONDS if hurried else None)
        if self._failure is not None:
            raise self._failure
        if done:
            return outcome
        self._abandon()
        tell("the rest of its output is dropped: nobody read it")
        return replace(outcome, truncated=True)

    def _append(self, fd: int, data: bytes) -> None:
        if len(self._waiting) > 1:
            last_fd, last = self._waiting[-1]
            if last_fd == fd and len(last) + len(data) <= _JOINED_BYTES:
                last += data
                return
        self._waiting.append((fd, bytearray(data)))

    def _wait(self, seconds: float | None) -> bool:
        """Wait until all is written, or a write failed; False if nothing was for ``seconds``."""
        with self._changed:
            while self._waiting and self._failure is None:
                before = self._written_bytes
                if not self._changed.wait(seconds) and self._written_bytes == before:
                    return False
        return True

    def _abandon(self) -> None:
        """Drop what waits; and what we say ourselves where it would wait for the same reader."""
        with self._changed:
            stuck = {fd for fd, _ in self._waiting}
            self._waiting.clear()
        poll = select.poll()
        for fd in (1, 2) if stuck else ():
            poll.register(fd, select.POLLOUT)
        ready = {fd for fd, _ in poll.poll(0)}
        for fd in {1, 2} - ready if stuck else ():
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, fd)
            os.close(null)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                fd, data = self._waiting[0]
            try:
                self._write(fd, data)
            except OSError as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                if self._waiting:  # else it was dropped meanwhile
                    self._waiting.popleft()
                self._changed.notify_all()

    def _write(self, fd: int, data: bytearray) -> None:
        view = memoryview(data)
        while view:
            try:
                written = os.write(fd, view[:_PIECE_BYTES])
            except BlockingIOError:  # whoever started us made it so
                poll = select.poll()
                poll.register(fd, select.POLLOUT)
                poll.poll()
                continue
            view = view[written:]
            with self._changed:
                if not self._waiting:
                    return
                self._written_bytes += written
                self._changed.notify_all()
