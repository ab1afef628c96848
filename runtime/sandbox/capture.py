"""Step "sandbox": the standard streams of one program, read within a bound."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum, auto
from typing import TypeAlias

from safeconduct.errors import SandboxFailed

from . import seccomp
from .launcher import Channel, Exit

Sink: TypeAlias = Callable[[str, bytes], None]

# How long the sandbox may take beyond its wall limit, which its own init counts.
GRACE_SECONDS = 5.0
_READ_BYTES = 64 << 10


class Streams:
    """Pipes for stdout and stderr and a source for stdin; closes all of them."""

    def __init__(self, stdin: bytes) -> None:
        """Open them. Raises OSError where this process has no descriptors left."""
        with ExitStack() as opened:
            self._theirs = opened.enter_context(ExitStack())
            self.stdout, stdout = self._pipe(opened)
            self.stderr, stderr = self._pipe(opened)
            source = _stdin(stdin)
            self._theirs.callback(os.close, source)
            self.given = (source, stdout, stderr)
            self._all = opened.pop_all()

    def hand_over(self) -> None:
        """Close what the program now has its own copies of."""
        self._theirs.close()

    def close(self) -> None:
        """Close everything that is still open."""
        self._all.close()

    def _pipe(self, opened: ExitStack) -> tuple[int, int]:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        opened.callback(os.close, ours)
        self._theirs.callback(os.close, theirs)
        return ours, theirs


class _Read(Enum):
    DATA = auto()
    NOTHING = auto()
    END = auto()


class Capture:
    """Collects two output streams up to a common bound; the rest is read and dropped."""

    def __init__(self, limit: int, sink: Sink | None) -> None:
        self.streams = {"stdout": b"", "stderr": b""}
        self.cut = False
        self._left = limit
        self._sink = sink
        self._parts: dict[str, list[bytes]] = {"stdout": [], "stderr": []}

    def follow(self, channel: Channel, stdout: int, stderr: int, wall_ms: int) -> Exit:
        """Read both streams until the sandbox reports its end."""
        deadline = time.monotonic() + wall_ms / 1000 + GRACE_SECONDS
        with selectors.DefaultSelector() as selector:
            for fd, name in ((stdout, "stdout"), (stderr, "stderr")):
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ, name)
            selector.register(channel, selectors.EVENT_READ, "channel")
            end: Exit | None = None
            while end is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise SandboxFailed("The sandbox outlived its wall limit.", step="wall")
                for key, _ in selector.select(left):
                    if key.data == "channel":
                        end = _exit(channel.receive(GRACE_SECONDS))
                    elif self._read(key.fd, key.data) is _Read.END:
                        selector.unregister(key.fd)
        # Every writer is dead now: what is left in the pipes is all there will be.
        for fd, name in ((stdout, "stdout"), (stderr, "stderr")):
            while self._read(fd, name) is _Read.DATA:
                pass
        self.streams = {name: b"".join(parts) for name, parts in self._parts.items()}
        return end

    def _read(self, fd: int, name: str) -> _Read:
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            # A program may open its own end for reading too and be faster than we are.
            return _Read.NOTHING
        kept = data[: self._left]
        self.cut = self.cut or len(kept) < len(data)
        self._left -= len(kept)
        if kept:
            self._parts[name].append(kept)
            if self._sink:
                self._sink(name, kept)
        return _Read.DATA if data else _Read.END


def _exit(message: Exit | str) -> Exit:
    if isinstance(message, str):
        raise SandboxFailed("The sandbox started twice.", step="channel")
    if message.code is None and message.signal is None and not message.wall_limit:
        # The init ended the tree because its launcher was gone.
        raise SandboxFailed("The launcher died before the call ended.", step="launcher")
    return message


def _stdin(data: bytes) -> int:
    if not data:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    return seccomp.memory_file(data)
