"""Step "sandbox": the supervisor's side of the launcher process (native/launcher).

The launcher makes templates, a template makes the sandboxes of one plan ahead of time, and the
queue of the socket to it is the pool of those that wait. A call takes one, tells it its program on
its own channel and hears there what became of it. Closing the channel ends the sandbox.
"""

from __future__ import annotations

import importlib.resources
import os
import select
import socket
import subprocess
import threading
from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import cast

import msgspec

from safeconduct.call import Tier
from safeconduct.errors import SandboxFailed

from . import seccomp
from .executable import unavailable

VERSION = 2
_MESSAGE_BYTES_MAX = 64 << 10
# LIMIT: bytes of a document that go inline; what is longer goes in a memfd, receive.rs.
_INLINE_BYTES_MAX = 8 << 10
_IN_MEMFD = b"\0"
_DESCRIPTORS_MAX = 16
_ANCILLARY_BYTES = socket.CMSG_SPACE(_DESCRIPTORS_MAX * 4)
_HELLO_SECONDS = 10.0

Plan = Mapping[str, object]


class Failure(msgspec.Struct, forbid_unknown_fields=True):
    """The step that failed and the kernel's errno."""

    step: str
    errno: int


class Exit(msgspec.Struct, forbid_unknown_fields=True):
    """How a program ended and what its tree used, as its init counted.

    ``full`` names what of the private scratch was used up. ``accounts`` are the raw texts of the
    cgroup files that the plan named, in their order.
    """

    code: int | None
    signal: int | None
    wall_limit: bool
    wall_us: int
    cpu_us: int
    peak_rss_kib: int
    read_bytes: int = 0
    written_bytes: int = 0
    full: str | None = None
    accounts: list[str] = []


class Hello(msgspec.Struct, forbid_unknown_fields=True):
    """What a launcher says of itself and of the kernel once it is ready."""

    version: int
    landlock_abi: int


class Made(msgspec.Struct, forbid_unknown_fields=True):
    """A template stands; ``shared`` when its sandboxes share one overlay layer."""

    shared: bool


class Born(msgspec.Struct, forbid_unknown_fields=True):
    """A new sandbox: its number in its template, its host uid, its folder on the host."""

    number: int
    uid: int
    scratch: str | None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One datagram of the native side; exactly one field is set."""

    hello: Hello | None = None
    template: Made | None = None
    sandbox: Born | None = None
    failed: Failure | None = None
    exited: Exit | None = None


_decoder: msgspec.json.Decoder[Message | str] = msgspec.json.Decoder(Message | str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A sandbox that waits for its program, and what belongs to it; ``close`` ends it unused."""

    number: int
    uid: int
    scratch: str | None
    channel: Channel
    stdout: int
    stderr: int
    cgroups: Sequence[int]

    def close(self) -> None:
        """Close every descriptor, which ends the sandbox. Does not wait."""
        self.channel.close()
        for fd in (self.stdout, self.stderr, *self.cgroups):
            os.close(fd)


