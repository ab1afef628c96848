"""Step "verify": what the commitments of a trace open to, believed only as far as it hashes.

An opening may be missing (erased, or never handed on), sealed with a key that is not here, or
false. None of these says anything about the Entry: openings lie outside the tree.
"""

from __future__ import annotations

import binascii
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from safeconduct.attestation.entry import SALT_BYTES, Entry, commit_pieces, committed_digest
from safeconduct.attestation.files import read_limited, read_some
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.journal import JournalTail, read_frames
from safeconduct.attestation.note import decode_base64
from safeconduct.attestation.reader import read_entries
from safeconduct.errors import TraceInvalid

from .openings import BLOBS, MAX_VALUE_BYTES, OpeningLine, parse_line, read_lines, read_origin
from .vault import LogKeys, SessionKey, Vault

_SEAL_BYTES = 28  # what encryption adds to a blob: nonce and tag
# Blobs up to here are read without a look at them first.
_TAKEN_BYTES = 1 << 20
# LIMIT: openings that are taken from the journal; what is beyond counts as missing.
_JOURNAL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """An opening that was checked against its Entry. ``data`` are the committed bytes."""

    index: int
    field: str
    data: bytes
    salt: bytes

    def json(self) -> Any:  # noqa: ANN401 - a parse boundary
        """Decode the committed bytes as JSON. Raise TraceInvalid ``opening.invalid``."""
        try:
            return msgspec.json.decode(self.data)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise TraceInvalid(
                f"the opening of {self.field!r} is not JSON", code="opening.invalid"
            ) from error


@dataclass(frozen=True, slots=True)
class Missing:
    """An opening that is not there (erased, or never handed on) or that is false."""

    code: str
    reason: str


_NO_OPENING = Missing("opening.missing", "there is no opening")
_SEALED = Missing("opening.sealed", "it is encrypted, and its session's key is not here")


class Openings:
    """Looks openings up entry by entry, in the order of the log, in constant memory per session."""

    def __init__(self, folder: Folder, *, vault: Vault | None = None) -> None:
        self._folder, self._vault = folder, vault
        self._log: LogKeys | None = None
        self._sessions: dict[str, Iterator[tuple[int, bytes]]] = {}
        self._keys: dict[str, SessionKey | None] = {}
        self._waiting: dict[str, OpeningLine] = {}
        self._journal: dict[int, bytes] | None = None

    def of(self, index: int, entry: Entry) -> dict[str, Opening | Missing]:
        """Return what the openings say about each commitment of an Entry.

        Call with ascending indices. A false opening becomes Missing ``opening.false``: it is
        reported, never believed.
        """
        found: dict[str, Opening | Missing] = {
            name: _NO_OPENING
            for name, value in entry.body.items()
            if committed_digest(value) is not None
        }
        if not found:
            return found
        while (line := self._next(entry.session)) is not None:
            if line.index < index:
                continue
            if line.index > index:
                self._waiting[entry.session] = line
                break
            self._take(line, entry, found)
        if _NO_OPENING in found.values():
            for raw in self._journalled(index).splitlines():
                line = parse_line(raw)
                if line is not None and line.index == index:
                    self._take(line, entry, found)
        return found

    def close_session(self, session: str) -> None:
        """Forget a session that is over."""
        self._sessions.pop(session, None)
        self._waiting.pop(session, None)
        self._keys.pop(session, None)

    def _take(self, line: OpeningLine, entry: Entry, found: dict[str, Opening | Missing]) -> None:
        key: SessionKey | None = None
        lines = [line]
        if line.sealed is not None:
            key = self._key(entry.session)
            if key is None:
                for name, item in found.items():
                    found[name] = _SEALED if item == _NO_OPENING else item
                return
            try:
                lines = unseal(line, key)
            except TraceInvalid as error:
                for name, item in found.items():
                    missing = Missing(error.code, error.message)
                    found[name] = item if isinstance(item, Opening) else missing
                return
        for one in lines:
            if one.field in found and not isinstance(found[one.field], Opening):
                try:
                    found[one.field] = open_commitment(self._folder, one, entry, key)
                except TraceInvalid as error:
                    found[one.field] = Missing(error.code, error.message)

    def _journalled(self, index: int) -> bytes:
        """Return the lines about an entry that are not in a file yet, or never came there."""
        if self._journal is None:
            self._journal, room_bytes = {}, _JOURNAL_BYTES
            with suppress(TraceInvalid):  # a writer may just be removing what is signed
                for one in read_frames(self._folder, JournalTail.bounded()):
                    room_bytes -= len(one.data) if one.is_openings else 0
                    if room_bytes < 0:
                        break
                    if one.is_openings:
                        self._journal[one.index] = one.data
        return self._journal.get(index, b"")

    def _key(self, session: str) -> SessionKey | None:
        if self._vault is None:
            return None
        if session not in self._keys:
            if self._log is None:
                self._log = self._vault.log(read_origin(self._folder))
            self._keys[session] = self._log.find(session)
        return self._keys[session]

    def _next(self, session: str) -> OpeningLine | None:
        waiting = self._waiting.pop(session, None)
        if waiting is not None:
            return waiting
        lines = self._sessions.get(session)
        if lines is None:
            lines = self._sessions[session] = read_lines(self._folder, session)
        return next((line for _, raw in lines if (line := parse_line(raw)) is not None), None)


