"""The signer: a process of its own that holds the log's key and signs only growing trees.

It reads bounded binary frames on descriptor 0 and answers there; end of input ends it. What it is
asked is in signer_request.py, what it remembers in signer_state.py, its key in key_files.py.
"""

from __future__ import annotations

import ctypes
import resource
import socket
from collections.abc import Sequence
from pathlib import Path

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.merkle import leaf_hash, verify_consistency, verify_inclusion
from safeconduct.attestation.note import Pen, SigningKey
from safeconduct.attestation.rotation import entry_body, rotation_body
from safeconduct.errors import TraceInvalid

from .key import Ask, require_outside
from .key_files import KeyFiles
from .signer_request import (
    ANSWER_ASK,
    ANSWER_BAD,
    ANSWER_GOOD,
    Attest,
    Finish,
    Query,
    Request,
    Rotate,
    Sign,
    error_frame,
    parse_request,
    receive,
    send,
)
from .signer_state import Memory, SignerState
from .signer_statement import signed_part, stated

_PR_SET_DUMPABLE = 4  # prctl(2)
# LIMIT: logs whose keys are kept ready; a runtime has one.
_MAX_PENS = 64


def main(arguments: Sequence[str]) -> int:
    """Serve one client: ``KEY STATE [FORBIDDEN…]``. The channel is descriptor 0."""
    channel = socket.socket(fileno=0)
    key_path, state, *forbidden = (Path(argument) for argument in arguments)
    return serve(channel, key_path, state, forbidden)


def serve(
    channel: socket.socket,
    key: Path,
    state: Path,
    forbidden: Sequence[Path] = (),
    *,
    rotates: bool = True,
) -> int:
    """Serve one client on a channel until it closes it; return the process's exit code.

    Only a signer that ``rotates`` lets its client end the key.
    """
    try:
        harden()
        require_outside(state, forbidden)
        files = KeyFiles.open(key, forbidden=forbidden, ask=_ask_on(channel))
        signer = _Signer(files, SignerState(state), rotates=rotates)
    except TraceInvalid as error:
        send(channel, ANSWER_BAD + error_frame(error))
        return 1
    except OSError as error:
        send(channel, ANSWER_BAD + error_frame(_lost_state(error)))
        return 1
    send(channel, ANSWER_GOOD + files.current.verifier.line.encode())
    while (data := receive(channel)) is not None:
        try:
            answer = ANSWER_GOOD + signer.answer(parse_request(data))
        except TraceInvalid as error:
            answer = ANSWER_BAD + error_frame(error)
        except OSError as error:
            answer = ANSWER_BAD + error_frame(_lost_state(error))
        send(channel, answer)
        if signer.broken:
            return 1
    return 0


def harden() -> None:
    """Keep the key out of core dumps and out of reach of ptrace and /proc/<pid>/mem."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What the caller limited for itself is not to end in the middle of a file of ours. Every
    # write is checked all the same: a hard limit stays, setrlimit(2).
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise TraceInvalid("the signer cannot be made non-dumpable", code="signer.state")


def _ask_on(channel: socket.socket) -> Ask:
    """Ask the other end for the passphrase; an empty frame says that there is none to give."""

    def ask(line: str) -> bytes:
        send(channel, ANSWER_ASK + line.encode())
        given = receive(channel)
        if not given:
            raise TraceInvalid(
                "the key file is under a passphrase, and none was given",
                code="key.passphrase",
                hint="set SAFECONDUCT_KEY_PASSPHRASE_FILE, or run this on a terminal",
            )
        return given

    return ask


class _Signer:
    """Answers requests about any number of logs with one key, or two while they change."""

    def __init__(self, files: KeyFiles, state: SignerState, *, rotates: bool) -> None:
        self._files, self._state, self._rotates = files, state, rotates
        self._pens: dict[tuple[bytes, str], Pen] = {}
        self.broken = False

    def answer(self, request: Request) -> bytes:
        if isinstance(request, Rotate | Finish) and not self._rotates:
            raise TraceInvalid(
                "the signer refuses: whoever may ask for signatures may not end the key",
                code="signer.refused",
                hint="rotate it with `safeconduct keys rotate`, which asks sudo for your password",
            )
        with self._state.locked(), self._state.opened(request.origin) as memory:
            last = memory.last
            match request:
                case Query():
                    return last.text().encode()
                case Sign():
                    return self._sign(memory, request)
                case Rotate():
                    return self._rotate(request)
                case Finish():
                    return self._finish(last, request)
                case Attest():
                    return self._attest(last, request)

    def _sign(self, memory: Memory, request: Sign) -> bytes:
        _require_extends(memory.last, request)
        head = Checkpoint(origin=request.origin, size=request.new_size, root=request.root)
        settle = memory.remember(head)
        # While the disk takes it. Where that fails, nobody learns them.
        lines = self._pen(self._files.current, head.origin).sign(head.text())
        if self._files.next is not None:
            # The head that will cover the key.rotate entry needs both, and only the writer knows
            # which one that is. A signature by a key not announced yet is ignored by verifiers.
            lines += self._pen(self._files.next, head.origin).sign(head.text())
        settle()
        return lines.encode()

    def _pen(self, key: SigningKey, origin: str) -> Pen:
        """Return what signs this log's heads; making it takes longer than a signature."""
        pen = self._pens.get((key.seed, origin))
        if pen is None:
            if len(self._pens) == _MAX_PENS:
                self._pens.clear()
            pen = self._pens[key.seed, origin] = Pen(key.of_log(origin))
        return pen

    def _rotate(self, request: Rotate) -> bytes:
        new = self._files.begin()
        body = rotation_body(request.origin, self._files.current, new)
        return "\n".join([body["old"], body["new"], body["signature"]]).encode()

    def _finish(self, last: Checkpoint, request: Finish) -> bytes:
        """Destroy the old key, once the tree signed last has been shown to say so."""
        if self._files.next is None:
            raise _refused("no rotation is under way")
        new = self._files.begin()  # after a crash it is not held alone yet
        leaf = leaf_hash(request.entry)
        if not verify_inclusion(leaf, request.index, last.size, request.proof, last.root):
            raise _refused("the entry is not in the tree signed last")
        if entry_body(request.entry) != rotation_body(request.origin, self._files.current, new):
            raise _refused("the entry does not hand over to the next key")
        try:
            self._files.finish()
        except OSError:
            self.broken = True  # which key is in force is found out by the next start
            raise
        self._pens.clear()
        return new.line.encode()

    def _attest(self, last: Checkpoint, request: Attest) -> bytes:
        payload = stated(last, request)
        return self._files.current.sign_bytes(signed_part(payload)) + payload


def _require_extends(last: Checkpoint, request: Sign) -> None:
    if request.old_size != last.size:
        raise _refused(f"the last signed tree has {last.size} entries, not {request.old_size}")
    if request.new_size < last.size:
        raise _refused(f"{request.new_size} entries are fewer than the {last.size} signed before")
    proof = request.proof
    if not verify_consistency(last.size, last.root, request.new_size, request.root, proof):
        raise _refused("the tree does not extend the one signed before")


def _refused(why: str) -> TraceInvalid:
    return TraceInvalid(f"the signer refuses: {why}", code="signer.refused")


def _lost_state(error: OSError) -> TraceInvalid:
    return TraceInvalid(
        f"the signer's files: {error.strerror}",
        code="signer.state",
        hint="make room, or make its folder writable, and start again",
    )
