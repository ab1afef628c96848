"""Step "sandbox": one call of a Python tool, from the fork that waits to the Outcome.

INVARIANT: no byte of the call is sent before the process has said that it is confined. After its
answer, or a limit, its end is asked for and waited for: a result is given out only when none of
the call's processes is left.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from typing import TypeAlias

from safeconduct.call import Confinement, Json, Limits, Outcome, Profile, Refused, Usage
from safeconduct.errors import SandboxFailed, ToolFailed

from . import bounds, cgroup, python_call, python_frames
from .channel import Exit
from .python_link import Hand
from .watch import Watch

Sink: TypeAlias = Callable[[str, bytes], None]

_READY_SECONDS = 60.0
_READ_BYTES = 64 << 10
# What an answer has around its value.
_ENVELOPE_BYTES = 16 << 10
_HEADER_BYTES = 4
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the call's own code said: its value, or why there is none."""

    value: Json = None
    failure: ToolFailed | None = None

    @classmethod
    def of(cls, reply: bytes) -> Answer:
        """Decode a reply, which is hostile bytes."""
        try:
            return cls(value=python_frames.value_of(reply))
        except ToolFailed as failure:
            return cls(failure=failure)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """Everything one call left. ``answer`` is None where it ended without one."""

    end: Exit
    wall_us: int
    answer: Answer | None
    stdout: bytes
    stderr: bytes
    cut: bool
    limit: str | None
    refused: tuple[Refused, ...] = ()

    @property
    def crashed(self) -> bool:
        """Tell whether a signal ended it that speaks of broken memory."""
        return self.end.signal in _CRASHES

    def outcome(
        self, call: str, limits: Limits, charge: cgroup.Charge, confinement: Confinement
    ) -> Outcome:
        """Return the Outcome. Raises ToolFailed where the call has no result."""
        limit = self.limit
        if limit is None and self.answer is None:
            limit = bounds.limit_of(self.end, charge, limits)
            # SIGXCPU passes pid 1 by, pid_namespaces(7), so RLIMIT_CPU ends it by SIGKILL; of those
            # there are two, and the other one is counted.
            if limit is None and self.end.signal == signal.SIGKILL and limits.cpu_ms:
                limit = "cpu"
        elif limit is None and self.answer is not None and self.answer.failure is not None:
            limit = bounds.counted_limit(charge)
        value = None
        if limit is None:
            value = self._value()
        cpu_us = self.end.cpu_us if charge.cpu_us is None else charge.cpu_us
        usage = Usage(
            wall_ms=self.wall_us // 1000,
            cpu_ms=cpu_us // 1000,
            throttled_ms=None if charge.throttled_us is None else charge.throttled_us // 1000,
            peak_memory_bytes=charge.peak_memory_bytes or self.end.peak_rss_kib * 1024,
            oom_kills=charge.oom_kills,
            peak_pids=charge.peak_pids,
            refused_forks=charge.refused_forks,
            read_bytes=charge.read_bytes,
            written_bytes=charge.written_bytes,
        )
        return Outcome(
            call=call,
            value=value,
            stdout=self.stdout,
            stderr=self.stderr,
            truncated=self.cut,
            limit=limit,
            refused=self.refused,
            usage=usage,
            confinement=confinement,
        )

    def _value(self) -> Json:
        if self.answer is not None:
            if self.answer.failure is not None:
                self.answer.failure.refused = self.refused
                raise self.answer.failure
            return self.answer.value
        end = self.end
        how = f"by signal {end.signal}" if end.signal else f"with exit code {end.code}"
        raise ToolFailed(
            f"The tool ended {how} before it answered.", code="python.died", refused=self.refused
        )


