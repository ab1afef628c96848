"""Step "verify": a signed in-toto Statement about one call or one session, in a DSSE envelope.

Formats: in-toto Statement v1, DSSE v1 (https://github.com/secure-systems-lab/dsse). The predicate
holds the log's own entries and the head of the tree they were found in, and nothing else: a
statement has one spelling, which everybody can make again from the entries. The signer makes it
itself, of entries that it has found in the tree it signed last (signer_statement.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from safeconduct.attestation.checkpoint import Checkpoint, require_origin
from safeconduct.attestation.encoding import MAX_ENTRY_BYTES
from safeconduct.attestation.entry import Entry, parse_entry
from safeconduct.attestation.merkle import HASH_BYTES, MAX_SIZE, leaf_hash
from safeconduct.attestation.note import VerifierKey, decode_base64, encode_base64
from safeconduct.call import EntryKind
from safeconduct.errors import TraceInvalid

from .search import OF_A_CALL

PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE_TYPE = "urn:safeconduct:trace-entries:v1"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
# LIMIT: entries of one statement: intent, decision, a few approvals and outcome; or two.
MAX_ENTRIES = 16
_MAX_PAYLOAD_BYTES = MAX_ENTRIES * (MAX_ENTRY_BYTES + 512) + 1024
# LIMIT: the payload in base64 and a few signatures.
MAX_ENVELOPE_BYTES = _MAX_PAYLOAD_BYTES * 4 // 3 + (8 << 10)
_MAX_SIGNATURES = 16
_ED25519_SIGNATURE_BYTES = 64
_FIRST = (EntryKind.SESSION_OPEN, EntryKind.LOG_OPEN)


class _Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    entry: msgspec.Raw
    index: int


class _Log(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    origin: str
    root: str
    size: int


class _Predicate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    entries: list[_Line]
    log: _Log


class _Subject(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    digest: dict[str, str]
    name: str


class _Payload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: str = msgspec.field(name="_type")
    predicate: _Predicate
    predicate_type: str = msgspec.field(name="predicateType")
    subject: list[_Subject]


class _Signature(msgspec.Struct, frozen=True, kw_only=True):
    sig: str
    keyid: str = ""


class _Envelope(msgspec.Struct, frozen=True, kw_only=True):
    payload: str
    payload_type: str = msgspec.field(name="payloadType")
    signatures: list[_Signature]


_encoder = msgspec.json.Encoder(order="deterministic")
_payloads = msgspec.json.Decoder(_Payload)
_envelopes = msgspec.json.Decoder(_Envelope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What is stated: these entries (index, bytes, parsed) are in the tree under that head."""

    head: Checkpoint
    entries: tuple[tuple[int, bytes, Entry], ...]

    @property
    def session(self) -> str:
        """Return the session all entries are of."""
        return self.entries[0][2].session

    @property
    def unbroken(self) -> bool:
        """Tell whether its entries follow each other in their session, each naming the last."""
        return self.entries[-1][2].sseq - self.entries[0][2].sseq == len(self.entries) - 1

    @classmethod
    def about(cls, head: Checkpoint, entries: Sequence[tuple[int, bytes]]) -> Statement:
        """Make the statement about one call's entries, or about a session's first and last.

        Raise TraceInvalid ``statement.invalid`` for any other set of entries, ``trace.*`` for
        bytes that are no entry.
        """
        if not 0 < len(entries) <= MAX_ENTRIES:
            raise _invalid(f"it is about 1 to {MAX_ENTRIES} entries")
        parsed = tuple((index, data, parse_entry(data)) for index, data in entries)
        indices = [index for index, _, _ in parsed]
        if indices != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= head.size:
            raise _invalid("its entries are not in order, or not under that head")
        _require_one_story([entry for _, _, entry in parsed])
        for (_, data, before), (_, _, entry) in pairwise(parsed):
            follows = entry.sseq == before.sseq + 1
            if follows and entry.prev != leaf_hash(data).hex():
                raise _invalid("an entry does not name the one before it")
        return cls(head=head, entries=parsed)

    def payload(self) -> bytes:
        """Return the bytes that are signed: an in-toto Statement in its one spelling."""
        origin = self.head.origin
        return _encoder.encode(
            _Payload(
                type=_STATEMENT_TYPE,
                predicate=_Predicate(
                    entries=[
                        _Line(entry=msgspec.Raw(data), index=index)
                        for index, data, _ in self.entries
                    ],
                    log=_Log(origin=origin, root=self.head.root.hex(), size=self.head.size),
                ),
                predicate_type=PREDICATE_TYPE,
                subject=[
                    _Subject(digest={"sha256": sha256(data).hexdigest()}, name=f"{origin}/{index}")
                    for index, data, _ in self.entries
                ],
            )
        )

    @classmethod
    def parse(cls, payload: bytes) -> Statement:
        """Parse a payload, refusing any that is not spelled as ``payload`` spells it.

        Raise TraceInvalid ``statement.invalid`` or ``trace.*``.
        """
        if len(payload) > _MAX_PAYLOAD_BYTES:
            raise _invalid("it is too large")
        try:
            read = _payloads.decode(payload)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise _invalid(f"its payload is no statement of ours ({error})") from error
        log = read.predicate.log
        root = bytes.fromhex(log.root) if _is_hex(log.root) else b""
        if len(root) != HASH_BYTES or not 0 <= log.size <= MAX_SIZE:
            raise _invalid("it names no head")
        head = Checkpoint(origin=require_origin(log.origin), size=log.size, root=root)
        entries = [(one.index, bytes(one.entry)) for one in read.predicate.entries]
        statement = cls.about(head, entries)
        if statement.payload() != payload:
            raise _invalid("its subjects are not its entries, or it is not spelled as one is")
        return statement