class Channel:
    """The line to one sandbox. Closing it ends the whole process tree of the call."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)
        self.layers: list[int] = []
        self.listener: int | None = None

    def fileno(self) -> int:
        """Return the descriptor that reads as ready when there is a message."""
        return self._socket.fileno()

    def tell(self, document: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a ``Bind`` or ``Run`` document. Raises SandboxFailed where nobody listens."""
        try:
            _send(self._socket, document, descriptors)
        except OSError as error:
            raise SandboxFailed(f"The sandbox is gone: {error}.", step="channel") from error

    def end(self) -> None:
        """Ask the sandbox to end; its init ends the whole tree and still reports."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def receive(self, seconds: float | None = None) -> Exit:
        """Wait for the end of the program; ``seconds`` is for each message. Raises as ``next``."""
        while True:
            end = self.next(seconds)
            if end is not None:
                return end

    def refuse_failure(self) -> None:
        """Raise SandboxFailed if the next message is there and tells of one; leave it otherwise."""
        try:
            data = self._socket.recv(_MESSAGE_BYTES_MAX, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise SandboxFailed(f"The sandbox is gone: {error}.", step="channel") from error
        message = _parse(data) if data else None
        if message is None:
            raise SandboxFailed("The sandbox ended before it started.", step="channel")
        if isinstance(message, Message) and message.failed is not None:
            raise failure_of(message.failed)

    def next(self, seconds: float | None = None) -> Exit | None:
        """Take the next message: the end of the program, or None for one that came before it.

        Raises SandboxFailed where the sandbox could not be made, its processes vanished, or
        ``seconds`` passed. Descriptors that came along are in ``layers`` and ``listener``.
        """
        message, descriptors = self._next(seconds)
        if isinstance(message, str):
            self._keep(message, descriptors)
            return None
        if message.failed is not None:
            raise failure_of(message.failed)
        if message.exited is None:
            raise SandboxFailed("The sandbox sent an unknown message.", step="channel")
        return message.exited

    def _next(self, seconds: float | None) -> tuple[Message | str, list[int]]:
        if not _wait(self._socket, seconds):
            raise SandboxFailed("The sandbox did not answer in time.", step="answer")
        try:
            data, descriptors, _ = _receive(self._socket)
        except OSError as error:
            raise SandboxFailed(f"The sandbox is gone: {error}.", step="channel") from error
        if not data:
            raise SandboxFailed(
                "The sandbox or its launcher died before the call ended.", step="channel"
            )
        return _parse(data), descriptors

    def _keep(self, name: str, descriptors: list[int]) -> None:
        if name == "layer":
            self.layers += descriptors
        elif name == "listener" and len(descriptors) == 1 and self.listener is None:
            self.listener = descriptors[0]
        else:
            for fd in descriptors:
                os.close(fd)
            raise SandboxFailed("The sandbox sent an unknown message.", step="channel")

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
        for fd in (*self.layers, *([] if self.listener is None else [self.listener])):
            os.close(fd)
        self.layers, self.listener = [], None

    def take_layers(self) -> list[int]:
        """Hand over the descriptors of the private writable layers; the caller closes them."""
        layers, self.layers = self.layers, []
        return layers


class Template:
    """The process that makes the sandboxes of one plan. Safe to use from several threads."""

    def __init__(self, end: socket.socket, name: str) -> None:
        self._socket = end
        self.name = name
        # The layer that all sandboxes share, and the folder it makes with what is below it.
        self.layer: int | None = None
        self.merged: int | None = None

    def ask(self, count: int = 1) -> None:
        """Have sandboxes made; they arrive in the queue. Does not wait for them."""
        try:
            for _ in range(count):
                self._socket.send(b"1")
        except OSError as error:
            raise SandboxFailed(f"The template is gone: {error}.", step="template") from error

    def take(self, seconds: float) -> Waiting:
        """Take one that was asked for, waiting for it at most ``seconds``.

        Raises SandboxFailed where it could not be made or the template is gone.
        """
        while True:
            if not _wait(self._socket, seconds):
                raise SandboxFailed("No sandbox was made in time.", step="template")
            try:
                data, descriptors, flags = _receive(self._socket)
            except BlockingIOError:
                continue  # another thread was faster
            except OSError as error:
                raise SandboxFailed(f"The template is gone: {error}.", step="template") from error
            if not data:
                raise SandboxFailed("The template of this sandbox died.", step="template")
            waiting = self._open(_parse(data), descriptors, whole=not flags & socket.MSG_CTRUNC)
            if waiting is not None:
                return waiting

    def _open(
        self, message: Message | str, descriptors: list[int], *, whole: bool
    ) -> Waiting | None:
        if isinstance(message, Message) and message.template is not None:
            return None
        if message == "layer" and len(descriptors) == 2:
            self.layer, self.merged = descriptors
            return None
        if isinstance(message, Message) and message.failed is not None:
            raise failure_of(message.failed)
        born = message.sandbox if isinstance(message, Message) else None
        if born is None or len(descriptors) < 3 or not whole:
            for fd in descriptors:
                os.close(fd)
            raise SandboxFailed(
                "A sandbox arrived without its descriptors: this process may open no more.",
                step="template",
            )
        channel, stdout, stderr, *cgroups = descriptors
        return Waiting(
            number=born.number,
            uid=born.uid,
            scratch=born.scratch,
            channel=Channel(channel),
            stdout=stdout,
            stderr=stderr,
            cgroups=tuple(cgroups),
        )

    def close(self) -> None:
        """End the template and every sandbox of it that still lives. Does not wait."""
        self._socket.close()
        for fd in (self.layer, self.merged):
            if fd is not None:
                os.close(fd)
        self.layer = self.merged = None


class Launcher:
    """The native side of one runtime. Safe to use from several threads.

    An ordinary user's sandboxes with namespaces are made by a process that lives in a user
    namespace of its own, those without by one that does not; root needs one process for both.
    """

    def __init__(self) -> None:
        """Start it. Raises SandboxUnavailable where the executable is missing."""
        self._lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._processes: dict[Tier, _Process] = {}
        self._refused: SandboxFailed | None = None
        try:
            self._processes[Tier.FULL] = first = _Process(Tier.FULL)
        except SandboxFailed as error:
            self._refused = error
            self._processes[Tier.LANDLOCK] = first = _Process(Tier.LANDLOCK)
        self.landlock_abi = first.landlock_abi

    @property
    def pid(self) -> int:
        """Process id of the process that was started first."""
        return next(iter(self._processes.values())).pid

    def template(self, tier: Tier, plan: Plan, program: bytes) -> Template:
        """Have a template made; ``program`` is a seccomp filter. Does not wait for it.

        Raises SandboxFailed where the machine refuses the tier or the launcher is gone.
        """
        document = encode({"version": VERSION, **plan})
        end = self._process(tier).ask(b"template", document, program)
        return Template(end, str(plan["name"]))

    def clone(self, identity: Plan, mounts: Sequence[Plan], seconds: float) -> list[int]:
        """Return descriptors of detached clones of bind ``mounts``, for a sandbox bound late."""
        document = encode({"identity": identity, "mounts": mounts})
        with self._process(Tier.FULL).ask(b"clone", document) as answer:
            answer.settimeout(seconds)
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    answer, _MESSAGE_BYTES_MAX, 253, socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                raise SandboxFailed(f"The launcher is gone: {error}.", step="clone") from error
        message = _parse(data) if data else None
        if isinstance(message, Message) and message.failed is not None:
            raise failure_of(message.failed)
        if message != "clones":
            raise SandboxFailed("The launcher is gone.", step="clone")
        return descriptors

    def _process(self, tier: Tier) -> _Process:
        if tier is Tier.FULL and self._refused is not None:
            raise self._refused
        kind = Tier.FULL if os.geteuid() == 0 else tier
        with self._lock:
            process = self._processes.get(kind)
            if process is None or not process.alive():
                if os.getpid() != self._owner_pid:
                    raise SandboxFailed("The launcher belongs to another process.", step="launcher")
                if process is not None:
                    process.close()
                # One that was killed is started again: the next call recovers.
                process = self._processes[kind] = _Process(kind)
            return process

    def alive(self) -> bool:
        """Tell whether its processes still run."""
        return all(process.alive() for process in self._processes.values())

    def close(self) -> None:
        """End it and with it every sandbox it started; waits for its processes.

        In a fork of the process that started it, only that process's copies of sockets are closed.
        """
        for process in self._processes.values():
            process.close(owned=os.getpid() == self._owner_pid)


class _Process:
    """One native process and the socket to it."""

    def __init__(self, tier: Tier) -> None:
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        try:
            with theirs:
                self._process = _spawn(theirs.fileno(), tier)
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
        return self._process.pid

    def ask(self, kind: bytes, *documents: bytes) -> socket.socket:
        """Send a request; return the socket that its answer comes on."""
        with ExitStack() as mine:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            mine.enter_context(theirs)
            failing = mine.enter_context(ExitStack())
            failing.enter_context(ours)
            handed = [theirs.fileno()]
            for data in documents:
                handed.append(seccomp.memory_file(data))
                mine.callback(os.close, handed[-1])
            try:
                with self._lock:
                    socket.send_fds(self._control, [kind], handed)
            except OSError as error:
                raise SandboxFailed(f"The launcher is gone: {error}.", step="launcher") from error
            failing.pop_all()
        return ours

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self, *, owned: bool = True) -> None:
        self._control.close()
        if not owned:
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
        if isinstance(message, Message) and message.failed is not None:
            raise failure_of(message.failed)
        if not isinstance(message, Message) or message.hello is None:
            raise SandboxFailed("The launcher did not start.", step="hello")
        if message.hello.version != VERSION:
            raise SandboxFailed("The launcher is of another version.", step="hello")
        return message.hello.landlock_abi


def encode(document: Plan) -> bytes:
    """Return a document as the native side reads it.

    Raises SandboxFailed for text that is no bytes.
    """
    try:
        encoded = msgspec.json.encode(document)
        if encoded.isascii():
            return encoded
    except UnicodeEncodeError:
        pass  # a name that is not UTF-8: a lone surrogate stands for each byte of it
    return msgspec.json.encode(_as_bytes(document))


def _wait(end: socket.socket, seconds: float | None) -> bool:
    """Wait until there is something to read; without system call where it is said to be there."""
    if seconds == 0:
        return True
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def _receive(end: socket.socket) -> tuple[bytes, list[int], int]:
    """Take one datagram and the descriptors that came along. Raises OSError; never waits."""
    flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    data, ancillary, told, _ = end.recvmsg(_MESSAGE_BYTES_MAX, _ANCILLARY_BYTES, flags)
    descriptors = array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return data, descriptors.tolist(), told


def _send(end: socket.socket, document: bytes, descriptors: Sequence[int]) -> None:
    if len(document) <= _INLINE_BYTES_MAX:
        if descriptors:
            socket.send_fds(end, [document], descriptors)
        else:
            end.send(document)
        return
    memfd = seccomp.memory_file(document)
    try:
        socket.send_fds(end, [_IN_MEMFD], [memfd, *descriptors])
    finally:
        os.close(memfd)


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


def failure_of(failure: Failure) -> SandboxFailed:
    """Translate what the native side could not do."""
    code = "sandbox.exec" if failure.step == "exec" else None
    reason = os.strerror(failure.errno)
    return SandboxFailed(
        f"The sandbox could not be made: {failure.step}: {reason}.",
        step=failure.step,
        errno=failure.errno,
        code=code,
    )


def _spawn(control: int, tier: Tier) -> subprocess.Popen[bytes]:
    """Start the executable of this package with nothing inherited but its control socket."""
    executable = importlib.resources.files("safeconduct.runtime").joinpath(
        "bin", "safeconduct-launcher"
    )
    with importlib.resources.as_file(executable) as path:
        try:
            return subprocess.Popen(
                [str(path), str(control), str(tier)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={},
                pass_fds=(control,),
                start_new_session=True,
            )
        except OSError as error:
            raise unavailable(path, error) from error
