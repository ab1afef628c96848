"""Witness step 0: ask one witness for a cosignature (C2SP tlog-witness, seen from the log).

What a witness answers is hostile: bounded in bytes and in time, and only a cosignature that
verifies under the key of the asker's own policy is taken. A witness that knows another tree than
ours is the finding this is all for: its checkpoint is fetched and kept as evidence.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Timer
from typing import Protocol
from urllib.parse import urlsplit

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.cosignature import Cosignature, CosignerKey
from safeconduct.attestation.note import MAX_NOTE_BYTES, Note, VerifierKey
from safeconduct.errors import TraceInvalid

from .state import origin_hash
from .submission import encode_submission, parse_head

# LIMIT: a witness that answers 409 to the size it named itself: another asks at the same time.
_MAX_TRIES = 4
_MAX_ANSWER_BYTES = MAX_NOTE_BYTES
_SIZE = re.compile(rb"(0|[1-9][0-9]{0,18})\n")


class Tree(Protocol):
    """Our log's tree, as a TileStore has it."""

    def prove_consistency(self, old_size: int, new_size: int) -> Sequence[bytes]:
        """Return the proof that one of its trees extends another."""
        ...

    def root_at(self, size: int) -> bytes:
        """Return the root it had at a size."""
        ...


class Answered(StrEnum):
    """How asking a witness ended."""

    COSIGNED = "cosigned"
    UNREACHABLE = "unreachable"
    """No answer in time, or none that can be read."""
    REFUSED = "refused"
    """It answered, and will not cosign: it does not know this log or its key, or is full."""
    AHEAD = "ahead"
    """It has cosigned a larger tree of this log: the log was put back to an earlier state."""
    FORK = "fork"
    """It has cosigned another tree of the same size, or one that ours does not extend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What came of asking. ``evidence`` is the note that the witness holds of this log."""

    answered: Answered
    size: int = 0
    cosignature: Cosignature | None = None
    why: str = ""
    evidence: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a witness is asked: its submission prefix, http or https, and its key."""

    key: CosignerKey
    secure: bool
    host: str
    port: int
    prefix: str

    @classmethod
    def of(cls, key: CosignerKey, url: str) -> Endpoint:
        """Parse a submission prefix. Raise TraceInvalid ``witness.url``."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise _bad_url(key) from error
        plain = not (parts.query or parts.fragment or parts.username or parts.password)
        ascii_only = url.isascii() and url.isprintable()
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or not plain
            or not ascii_only
        ):
            raise _bad_url(key)
        secure = parts.scheme == "https"
        return cls(
            key=key,
            secure=secure,
            host=parts.hostname,
            port=port or (443 if secure else 80),
            prefix=parts.path.rstrip("/"),
        )


def ask(
    endpoint: Endpoint,
    note: bytes,
    *,
    old_size: int,
    tree: Tree,
    log_keys: Sequence[VerifierKey],
    timeout_s: float,
) -> Asked:
    """Ask for a cosignature on a signed checkpoint of ours.

    Once connected it ends within ``timeout_s``; looking up the host's name, and trying its
    several addresses, may take longer: call it from a thread that nobody waits for without bound.

    ``old_size`` is what the witness cosigned last as far as known; it corrects us where it is
    not. ``log_keys`` tell which checkpoints it may show us as ours.
    """
    context = ssl.create_default_context() if endpoint.secure else None
    channel = _Channel(endpoint, context, timeout_s)
    try:
        return _Asking(channel, endpoint, note, tree, log_keys).run(old_size)
    except (OSError, HTTPException, ValueError) as error:
        why = str(error) or type(error).__name__
        return Asked(answered=Answered.UNREACHABLE, why=why[:200])
    finally:
        channel.close()


