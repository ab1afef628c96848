"""Signals that end ``exec`` and ``call``: they unwind, so that the Trace gets its signature.

By default SIGTERM and SIGHUP end a process on the spot: made places stay behind and the Trace has
no end. Here they become an exception that leaves the Call, as Ctrl-C does, and exit code 128+n.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from types import FrameType

from safeconduct.errors import Exit

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


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
