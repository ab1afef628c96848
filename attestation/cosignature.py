"""Step "record": a witness's Cosignature on a checkpoint (C2SP tlog-cosignature, type 0x04).

A cosignature is a note signature whose bytes are a time (8 bytes, big-endian POSIX seconds) and an
Ed25519 signature over ``cosignature/v1``, the time, and the whole note text. A cosigner's key has a
type of its own, so that a log's key is never taken for a witness's, nor the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from safeconduct.errors import TraceInvalid

from .note import (
    DASH,
    PRIVATE,
    Signature,
    bad_key,
    encode_base64,
    key_id,
    parse_key_line,
)

COSIGNATURE = b"\x04"
_HEADER = "cosignature/v1"
_TIME_BYTES = 8
_ED25519_SIGNATURE_BYTES = 64
# LIMIT: tlog-cosignature, "Format": the timestamp MUST NOT exceed 2**63 - 1.
MAX_TIME = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosignature:
    """A cosignature as read or made: ``time`` in POSIX seconds, ``signature`` the 64 bytes.

    One that comes out of ``CosignerKey.verified`` or ``CosigningKey.sign`` is true; one out of
    ``parse`` is only well formed.
    """

    name: str
    id: bytes
    time: int
    signature: bytes

    @classmethod
    def parse(cls, line: Signature) -> Cosignature | None:
        """Take a signature line apart; None when its bytes cannot be a cosignature."""
        if len(line.signature) != _TIME_BYTES + _ED25519_SIGNATURE_BYTES:
            return None
        time = int.from_bytes(line.signature[:_TIME_BYTES], "big")
        if time > MAX_TIME:
            return None
        return cls(name=line.name, id=line.id, time=time, signature=line.signature[_TIME_BYTES:])

    @property
    def line(self) -> str:
        """Return the signature line, with its newline."""
        data = self.id + self.time.to_bytes(_TIME_BYTES, "big") + self.signature
        return f"{DASH}{self.name} {encode_base64(data)}\n"


@dataclass(frozen=True, slots=True)
class CosignerKey:
    """A witness's public key with its name: what a verifier's policy brings along."""

    name: str
    public: bytes

    @property
    def id(self) -> bytes:
        """Return the key's 4-byte id."""
        return key_id(self.name, self.public, COSIGNATURE)

    @property
    def line(self) -> str:
        """Return the key line ``name+hash+base64`` (vkey) with type 0x04."""
        return f"{self.name}+{self.id.hex()}+{encode_base64(COSIGNATURE + self.public)}"

    @classmethod
    def parse(cls, line: str) -> CosignerKey:
        """Parse a key line. Raise TraceInvalid ``key.invalid``, also for a log's key."""
        key = cls(*parse_key_line(line, line, COSIGNATURE))
        if line.split("+", 2)[1] != key.id.hex():
            raise bad_key("its hash does not match")
        return key

    def made(self, signature: Signature) -> bool:
        """Tell whether the line claims this key: same name and same id."""
        return signature.name == self.name and signature.id == self.id

    def verified(self, signature: Signature, text: str) -> Cosignature | None:
        """Return what this key cosigned over the note text, or None when it did not.

        A line that claims this key (``made``) and comes back as None is a false signature, and
        its note should be refused whole (signed-note, "Signatures").
        """
        cosignature = Cosignature.parse(signature) if self.made(signature) else None
        if cosignature is None:
            return None
        message = cosigned_message(text, cosignature.time)
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(cosignature.signature, message)
        except (InvalidSignature, ValueError):
            return None
        return cosignature


@dataclass(frozen=True, slots=True)
class CosigningKey:
    """A witness's private key with its name."""

    name: str
    seed: bytes = field(repr=False)

    @property
    def verifier(self) -> CosignerKey:
        """Return the public half."""
        private = Ed25519PrivateKey.from_private_bytes(self.seed)
        return CosignerKey(self.name, private.public_key().public_bytes_raw())

    @property
    def line(self) -> str:
        """Return the private key line; whoever holds it can cosign."""
        encoded = encode_base64(COSIGNATURE + self.seed)
        return f"{PRIVATE}{self.name}+{self.verifier.id.hex()}+{encoded}"

    @classmethod
    def parse(cls, line: str) -> CosigningKey:
        """Parse a private key line. Raise TraceInvalid ``key.invalid``, never quoting it."""
        if not line.startswith(PRIVATE):
            raise bad_key("it is no private key line")
        public_form = line.removeprefix(PRIVATE)
        key = cls(*parse_key_line(public_form, "a private key", COSIGNATURE))
        if public_form.split("+", 2)[1] != key.verifier.id.hex():
            raise bad_key("its hash does not match")
        return key

    def sign(self, text: str, *, time: int) -> Cosignature:
        """Cosign a checkpoint's note text as of ``time`` (POSIX seconds).

        The caller has verified the log's own signature and the consistency of the tree with what
        it cosigned before: that is all a cosignature says. Raise TraceInvalid
        ``cosignature.time`` for a time outside 0..2**63-1.
        """
        if not 0 <= time <= MAX_TIME:
            raise TraceInvalid(
                f"{time} is no POSIX time", code="cosignature.time", hint="set the clock"
            )
        private = Ed25519PrivateKey.from_private_bytes(self.seed)
        return Cosignature(
            name=self.name,
            id=self.verifier.id,
            time=time,
            signature=private.sign(cosigned_message(text, time)),
        )


def cosigned_message(text: str, time: int) -> bytes:
    """Return the bytes that are signed (tlog-cosignature, "Ed25519 signed message")."""
    return f"{_HEADER}\ntime {time}\n{text}".encode()
