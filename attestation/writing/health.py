"""Step "record": whether a trace can still be written: not failed, not closed, not in a fork."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager

from safeconduct.attestation.journal import write_failed
from safeconduct.errors import TraceInvalid

_CLOSED = "trace.closed"


class Health:
    """The first failure of a trace is its last: nothing is recorded after it."""

    def __init__(self) -> None:
        self.failure: TraceInvalid | None = None
        self.ended = False
        """Whether the log's own session is over: what is there is signed, and nothing follows."""
        self.closed = False
        self.on_failure: Callable[[], object] = lambda: None
        self.owner_pid = os.getpid()

    def require_usable(self) -> None:
        """Raise the first failure once more, or ``trace.closed``."""
        if self.failure is not None:
            raise TraceInvalid(self.failure.message, code=self.failure.code, hint=self.failure.hint)
        if self.closed:
            raise closed()

    def require_recording(self) -> None:
        """Raise the first failure once more, or ``trace.closed`` where no Entry may follow."""
        self.require_usable()
        if self.ended:
            raise closed()

    def fail(self, error: TraceInvalid) -> TraceInvalid:
        """Have nothing recorded any more; return the error to raise."""
        if error.code != _CLOSED:  # who comes too late breaks nothing
            self.failure = self.failure or error
            self.on_failure()
        return error

    @contextmanager
    def fatal(self) -> Generator[None]:
        """Make every failure inside the block the last one."""
        try:
            yield
        except OSError as error:
            raise self.fail(write_failed(error)) from error
        except TraceInvalid as error:
            raise self.fail(error) from error

    def interrupted(self, error: BaseException) -> TraceInvalid:
        """Have nothing recorded after what nobody foresaw, an interrupt above all."""
        failure = TraceInvalid(f"interrupted: {type(error).__name__}", code="trace.interrupted")
        return self.fail(failure)

    @contextmanager
    def unbroken(self) -> Generator[None]:
        """Make every failure and every interrupt inside the block the last: it would be half done.

        Not for what may be left at any time, such as waiting for a task.
        """
        try:
            with self.fatal():
                yield
        except TraceInvalid:
            raise  # kept already
        except BaseException as error:
            self.interrupted(error)
            raise

    @property
    def is_fork(self) -> bool:
        """Tell whether this process is a fork of the one that opened the trace."""
        return os.getpid() != self.owner_pid

    def refuse_fork(self) -> None:
        """Raise ``trace.forked`` in a fork."""
        if os.getpid() != self.owner_pid:
            raise TraceInvalid(
                "this process is a fork of the one that writes the trace",
                code="trace.forked",
                hint="open a trace of its own in each process",
            )


def closed() -> TraceInvalid:
    """Return the error of a trace that nothing is recorded in any more."""
    return TraceInvalid("the trace is closed", code=_CLOSED)
