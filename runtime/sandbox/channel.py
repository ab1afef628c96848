"""Step "sandbox": the line to one sandbox, and the datagrams of the native side.

`report.rs` writes the messages and `request.rs` reads the documents, one datagram each, with the
descriptors that belong to them.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar, cast

import msgspec

from safeconduct.errors import SandboxFailed

from . import seccomp

# LIMIT: bytes of one datagram of the native side, and descriptors that come along with it.
MESSAGE_BYTES_MAX = 64 << 10
_DESCRIPTORS_MAX = 16
_ANCILLARY_BYTES = socket.CMSG_SPACE(_DESCRIPTORS_MAX * 4)
# LIMIT: bytes of a document that go inline; what is longer goes in a memfd, receive.rs.
_INLINE_BYTES_MAX = 8 << 10
_IN_MEMFD = b"\0"

_RECEIVE = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT

Document = Mapping[str, object]

# Code of a failure that came before the program: what the sandbox was made for has changed.
STALE = "sandbox.stale"
_T = TypeVar("_T")


class _Buffers(threading.local):
    """Where each thread receives: making room for the longest message takes longer than reading."""

    def __init__(self) -> None:
        self.kept = bytearray(MESSAGE_BYTES_MAX)


_buffers = _Buffers()
# Whoever holds it may change how many descriptors this process may open.
_sending = threading.Lock()


class Failure(msgspec.Struct, forbid_unknown_fields=True):
    """The step that failed and the kernel's errno; ``stale`` where a new sandbox may do better."""

    step: str
    errno: int
    stale: bool = False


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


class Born(msgspec.Struct, forbid_unknown_fields=True):
    """A new sandbox: its number in its template, its host uid, its folder on the host.

    ``again`` when the template makes another one as soon as this one is gone.
    """

    number: int
    uid: int
    again: bool
    scratch: str | None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One datagram of the native side; exactly one field is set."""

    hello: Hello | None = None
    sandbox: Born | None = None
    failed: Failure | None = None
    exited: Exit | None = None


_decoder: msgspec.json.Decoder[Message | str] = msgspec.json.Decoder(Message | str)


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
            self.refuse_failure()  # what it said before it went says more than that it went
            raise SandboxFailed(f"The sandbox is gone: {error}.", step="channel") from error

    def end(self) -> None:
        """Ask the sandbox to end; its init ends the whole tree and still reports."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def forward(self, number: int) -> None:
        """Have the program and its process group sent a signal; may be called by a handler.

        One that is gone gets none, and so does one whose line is full of signals.
        """
        with suppress(OSError):
            self._socket.send(bytes([number]), socket.MSG_DONTWAIT)

    def receive(self, seconds: float | None = None) -> Exit:
        """Wait for the end of the program; ``seconds`` is for each message. Raises as ``next``."""
        while True:
            end = self.next(seconds)
            if end is not None:
                return end

    def refuse_failure(self) -> None:
        """Raise SandboxFailed if the next message is there and tells of one; leave it otherwise."""
        try:
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
            data = _past_reset(lambda: self._socket.recv(MESSAGE_BYTES_MAX, flags))
        except BlockingIOError:
            return
        except OSError as error:
            raise SandboxFailed(f"The sandbox is gone: {error}.", step="channel") from error
        message = parse(data) if data else None
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
        if not wait(self._socket, seconds):
            raise SandboxFailed("The sandbox did not answer in time.", step="answer")
        try:
            data, descriptors, _ = receive(self._socket)
        except OSError as error:
            raise SandboxFailed(f"The sandbox is gone: {error}.", step="channel") from error
        if not data:
            raise SandboxFailed(
                "The sandbox or its launcher died before the call ended.", step="channel"
            )
        return parse(data), descriptors

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
            while self._socket.recv(MESSAGE_BYTES_MAX):
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


def encode(document: Document) -> bytes:
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


def wait(end: socket.socket, seconds: float | None) -> bool:
    """Wait until there is something to read; without system call where it is said to be there."""
    if seconds == 0:
        return True
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def receive(end: socket.socket) -> tuple[bytes, list[int], int]:
    """Take one datagram and the descriptors that came along. Raises OSError; never waits."""
    buffer = _buffers.kept
    size, ancillary, told, _ = _past_reset(
        lambda: end.recvmsg_into((buffer,), _ANCILLARY_BYTES, _RECEIVE)
    )
    data = bytes(memoryview(buffer)[:size])
    descriptors = array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return data, descriptors.tolist(), told


def _past_reset(read: Callable[[], _T]) -> _T:
    """Read, again where the other side went without reading what it was told.

    The kernel tells that once, before what was said earlier and still waits (unix_release_sock
    in the kernel's net/unix/af_unix.c).
    """
    try:
        return read()
    except ConnectionResetError:
        return read()


def send_fds(end: socket.socket, data: bytes, descriptors: Sequence[int]) -> None:
    """Send one datagram with descriptors. Raises OSError.

    The programs of an ordinary user, sandboxed ones too, may together have as many descriptors
    under way as each may open, unix(7) ETOOMANYREFS: a hostile one could keep us from starting any
    other. Our own soft limit is not for that, so the hard one then counts for a moment.
    """
    try:
        socket.send_fds(end, [data], descriptors)
    except OSError as error:
        if error.errno != errno.ETOOMANYREFS:
            raise
        with _sending:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            try:
                socket.send_fds(end, [data], descriptors)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _send(end: socket.socket, document: bytes, descriptors: Sequence[int]) -> None:
    if len(document) <= _INLINE_BYTES_MAX:
        if descriptors:
            send_fds(end, document, descriptors)
        else:
            end.send(document)
        return
    memfd = seccomp.memory_file(document)
    try:
        send_fds(end, _IN_MEMFD, [memfd, *descriptors])
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


def parse(data: bytes) -> Message | str:
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise SandboxFailed("The sandbox sent unreadable bytes.", step="channel") from error


def failure_of(failure: Failure) -> SandboxFailed:
    """Translate what the native side could not do."""
    code = "sandbox.exec" if failure.step == "exec" else STALE if failure.stale else None
    reason = os.strerror(failure.errno)
    return SandboxFailed(
        f"The sandbox could not be made: {failure.step}: {reason}.",
        step=failure.step,
        errno=failure.errno,
        code=code,
    )
