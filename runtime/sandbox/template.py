"""Step "sandbox": the line to a template, which makes the sandboxes of one plan ahead of time.

The queue of the socket to it is the pool of those that wait.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from safeconduct.errors import SandboxFailed

from .channel import Channel, Message, failure_of, parse, receive, wait

# What template.rs understands.
_ONCE, _AGAIN = b"1", b"+"


@dataclass(slots=True, kw_only=True)
class Waiting:
    """A sandbox that waits for its program, and what belongs to it; ``close`` ends it.

    One that is lost, because an interrupt came before it was noted anywhere, is closed too.
    """

    number: int
    uid: int
    again: bool
    scratch: str | None
    channel: Channel
    stdout: int
    stderr: int
    # A pidfd of its first process.
    init: int

    _closed: bool = False

    def kill(self, seconds: float) -> bool:
        """Kill its first process and wait for its end; False where it lives after ``seconds``.

        Where that is the first one of a pid namespace, the kernel ends all others with it and
        reports its end when they are gone, pid_namespaces(7).
        """
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.init, signal.SIGKILL)
        poll = select.poll()
        poll.register(self.init, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        """Close every descriptor, which ends the sandbox. Does not wait."""
        if self._closed:
            return
        self._closed = True
        self.channel.close()
        for fd in (self.stdout, self.stderr, self.init):
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class Template:
    """The process that makes the sandboxes of one plan. Safe to use from several threads."""

    def __init__(self, end: socket.socket, name: str) -> None:
        self._socket = end
        self._owner_pid = os.getpid()
        self.name = name
        # Called once it was told to end, for what is left where it had been killed before.
        self.closed: Callable[[], None] | None = None

    def ask(self, *, again: bool = False) -> None:
        """Have a sandbox made; it arrives in the queue. Does not wait for it.

        With ``again`` another one is made whenever one is gone that was asked for so.
        """
        try:
            self._socket.send(_AGAIN if again else _ONCE)
        except OSError as error:
            raise SandboxFailed(f"The template is gone: {error}.", step="template") from error

    def take(self, seconds: float) -> Waiting:
        """Take one that was asked for, waiting for it at most ``seconds``.

        Raises SandboxFailed where it could not be made or the template is gone.
        """
        while wait(self._socket, seconds):
            waiting = self.take_ready()
            if waiting is not None:
                return waiting
        raise SandboxFailed("No sandbox was made in time.", step="template")

    def take_ready(self) -> Waiting | None:
        """Take one if it has arrived. Never waits; raises as ``take``."""
        try:
            data, descriptors, flags = receive(self._socket)
        except BlockingIOError:
            return None
        except OSError as error:
            raise SandboxFailed(f"The template is gone: {error}.", step="template") from error
        if not data:
            raise SandboxFailed("The template of this sandbox died.", step="template")
        return self._open(parse(data), descriptors, whole=not flags & socket.MSG_CTRUNC)

    def _open(
        self, message: Message | str, descriptors: list[int], *, whole: bool
    ) -> Waiting | None:
        if message == "template":
            return None
        if isinstance(message, Message) and message.failed is not None:
            raise failure_of(message.failed)
        born = message.sandbox if isinstance(message, Message) else None
        if born is None or len(descriptors) != 4 or not whole:
            for fd in descriptors:
                os.close(fd)
            raise SandboxFailed(
                "A sandbox arrived without its descriptors: this process may open no more.",
                step="template",
            )
        channel, stdout, stderr, init = descriptors
        return Waiting(
            number=born.number,
            uid=born.uid,
            again=born.again,
            scratch=born.scratch,
            channel=Channel(channel),
            stdout=stdout,
            stderr=stderr,
            init=init,
        )

    def close(self) -> None:
        """End the template and every sandbox of it that still lives. Does not wait.

        In a fork of the process that made it only the copies of its descriptors are closed.
        """
        closed, self.closed = self.closed, None
        if os.getpid() == self._owner_pid:
            with suppress(OSError):
                # A fork may hold a copy of this end, which would hide that it is closed.
                self._socket.shutdown(socket.SHUT_RDWR)
            if closed is not None:
                closed()
        self._socket.close()
