"""Step "sandbox": the supervisor's side of the launcher process (native/launcher).

One datagram asks for one sandbox and carries its descriptors; everything that becomes of it is
told on that call's own channel. Closing the channel ends the sandbox.
"""

from __future__ import annotations

import importlib.resources
import os
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import msgspec

from safeconduct.errors import SandboxFailed, SandboxUnavailable

from . import seccomp

VERSION = 1
_MESSAGE_BYTES_MAX = 64 << 10
_HELLO_SECONDS = 10.0


class Failure(msgspec.Struct, forbid_unknown_fields=True):
    """The step that failed and the kernel's errno."""

    step: str
    errno: int


class Exit(msgspec.Struct, forbid_unknown_fields=True):
    """How a program ended and what its tree used, as its init counted."""

    code: int | None
    signal: int | None
    wall_limit: bool
    wall_us: int
    cpu_us: int
    peak_rss_kib: int


class Hello(msgspec.Struct, forbid_unknown_fields=True):
    """What a launcher says of itself and of the kernel once it is ready."""

    version: int
    landlock_abi: int


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One datagram of the launcher or of a sandbox's init; exactly one field is set."""

    hello: Hello | None = None
    failed: Failure | None = None
    exited: Exit | None = None


_decoder: msgspec.json.Decoder[Message | str] = msgspec.json.Decoder(Message | str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What native/launcher/src/request.rs calls a Request; the names are the same."""

    layers: Sequence[str]
    argv: Sequence[str]
    environment: Sequence[str]
    cwd: str
    search: Sequence[str]
    identity: Mapping[str, object]
    mounts: Sequence[Mapping[str, object]]
    landlock: Sequence[Mapping[str, object]]
    rlimits: Sequence[Mapping[str, object]]
    cgroups: Sequence[str]
    wall_ms: int

    def encode(self) -> bytes:
        """Return the request document. Raises SandboxFailed for text that is no bytes."""
        fields = {name: _as_bytes(getattr(self, name)) for name in self.__slots__}
        return msgspec.json.encode({"version": VERSION, **fields})


class Channel:
    """The line to one sandbox. Closing it ends the whole process tree of the call."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def fileno(self) -> int:
        """Return the descriptor that reads as ready when there is a message."""
        return self._socket.fileno()

    def receive(self, seconds: float | None = None) -> Exit | str:
        """Wait for the next message: ``"started"`` or the Exit.

        Raises SandboxFailed where the sandbox could not be made, its processes vanished, or
        ``seconds`` passed.
        """
        self._socket.settimeout(seconds)
        try:
            data = self._socket.recv(_MESSAGE_BYTES_MAX)
        except TimeoutError as error:
            raise SandboxFailed("The sandbox did not answer in time.", step="answer") from error
        except OSError as error:
            raise SandboxFailed(f"The sandbox is gone: {error}.", step="channel") from error
        if not data:
            raise SandboxFailed(
                "The sandbox or its launcher died before the call ended.", step="channel"
            )
        message = _parse(data)
        if isinstance(message, str):
            return message
        if message.failed is not None:
            raise _failure(message.failed)
        if message.exited is None:
            raise SandboxFailed("The sandbox sent an unknown message.", step="channel")
        return message.exited

    def drain(self, seconds: float) -> bool:
        """Ask the sandbox to end and wait until its init holds no end of this line any more.

        False when it still does after ``seconds``.
        """
        try:
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(seconds)
            while self._socket.recv(_MESSAGE_BYTES_MAX):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """End the sandbox, if it still lives. Does not wait."""
        self._socket.close()


class Launcher:
    """The launcher process of one runtime. Safe to use from several threads."""

    def __init__(self) -> None:
        """Start the process. Raises SandboxUnavailable where the executable is missing."""
        self._lock = threading.Lock()
        self._owner_pid = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        try:
            with theirs:
                self._process = _spawn(theirs.fileno())
        except BaseException:
            ours.close()
            raise
        try:
            self.landlock_abi = self._greet()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the launcher."""
        return self._process.pid

    def start(
        self, request: Request, *, program: bytes, stdio: Sequence[int], extra: Sequence[int] = ()
    ) -> Channel:
        """Ask for one sandbox; its descriptors are copied, the caller keeps its own.

        ``program`` is a seccomp filter. Raises SandboxFailed where the launcher is gone.
        """
        encoded = request.encode()
        with ExitStack() as mine:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            mine.enter_context(theirs)
            failing = mine.enter_context(ExitStack())
            failing.enter_context(ours)
            handed = [theirs.fileno()]
            for data in (encoded, program):
                handed.append(seccomp.memory_file(data))
                mine.callback(os.close, handed[-1])
            try:
                with self._lock:
                    socket.send_fds(self._control, [b"1"], [*handed, *stdio, *extra])
            except OSError as error:
                raise SandboxFailed(f"The launcher is gone: {error}.", step="launcher") from error
            failing.pop_all()
        return Channel(ours)

    def alive(self) -> bool:
        """Tell whether the process still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the launcher and with it every sandbox it started; waits for the process.

        In a fork of the process that started it, only that process's copy of the socket is closed.
        """
        self._control.close()
        if os.getpid() != self._owner_pid:
            return  # somebody else's child: it can be neither waited for nor ended from here
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _greet(self) -> int:
        self._control.settimeout(_HELLO_SECONDS)
        try:
            data = self._control.recv(_MESSAGE_BYTES_MAX)
        except OSError as error:
            raise SandboxFailed(f"The launcher did not start: {error}.", step="hello") from error
        finally:
            self._control.settimeout(None)
        message = _parse(data) if data else None
        if not isinstance(message, Message) or message.hello is None:
            raise SandboxFailed("The launcher did not start.", step="hello")
        if message.hello.version != VERSION:
            raise SandboxFailed("The launcher is of another version.", step="hello")
        return message.hello.landlock_abi


def _as_bytes(value: object) -> object:
    """Spell each byte of a text as the character of that number.

    File names and arguments are bytes in any encoding; a JSON string could not hold them all.
    """
    if isinstance(value, str):
        if value.isascii():
            return value
        try:
            return os.fsencode(value).decode("latin-1")
        except UnicodeEncodeError as error:
            raise SandboxFailed("A name is not text of this system.", step="request") from error
    if isinstance(value, Mapping):
        return {name: _as_bytes(item) for name, item in cast("Mapping[str, object]", value).items()}
    if isinstance(value, Sequence):
        return [_as_bytes(item) for item in cast("Sequence[object]", value)]
    return value


def _parse(data: bytes) -> Message | str:
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise SandboxFailed("The sandbox sent unreadable bytes.", step="channel") from error


def _failure(failure: Failure) -> SandboxFailed:
    code = "sandbox.exec" if failure.step == "exec" else None
    reason = os.strerror(failure.errno)
    return SandboxFailed(
        f"The sandbox could not be made: {failure.step}: {reason}.",
        step=failure.step,
        errno=failure.errno,
        code=code,
    )


def _spawn(control: int) -> subprocess.Popen[bytes]:
    """Start the executable of this package with nothing inherited but its control socket."""
    executable = importlib.resources.files("safeconduct.runtime").joinpath(
        "bin", "safeconduct-launcher"
    )
    with importlib.resources.as_file(executable) as path:
        if not path.is_file():
            raise SandboxUnavailable(
                "The launcher executable is not installed with this package.",
                missing="launcher",
                hint="Install safeconduct again (from a checkout: make setup).",
            )
        return subprocess.Popen(
            [str(path), str(control)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={},
            pass_fds=(control,),
            start_new_session=True,
        )
