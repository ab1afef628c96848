"""Witness step 3: what a witness remembers: of each log the head it cosigned last, and evidence.

One folder per log, named by the SHA-256 of its origin: ``checkpoint`` is the note as it is
served, ``evidence/`` holds what the log signed and should not have. Everything is replaced at
once and on disk before it is relied on, so that a kill leaves the old memory or the new one.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import MAX_NOTE_BYTES, Note
from safeconduct.errors import TraceInvalid

from .submission import MAX_BODY_BYTES, parse_head

EVIDENCE_FORMAT = "safeconduct/witness-evidence/v1"
# LIMIT: logs one witness remembers (each run of a recorder may be one), and pieces of evidence of
# one kind about one of them. Only who holds a configured key can add any.
MAX_LOGS = 1_000_000
MAX_EVIDENCE = 64
_MAX_EVIDENCE_BYTES = MAX_BODY_BYTES + MAX_NOTE_BYTES + 1024
_LOCK = "lock"
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z]{1,16}-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The head cosigned last for one log, with its whole note as it was cosigned."""

    head: Checkpoint
    note: Note
    data: bytes


def origin_hash(origin: str) -> str:
    """Return a log's name in paths and URLs (tlog-witness, "Monitor Retrieval")."""
    return sha256(origin.encode()).hexdigest()


class WitnessState:
    """A folder that one witness process holds. Not for use by two threads at once."""

    def __init__(self, directory: Path) -> None:
        """Open or make the folder and take it.

        Raise TraceInvalid ``witness.locked`` where another witness has it, ``witness.state``
        where others can write it.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_own(directory)
            self._folder = Folder(directory)
        except OSError as error:
            raise damaged(f"{directory}: {error.strerror}") from error
        self._lock_fd = self._folder.open_lock(_LOCK)
        try:
            self._take()
            with self._folder.scan(".") as found:
                self.count = sum(_HASH.fullmatch(one.name) is not None for one in found)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._lock_fd)
        self._folder.close()

    def held(self, origin: str) -> Held | None:
        """Return what was cosigned last for a log, None when nothing ever was.

        Raise TraceInvalid ``witness.state`` where that is damaged: guessing could sign a fork.
        """
        return self.by_hash(origin_hash(origin))

    def by_hash(self, name: str) -> Held | None:
        """Return the same by the hash of the origin."""
        try:
            data = self._folder.read(f"{name}/checkpoint", limit=MAX_NOTE_BYTES)
            note = Note.parse(data)
            head = parse_head(note.text)
        except TraceInvalid as error:
            if error.code == "trace.missing" and not self._folder.exists(f"{name}/evidence"):
                return None  # also: killed before its first head was kept
            raise damaged(f"{name}/checkpoint: {error.message}") from error
        if origin_hash(head.origin) != name:
            raise damaged(f"{name}/checkpoint is of another log")
        return Held(head=head, note=note, data=data)

    def knows(self, name: str) -> bool:
        """Tell whether anything is remembered of a log, by the hash of its origin."""
        return _HASH.fullmatch(name) is not None and self._folder.exists(f"{name}/checkpoint")

    def is_full(self) -> bool:
        """Tell whether there is no room for another log."""
        return self.count >= MAX_LOGS

    def keep(self, held: Held) -> None:
        """Remember a head; it is on disk on return. Raise TraceInvalid ``witness.state``."""
        name = origin_hash(held.head.origin)
        new = not self._folder.exists(name)
        try:
            self._folder.write(f"{name}/checkpoint", held.data)
        except OSError as error:
            raise damaged(f"it cannot be written: {error.strerror}") from error
        self.count += new

    def accuse(self, kind: str, held: Held, body: bytes, head: Checkpoint) -> None:
        """Keep what a log signed beside what was held, once for each head.

        A full disk loses the evidence, not the refusal.
        """
        mark = sha256(f"{head.size} {head.root.hex()}".encode()).hexdigest()[:32]
        folder = f"{origin_hash(head.origin)}/evidence"
        known = [name for name in self._names(folder) if name.startswith(f"{kind}-")]
        if f"{kind}-{mark}" in known or len(known) >= MAX_EVIDENCE:
            return
        data = encode_evidence(kind, held.data, body)
        with suppress(OSError, TraceInvalid):
            self._folder.write(f"{folder}/{kind}-{mark}", data)

    def evidence(self, name: str) -> list[str]:
        """Return the names of the evidence about a log, by the hash of its origin."""
        return self._names(f"{name}/evidence")

    def read_evidence(self, name: str, piece: str) -> bytes | None:
        """Return one piece of evidence."""
        if _HASH.fullmatch(name) is None or _NAME.fullmatch(piece) is None:
            return None
        try:
            return self._folder.read(f"{name}/evidence/{piece}", limit=_MAX_EVIDENCE_BYTES)
        except TraceInvalid:
            return None

    def _names(self, folder: str) -> list[str]:
        return [name for name in self._folder.names(folder) if _NAME.fullmatch(name)]

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TraceInvalid(
                "another witness uses this state folder",
                code="witness.locked",
                hint="two memories of one log could cosign a fork: end the other one",
            ) from error


def encode_evidence(kind: str, held: bytes, sent: bytes) -> bytes:
    """Return evidence as text that a person can read: each part behind its length in bytes."""
    head = f"{EVIDENCE_FORMAT}\n{kind}\nheld {len(held)}\n".encode()
    return head + held + f"sent {len(sent)}\n".encode() + sent


def _require_own(directory: Path) -> None:
    status = os.stat(directory)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022 or not stat.S_ISDIR(status.st_mode):
        raise TraceInvalid(
            f"others can write the witness's state in {directory}",
            code="witness.state",
            hint=f"chmod 700 {directory}",
        )


def damaged(why: str) -> TraceInvalid:
    """Return the error of a memory that cannot be relied on."""
    return TraceInvalid(
        f"the witness's state cannot be used: {why}",
        code="witness.state",
        hint="restore it from a copy that is not older than the last cosignature, or use a new key",
    )