def read_opened(
    directory: Path, *, vault: Vault | None = None
) -> Iterator[tuple[int, Entry, dict[str, Opening | Missing]]]:
    """Yield (index, Entry, what its commitments open to) of a whole trace.

    Without the ``vault`` that they were written with, openings are ``opening.sealed``.
    """
    with Folder(directory) as folder:
        openings = Openings(folder, vault=vault)
        for index, entry in read_entries(directory):
            yield index, entry, openings.of(index, entry)
            if entry.kind == "session.close":
                openings.close_session(entry.session)


def unseal(line: OpeningLine, key: SessionKey) -> list[OpeningLine]:
    """Return the openings that a sealed line holds. Raise TraceInvalid ``opening.false``."""
    sealed = decode_base64(line.sealed or "", code="opening.false")
    parsed = [parse_line(one) for one in key.open_lines(line.index, sealed).split(b"\n")]
    return [
        msgspec.structs.replace(one, index=line.index, sealed=None)
        for one in parsed
        if one is not None
    ]


def open_commitment(
    folder: Folder, line: OpeningLine, entry: Entry, key: SessionKey | None = None
) -> Opening:
    """Check one opening against its Entry. ``key`` is what its line was sealed with.

    Raise TraceInvalid ``opening.false`` when it does not hash to the commitment, and
    ``trace.missing`` when its blob was erased.
    """
    digest = committed_digest(entry.body.get(line.field))
    if digest is None:
        raise _false(line, "the entry has no such commitment")
    try:
        salt = bytes.fromhex(line.salt)
        data = _opened_bytes(folder, line, salt, digest, key)
    except (ValueError, binascii.Error) as error:
        raise _false(line, "it cannot be read") from error
    if len(salt) != SALT_BYTES or commit_pieces(salt, (data,)) != digest:
        raise _false(line, "it does not hash to the commitment")
    return Opening(index=line.index, field=line.field, data=data, salt=salt)


def _opened_bytes(
    folder: Folder, line: OpeningLine, salt: bytes, digest: str, key: SessionKey | None
) -> bytes:
    if line.blob:
        path = f"{BLOBS}/{digest}"
        with folder.open(path) as fd:
            if _TAKEN_BYTES < os.fstat(fd).st_size <= MAX_VALUE_BYTES + _SEAL_BYTES:
                _require_blob(fd, path, line, salt, digest, sealed=key is not None)
            data = read_limited(fd, path, MAX_VALUE_BYTES + _SEAL_BYTES)
        return data if key is None else key.open_blob(digest, data)
    if line.value is not None:
        return line.value.encode("utf-8")
    return decode_base64(line.data or "", code="opening.false")


def _require_blob(
    fd: int, path: str, line: OpeningLine, salt: bytes, digest: str, *, sealed: bool
) -> None:
    """Look at a large blob before any of it is kept: a sparse file of any length costs nothing.

    What is encrypted has no run of zeros that a file system would make a hole of. What is plain
    may have some, and is hashed piece by piece.
    """
    if sealed:
        if _has_hole(fd):
            raise _false(line, "its blob has holes")
        return
    if commit_pieces(salt, iter(lambda: read_some(fd, path), b"")) != digest:
        raise _false(line, "it does not hash to the commitment")
    os.lseek(fd, 0, os.SEEK_SET)


def _has_hole(fd: int) -> bool:
    try:
        hole = os.lseek(fd, 0, os.SEEK_HOLE)  # without any, the end of the file: lseek(2)
    except OSError:
        return False
    os.lseek(fd, 0, os.SEEK_SET)
    return hole < os.fstat(fd).st_size


def _false(line: OpeningLine, why: str) -> TraceInvalid:
    return TraceInvalid(
        f"the opening of {line.field!r} at entry {line.index} is false: {why}",
        code="opening.false",
        offset=line.index,
    )
