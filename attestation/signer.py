"""Step "record": the supervisor's end of the signer, which holds no key.

Frames on the channel: length (4 bytes, big-endian, at most 8 KiB), then the body. A request is an
operation byte (``Q`` what did you sign last, ``S`` sign), the origin's length (1 byte) and bytes,
and for ``S``: old size, new size (8 bytes each), root (32), number of proof hashes (1), hashes.
An answer is ``+`` and the result, or ``-`` and code, message, hint on three lines.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from safeconduct import errors
from safeconduct.errors import TraceInvalid

from .checkpoint import Checkpoint, require_origin
from .merkle import HASH_BYTES, MAX_PROOF_HASHES
from .note import VerifierKey

ISOLATION = "process"
ANSWER_GOOD = b"+"
ANSWER_BAD = b"-"
_SIGN = b"S"
_QUERY = b"Q"
# LIMIT: a request is at most 1 + 1 + 200 + 16 + 32 + 1 + 126 * 32 bytes.
_MAX_FRAME_BYTES = 8 << 10
# LIMIT: a signature takes two fsyncs; a disk that needs longer than this is a lost signer.
_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 5.0

_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from safeconduct.attestation.signer_process import main; "
    "raise SystemExit(main(sys.argv[2:]))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the signer is asked. ``root`` None asks for the head it signed last."""

    origin: str
    old_size: int = 0
    new_size: int = 0
    root: bytes | None = None
    proof: tuple[bytes, ...] = ()


def encode_request(request: Request) -> bytes:
    """Return a request as bytes."""
    origin = request.origin.encode("ascii")
    head = bytes([len(origin)]) + origin
    if request.root is None:
        return _QUERY + head
    sizes = request.old_size.to_bytes(8, "big") + request.new_size.to_bytes(8, "big")
    count = bytes([len(request.proof)])
    return _SIGN + head + sizes + request.root + count + b"".join(request.proof)


def parse_request(data: bytes) -> Request:
    """Parse a request strictly. Raise TraceInvalid ``signer.request``."""
    length = data[1] if len(data) > 1 else 0
    origin_bytes, rest = data[2 : 2 + length], data[2 + length :]
    if len(origin_bytes) != length or not origin_bytes.isascii():
        raise _bad_request()
    origin = require_origin(origin_bytes.decode("ascii"))
    if data[:1] == _QUERY and not rest:
        return Request(origin=origin)
    hashes = rest[49:]
    if data[:1] != _SIGN or len(rest) < 49 or len(hashes) != rest[48] * HASH_BYTES:
        raise _bad_request()
    if rest[48] > MAX_PROOF_HASHES:
        raise _bad_request()
    proof = tuple(hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES))
    return Request(
        origin=origin,
        old_size=int.from_bytes(rest[:8], "big"),
        new_size=int.from_bytes(rest[8:16], "big"),
        root=rest[16:48],
        proof=proof,
    )


def error_frame(error: TraceInvalid) -> bytes:
    """Return an error as an answer carries it."""
    lines = (error.code, error.message, error.hint)
    return "\n".join(line.replace("\n", " ")[:1000] for line in lines).encode("utf-8", "replace")


def send(channel: socket.socket, body: bytes) -> None:
    """Send one frame."""
    channel.sendall(len(body).to_bytes(4, "big") + body)


def receive(channel: socket.socket) -> bytes | None:
    """Return the next frame, or None at the end of input or on a frame that is too long."""
    header = _receive_exactly(channel, 4)
    if header is None or int.from_bytes(header, "big") > _MAX_FRAME_BYTES:
        return None
    return _receive_exactly(channel, int.from_bytes(header, "big"))


