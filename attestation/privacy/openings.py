"""Step "record": openings of commitments, kept outside the tree so that they can be erased.

``openings/<session>.jsonl`` holds one line per commitment: index, field, salt and either ``value``
(the committed JSON as a string), ``data`` (base64 bytes) or ``blob`` (the bytes lie in
``blobs/<commitment>``, a name that tells nothing because the commitment is salted). With a vault,
the lines of an Entry become one, ``sealed``, and blobs are encrypted too. ``opened.py`` reads them.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock

import msgspec

from safeconduct.attestation.encoding import encode_committed
from safeconduct.attestation.entry import SALT_BYTES, commit, commitment_field
from safeconduct.attestation.files import read_some, write_whole
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import encode_base64
from safeconduct.call import Json
from safeconduct.errors import TraceInvalid

from .vault import KEY_BYTES, LogKeys, SessionKey, Vault

OPENINGS = "openings"
BLOBS = "blobs"
# LIMIT: longer values go to a file of their own, so that a line stays quick to skip.
INLINE_BYTES = 16 << 10
# LIMIT: one committed value. Outputs are cut by their sandbox's limit long before.
MAX_VALUE_BYTES = 256 << 20
# LIMIT: a line that is longer was not written by us (base64 and JSON escapes included).
_MAX_LINE_BYTES = 256 << 10
# LIMIT: lines of one Entry are sealed together up to here, so that the bound above holds.
_SEALED_BYTES = 96 << 10
_MAX_ORIGIN_BYTES = 256
# LIMIT: sessions whose opening files stay open at once.
_MAX_OPEN_FILES = 64
_CHUNK_BYTES = 1 << 20
_SALTS_AHEAD = 128


class OpeningLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of an opening file: one opening, or ``sealed`` all those of an Entry, encrypted."""

    field: str = ""
    salt: str = ""
    sealed: str | None = None
    value: str | None = None
    data: str | None = None
    blob: bool = False
    index: int = -1  # last, and never the default in a file: it is known only under the lock


class Sealed(msgspec.Struct, frozen=True):
    """A value turned into a commitment: its opening's line up to the index, and its blob."""

    digest: str
    line: bytes
    blob: bytes | None


_encoder = msgspec.json.Encoder()
_encode = _encoder.encode
_TEXT_LINE = b'{"field":%b,"salt":"%b","value":%b'
_SPELLED = {name: _encode(name) for name in ("document", "value")}
_decoder = msgspec.json.Decoder(OpeningLine)


def seal(field: str, value: Json | bytes, salt: bytes) -> Sealed:
    """Commit to a value. Bytes stand for themselves, all else as JSON."""
    if isinstance(value, bytes):
        data = value
    else:
        data = encode_committed(value)
        if len(data) <= INLINE_BYTES:  # the hot path: what the encoder would make of a line
            name = _SPELLED.get(field) or _encode(field)
            line = _TEXT_LINE % (name, salt.hex().encode(), _encode(data.decode("utf-8")))
            return Sealed(commit(salt, data), line, None)
    if len(data) > MAX_VALUE_BYTES:
        raise TraceInvalid(f"{field} holds {len(data)} bytes", code="trace.too_large")
    if len(data) > INLINE_BYTES:
        blob = OpeningLine(field=field, salt=salt.hex(), blob=True)
        return Sealed(commit(salt, data), _encode(blob)[:-1], data)
    inline = OpeningLine(field=field, salt=salt.hex(), data=encode_base64(data))
    return Sealed(commit(salt, data), _encode(inline)[:-1], None)


def plain_line(field: str, data: bytes, salt: bytes, *, index: int) -> tuple[bytes, bytes | None]:
    """Return an opening as a whole line that anybody can read, and what goes to a blob file."""
    if len(data) > INLINE_BYTES:
        line = OpeningLine(field=field, salt=salt.hex(), blob=True, index=index)
        return _encoder.encode(line) + b"\n", data
    try:
        line = OpeningLine(field=field, salt=salt.hex(), value=data.decode("utf-8"), index=index)
    except UnicodeDecodeError:
        line = OpeningLine(field=field, salt=salt.hex(), data=encode_base64(data), index=index)
    return _encoder.encode(line) + b"\n", None


class Salts:
    """Random salts, each given out once. Thread-safe, but not for a fork to go on with.

    Asking the kernel for each one gives up the interpreter's lock, and where many threads record
    that is dearer than all else.
    """

    def __init__(self) -> None:
        self._ready: deque[bytes] = deque()

    def take(self) -> bytes:
        """Return a salt that nobody else gets."""
        try:
            return self._ready.popleft()
        except IndexError:
            data = os.urandom(SALT_BYTES * _SALTS_AHEAD)
            fresh = [data[at : at + SALT_BYTES] for at in range(0, len(data), SALT_BYTES)]
            self._ready.extend(fresh[1:])
            return fresh[0]


def seal_all(
    committed: Mapping[str, Json | bytes], salts: Salts
) -> tuple[dict[str, Json], list[Sealed]]:
    """Return the commitments to these fields, each under a fresh salt, and their openings."""
    commitments: dict[str, Json] = {}
    sealed: list[Sealed] = []
    for field, value in committed.items():
        one = seal(field, value, salts.take())
        commitments[field] = commitment_field(one.digest)
        sealed.append(one)
    return commitments, sealed