def _require_one_story(entries: Sequence[Entry]) -> None:
    """Refuse all but a call from intent to outcome, or the two ends of a session."""
    first, last = entries[0], entries[-1]
    if any(entry.session != first.session for entry in entries):
        raise _invalid("its entries are of several sessions")
    if [entry.sseq for entry in entries] != sorted({entry.sseq for entry in entries}):
        raise _invalid("its entries are not in the order of their session")
    if first.kind in _FIRST and last.kind is EntryKind.SESSION_CLOSE and len(entries) == 2:
        return
    kinds_fit = first.kind is EntryKind.CALL_INTENT and last.kind is EntryKind.CALL_OUTCOME
    if not kinds_fit or not all(entry.kind in OF_A_CALL for entry in entries):
        raise _invalid("its entries are neither a whole call nor the ends of a session")
    if any(entry.body["call"] != first.body["call"] for entry in entries):
        raise _invalid("its entries are of several calls")
    kinds = [entry.kind for entry in entries]
    # A log that breaks the rules may use an id again after its outcome: one story has one of each.
    ends = (EntryKind.CALL_INTENT, EntryKind.CALL_OUTCOME)
    if any(kinds.count(kind) != 1 for kind in ends) or kinds.count(EntryKind.CALL_DECISION) > 1:
        raise _invalid("its entries are of several calls with one id")
    # Only a call that a crash took may lack it: intent and decision are one write.
    if EntryKind.CALL_DECISION not in kinds and last.body.get("status") != "unknown":
        raise _invalid("it leaves out what was decided about the call")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvelopeSignature:
    """A signature as found. ``keyid`` is a hint, and believed no more than the rest."""

    keyid: str
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A DSSE envelope around a statement."""

    payload: bytes
    signatures: tuple[EnvelopeSignature, ...]

    def encode(self) -> bytes:
        """Return the envelope as a file holds it."""
        return _encoder.encode(
            _Envelope(
                payload=encode_base64(self.payload),
                payload_type=PAYLOAD_TYPE,
                signatures=[
                    _Signature(sig=encode_base64(one.signature), keyid=one.keyid)
                    for one in self.signatures
                ],
            )
        )

    @classmethod
    def parse(cls, data: bytes) -> Envelope:
        """Parse an envelope. Raise TraceInvalid ``statement.invalid``."""
        if len(data) > MAX_ENVELOPE_BYTES:
            raise _invalid("it is too large")
        try:
            read = _envelopes.decode(data)
            # Another reader might take the first of two: then it would not be what was verified.
            json.loads(data.decode("utf-8"), object_pairs_hook=_require_names_once)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise _invalid(f"it is no DSSE envelope ({error})") from error
        if read.payload_type != PAYLOAD_TYPE or not 0 < len(read.signatures) <= _MAX_SIGNATURES:
            raise _invalid("it is no signed in-toto statement")
        return cls(
            payload=decode_base64(read.payload, code="statement.invalid"),
            signatures=tuple(
                EnvelopeSignature(
                    keyid=one.keyid, signature=decode_base64(one.sig, code="statement.invalid")
                )
                for one in read.signatures
            ),
        )

    def signer(self, keys: Sequence[VerifierKey]) -> VerifierKey | None:
        """Return the first of these keys that signed, None where none claims to have.

        Raise TraceInvalid ``statement.signature`` where a signature claims one of them and is
        false. One key id may belong to one key only: it holds the key's name and hash.
        """
        message = pre_authentication(self.payload)
        for key in keys:
            for one in self.signatures:
                if one.keyid != key_hint(key):
                    continue
                try:
                    public = Ed25519PublicKey.from_public_bytes(key.public)
                    public.verify(one.signature, message)
                except (InvalidSignature, ValueError) as error:
                    raise TraceInvalid(
                        f"the signature of {key.name} on the statement is false",
                        code="statement.signature",
                    ) from error
                return key
        return None


def key_hint(key: VerifierKey) -> str:
    """Return what stands as ``keyid`` beside a signature: the key's name and hash."""
    return f"{key.name}+{key.id.hex()}"


def pre_authentication(payload: bytes) -> bytes:
    """Return the bytes that a DSSE signature covers.

    They begin with a word and a space. No origin has a space (checkpoint.py), so no signature on a
    statement is ever one on a checkpoint. signer_statement.py makes the same bytes.
    """
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _require_names_once(pairs: Sequence[tuple[str, object]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice in it")


def _is_hex(text: str) -> bool:
    return len(text) == 2 * HASH_BYTES and all(mark in "0123456789abcdef" for mark in text)


def _invalid(why: str) -> TraceInvalid:
    return TraceInvalid(
        f"the statement cannot be believed: {why}",
        code="statement.invalid",
        hint="ask for the file again",
    )
