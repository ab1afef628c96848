"""Step "record": what the supervisor asks its signer, as bytes. Both ends use this file.

A frame is its length (4 bytes, big-endian, at most 2 MiB) and a body. A request is an operation
byte, the length of the origin (1 byte), the origin, and the fields below; numbers have 8 bytes,
hashes 32; a list of hashes follows its count (1 byte), an entry its length (2 bytes), except that
the entry of ``F`` is the rest. An answer is ``+`` and the result, or
``-`` and code, message and hint on three lines.

====  ==============================  =====================================================
 Q    nothing                         the head signed last for this log, as its text
 S    old size, new size, root, proof the signature line(s) over the head that extends it
 R    nothing                         old key line, new key line, signature, on three lines
 F    index, proof, entry             the new key's line; the old private key is gone
 D    count, (index, proof, entry)*  a signature (64 bytes) and the DSSE payload it is over
====  ==============================  =====================================================
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from safeconduct.attestation.checkpoint import require_origin
from safeconduct.attestation.merkle import HASH_BYTES, MAX_PROOF_HASHES
from safeconduct.errors import TraceInvalid

ANSWER_GOOD = b"+"
ANSWER_BAD = b"-"
ANSWER_ASK = b"?"
"""The signer's first answer where its key file is sealed: it waits for the passphrase."""
# LIMIT: a frame: 16 entries of 65,535 bytes, each with a proof of 126 hashes.
MAX_FRAME_BYTES = 2 << 20
# LIMIT: entries of one statement; each is proven by itself.
MAX_PLACES = 16
_NUMBER_BYTES, _LENGTH_BYTES = 8, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Ask for the head signed last."""

    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """Ask for a signature over a head."""

    origin: str
    old_size: int
    new_size: int
    root: bytes
    proof: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotate:
    """Ask for the statement that hands this log over to a new key."""

    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Show that the ``key.rotate`` entry is in the tree signed last: the old key may go."""

    origin: str
    index: int
    proof: tuple[bytes, ...]
    entry: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An entry, and the proof that it is the leaf at that index of the tree signed last."""

    index: int
    proof: tuple[bytes, ...]
    entry: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Attest:
    """Ask for a signed statement about these entries of this log."""

    origin: str
    places: tuple[Place, ...]


Request = Query | Sign | Rotate | Finish | Attest


def encode_request(request: Request) -> bytes:
    """Return a request as bytes."""
    origin = request.origin.encode("ascii")
    head = bytes([len(origin)]) + origin
    match request:
        case Query():
            return b"Q" + head
        case Sign():
            sizes = _number(request.old_size) + _number(request.new_size)
            return b"S" + head + sizes + request.root + _hashes(request.proof)
        case Rotate():
            return b"R" + head
        case Finish():
            return b"F" + head + _number(request.index) + _hashes(request.proof) + request.entry
        case Attest():
            places = b"".join(_encode_place(place) for place in request.places)
            return b"D" + head + bytes([len(request.places)]) + places


def parse_request(data: bytes) -> Request:
    """Parse a request strictly. Raise TraceInvalid ``signer.request``."""
    parser = _Parser(data)
    operation = parser.take(1)
    name = parser.take(parser.take(1)[0])
    if not name.isascii():
        raise _bad_request()
    origin = require_origin(name.decode("ascii"))
    request = _parse_fields(operation, origin, parser)
    if parser.rest():
        raise _bad_request()
    return request


def _parse_fields(operation: bytes, origin: str, parser: _Parser) -> Request:
    match operation:
        case b"Q":
            return Query(origin=origin)
        case b"R":
            return Rotate(origin=origin)
        case b"S":
            old_size, new_size, root = parser.number(), parser.number(), parser.take(HASH_BYTES)
            return Sign(
                origin=origin, old_size=old_size, new_size=new_size, root=root,
                proof=parser.hashes(),
            )  # fmt: skip
        case b"F":
            index, proof = parser.number(), parser.hashes()
            return Finish(origin=origin, index=index, proof=proof, entry=parser.rest())
        case b"D":
            count = parser.take(1)[0]
            if count > MAX_PLACES:
                raise _bad_request()
            return Attest(origin=origin, places=tuple(parser.place() for _ in range(count)))
        case _:
            raise _bad_request()


class _Parser:
    """Takes hostile bytes apart from the left."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise _bad_request()
        self._at += count
        return part

    def number(self) -> int:
        return int.from_bytes(self.take(_NUMBER_BYTES), "big")

    def hashes(self) -> tuple[bytes, ...]:
        count = self.take(1)[0]
        if count > MAX_PROOF_HASHES:
            raise _bad_request()
        return tuple(self.take(HASH_BYTES) for _ in range(count))

    def place(self) -> Place:
        index, proof = self.number(), self.hashes()
        length = int.from_bytes(self.take(_LENGTH_BYTES), "big")
        return Place(index=index, proof=proof, entry=self.take(length))

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)


def error_frame(error: TraceInvalid) -> bytes:
    """Return an error as an answer carries it."""
    lines = (error.code, error.message, error.hint)
    return "\n".join(line.replace("\n", " ")[:1000] for line in lines).encode("utf-8", "replace")


def send(channel: socket.socket, body: bytes) -> None:
    """Send one frame. Raise TraceInvalid ``signer.request`` for one that is too long."""
    if len(body) > MAX_FRAME_BYTES:
        raise _bad_request()
    channel.sendall(len(body).to_bytes(4, "big") + body)


def receive(channel: socket.socket) -> bytes | None:
    """Return the next frame, or None at the end of input or on a frame that is too long."""
    header = _receive_exactly(channel, 4)
    if header is None or int.from_bytes(header, "big") > MAX_FRAME_BYTES:
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


def _encode_place(place: Place) -> bytes:
    if len(place.entry) >> 8 * _LENGTH_BYTES:
        raise _bad_request()
    length = len(place.entry).to_bytes(_LENGTH_BYTES, "big")
    return _number(place.index) + _hashes(place.proof) + length + place.entry


def _number(value: int) -> bytes:
    return value.to_bytes(_NUMBER_BYTES, "big")


def _hashes(hashes: Sequence[bytes]) -> bytes:
    return bytes([len(hashes)]) + b"".join(hashes)


def _bad_request() -> TraceInvalid:
    return TraceInvalid("the signer does not understand the request", code="signer.request")
