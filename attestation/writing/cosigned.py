"""Step "record": cosignature lines beside the log's own in a stored checkpoint note.

Lines are only ever added, and only to the note of the very head they cover; what the log signed
stays as it is. ``checkpoint`` is the newest head: it takes lines only while it is that head.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.layout import lock_trace
from safeconduct.attestation.note import (
    DASH,
    MAX_NOTE_BYTES,
    MAX_SIGNATURES,
    Note,
    Signature,
    encode_base64,
)
from safeconduct.attestation.reader import CHECKPOINT
from safeconduct.attestation.verify.witnessed import CHECKPOINTS
from safeconduct.errors import TraceInvalid


def signature_line(signature: Signature) -> str:
    """Return a signature as its line, with the newline."""
    return f"{DASH}{signature.name} {encode_base64(signature.id + signature.signature)}\n"


def add_lines(data: bytes, lines: Iterable[str]) -> bytes:
    """Return a note with signature lines added; a key's newer line takes its older one's place.

    Raise TraceInvalid ``note.invalid`` where that is no note any more.
    """
    note = Note.parse(data)
    added = [Note.parse(f"{note.text}\n{line}".encode()).signatures[0] for line in lines]
    by_key = {(one.name, one.id): one for one in [*note.signatures, *added]}
    if len(by_key) > MAX_SIGNATURES:
        raise TraceInvalid(f"more than {MAX_SIGNATURES} signatures", code="note.invalid")
    whole = f"{note.text}\n{''.join(signature_line(one) for one in by_key.values())}".encode()
    Note.parse(whole)
    return whole


def merge_cosignatures(folder: Folder, note: bytes, lines: Iterable[str]) -> str:
    """Add lines to the stored notes of the head that ``note`` signs, durably; return its path.

    They go to ``checkpoints/<size>``, made anew where it is gone, and to ``checkpoint`` while
    that is still this head. The caller is the trace's writer between two heads, or holds its
    lock: else a newer head could be overwritten by this one. Raise TraceInvalid or OSError.
    """
    text = Note.parse(note).text
    path = f"{CHECKPOINTS}/{Checkpoint.parse(text).size}"
    newest, kept = _note_of(folder, CHECKPOINT, text), _note_of(folder, path, text)
    # Lines that either file has already stay; the newest note of the writer comes last.
    known = [one for data in (kept, newest) if data for one in Note.parse(data).signatures]
    whole = add_lines(note, [*(signature_line(one) for one in known), *lines])
    folder.write(path, whole)
    if newest is not None:
        folder.write(CHECKPOINT, whole)
    return path


def store_cosignatures(directory: Path, note: bytes, lines: Iterable[str]) -> None:
    """Do the same in a trace that nobody writes.

    Raise TraceInvalid ``trace.locked`` while somebody does, and what reading and writing raise.
    """
    with Folder(directory) as folder:
        lock_fd = lock_trace(folder)
        try:
            merge_cosignatures(folder, note, lines)
        except OSError as error:
            raise TraceInvalid(f"{directory}: {error.strerror}", code="trace.io") from error
        finally:
            os.close(lock_fd)


def _note_of(folder: Folder, path: str, text: str) -> bytes | None:
    """Return a stored note if it is of this head."""
    try:
        data = folder.read(path, limit=MAX_NOTE_BYTES)
        same = Note.parse(data).text == text
    except TraceInvalid as error:
        if error.code == "trace.io":
            raise
        return None  # missing, or damaged by whatever: the signed note that we have is whole
    return data if same else None
