"""Step "sandbox": run a function of a Wasm module in a worker process inside a native sandbox.

wasmtime holds the module; the native sandbox holds wasmtime. The worker (wasm_worker.py) gets
its interpreter, its two packages and its own file, and nothing else. What it answers is hostile:
bounded, decoded strictly, and a worker that does anything unexpected is killed.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import math
import os
import select
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import msgspec

from safeconduct.call import Confinement, Held, Limits, Outcome, Profile, Usage
from safeconduct.errors import LimitExceeded, SandboxFailed, SandboxUnavailable, ToolFailed

from . import wasm_worker
from .interpreter import base_grants, interpreter
from .native import NativeSandbox, Program
from .running import Running
from .shield import Shield
from .wasm_worker import (
    MODULE_BYTES_MAX,
    MODULES_MAX,
    NAME_BYTES_MAX,
    VALUES_MAX,
    Done,
    Failed,
    Ready,
    Request,
)

# About a second of work: a profile that gives no fuel still bounds the work of a call.
FUEL_DEFAULT = 1_000_000_000
_FUEL_MAX = (1 << 63) - 1
# Beyond the memory of the guest: interpreter and wasmtime take about 50 MiB, the rest is for
# compiling. A module built to take more ends the worker, and with it the call.
OVERHEAD_BYTES = 256 << 20
# The worker lives as long as its engine; each call has a wall limit of its own.
_SESSION_MS = 24 * 60 * 60 * 1000
_PIDS, _FILES, _SCRATCH_BYTES = 16, 64, 1 << 20
# The worker ends a call itself; only if it does not (it compiles, or it is broken) we do.
_GRACE_SECONDS = 1.0
_START_SECONDS = 20.0
_END_SECONDS = 2.0
_REPLY_BYTES_MAX = 64 << 10
_DETAIL_CHARACTERS_MAX = 300
_PACKAGES = ("msgspec", "wasmtime")
_LIMIT_HINT = "Raise limits.{limit} of the profile, if the tool needs it."
_LAYERS = ("wasm-fuel", "wasm-epoch", "wasm-memory")

_decoder: msgspec.json.Decoder[Ready | Done | Failed] = msgspec.json.Decoder(Ready | Done | Failed)


def worker_profile(memory_bytes: int) -> Profile:
    """Return the native profile of a worker whose guests may use ``memory_bytes``."""
    grants = {*base_grants(), *_packages(), os.path.realpath(wasm_worker.__file__)}
    limits = Limits(
        wall_ms=_SESSION_MS,
        memory_bytes=memory_bytes + OVERHEAD_BYTES,
        pids=_PIDS,
        files=_FILES,
        disk_bytes=_SCRATCH_BYTES,
    )
    return Profile(name="wasm-worker", read=tuple(sorted(grants)), limits=limits)


def _packages() -> list[str]:
    """Find the folders of what the worker imports, without importing it here."""
    folders: list[str] = []
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SandboxUnavailable(
                f"The Python package {name} is not installed.",
                missing=name,
                hint="Install safeconduct again.",
            )
        folders.append(os.path.realpath(os.path.dirname(spec.origin)))
    return folders


class WasmEngine:
    """Runs Wasm calls of one session, one at a time, in one worker. Safe to use from threads."""

    module_bytes_max: Final = MODULE_BYTES_MAX

    def __init__(self, sandbox: NativeSandbox) -> None:
        self._sandbox = sandbox
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._closed = False

    def run(
        self,
        call: str,
        *,
        module: bytes,
        function: str,
        arguments: Sequence[int | float],
        profile: Profile,
    ) -> Outcome:
        """Call an exported function in a fresh instance; blocks until earlier calls are over.

        ``value`` is the list of results: integers signed, floats as they are, and the strings
        "NaN", "Infinity" and "-Infinity" where JSON has no number. Raises LimitExceeded (fuel,
        wall, cpu, memory), ToolFailed (wasm.invalid, .import, .export, .trap, .too_large) and
        SandboxFailed, after which the worker is gone and the next call gets a fresh one.
        """
        _check(module, function, arguments)
        limits = profile.limits
        fuel = FUEL_DEFAULT if limits.fuel is None else min(limits.fuel, _FUEL_MAX)
        with self._lock:
            worker = self._ready(limits.memory_bytes)
            started = time.monotonic()
            try:
                reply = worker.ask(call, module, function, arguments, limits, fuel)
            except BaseException:
                self._drop()
                raise
            wall_ms = int((time.monotonic() - started) * 1000)
            if isinstance(reply, Failed):
                raise _error(reply)
            usage = Usage(wall_ms=wall_ms, cpu_ms=reply.cpu_ms, fuel=reply.fuel)
            return Outcome(
                call=call, value=reply.values, usage=usage, confinement=worker.confinement
            )

    def close(self) -> None:
        """End the worker and wait until it is gone. Waits for a running call."""
        with self._lock:
            self._closed = True
            self._drop()

    def _ready(self, memory_bytes: int) -> _Worker:
        if self._closed:
            raise SandboxFailed("The Wasm engine is closed.", step="closed")
        worker = self._worker
        if worker and (worker.memory_bytes != memory_bytes or not worker.quiet()):
            self._drop()
        if self._worker is None:
            self._worker = _Worker(self._sandbox, memory_bytes)
        return self._worker

    def _drop(self) -> None:
        worker, self._worker = self._worker, None
        if worker:
            worker.close()


class _Worker:
    """One worker process and the line to it. After any error it must be closed."""

    def __init__(self, sandbox: NativeSandbox, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._held: OrderedDict[str, int] = OrderedDict()
        self._number = 0
        self._running, self._input, self._output = _start(sandbox, memory_bytes)
        native = self._running.confinement
        self.confinement = Confinement(
            tier=native.tier,
            layers=(*native.layers, *_LAYERS),
            # A guest has no processes: what holds its one store holds all of it.
            held={**native.held, **dict.fromkeys(("cpu", "fuel", "memory"), Held.TREE)},
        )
        try:
            ready = self._receive("start", time.monotonic() + _START_SECONDS)
            if not isinstance(ready, Ready) or ready.version != wasm_worker.VERSION:
                raise _unexpected("The Wasm worker is of another version.")
        except BaseException:
            self.close()
            raise

    def ask(
        self,
        call: str,
        module: bytes,
        function: str,
        arguments: Sequence[int | float],
        limits: Limits,
        fuel: int,
    ) -> Done | Failed:
        """Send one call and wait for its reply, at most its wall limit and a grace."""
        name = hashlib.sha256(module).hexdigest()
        known = name in self._held
        self._number += 1
        request = Request(
            number=self._number,
            module=name,
            module_bytes=0 if known else len(module),
            forget=[] if known else self._make_room(len(module)),
            function=function,
            arguments=list(arguments),
            fuel=fuel,
            wall_ms=limits.wall_ms,
            cpu_ms=limits.cpu_ms,
            memory_bytes=limits.memory_bytes,
        )
        deadline = time.monotonic() + limits.wall_ms / 1000 + _GRACE_SECONDS
        self._send(call, wasm_worker.frame(request) + (b"" if known else module), deadline)
        reply = self._receive(call, deadline)
        if isinstance(reply, Ready) or reply.number != self._number:
            raise _unexpected("The Wasm worker answered another question.")
        if isinstance(reply, Done) and reply.fuel > fuel:
            raise _unexpected("The Wasm worker counts more fuel than it was given.")
        if isinstance(reply, Done) or reply.kept:
            self._held[name] = len(module)
            self._held.move_to_end(name)
        return reply

    def quiet(self) -> bool:
        """Tell whether the worker lives and has said nothing that it was not asked."""
        return not _wait(self._output, select.POLLIN, 0)

    def close(self) -> None:
        """End the process and wait until it is gone."""
        os.close(self._input)
        os.close(self._output)
        self._running.close()

    def _make_room(self, size: int) -> list[str]:
        """Choose the modules that went unused longest, until ``size`` bytes more fit."""
        gone: list[str] = []
        while self._held and (
            len(self._held) >= MODULES_MAX or sum(self._held.values()) + size > MODULE_BYTES_MAX
        ):
            gone.append(self._held.popitem(last=False)[0])
        return gone

    def _send(self, call: str, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._input, view) :]
            except BlockingIOError:
                self._await(self._input, select.POLLOUT, deadline)
            except BrokenPipeError as error:
                raise self._death(call) from error

    def _receive(self, call: str, deadline: float) -> Ready | Done | Failed:
        length = int.from_bytes(self._read(call, 4, deadline), "little")
        if length > _REPLY_BYTES_MAX:
            raise _unexpected("The Wasm worker sent too long a reply.")
        try:
            return _decoder.decode(self._read(call, length, deadline))
        except msgspec.DecodeError as error:
            raise _unexpected("The Wasm worker sent an unreadable reply.") from error

    def _read(self, call: str, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                part = os.read(self._output, count - len(data))
            except BlockingIOError:
                self._await(self._output, select.POLLIN, deadline)
                continue
            if not part:
                raise self._death(call)
            data += part
        return bytes(data)

    def _await(self, fd: int, events: int, deadline: float) -> None:
        if not _wait(fd, events, deadline - time.monotonic()):
            raise LimitExceeded(
                "The Wasm call ran past its wall limit and could not be interrupted (it may have "
                "been compiling); its worker was killed.",
                limit="wall",
                hint=_LIMIT_HINT.format(limit="wall"),
            )

    def _death(self, call: str) -> SandboxFailed | LimitExceeded:
        """Say why the worker closed its line, as far as the kernel tells."""
        end = self._running.channel.receive(_END_SECONDS)
        if isinstance(end, str):
            return _unexpected("The Wasm sandbox started twice.")
        outcome = self._running.outcome(call, end, stdout=b"", stderr=b"", cut=False)
        if outcome.limit == "memory":
            return LimitExceeded(
                "The Wasm worker ran out of memory and was killed.",
                limit="memory",
                hint=_LIMIT_HINT.format(limit="memory"),
            )
        how = f"signal {end.signal}" if end.signal else f"exit code {end.code}"
        return _unexpected(f"The Wasm worker died ({how}) before it answered.")


def _start(sandbox: NativeSandbox, memory_bytes: int) -> tuple[Running, int, int]:
    """Start the process; return it with our ends of its stdin and stdout, non-blocking."""
    profile = worker_profile(memory_bytes)
    script = os.path.realpath(wasm_worker.__file__)
    program = Program(argv=[*interpreter(), script, *_packages()], cwd="/usr")
    in_read, in_write = os.pipe2(os.O_CLOEXEC)
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        running = sandbox.start(
            program,
            profile,
            # As root, what the interpreter's owner may read is what the worker may read.
            workspace=os.path.realpath(sys.base_prefix),
            shield=Shield(),
            stdio=(in_read, out_write, null),
        )
    except BaseException as error:
        os.close(in_write)
        os.close(out_read)
        if isinstance(error, SandboxFailed | ToolFailed) and error.errno == errno.EACCES:
            # As root, tier landlock drops to another user and then has only that user's view.
            raise SandboxUnavailable(
                f"The Python interpreter cannot be used inside a sandbox: {error.message}",
                missing="wasm-worker",
                hint="Use a Python installed in a folder that every user may enter.",
            ) from error
        raise
    finally:
        for fd in (in_read, out_write, null):
            os.close(fd)
    os.set_blocking(in_write, False)
    os.set_blocking(out_read, False)
    return running, in_write, out_read


def _check(module: bytes, function: str, arguments: Sequence[int | float]) -> None:
    """Refuse what the frames cannot carry, before anything is sent."""
    if len(module) > MODULE_BYTES_MAX:
        raise ToolFailed(
            f"The module has {len(module)} bytes; {MODULE_BYTES_MAX} are allowed.",
            code="wasm.too_large",
        )
    if len(function.encode("utf-8", "surrogatepass")) > NAME_BYTES_MAX or not _is_text(function):
        raise ToolFailed("No function has such a name.", code="wasm.export")
    if len(arguments) > VALUES_MAX:
        raise ToolFailed(f"{len(arguments)} arguments are too many.", code="wasm.export")
    if not all(_is_number(value) for value in arguments):
        raise ToolFailed("An argument is not a number of 64 bits.", code="wasm.export")


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 64
    return isinstance(value, float) and math.isfinite(value)


def _wait(fd: int, events: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _unexpected(message: str) -> SandboxFailed:
    return SandboxFailed(message, step="wasm")


def _error(reply: Failed) -> ToolFailed | LimitExceeded:
    # The detail holds names that the module chose.
    detail = "".join(c if " " <= c <= "~" else "?" for c in reply.detail[:_DETAIL_CHARACTERS_MAX])
    if "." in reply.code:
        return ToolFailed(f"The Wasm call failed: {detail}", code=reply.code)
    return LimitExceeded(
        f"The Wasm call reached its {reply.code} limit. {detail}",
        limit=reply.code,
        hint=_LIMIT_HINT.format(limit=reply.code),
    )
