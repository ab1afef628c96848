"""Steps "record" and "verify": the old key hands a log over to a new one, inside the log.

A ``key.rotate`` entry holds both key lines and the old key's signature over ``statement``. The
signer signs the head that covers the entry with both keys and then destroys the old one
(signer_process.py). docs/trace-format.md, "Key rotation", is the rule for verifiers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from safeconduct.call import EntryKind
from safeconduct.errors import TraceInvalid

from .checkpoint import require_origin
from .note import DASH, Signature, SigningKey, VerifierKey, parse_signature

# INVARIANT: no checkpoint text reads like this: its second line is a number, and its third, the
# root, is shorter than any key line.
_STATEMENT: Final = "safeconduct/key-rotate/v1"


def statement(origin: str, new: VerifierKey) -> str:
    """Return the text that the old key signs: this log goes on under the new key."""
    return f"{_STATEMENT}\n{require_origin(origin)}\n{new.line}\n"


def rotation_body(origin: str, old: SigningKey, new: VerifierKey) -> dict[str, str]:
    """Return the body of the ``key.rotate`` entry. Only the signer can make one.

    Ed25519 is deterministic: asked again for the same keys and log, it is the same body.
    """
    line = old.sign(statement(origin, new))
    return {
        "old": old.verifier.line,
        "new": new.line,
        "signature": line.removeprefix(DASH).removesuffix("\n"),
    }


def follow_rotation(
    body: Mapping[str, object], trusted: Collection[VerifierKey], origin: str
) -> VerifierKey:
    """Return the key that a ``key.rotate`` entry of the log ``origin`` hands over to.

    ``trusted`` are keys the verifier brought or was carried over to. Raise TraceInvalid
    ``rotation.stranger`` when the old key is none of them: the entry then says nothing to this
    verifier; ``rotation.invalid`` when the old key is trusted and did not sign this, or a field
    cannot be read: the log then breaks its own rules.

    This is half of the rule. The verifier believes the new key only if the smallest stored
    checkpoint that covers the entry is signed by the old key and has the true root: otherwise
    the new key's holder could replace what the old key had signed.

    A key is its public half, whatever name it has here and there: the verifier may know the old
    one by the log's name or by a path above it.
    """
    old, new = _key(body, "old"), _key(body, "new")
    if old.public not in {key.public for key in trusted}:
        raise TraceInvalid(
            f"the key that hands over, {old.name}+{old.id.hex()}, is none you brought",
            code="rotation.stranger",
            hint="bring the log's first key line, or its newest",
        )
    signature = _signature(body)
    if not old.made(signature) or not old.verifies(signature, statement(origin, new)):
        raise _invalid("the old key did not sign it for this log")
    if new.public == old.public:
        raise _invalid("it hands over to the same key")
    return new


def entry_body(entry: bytes) -> dict[str, object]:
    """Return the whole body of an entry's bytes; empty where it is no ``key.rotate``.

    As strict as a verifier: what none would follow must not end a key.
    """
    # These load the decoder, which signing heads never needs.
    from .encoding import MAX_ROTATION_BYTES
    from .entry import parse_entry

    if len(entry) > MAX_ROTATION_BYTES:
        return {}
    try:
        parsed = parse_entry(entry)
    except TraceInvalid:
        return {}
    if parsed.kind is not EntryKind.KEY_ROTATE:
        return {}
    return parsed.body


def _key(body: Mapping[str, object], field: str) -> VerifierKey:
    line = body.get(field)
    if not isinstance(line, str):
        raise _invalid(f"it has no {field!r} key line")
    try:
        return VerifierKey.parse(line)
    except TraceInvalid as error:
        raise _invalid(f"its {field!r} key: {error.message}") from error


def _signature(body: Mapping[str, object]) -> Signature:
    text = body.get("signature")
    if not isinstance(text, str):
        raise _invalid("it has no signature")
    try:
        return parse_signature(DASH + text)
    except TraceInvalid as error:
        raise _invalid(f"its signature: {error.message}") from error


def _invalid(why: str) -> TraceInvalid:
    return TraceInvalid(f"a key rotation that cannot be followed: {why}", code="rotation.invalid")
