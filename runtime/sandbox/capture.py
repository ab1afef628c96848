"""Step "sandbox": the output of one program, read within a bound while it is watched."""

from __future__ import annotations

import fcntl
import os
import select
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeAlias

from safeconduct.errors import SandboxFailed

from .channel import Channel, Exit
from .watch import Watch

Sink: TypeAlias = Callable[[str, bytes], None]

# How long the sandbox may take beyond its wall limit, which its own init counts.
GRACE_SECONDS = 5.0
_READ_BYTES = 64 << 10
# What is beyond the bound is dropped in pieces of that size, the largest that an ordinary user may
# set, pipe(7), at most 500 times a second: a program that writes for ever costs us next to nothing.
_DROP_BYTES, _DROP_MS = 1 << 20, 2


class Capture:
    """Collects two output streams up to a common bound; the rest is read and dropped."""

    def __init__(self, limit: int, sink: Sink | None) -> None:
        self.stdout = self.stderr = b""
        self.cut = False
        # The limit that the watch ended the call for.
        self.exceeded: str | None = None
        self._left = limit
        self._sink = sink
        self._seen = False
        # Where all that is beyond the bound goes, and how long to wait between the pieces.
        self._nowhere: int | None = None
        self._drop_ms = 0
        # One byte takes one byte, however small the pieces are that a program writes.
        self._kept = {"stdout": bytearray(), "stderr": bytearray()}

    def follow(
        self,
        channel: Channel,
        streams: tuple[int, int],
        wall_ms: int,
        watch: Watch,
        arrived: Callable[[], None] | None = None,
    ) -> Exit:
        """Read both streams until the sandbox reports its end.

        ``arrived`` is called when a descriptor came on the channel before the end.
        """
        try:
            end = self._follow(channel, streams, wall_ms, watch, arrived)
        finally:
            if self._nowhere is not None:
                os.close(self._nowhere)
                self._nowhere = None
        if end.code is None and end.signal is None and not end.wall_limit and not self.exceeded:
            # The init ended the tree because its launcher was gone.
            raise SandboxFailed("The launcher died before the call ended.", step="launcher")
        return end

    def _follow(
        self,
        channel: Channel,
        streams: tuple[int, int],
        wall_ms: int,
        watch: Watch,
        arrived: Callable[[], None] | None,
    ) -> Exit:
        names = dict(zip(streams, ("stdout", "stderr"), strict=True))
        poll, alone = select.poll(), select.poll()
        for one in (poll, alone):
            one.register(channel, select.POLLIN)
        for fd in streams:
            poll.register(fd, select.POLLIN)
        now = time.monotonic()
        deadline = now + wall_ms / 1000 + GRACE_SECONDS
        look = now + watch.interval_seconds
        end: Exit | None = None
        while end is None:
            if self._drop_ms:
                alone.poll(self._drop_ms)
            for fd, _ in poll.poll(max(0, (min(look, deadline) - now) * 1000)):
                if fd not in names:
                    end = channel.next(0)
                    if end is None and arrived is not None:
                        arrived()
                elif not self._read(fd, names[fd]):
                    poll.unregister(fd)
            now = time.monotonic()
            if now >= look and end is None:
                look = self._look(watch, channel, now, deadline)
        self._finish(names)
        return end

    def _finish(self, names: Mapping[int, str]) -> None:
        """Read what is left: every writer is dead now, so it is all there will be."""
        for fd, name in names.items():
            while self._read(fd, name):
                pass
        self.stdout, self.stderr = map(bytes, self._kept.values())

    def _look(self, watch: Watch, channel: Channel, now: float, deadline: float) -> float:
        """Look at the limits that the kernel does not hold; return when to look again."""
        if now >= deadline:
            raise SandboxFailed("The sandbox outlived its wall limit.", step="wall")
        if self.exceeded is None:
            self.exceeded = watch.check(now, self._seen)
            self._seen = False
            if self.exceeded is not None:
                channel.end()
        if self.exceeded is not None or now >= deadline - GRACE_SECONDS:
            watch.end()
        return min(now + watch.interval_seconds, deadline)

    def _read(self, fd: int, name: str) -> bool:
        """Read once; False at the end of the stream, or when there is nothing now."""
        try:
            if self.cut:
                return self._drop(fd)
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            # A program may open its own end for reading too and be faster than we are.
            return False
        if not data:
            return False
        self._seen = True
        kept = data[: self._left]
        self.cut = self.cut or len(kept) < len(data)
        self._left -= len(kept)
        if kept:
            self._kept[name] += kept
            if self._sink:
                self._sink(name, kept)
        return True

    def _drop(self, fd: int) -> bool:
        """Drop a piece without looking at it, splice(2); False at the end of the stream."""
        if self._nowhere is None:
            self._nowhere = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        with suppress(OSError):  # pipe-user-pages-soft: then it stays small, and we are busier
            if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < _DROP_BYTES:
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _DROP_BYTES)
            self._drop_ms = _DROP_MS
        # Whatever the program did to the pipe: we wait for nothing here.
        dropped = os.splice(fd, self._nowhere, _DROP_BYTES, flags=os.SPLICE_F_NONBLOCK)
        self._seen = self._seen or dropped > 0
        return dropped > 0
