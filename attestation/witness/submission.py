"""Witness step 1: an ``add-checkpoint`` request, read as hostile (C2SP tlog-witness)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.merkle import HASH_BYTES, MAX_SIZE
from safeconduct.attestation.note import MAX_NOTE_BYTES, Note, decode_base64, encode_base64
from safeconduct.errors import TraceInvalid

# LIMIT: tlog-witness, "add-checkpoint": the client MUST NOT send more proof lines.
MAX_PROOF_LINES = 63
_HASH_LINE_CHARACTERS = 44
MAX_BODY_BYTES = MAX_NOTE_BYTES + (MAX_PROOF_LINES + 1) * (_HASH_LINE_CHARACTERS + 1)
# LIMIT: an origin is one line; longer ones are no log's that anybody configured.
_MAX_ORIGIN_CHARACTERS = 512
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A well-formed request: nothing in it is believed yet.

    ``head`` is made of the note's first three lines; extension lines stand in ``note.text`` only.
    """

    old_size: int
    proof: tuple[bytes, ...]
    note: Note
    head: Checkpoint

    @classmethod
    def parse(cls, body: bytes) -> Submission:
        """Parse a request body strictly. Raise TraceInvalid ``witness.request``."""
        header, separator, note_bytes = body.partition(b"\n\n")
        if not separator or len(body) > MAX_BODY_BYTES:
            raise _bad("there is no empty line before the checkpoint")
        try:
            old, *hashes = header.decode("ascii").split("\n")
        except UnicodeDecodeError as error:
            raise _bad("what stands before the checkpoint is not ASCII") from error
        word, _, size = old.partition(" ")
        if word != "old":
            raise _bad("the first line does not say: old SIZE")
        if len(hashes) > MAX_PROOF_LINES:
            raise _bad(f"a proof has at most {MAX_PROOF_LINES} lines")
        try:
            proof = tuple(_hash(line) for line in hashes)
            note = Note.parse(note_bytes)
        except TraceInvalid as error:
            raise _bad(error.message) from error
        return cls(old_size=_size(size), proof=proof, note=note, head=parse_head(note.text))


def encode_submission(old_size: int, proof: Sequence[bytes], note: bytes) -> bytes:
    """Return the body of a request."""
    hashes = "".join(f"{encode_base64(one)}\n" for one in proof)
    return f"old {old_size}\n{hashes}\n".encode() + note


def parse_head(text: str) -> Checkpoint:
    """Parse a checkpoint's text of any log: three lines, then perhaps extension lines.

    Raise TraceInvalid ``witness.request``. An origin no log of ours may have is no error here:
    it is only unknown.
    """
    lines = text.split("\n")
    if len(lines) < 4 or lines.pop() or not all(lines):
        raise _bad("a checkpoint has at least three lines, none of them empty")
    origin, size, root = lines[:3]
    if len(origin) > _MAX_ORIGIN_CHARACTERS:
        raise _bad("the origin is too long")
    digest = decode_base64(root, code="witness.request")
    if len(digest) != HASH_BYTES:
        raise _bad("the root is no hash")
    return Checkpoint(origin=origin, size=_size(size), root=digest)


def _hash(line: str) -> bytes:
    digest = decode_base64(line, code="witness.request")
    if len(digest) != HASH_BYTES:
        raise _bad("a proof line is no hash")
    return digest


def _size(text: str) -> int:
    if _SIZE.fullmatch(text) is None or int(text) > MAX_SIZE:
        raise _bad("a size is no size")
    return int(text)


def _bad(why: str) -> TraceInvalid:
    return TraceInvalid(why, code="witness.request")
