"""Step "record": a private key under a passphrase, four lines of ASCII.

::

    SAFECONDUCT+PROTECTED+KEY+v1
    <the public key line>
    scrypt <log2 N> <r> <p> <base64 of a 16-byte salt>
    aes-256-gcm <base64 of a 12-byte nonce> <base64 of ciphertext and tag>

The plaintext is the 32-byte seed; the first three lines, with their newlines, are authenticated
with it (AES-GCM's additional data). scrypt is RFC 7914, AES-GCM is NIST SP 800-38D.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from safeconduct.attestation.note import (
    SigningKey,
    VerifierKey,
    bad_key,
    decode_base64,
    encode_base64,
)
from safeconduct.errors import TraceInvalid

MAGIC: Final = "SAFECONDUCT+PROTECTED+KEY+v1"
_CIPHER: Final = "aes-256-gcm"
_SALT_BYTES, _NONCE_BYTES, _KEY_BYTES, _SEALED_BYTES = 16, 12, 32, 48
# 128 MiB and about half a second for each guess.
_LOG2_N: Final = 17
_R, _P = 8, 1
# LIMIT: what a hostile file may make us spend, 1 GiB; and what is too weak to pretend with.
_LOG2_N_LEAST, _LOG2_N_MOST = 14, 20
# LIMIT: a passphrase, so that a wrong file given as one is refused.
MAX_PASSPHRASE_BYTES: Final = 1024


def is_protected(text: str) -> bool:
    """Tell whether a key file's text needs a passphrase."""
    return text.startswith(MAGIC + "\n")


def protected_line(text: str) -> str:
    """Return the public key line that a protected file claims; nobody has vouched for it yet."""
    return VerifierKey.parse(_lines(text)[1]).line


def protect(key: SigningKey, passphrase: bytes, *, log2_n: int = _LOG2_N) -> str:
    """Return the file text of a key under a passphrase."""
    require_passphrase(passphrase)
    salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
    head = f"{MAGIC}\n{key.verifier.line}\nscrypt {log2_n} {_R} {_P} {encode_base64(salt)}\n"
    cipher = AESGCM(_derive(passphrase, salt, log2_n))
    sealed = cipher.encrypt(nonce, key.seed, head.encode())
    return f"{head}{_CIPHER} {encode_base64(nonce)} {encode_base64(sealed)}\n"


def unprotect(text: str, passphrase: bytes) -> SigningKey:
    """Return the key. Raise TraceInvalid ``key.passphrase`` (wrong) or ``key.invalid``."""
    require_passphrase(passphrase)
    _, line, derivation, cipher_line = _lines(text)
    public = VerifierKey.parse(line)
    log2_n, salt = _parse_derivation(derivation)
    words = cipher_line.split(" ")
    if len(words) != 3 or words[0] != _CIPHER:
        raise bad_key("its cipher is not aes-256-gcm")
    nonce = decode_base64(words[1], code="key.invalid")
    sealed = decode_base64(words[2], code="key.invalid")
    if len(nonce) != _NONCE_BYTES or len(sealed) != _SEALED_BYTES:
        raise bad_key("its nonce or ciphertext has not the length it should")
    head = f"{MAGIC}\n{line}\n{derivation}\n"
    try:
        seed = AESGCM(_derive(passphrase, salt, log2_n)).decrypt(nonce, sealed, head.encode())
    except InvalidTag as error:
        raise TraceInvalid(
            "the passphrase does not open the key file, or the file was changed",
            code="key.passphrase",
            hint="try again with the passphrase the key was made with",
        ) from error
    key = SigningKey(public.name, seed)
    if key.verifier != public:
        raise bad_key("its public line is not the key's")
    return key


def require_passphrase(passphrase: bytes) -> None:
    """Refuse an empty passphrase and one that is no passphrase any more."""
    if not 0 < len(passphrase) <= MAX_PASSPHRASE_BYTES:
        raise TraceInvalid(
            f"a passphrase has 1 to {MAX_PASSPHRASE_BYTES} bytes",
            code="key.passphrase",
            hint="give one, or make a key without a passphrase",
        )


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    if len(lines) != 5 or lines[0] != MAGIC or lines[4]:
        raise bad_key("it is no protected key file")
    return lines[:4]


def _parse_derivation(line: str) -> tuple[int, bytes]:
    words = line.split(" ")
    allowed = {str(n): n for n in range(_LOG2_N_LEAST, _LOG2_N_MOST + 1)}
    if len(words) != 5 or words[0] != "scrypt" or words[2:4] != [str(_R), str(_P)]:
        raise bad_key("its key derivation is not scrypt with r = 8 and p = 1")
    if words[1] not in allowed:
        raise bad_key(f"its scrypt cost is not 2**{_LOG2_N_LEAST} to 2**{_LOG2_N_MOST}")
    salt = decode_base64(words[4], code="key.invalid")
    if len(salt) != _SALT_BYTES:
        raise bad_key("its salt has not 16 bytes")
    return allowed[words[1]], salt


def _derive(passphrase: bytes, salt: bytes, log2_n: int) -> bytes:
    memory_bytes = (128 * _R << log2_n) + (1 << 20)
    return hashlib.scrypt(
        passphrase, salt=salt, n=1 << log2_n, r=_R, p=_P, maxmem=memory_bytes, dklen=_KEY_BYTES
    )
