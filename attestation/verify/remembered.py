"""Step "verify": the verifier's own memory: the newest checkpoint it verified of each log.

Put back to an older state, or forked, a log still verifies by itself; held against what was seen
before, it does not. The memory is the verifier's: a folder of notes of mode 0700, one for each
origin and key, as the log signed them. Only what a trusted key signed is ever kept. A note of a key
that the log was handed over to is kept under the keys before it too, with a line that names the
signer: a copy from before the change of key does not even name the new one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import MAX_NOTE_BYTES, Note, VerifierKey
from safeconduct.attestation.reader import CHECKPOINT
from safeconduct.errors import Exit, TraceInvalid

from .report import Report
from .vouching import Recalled, key_mark

# LIMIT: keys of one log that are remembered.
_MAX_KEYS = 64
_CARRIED = b"carried "
# LIMIT: a note, and the line that names its signer.
_MAX_BYTES = MAX_NOTE_BYTES + 512
_SOURCE = "remembered from an earlier verification on this machine"


def memory_folder(environment: Mapping[str, str]) -> Path:
    """Return where this user's verifier remembers checkpoints (XDG base directories)."""
    state = environment.get("XDG_STATE_HOME", "")
    home = environment.get("HOME") or os.path.expanduser("~")
    base = Path(state) if os.path.isabs(state) else Path(home) / ".local/state"
    return base / "safeconduct/verified"


class Memory:
    """Checkpoints of verified logs, by origin. A memory that cannot be used is no memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def recall(self, origin: str) -> list[Recalled]:
        """Return the notes remembered of the log of this origin, one for each key."""
        found: list[Recalled] = []
        try:
            with Folder(self._directory) as folder:
                begin = _hash(origin)
                names = [name for name in folder.names("") if name.startswith(begin)]
                for name in names[:_MAX_KEYS]:
                    with suppress(TraceInvalid):
                        signer, note = _split(folder.read(name, limit=_MAX_BYTES))
                        if _origin(note) != origin:
                            continue
                        under = name.removeprefix(f"{begin}-").partition(".")[0]
                        one = Recalled(source=_SOURCE, note=note, under=under, signer=signer)
                        found.append(one)
        except TraceInvalid:
            return found
        return found

    def keep(self, trace: Path, report: Report) -> bool:
        """Remember a verified log's checkpoint; tell whether it is kept.

        An older copy never takes the place of a newer one: ``verify`` has held it against that.
        """
        if report.level < 1 or report.status not in (Exit.OK, Exit.INCOMPLETE):
            return False
        try:
            with Folder(trace) as folder:
                note = folder.read(CHECKPOINT, limit=MAX_NOTE_BYTES)
            head = Checkpoint.parse(Note.parse(note).text)
            key = VerifierKey.parse(report.signed_key)
            # The folder may have changed since: only the head that was verified is kept, signed.
            if not _signed(key, note) or (head.origin, head.size, head.root.hex()) != (
                report.origin,
                report.size,
                report.root,
            ):
                return False
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(OSError), Folder(self._directory) as folder:
                for line in report.carried_from:
                    old, named = VerifierKey.parse(line), f"{key.line}\n".encode()
                    _put(folder, _name(head.origin, old), _CARRIED + named + note, head, report)
                return _put(folder, _name(head.origin, key), note, head, report)
        except (TraceInvalid, OSError):
            return False
        return False


def _split(data: bytes) -> tuple[VerifierKey | None, bytes]:
    """Cut what is kept into the key that signed, where it was another one, and the note."""
    if not data.startswith(_CARRIED):
        return None, data
    line, _, note = data.removeprefix(_CARRIED).partition(b"\n")
    return VerifierKey.parse(line.decode("ascii", "replace")), note


def _put(folder: Folder, name: str, data: bytes, head: Checkpoint, report: Report) -> bool:
    """Keep a note unless a newer one is kept; tell whether it is."""
    if _outlives(folder, name, VerifierKey.parse(report.signed_key), head, report):
        return False
    folder.write(name, data, mode=0o600)
    return True


def _origin(note: bytes) -> str:
    return Checkpoint.parse(Note.parse(note).text).origin


def _outlives(
    folder: Folder, name: str, key: VerifierKey, head: Checkpoint, report: Report
) -> bool:
    """Tell whether what is kept stays: it only gives way to a head that was held against it.

    The folder that was verified may have shown another log while the memory was looked up.
    """
    before = [VerifierKey.parse(line) for line in report.carried_from]
    try:
        signer, note = _split(folder.read(name, limit=_MAX_BYTES))
        kept = Checkpoint.parse(Note.parse(note).text)
        true = any(_signed(one, note) for one in (signer or key, *before))
    except TraceInvalid:
        return False
    held = any(one.number == 2 and one.reached for one in report.levels)
    return true and kept.origin == head.origin and (kept.size > head.size or not held)


def _signed(key: VerifierKey, data: bytes) -> bool:
    note = Note.parse(data)
    named = key.of_log(Checkpoint.parse(note.text).origin)
    return any(named.made(one) and named.verifies(one, note.text) for one in note.signatures)


def _hash(origin: str) -> str:
    return sha256(origin.encode()).hexdigest()


def _name(origin: str, key: VerifierKey) -> str:
    """Name a file by log and key: another key's log of the same name takes nobody's place."""
    return f"{_hash(origin)}-{key_mark(key)}.checkpoint"
