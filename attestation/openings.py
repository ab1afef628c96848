"""Step "record": openings of commitments, kept outside the tree so that they can be erased.

``openings/<session>.jsonl`` holds one line per commitment: index, field, salt and either ``value``
(the committed JSON as a string), ``data`` (base64 bytes) or ``blob`` (the bytes lie in
``blobs/<commitment>``, a name that tells nothing because the commitment is salted). An opening is
believed only when it hashes to what the signed Entry holds.
"""

from __future__ import annotations

import binascii
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from safeconduct.call import Json
from safeconduct.errors import TraceInvalid

from .encoding import encode_committed
from .entry import SALT_BYTES, Entry, commit, commitment_field, committed_digest
from .folder import Folder, write_whole
from .note import decode_base64, encode_base64

OPENINGS = "openings"
BLOBS = "blobs"
# LIMIT: longer values go to a file of their own, so that a line stays quick to skip.
INLINE_BYTES = 16 << 10
# LIMIT: one committed value. Outputs are cut by their sandbox's limit long before.
MAX_VALUE_BYTES = 256 << 20
# LIMIT: a line that is longer was not written by us (base64 and JSON escapes included).
_MAX_LINE_BYTES = 256 << 10
# LIMIT: sessions whose opening files stay open at once.
_MAX_OPEN_FILES = 64
_CHUNK_BYTES = 1 << 20


class OpeningLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of an opening file."""

    field: str
    salt: str
    value: str | None = None
    data: str | None = None
    blob: bool = False
    index: int = -1  # last, and never the default in a file: it is known only under the lock


class Sealed(msgspec.Struct, frozen=True):
    """A value turned into a commitment: its opening's line up to the index, and its blob."""

    digest: str
    line: bytes
    blob: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """An opening that was checked against its Entry. ``data`` are the committed bytes."""

    index: int
    field: str
    data: bytes

    def json(self) -> Any:  # noqa: ANN401 - a parse boundary
        """Decode the committed bytes as JSON. Raise TraceInvalid ``opening.invalid``."""
        try:
            return msgspec.json.decode(self.data)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise TraceInvalid(
                f"the opening of {self.field!r} is not JSON", code="opening.invalid"
            ) from error


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(OpeningLine)


def seal(field: str, value: Json | bytes, salt: bytes) -> Sealed:
    """Commit to a value. Bytes stand for themselves, all else as JSON."""
    text = None
    if isinstance(value, bytes):
        data = value
    else:
        data = encode_committed(value)
        text = data.decode("utf-8")
    if len(data) > MAX_VALUE_BYTES:
        raise TraceInvalid(f"{field} holds {len(data)} bytes", code="trace.too_large")
    if len(data) > INLINE_BYTES:
        line = OpeningLine(field=field, salt=salt.hex(), blob=True)
    elif text is not None:
        line = OpeningLine(field=field, salt=salt.hex(), value=text)
    else:
        line = OpeningLine(field=field, salt=salt.hex(), data=encode_base64(data))
    blob = data if line.blob else None
    return Sealed(commit(salt, data), _encoder.encode(line)[:-1], blob)


def seal_into(
    body: Mapping[str, Json], committed: Mapping[str, Json | bytes]
) -> tuple[dict[str, Json], list[Sealed]]:
    """Return a body with the committed fields as commitments, each under a fresh salt."""
    salts = os.urandom(SALT_BYTES * len(committed))
    whole: dict[str, Json] = dict(body)
    sealed: list[Sealed] = []
    for at, (field, value) in enumerate(committed.items()):
        one = seal(field, value, salts[at * SALT_BYTES : (at + 1) * SALT_BYTES])
        whole[field] = commitment_field(one.digest)
        sealed.append(one)
    return whole, sealed


class OpeningStore:
    """Writes openings and blobs. Called under the writer's lock; raises OSError."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._files: OrderedDict[str, int] = OrderedDict()
        self._dirty: set[int] = set()

    def write(self, session: str, index: int, sealed: list[Sealed]) -> None:
        """Hand the openings of one Entry to the kernel: one write for all of them."""
        for one in sealed:
            if one.blob is not None:
                self._folder.write(f"{BLOBS}/{one.digest}", one.blob, mode=0o600)
        end = b',"index":%d}\n' % index
        lines = end.join([one.line for one in sealed]) + end
        fd = self._file(session)
        write_whole(fd, lines)
        self._dirty.add(fd)

    def sync(self) -> None:
        """Make all openings written so far durable."""
        for fd in list(self._dirty):
            os.fdatasync(fd)
        self._dirty.clear()

    def close_session(self, session: str) -> None:
        """Sync and close the file of a session that is over."""
        fd = self._files.pop(session, None)
        if fd is not None:
            self._close(fd)

    def close(self) -> None:
        """Sync and close all files."""
        for session in list(self._files):
            self.close_session(session)

    def _file(self, session: str) -> int:
        fd = self._files.get(session)
        if fd is None:
            if len(self._files) >= _MAX_OPEN_FILES:
                self._close(self._files.popitem(last=False)[1])
            fd = self._folder.open_append(f"{OPENINGS}/{session}.jsonl", mode=0o600)
            self._files[session] = fd
        return fd

    def _close(self, fd: int) -> None:
        if fd in self._dirty:
            os.fdatasync(fd)
            self._dirty.discard(fd)
        os.close(fd)


def read_lines(folder: Folder, session: str) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, line) of a session's opening file, in constant memory.

    Ends at a torn or overlong line. A missing file has no lines.
    """
    try:
        with folder.open(f"{OPENINGS}/{session}.jsonl") as fd:
            buffer, offset = b"", 0
            while part := os.read(fd, _CHUNK_BYTES):
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    yield offset, line
                    offset += len(line) + 1
                if len(buffer) > _MAX_LINE_BYTES:
                    return
    except TraceInvalid as error:
        if error.code != "trace.missing":
            raise


def parse_line(line: bytes) -> OpeningLine | None:
    """Return a line's content, or None for bytes that are no opening."""
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def open_commitment(folder: Folder, line: OpeningLine, entry: Entry) -> Opening:
    """Check one opening against its Entry.

    Raise TraceInvalid ``opening.false`` when it does not hash to the commitment, and
    ``trace.missing`` when its blob was erased.
    """
    digest = committed_digest(entry.body.get(line.field))
    if digest is None:
        raise _false(line, "the entry has no such commitment")
    try:
        salt = bytes.fromhex(line.salt)
        data = _opened_bytes(folder, line, digest)
    except (ValueError, binascii.Error) as error:
        raise _false(line, "it cannot be read") from error
    if len(salt) != SALT_BYTES or commit(salt, data) != digest:
        raise _false(line, "it does not hash to the commitment")
    return Opening(index=line.index, field=line.field, data=data)


def _opened_bytes(folder: Folder, line: OpeningLine, digest: str) -> bytes:
    if line.blob:
        return folder.read(f"{BLOBS}/{digest}", limit=MAX_VALUE_BYTES)
    if line.value is not None:
        return line.value.encode("utf-8")
    return decode_base64(line.data or "", code="opening.false")


def _false(line: OpeningLine, why: str) -> TraceInvalid:
    return TraceInvalid(
        f"the opening of {line.field!r} at entry {line.index} is false: {why}",
        code="opening.false",
        offset=line.index,
    )