class _Channel:
    """One connection that is cut at its deadline, however slowly the other side goes on."""

    def __init__(
        self, endpoint: Endpoint, context: ssl.SSLContext | None, timeout_s: float
    ) -> None:
        self._endpoint = endpoint
        if context is None:
            self._http = HTTPConnection(endpoint.host, endpoint.port, timeout=timeout_s)
        else:
            self._http = HTTPSConnection(
                endpoint.host, endpoint.port, timeout=timeout_s, context=context
            )
        self._late = False
        self._timer = Timer(timeout_s, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def send(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes, str]:
        """Return status, body and content type. Raise OSError or HTTPException."""
        headers = {"User-Agent": "safeconduct", "Accept-Encoding": "identity"}
        try:
            if self._http.sock is None:
                self._http.connect()
            # INVARIANT: looked at after there is a socket: from here on the timer can cut it.
            if self._late:
                raise TimeoutError("there was no answer in time")
            self._http.request(method, self._endpoint.prefix + path, body, headers)
            answer = self._http.getresponse()
            data = answer.read(_MAX_ANSWER_BYTES + 1)
        except (OSError, HTTPException, ValueError, AttributeError) as error:
            # A socket cut from another thread breaks in many ways; late is what it is.
            if self._late:
                raise TimeoutError("there was no answer in time") from error
            raise OSError(f"{error}") from error
        if self._late:
            raise TimeoutError("there was no answer in time")
        if len(data) > _MAX_ANSWER_BYTES:
            raise OSError("the answer is too large")
        return answer.status, data, answer.headers.get_content_type()

    def close(self) -> None:
        self._timer.cancel()
        self._http.close()

    def _cut(self) -> None:
        self._late = True
        sock: socket.socket | None = self._http.sock
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # it is closed already


class _Asking:
    """One conversation with one witness about one checkpoint."""

    def __init__(
        self,
        channel: _Channel,
        endpoint: Endpoint,
        note: bytes,
        tree: Tree,
        log_keys: Sequence[VerifierKey],
    ) -> None:
        self._channel, self._endpoint = channel, endpoint
        self._tree, self._log_keys, self._note = tree, log_keys, note
        self._text = Note.parse(note).text
        self._head = Checkpoint.parse(self._text)

    def run(self, old_size: int) -> Asked:
        size = min(old_size, self._head.size)
        for _ in range(_MAX_TRIES):
            proof = self._tree.prove_consistency(size, self._head.size)
            body = encode_submission(size, proof, self._note)
            status, data, kind = self._channel.send("POST", "/add-checkpoint", body)
            if status == 200:
                return self._take(data)
            if status == 422:
                return self._other_tree()
            if status != 409:
                why = f"HTTP {status}: {data[:100].decode('ascii', 'replace')}".strip()
                answered = (
                    Answered.REFUSED if status in (400, 403, 404, 429) else Answered.UNREACHABLE
                )
                return Asked(answered=answered, why=why)
            found = _SIZE.fullmatch(data) if kind == "text/x.tlog.size" else None
            if found is None:
                return Asked(answered=Answered.UNREACHABLE, why="HTTP 409 without a size")
            size = int(found[1])
            if size > self._head.size:
                return self._other_tree()
        return Asked(answered=Answered.UNREACHABLE, why="it answers with one size after another")

    def _take(self, data: bytes) -> Asked:
        """Take our key's cosignature out of an answer, and nothing else."""
        try:
            lines = Note.parse(f"{self._text}\n".encode() + data).signatures
        except TraceInvalid as error:
            return Asked(answered=Answered.UNREACHABLE, why=f"its answer: {error.message}")
        for line in lines:
            found = self._endpoint.key.verified(line, self._text)
            if found is not None and found.time:
                return Asked(answered=Answered.COSIGNED, size=self._head.size, cosignature=found)
        why = "it answered without a true cosignature by the key of the policy"
        return Asked(answered=Answered.REFUSED, why=why)

    def _other_tree(self) -> Asked:
        """Fetch what the witness holds. Without a head that our key signed it is only a claim."""
        path = f"/{origin_hash(self._head.origin)}/checkpoint"
        status, data, _ = self._channel.send("GET", path)
        held = _signed_head(data, self._log_keys) if status == 200 else None
        if held is None or held.origin != self._head.origin:
            why = "it says that it knows another tree of this log, and does not show it"
            return Asked(answered=Answered.REFUSED, why=why)
        if held.size > self._head.size:
            why = f"it holds {held.size} entries that this log signed, more than are here"
            return Asked(answered=Answered.AHEAD, size=held.size, why=why, evidence=data)
        if self._tree.root_at(held.size) != held.root:
            why = f"it holds other {held.size} entries that this log signed"
            return Asked(answered=Answered.FORK, size=held.size, why=why, evidence=data)
        why = "it refuses a tree that extends the one it shows"
        return Asked(answered=Answered.REFUSED, why=why)


def _signed_head(data: bytes, log_keys: Sequence[VerifierKey]) -> Checkpoint | None:
    try:
        note = Note.parse(data)
        head = parse_head(note.text)
    except TraceInvalid:
        return None
    signed = any(
        key.made(line) and key.verifies(line, note.text)
        for key in (one.of_log(head.origin) for one in log_keys)
        for line in note.signatures
    )
    return head if signed else None


def _bad_url(key: CosignerKey) -> TraceInvalid:
    # The address itself is not repeated: somebody may have put a password into it.
    return TraceInvalid(
        f"the address of the witness {key.name} cannot be used",
        code="witness.url",
        hint="write its submission prefix, such as https://witness.example/prefix",
    )