class OpeningStore:
    """Writes openings and blobs, encrypted where there is a vault; raises OSError. Thread-safe."""

    def __init__(self, folder: Folder, *, vault: Vault | None = None) -> None:
        self.folder = folder
        self._owner_pid = os.getpid()
        self._vault: LogKeys | None = None
        if vault is not None:
            self._vault = vault.log(read_origin(folder))
        self._keys: dict[str, SessionKey] = {}
        self._erased: set[str] = set()
        self._key_lock = Lock()  # order: _lock before _key_lock; no sync is waited for under it
        self._lock = Lock()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._dirty: set[int] = set()

    @property
    def has_vault(self) -> bool:
        """Tell whether openings are encrypted, so that destroying a key erases them."""
        return self._vault is not None

    @property
    def is_fork(self) -> bool:
        """Tell whether this is a copy in a fork of the process that writes."""
        return os.getpid() != self._owner_pid

    def holds(self, session: str) -> bool:
        """Tell whether there is anything of a session left to erase."""
        has_key = self._vault is not None and self._vault.has(session)
        return has_key or self.folder.exists(f"{OPENINGS}/{session}.jsonl")

    def prepare(self, session: str) -> None:
        """Make the key of a new session, durably: better here than at its first opening."""
        if self._vault is not None:
            self._keys[session] = self._vault.obtain(session)

    def blobs(self, session: str, sealed: Sequence[Sealed]) -> None:
        """Write the blobs among these durably. Before their Entry, and without the writer's lock.

        A blob whose Entry never came has a name that nobody can guess anything from.
        """
        for one in sealed:
            if one.blob is None or session in self._erased:
                continue
            key = self._key(session)
            data = one.blob if key is None else key.seal_blob(one.digest, one.blob)
            self.folder.write(f"{BLOBS}/{one.digest}", data, mode=0o600)

    def lines(self, session: str, index: int, sealed: Sequence[Sealed]) -> bytes:
        """Return the openings of one Entry as they stand on disk, in the journal and here.

        Called under the writer's lock, on the hot path: what is encrypted is encrypted here.
        """
        if session in self._erased:
            return b""
        key = self._key(session)
        end = b',"index":%d}\n' % index
        if key is None:
            return end.join([one.line for one in sealed]) + end
        whole = b"}\n".join([one.line for one in sealed]) + b"}"
        parts = [whole] if len(whole) <= _SEALED_BYTES else [one.line + b"}" for one in sealed]
        return b"".join(
            [b'{"sealed":"%b"%b' % (b64encode(key.seal_lines(index, part)), end) for part in parts]
        )

    def put(self, session: str, lines: bytes) -> None:
        """Hand lines that the journal has to the kernel, behind the hot path."""
        with self._lock:
            if session in self._erased:
                return
            fd = self._file(session)
            write_whole(fd, lines)
            self._dirty.add(fd)

    def write(self, session: str, index: int, sealed: Sequence[Sealed]) -> None:
        """Hand the openings of one Entry to the kernel: one write for all of them."""
        self.blobs(session, sealed)
        self.put(session, self.lines(session, index, sealed))

    def sync(self) -> None:
        """Make all openings written so far durable."""
        with self._lock:
            for fd in list(self._dirty):
                os.fdatasync(fd)
            self._dirty.clear()

    def close_session(self, session: str) -> None:
        """Sync and close the file of a session that is over, and forget its key."""
        with self._lock:
            self._close_session(session)

    def erase_session(self, session: str) -> bool:
        """Destroy a session's key and opening file; tell whether there was one.

        If the session is still open, nothing of it is kept from now on. Blobs are the caller's
        matter. Can be repeated after a crash at any step.
        """
        with self._lock:
            with self._key_lock:
                self._erased.add(session)
                had_key = self._vault is not None and self._vault.destroy(session)
            self._close_session(session)
            return self.folder.destroy(f"{OPENINGS}/{session}.jsonl") or had_key

    def close(self) -> None:
        """Sync and close all files."""
        with self._lock:
            for session in list(self._files):
                self._close_session(session)

    def _key(self, session: str) -> SessionKey | None:
        if self._vault is None:
            return None
        key = self._keys.get(session)
        if key is not None:
            return key
        with self._key_lock:
            if session in self._erased:
                return SessionKey(os.urandom(KEY_BYTES), session)  # which nobody has
            key = self._keys[session] = self._vault.obtain(session)
        return key

    def _close_session(self, session: str) -> None:
        self._keys.pop(session, None)
        fd = self._files.pop(session, None)
        if fd is not None:
            self._close(fd)

    def _file(self, session: str) -> int:
        fd = self._files.get(session)
        if fd is None:
            if len(self._files) >= _MAX_OPEN_FILES:
                self._close(self._files.popitem(last=False)[1])
            fd = self.folder.open_append(f"{OPENINGS}/{session}.jsonl", mode=0o600)
            self._files[session] = fd
        return fd

    def _close(self, fd: int) -> None:
        try:
            if fd in self._dirty:
                os.fdatasync(fd)
        finally:
            self._dirty.discard(fd)
            os.close(fd)


def read_origin(folder: Folder) -> str:
    """Return the log's name, which the keys of its sessions are bound to. Nothing is believed."""
    text = folder.read("origin", limit=_MAX_ORIGIN_BYTES).decode("ascii", "replace")
    return text.removesuffix("\n")


def read_lines(folder: Folder, session: str) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, line) of a session's opening file, in constant memory.

    Ends at a torn or overlong line. A missing file has no lines.
    """
    path = f"{OPENINGS}/{session}.jsonl"
    try:
        with folder.open(path) as fd:
            buffer, offset = b"", 0
            while part := read_some(fd, path, _CHUNK_BYTES):
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
