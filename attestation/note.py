"""Step "record": signed notes with Ed25519 (C2SP signed-note, signature type 0x01).

The key lines are the public ones of the signed-note ecosystem: ``name+hash+base64`` to verify and
``PRIVATE+KEY+name+hash+base64`` to sign. Everything here is parsed as hostile and bounded.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64encode
from dataclasses import dataclass, field
from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from safeconduct.errors import TraceInvalid

ED25519 = b"\x01"  # the signature type of a log's key
DASH = "\N{EM DASH} "
PRIVATE = "PRIVATE+KEY+"
# LIMIT: signed-note asks for at least 16 signatures; a cosigned checkpoint needs a few more.
MAX_SIGNATURES = 64
MAX_NOTE_BYTES = 64 << 10
MAX_KEY_CHARACTERS = 512

_KEY_NAME = re.compile(r"[!-*,-~]{1,200}")  # printable ASCII, neither space nor '+'
_KEY_HASH = re.compile(r"[0-9a-f]{8}")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")


def encode_base64(data: bytes) -> str:
    """Encode as RFC 4648 §4 with padding."""
    return b64encode(data).decode("ascii")


def decode_base64(text: str, *, code: str) -> bytes:
    """Decode the one spelling RFC 4648 §4 gives, refusing stray bits and characters."""
    try:
        data = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise TraceInvalid("not base64", code=code) from error
    if encode_base64(data) != text:
        raise TraceInvalid("base64 with stray bits", code=code)
    return data


def key_id(name: str, public: bytes, kind: bytes = ED25519) -> bytes:
    """Return the 4-byte id of a key (signed-note, "Signatures"); ``kind`` is its type byte."""
    return sha256(name.encode() + b"\n" + kind + public).digest()[:4]


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature line as found: nothing about it is believed yet."""

    name: str
    id: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """A parsed note. ``text`` ends in a newline and is exactly what each signature covers."""

    text: str
    signatures: tuple[Signature, ...]

    @classmethod
    def parse(cls, data: bytes) -> Note:
        """Parse a signed note strictly. Raise TraceInvalid ``note.invalid``."""
        if len(data) > MAX_NOTE_BYTES:
            raise _invalid("a note of more than 64 KiB")
        try:
            whole = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _invalid("a note that is not UTF-8") from error
        if _CONTROL.search(whole):
            raise _invalid("a note with control characters")
        body, separator, lines = whole.rpartition("\n\n")
        if not separator or not lines.endswith("\n"):
            raise _invalid("a note without signature lines")
        signatures = lines[:-1].split("\n")
        if len(signatures) > MAX_SIGNATURES:
            raise _invalid(f"a note with more than {MAX_SIGNATURES} signatures")
        return cls(body + "\n", tuple(parse_signature(line) for line in signatures))


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A public key with its name: what a verifier brings along."""

    name: str
    public: bytes

    @property
    def id(self) -> bytes:
        """Return the key's 4-byte id."""
        return key_id(self.name, self.public)

    @property
    def line(self) -> str:
        """Return the key line ``name+hash+base64``."""
        return f"{self.name}+{self.id.hex()}+{encode_base64(ED25519 + self.public)}"

    @classmethod
    def parse(cls, line: str) -> VerifierKey:
        """Parse a key line. Raise TraceInvalid ``key.invalid``."""
        key = cls(*parse_key_line(line, line))
        if line.split("+", 2)[1] != key.id.hex():
            raise bad_key("its hash does not match")
        return key

    def of_log(self, origin: str) -> VerifierKey:
        """Return the same key under the name its signatures on this log's heads carry: the origin.

        tlog-checkpoint asks for it, and witnesses and tlog-policy files know a log by it.
        """
        return VerifierKey(origin, self.public)

    def made(self, signature: Signature) -> bool:
        """Tell whether the line claims this key: same name and same id."""
        return signature.name == self.name and signature.id == self.id

    def verifies(self, signature: Signature, text: str) -> bool:
        """Tell whether the signature is this key's over the text."""
        try:
            key = Ed25519PublicKey.from_public_bytes(self.public)
            key.verify(signature.signature, text.encode())
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key with its name. Only the signer process holds one."""

    name: str
    seed: bytes = field(repr=False)

    @property
    def verifier(self) -> VerifierKey:
        """Return the public half."""
        public = Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw()
        return VerifierKey(self.name, public)

    @property
    def line(self) -> str:
        """Return the private key line; whoever holds it can sign."""
        return f"{PRIVATE}{self.name}+{self.verifier.id.hex()}+{encode_base64(ED25519 + self.seed)}"

    @classmethod
    def parse(cls, line: str) -> SigningKey:
        """Parse a private key line. Raise TraceInvalid ``key.invalid``, never quoting it."""
        if not line.startswith(PRIVATE):
            raise bad_key("it is no private key line")
        public_form = line.removeprefix(PRIVATE)
        key = cls(*parse_key_line(public_form, "a private key"))
        if public_form.split("+", 2)[1] != key.verifier.id.hex():
            raise bad_key("its hash does not match")
        return key

    def of_log(self, origin: str) -> SigningKey:
        """Return the same key under the name that signs this log's heads: the origin."""
        return SigningKey(origin, self.seed)

    def sign(self, text: str) -> str:
        """Return the signature line over a note text, with its newline."""
        return Pen(self).sign(text)

    def sign_bytes(self, data: bytes) -> bytes:
        """Return the 64 bytes of the signature; ``data`` must not look like any note text."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(data)


class Pen:
    """A private key made ready for many notes: what only depends on it is computed once."""

    def __init__(self, key: SigningKey) -> None:
        """Take a key as it is to sign."""
        self._name, self._id = key.name, key.verifier.id
        self._private = Ed25519PrivateKey.from_private_bytes(key.seed)

    def sign(self, text: str) -> str:
        """Return the signature line over a note text, with its newline."""
        signature = self._private.sign(text.encode())
        return f"{DASH}{self._name} {encode_base64(self._id + signature)}\n"


def require_key_name(name: str) -> str:
    """Return the name if it may name a key: 1-200 printable ASCII, neither space nor '+'."""
    if _KEY_NAME.fullmatch(name) is None:
        raise TraceInvalid(
            f"{name[:80]!r} is no key name",
            code="key.invalid",
            hint="use something like example.org/alice: printable, without space or '+'",
        )
    return name


def parse_signature(line: str) -> Signature:
    """Parse one signature line, without its newline. Raise TraceInvalid ``note.invalid``."""
    if not line.startswith(DASH):
        raise _invalid("a signature line that does not start with an em dash")
    name, space, encoded = line.removeprefix(DASH).partition(" ")
    if not space or not name or "+" in name or any(mark.isspace() for mark in name):
        raise _invalid("a signature line without a key name")
    data = decode_base64(encoded, code="note.invalid")
    if len(data) <= 4:
        raise _invalid("a signature line without a signature")
    return Signature(name, data[:4], data[4:])


def parse_key_line(line: str, what: str, kind: bytes = ED25519) -> tuple[str, bytes]:
    """Return name and 32 key bytes of ``name+hash+base64``; ``what`` is quoted in errors.

    The hash is only looked at: comparing it is the caller's, who knows what it is taken over.
    """
    parts = line.split("+", 2)
    if len(line) > MAX_KEY_CHARACTERS or len(parts) != 3:
        raise bad_key(f"{what[:80]!r} has not the form name+hash+base64")
    name, hash_text, encoded = parts
    if _KEY_HASH.fullmatch(hash_text) is None:
        raise bad_key("its hash is not eight hexadecimal digits")
    data = decode_base64(encoded, code="key.invalid")
    if data[:1] != kind or len(data) != 33:
        raise bad_key(f"it is no key of type 0x{kind.hex()} (Ed25519)")
    return require_key_name(name), data[1:]


def _invalid(what: str) -> TraceInvalid:
    return TraceInvalid(what, code="note.invalid")


def bad_key(why: str) -> TraceInvalid:
    """Return the error for a key line that cannot be used."""
    return TraceInvalid(
        f"the key line cannot be used: {why}",
        code="key.invalid",
        hint="a key line reads name+hash+base64; ask the log's operator for it again",
    )
