"""Step "record": the supervisor's end of the signer, which holds no key.

signer_request.py describes the frames, signer_process.py is the other end.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from safeconduct import errors
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.note import VerifierKey
from safeconduct.errors import TraceInvalid

from .key import Ask
from .signer_request import (
    ANSWER_ASK,
    ANSWER_GOOD,
    MAX_FRAME_BYTES,
    Attest,
    Finish,
    Place,
    Query,
    Request,
    Rotate,
    Sign,
    encode_request,
    receive,
    send,
)

if TYPE_CHECKING:
    from safeconduct.attestation.proofs.statement import Envelope

ISOLATION = "process"
ISOLATION_USER = "user"
# LIMIT: a signature takes two fsyncs; a disk that needs longer than this is a lost signer.
_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 5.0
_SIGNATURE_BYTES = 64

_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from safeconduct.attestation.signing.signer_process import main; "
    "raise SystemExit(main(sys.argv[2:]))"
)


class SignerClient:
    """A running signer process and the channel to it. Thread-safe; one request at a time.

    Only the process that started it may ask: a fork shares the channel, and would take answers
    that are not its own. There every request raises ``signer.forked``.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        channel: socket.socket,
        *,
        isolation: str = ISOLATION,
        ask: Ask | None = None,
    ) -> None:
        self._process = process
        self._channel = channel
        self._lock = Lock()
        # INVARIANT: true from before a request is sent until its whole answer was read. What is
        # interrupted between, as by Ctrl-C, would leave its answer to the next request.
        self._lost = True
        self._owner_pid = os.getpid()
        self.isolation = isolation
        """``process``: the signer runs under our own uid. ``user``: under one of its own."""
        answer = self._answer(ask)
        self.key = VerifierKey.parse(answer.decode("utf-8", "replace"))

    @classmethod
    def start(
        cls,
        key: Path,
        *,
        state: Path,
        forbidden: Sequence[Path] = (),
        ask: Ask | None = None,
    ) -> SignerClient:
        """Start the signer on a private key file and wait until it is ready.

        ``state`` is the folder where it remembers what it signed, per log; keep it beside the
        key, never in the trace. ``forbidden`` are folders (trace, workspace) in which neither may
        lie. ``ask`` returns the passphrase where the key file has one. Raise TraceInvalid
        ``key.*`` for a key that must not be used, else ``signer.lost``.
        """
        # This folder is reached through a link; errors.py lies inside the package itself.
        root = str(Path(errors.__file__).parents[1])
        paths = [os.path.abspath(path) for path in (key, state, *forbidden)]
        return cls.start_command([sys.executable, "-I", "-c", _BOOT, root, *paths], ask=ask)

    @classmethod
    def start_command(
        cls,
        command: Sequence[str],
        *,
        isolation: str = ISOLATION,
        ask: Ask | None = None,
        terminal_s: float | None = None,
    ) -> SignerClient:
        """Start a signer by its command, which finds the channel as its descriptor 0.

        With ``terminal_s`` the command may first talk to the person at the terminal, that long.
        """
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if terminal_s is None else None,
                env=dict[str, str](),
                cwd="/",
                close_fds=True,
                # Who leaves the session has no terminal any more, credentials(7).
                start_new_session=terminal_s is None,
            )
        except OSError as error:
            ours.close()
            raise _lost(f"it cannot be started: {error.strerror}") from error
        finally:
            theirs.close()
        ours.settimeout(_TIMEOUT_S if terminal_s is None else terminal_s)
        try:
            client = cls(process, ours, isolation=isolation, ask=ask)
        except BaseException:
            _stop(process, ours)
            raise
        ours.settimeout(_TIMEOUT_S)
        return client

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
        answer = self._ask(Query(origin=origin))
        return Checkpoint.parse(answer.decode("ascii", "replace"))

    def sign(self, head: Checkpoint, *, old_size: int, proof: Sequence[bytes]) -> str:
        """Return the signature line over a head that extends the one signed last.

        While the key is being rotated there are two lines, the old key's first, and the note they
        make must be kept. Raise TraceInvalid ``signer.refused`` when the head does not extend,
        ``signer.lost`` when the process is gone, ``signer.state`` when it cannot remember what it
        is about to sign, ``signer.forked`` in a fork of the process that started it.
        """
        request = Sign(
            origin=head.origin,
            old_size=old_size,
            new_size=head.size,
            root=head.root,
            proof=tuple(proof),
        )
        return self._ask(request).decode("utf-8", "replace")

    def rotate(self, origin: str) -> dict[str, str]:
        """Begin to hand this log over to a new key, or go on; return the ``key.rotate`` body.

        The new key is durable on return, and heads are signed by both keys until
        ``finish_rotation``. Asked again, also after a crash, the answer is the same. Raise
        TraceInvalid ``key.busy`` while other signers use the key.
        """
        answer = self._ask(Rotate(origin=origin)).decode("utf-8", "replace")
        old, new, signature = [*answer.split("\n"), "", "", ""][:3]
        return {"old": old, "new": new, "signature": signature}

    def finish_rotation(
        self, origin: str, *, index: int, entry: bytes, proof: Sequence[bytes]
    ) -> VerifierKey:
        """Show that the ``key.rotate`` entry lies in the tree signed last; end the old key.

        Only after a note over a head that covers the entry is durable. On return the old private
        key is overwritten and removed, and ``key`` is the new one. Raise ``signer.refused`` when
        the proof does not lead to the head signed last.
        """
        request = Finish(origin=origin, index=index, proof=tuple(proof), entry=entry)
        self.key = VerifierKey.parse(self._ask(request).decode("utf-8", "replace"))
        return self.key

    def attest(self, origin: str, places: Sequence[Place]) -> Envelope:
        """Return a signed statement about entries of this log, shown to lie in the tree.

        signer_statement.py says which statement. Raise ``signer.refused`` where an entry is not
        shown to lie in the tree signed last (``last``; prove it anew if that has grown).
        """
        from safeconduct.attestation.proofs.statement import Envelope, EnvelopeSignature, key_hint

        answer = self._ask(Attest(origin=origin, places=tuple(places)))
        signature, payload = answer[:_SIGNATURE_BYTES], answer[_SIGNATURE_BYTES:]
        made = EnvelopeSignature(keyid=key_hint(self.key.of_log(origin)), signature=signature)
        return Envelope(payload=payload, signatures=(made,))

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
        frame = encode_request(request)
        if len(frame) > MAX_FRAME_BYTES:
            raise TraceInvalid("the request is too long for the signer", code="signer.request")
        with self._lock:
            if self._lost:
                raise _lost("it is gone")
            self._lost = True
            self._send(frame)
            return self._answer()

    def _send(self, frame: bytes) -> None:
        try:
            send(self._channel, frame)
        except OSError as error:
            raise _lost(f"{error}") from error

    def _answer(self, ask: Ask | None = None) -> bytes:
        answer = self._receive()
        if answer[:1] == ANSWER_ASK:
            # Nothing to give is said by an empty frame; the signer then says what is missing.
            line = answer[1:].decode("utf-8", "replace")
            self._send(b"" if ask is None else ask(line))
            answer = self._receive()
        self._lost = False
        if answer[:1] == ANSWER_GOOD:
            return answer[1:]
        code, message, hint = [*answer[1:].decode("utf-8", "replace").split("\n"), "", "", ""][:3]
        raise TraceInvalid(message, code=code or "signer.lost", hint=hint)

    def _receive(self) -> bytes:
        try:
            answer = receive(self._channel)
        except OSError as error:
            raise _lost(f"{error}") from error
        if not answer:
            raise _lost("it ended without an answer")
        return answer


def _stop(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
        return
    with suppress(PermissionError, subprocess.TimeoutExpired):
        process.kill()  # a signer of another user is not ours to kill: it ends with its channel
        process.wait(_STOP_TIMEOUT_S)


def _lost(why: str) -> TraceInvalid:
    return TraceInvalid(
        f"the signer is lost: {why}",
        code="signer.lost",
        hint="nothing more is recorded; open the trace again to recover it",
    )