class Talk:
    """One conversation with one waiting process. ``hold`` it once."""

    def __init__(self, hand: Hand, profile: Profile, sink: Sink | None) -> None:
        limits = profile.limits
        self._hand = hand
        self._name = profile.name
        self._sink = sink
        self._wall_seconds = limits.wall_ms / 1000
        self._left = limits.output_bytes
        self._reply_bytes_max = limits.output_bytes + _ENVELOPE_BYTES
        self._streams: dict[int, str] = {hand.stdout: "stdout", hand.stderr: "stderr"}
        self._output = {"stdout": bytearray(), "stderr": bytearray()}
        self._cut = self._printed = False
        self._unsent = memoryview(b"")
        self._reply = bytearray()
        self._answer: Answer | None = None
        self._limit: str | None = None
        self._stopping = False
        self._deadline = self._look = 0.0
        self._poll = select.poll()

    def hold(self, frame: bytes) -> Heard:
        """Send the call, read what comes, and wait until its processes are gone.

        Raises SandboxFailed where the process or its zygote broke, and SandboxUnavailable where
        it could not be confined or what its profile imports is missing.
        """
        with ExitStack() as asked:
            # Before it is waited for: a call that its filter asks about waits for the answer.
            refusals = self._hand.refusals() if self._hand.refusals else None
            if refusals is not None:
                asked.enter_context(refusals.start())
            heard = self._hold(frame)
        # What was asked is answered now, and counted.
        return replace(heard, refused=refusals.found(self._name)) if refusals else heard

    def _hold(self, frame: bytes) -> Heard:
        self._await_ready()
        begun = time.monotonic()
        self._unsent = memoryview(len(frame).to_bytes(_HEADER_BYTES, "little") + frame)
        self._deadline = begun + self._wall_seconds
        self._hand.channel.setblocking(False)
        for fd in (*self._streams, self._hand.fate.fileno()):
            self._poll.register(fd, select.POLLIN)
        self._poll.register(self._hand.channel, select.POLLIN | select.POLLOUT)
        with closing(self._hand.watch()) as watch:
            end = self._until_gone(watch)
            # Every writer is dead now: what is left in the pipes is all there will be.
            for fd in self._streams:
                while self._listen(fd):
                    pass
            while not self._stopping and self._hear():
                pass
            if self._limit is None and (self._answer is None or self._answer.failure is not None):
                self._limit = watch.last()
            if self._limit == "depth":
                watch.flatten()
        return Heard(
            end=end,
            wall_us=int((time.monotonic() - begun) * 1_000_000),
            answer=self._answer if self._limit is None else None,
            stdout=bytes(self._output["stdout"]),
            stderr=bytes(self._output["stderr"]),
            cut=self._cut,
            limit="wall" if end.wall_limit else self._limit,
        )

    def _await_ready(self) -> None:
        """Wait for the byte that says "confined, and nothing of a call known"."""
        channel, fate = self._hand.channel, self._hand.fate
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        poll.register(fate, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(_READY_SECONDS * 1000)]
        if not ready:
            raise SandboxFailed("The Python process did not become ready.", step="ready")
        data = channel.recv(_READ_BYTES) if channel.fileno() in ready else b""
        if data == python_call.READY:
            return
        if data:
            raise python_frames.imports_failed(data.decode(errors="replace"))
        fate.receive()  # raises what it says, where it says why there is no process
        raise SandboxFailed("The Python process died before its call.", step="ready")

    def _until_gone(self, watch: Watch) -> Exit:
        channel, fate = self._hand.channel.fileno(), self._hand.fate.fileno()
        self._look = time.monotonic() + watch.interval_seconds
        while True:
            seconds = self._pass_time(watch)
            if seconds is None:
                return self._hand.fate.expire()
            for fd, event in self._poll.poll(seconds * 1000):
                if fd == fate:
                    return self._hand.fate.receive()
                if fd in self._streams and self._listen(fd) == b"":
                    self._forget(fd)
                if fd != channel or self._stopping:
                    continue
                if event & select.POLLOUT:
                    self._send()
                elif self._hear() == b"":
                    self._forget(channel)

    def _forget(self, fd: int) -> None:
        """Poll a descriptor no more; from here on it would be ready for ever."""
        with suppress(KeyError):
            self._poll.unregister(fd)

    def _pass_time(self, watch: Watch) -> float | None:
        """End what is due to end; return the seconds until the next look, or None if too late."""
        now = time.monotonic()
        if now >= self._deadline and self._stopping:
            return None
        if now >= self._deadline:
            self._stop("wall")
        elif now >= self._look and not self._stopping:
            self._look = now + watch.interval_seconds
            exceeded, self._printed = watch.check(now, self._printed), False
            if exceeded:
                self._stop(exceeded)
        if self._stopping:
            watch.end()
        until = self._deadline if self._stopping else min(self._look, self._deadline)
        return max(0.0, until - now)

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self._hand.channel.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:
            # It closed its end: its fate will say what became of it.
            self._unsent = memoryview(b"")
        if not self._unsent:
            self._poll.modify(self._hand.channel, select.POLLIN)

    def _hear(self) -> bytes | None:
        """Read a part of the answer; as soon as it is whole, ask for the end."""
        data = _read(self._hand.channel.fileno())
        self._reply += data or b""
        if len(self._reply) >= _HEADER_BYTES and not self._stopping:
            if self._length() > self._reply_bytes_max:
                self._stop("output")
            elif (reply := self._whole()) is not None:
                self._stop(None)
                # Meanwhile its processes die.
                self._answer = Answer.of(reply)
        return data

    def _length(self) -> int:
        return int.from_bytes(self._reply[:_HEADER_BYTES], "little")

    def _whole(self) -> bytes | None:
        """Return the answer once all of it is here."""
        end = _HEADER_BYTES + self._length()
        return bytes(self._reply[_HEADER_BYTES:end]) if len(self._reply) >= end else None

    def _listen(self, fd: int) -> bytes | None:
        """Keep a part of what a stream prints, within the bound; the rest is dropped."""
        data = _read(fd)
        if data:
            self._printed = True
            kept = data[: self._left]
            self._cut = self._cut or len(kept) < len(data)
            self._left -= len(kept)
            if kept:
                name = self._streams[fd]
                self._output[name] += kept
                if self._sink:
                    self._sink(name, kept)
        return data

    def _stop(self, limit: str | None) -> None:
        """Ask for the end: the answer is here, or a limit was met."""
        self._limit = limit
        self._stopping = True
        self._deadline = time.monotonic() + self._hand.fate.patience
        self._forget(self._hand.channel.fileno())
        self._hand.fate.stop()


def _read(fd: int) -> bytes | None:
    """Read what is there: None where nothing is yet, nothing at the end."""
    try:
        return os.read(fd, _READ_BYTES)
    except BlockingIOError:
        return None
    except ConnectionError:
        return b""
