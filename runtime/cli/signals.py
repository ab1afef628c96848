"""Signals that end ``exec`` and ``call``, and those that ``run`` hands on to its program.

They unwind, so that the Trace gets its signature.

By default SIGTERM and SIGHUP end a process on the spot: made places stay behind and the Trace has
no end. Here they become an exception that leaves the Call, as Ctrl-C does, and exit code 128+n.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from types import FrameType

from safeconduct.errors import Exit

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_FORWARDED = (*_ENDING, signal.SIGUSR1, signal.SIGUSR2)
_PATIENCE = 3


class Termination:
    """Holds signals back while things are put up and taken down; a context manager.

    A signal raises SystemExit (128+n) inside ``interrupting``; before it, on entering; after it, on
    leaving this block. Only the first one counts: clean-up is bounded and is not interrupted.
    For the main thread only, signal(2).
    """

    def __init__(self) -> None:
        self._received = 0
        self._raises = False
        self._restore = ExitStack()

    def __enter__(self) -> Termination:
        for number in _SIGNALS:
            # Ignored by whoever started us, as nohup(1) does: it stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._restore.callback(signal.signal, number, signal.signal(number, self._receive))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._restore.close()
        # An append that was cut short fails the writer's close: still it was the signal.
        if self._received and kind is not SystemExit:
            raise self._leaving()

    @contextmanager
    def interrupting(self) -> Generator[None]:
        """Let a signal end what runs in this block."""
        self._raises = True
        try:
            if self._received:
                raise self._leaving()
            yield
        finally:
            self._raises = False

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received:
            return
        self._received = number
        if self._raises:
            raise self._leaving()

    def _leaving(self) -> SystemExit:
        return SystemExit(int(Exit.SIGNAL) + self._received)


class Forwarding:
    """Hands signals on to the program of a Call; a context manager, for the main thread only.

    One that comes before the program is there waits for it, one that comes after it is dropped.
    Whoever asks to end it the third time is tired of waiting: that one kills, and keeps a program
    that has not begun from it. Twice as many leave whatever became of the program.
    """

    def __init__(self) -> None:
        self._forward: Callable[[int], object] | None = None
        # At most one of each number, as the kernel itself keeps them, signal(7).
        self._waiting: list[int] = []
        self._asked = self._asked_running = 0
        # How many times asked is too much: SystemExit (128+n) is raised then. 0 is never.
        self._leave_at = 0
        self._last = 0
        self._restore = ExitStack()

    def __enter__(self) -> Forwarding:
        for number in _FORWARDED:
            # Ignored by whoever started us, as nohup(1) does: it stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._restore.callback(signal.signal, number, signal.signal(number, self._receive))
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    @property
    def hurries(self) -> bool:
        """Tell whether the program was to be killed, or somebody asked again once it was gone."""
        return self._killed or self._asked > self._asked_running

    @contextmanager
    def starting(self) -> Generator[None]:
        """Let asking to end leave this block, in which the program starts and runs."""
        with self._leaving_at(_PATIENCE):
            yield
            self._asked_running = self._asked

    @contextmanager
    def finishing(self) -> Generator[None]:
        """Let the next who asks to end leave this block: the program is gone."""
        with self._leaving_at(self._asked + 1):
            yield

    @property
    def _killed(self) -> bool:
        return self._asked >= _PATIENCE

    def to(self, forward: Callable[[int], object]) -> None:
        """Hand on by ``forward`` what waits and what comes; it is called by a signal handler."""
        self._leave_at = 2 * _PATIENCE
        self._forward = forward
        if self._killed:  # asked between the two lines above
            forward(signal.SIGKILL)
        while self._waiting:
            forward(self._waiting.pop(0))

    @contextmanager
    def _leaving_at(self, asked: int) -> Generator[None]:
        self._leave_at = asked
        try:
            self._leave_if_asked()
            yield
        finally:
            self._leave_at = 0

    def _leave_if_asked(self) -> None:
        if 0 < self._leave_at <= self._asked:
            self._leave_at = 0
            raise SystemExit(int(Exit.SIGNAL) + self._last)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number in _ENDING:
            self._asked += 1
            self._last = number
        if self._forward is not None:
            self._forward(signal.SIGKILL if self._killed else number)
        elif number not in self._waiting:
            self._waiting.append(number)
        if number in _ENDING:
            self._leave_if_asked()