def _receive_exactly(channel: socket.socket, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        part = channel.recv(count - len(data))
        if not part:
            return None
        data += part
    return data


class SignerClient:
    """A running signer process and the channel to it. Thread-safe; one request at a time.

    Only the process that started it may ask: a fork shares the channel, and would take answers
    that are not its own. There every request raises ``signer.forked``.
    """

    isolation = ISOLATION

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self._process = process
        self._channel = channel
        self._lock = Lock()
        self._lost = False
        self._owner_pid = os.getpid()
        self.key = VerifierKey.parse(self._read_answer().decode("utf-8", "replace"))

    @classmethod
    def start(cls, key: Path, *, state: Path, forbidden: Sequence[Path] = ()) -> SignerClient:
        """Start the signer on a private key file and wait until it is ready.

        ``state`` is the folder where it remembers what it signed, per log; keep it beside the
        key, never in the trace. ``forbidden`` are folders (trace, workspace) in which neither may
        lie. Raise TraceInvalid ``key.*`` for a key that must not be used, else ``signer.lost``.
        """
        ours, theirs = socket.socketpair()
        # This folder is reached through a link; errors.py lies inside the package itself.
        root = str(Path(errors.__file__).parents[1])
        paths = [os.path.abspath(path) for path in (key, state, *forbidden)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, root, *paths],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=dict[str, str](),
                cwd="/",
                close_fds=True,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise _lost(f"it cannot be started: {error.strerror}") from error
        finally:
            theirs.close()
        ours.settimeout(_TIMEOUT_S)
        try:
            return cls(process, ours)
        except BaseException:
            _stop(process, ours)
            raise

    @property
    def name(self) -> str:
        """Return the key's name."""
        return self.key.name

    @property
    def pid(self) -> int:
        """Return the signer's process id."""
        return self._process.pid

    def last(self, origin: str) -> Checkpoint:
        """Return the head last signed for this log; size 0 when there is none."""
        answer = self._ask(Request(origin=origin))
        return Checkpoint.parse(answer.decode("ascii", "replace"))

    def sign(self, head: Checkpoint, *, old_size: int, proof: Sequence[bytes]) -> str:
        """Return the signature line over a head that extends the one signed last.

        Raise TraceInvalid ``signer.refused`` when it does not, ``signer.lost`` when the process is
        gone, ``signer.state`` when it cannot remember what it is about to sign, ``signer.forked``
        in a fork of the process that started it.
        """
        request = Request(
            origin=head.origin,
            old_size=old_size,
            new_size=head.size,
            root=head.root,
            proof=tuple(proof),
        )
        return self._ask(request).decode("utf-8", "replace")

    def close(self) -> None:
        """End the signer by closing its channel; it is killed if it does not leave.

        In a fork only that process's copy of the channel is closed.
        """
        if os.getpid() != self._owner_pid:
            self._channel.close()
            return
        _stop(self._process, self._channel)

    def _ask(self, request: Request) -> bytes:
        if os.getpid() != self._owner_pid:
            raise TraceInvalid(
                "this process is a fork of the one that started the signer",
                code="signer.forked",
                hint="start a signer of its own in each process",
            )
        with self._lock:
            if self._lost:
                raise _lost("it is gone")
            try:
                send(self._channel, encode_request(request))
            except OSError as error:
                self._lost = True
                raise _lost(f"{error}") from error
            return self._read_answer()

    def _read_answer(self) -> bytes:
        try:
            answer = receive(self._channel)
        except OSError as error:
            self._lost = True
            raise _lost(f"{error}") from error
        if not answer:
            self._lost = True
            raise _lost("it ended without an answer")
        if answer[:1] == ANSWER_GOOD:
            return answer[1:]
        code, message, hint = [*answer[1:].decode("utf-8", "replace").split("\n"), "", "", ""][:3]
        raise TraceInvalid(message, code=code or "signer.lost", hint=hint)


def _stop(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
        return
    process.kill()
    process.wait()


def _lost(why: str) -> TraceInvalid:
    return TraceInvalid(
        f"the signer is lost: {why}",
        code="signer.lost",
        hint="nothing more is recorded; open the trace again to recover it",
    )


def _bad_request() -> TraceInvalid:
    return TraceInvalid("the signer does not understand the request", code="signer.request")
