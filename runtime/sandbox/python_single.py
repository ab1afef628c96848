"""Step "sandbox": one interpreter for one call of a Python tool, where forks cannot be confined."""

from __future__ import annotations

import errno
import signal
import socket
from contextlib import ExitStack
from functools import partial

from safeconduct.errors import SandboxFailed, SandboxUnavailable, ToolFailed

from . import cgroup
from .channel import Exit
from .native import NativeSandbox
from .python_link import START_SECONDS, Hand, pair, pipe, start_worker
from .python_place import Place
from .refused import Refusals
from .running import Running


def start_single(native: NativeSandbox, place: Place) -> Hand:
    """Start an interpreter for one call in a sandbox of its own: no zygote, no forks."""
    granted = place.granted()
    with ExitStack() as mine, ExitStack() as theirs:
        channel, their_channel = pair(mine, theirs, socket.SOCK_STREAM)
        stdout, their_stdout = pipe(mine, theirs)
        stderr, their_stderr = pipe(mine, theirs)
        setting, outputs = place.setting("single"), (their_stdout, their_stderr)
        descriptors = [their_channel.fileno()]
        try:
            running = start_worker(
                native, granted, place, setting, descriptors, outputs, explain=place.explain
            )
            mine.callback(running.close)
            if place.explain:
                _await_listener(running)
        except (SandboxFailed, ToolFailed) as error:
            if error.errno != errno.EACCES:
                raise
            # As root, tier landlock drops to another user and then has only that user's view.
            raise SandboxUnavailable(
                f"The Python interpreter cannot be used inside a sandbox: {error.message}",
                missing="python-interpreter",
                hint="Use a Python installed in a folder that every user may enter.",
            ) from error
        program = native.program(granted)
        return Hand(
            channel=channel,
            stdout=stdout,
            stderr=stderr,
            fate=_SingleFate(running),
            charge=cgroup.Charge,
            watch=running.watch,
            close=mine.pop_all().close,
            refusals=partial(_refusals, running, program) if place.explain else None,
        )


def _await_listener(running: Running) -> None:
    """Have the listener of a sandbox whose program was executed, or could not be."""
    channel = running.channel
    try:
        while channel.listener is None:
            if channel.next(START_SECONDS) is not None:
                raise SandboxFailed("The Python process died before its call.", step="ready")
        # It came before what there may be to say of the program.
        channel.refuse_failure()
    except SandboxFailed as error:
        raise running.translated(error) from error


def _refusals(running: Running, program: bytes) -> Refusals:
    listener, running.channel.listener = running.channel.listener, None
    if listener is None:
        raise SandboxFailed("Nothing tells what the filter refuses.", step="ready")
    return Refusals(listener, program)


class _SingleFate:
    # It ends by itself after its answer, within a few milliseconds.
    patience = 1.0

    def __init__(self, running: Running) -> None:
        self._running = running

    def fileno(self) -> int:
        return self._running.channel.fileno()

    def receive(self) -> Exit:
        return self._running.channel.receive(self.patience)

    def stop(self) -> None:
        """Do nothing: the process ends after its answer, or by the sandbox's own clock."""

    def expire(self) -> Exit:
        self._running.close()
        return Exit(
            code=None, signal=int(signal.SIGKILL), wall_limit=False, wall_us=0, cpu_us=0,
            peak_rss_kib=0,
        )  # fmt: skip
