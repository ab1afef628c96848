"""Step "record": an Entry, one record of the log, and the commitments inside it.

docs/trace-format.md §3 lists the body of each kind, field by field: what is clear text and what
is a salted commitment. Readers ignore fields they do not know; the ones listed must be there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final, TypeAlias, cast

import msgspec

from safeconduct.call import EntryKind
from safeconduct.errors import TraceInvalid

from .encoding import (
    MAX_ENTRY_BYTES,
    MAX_INTEGER,
    read,
    require_same_spelling,
    require_subset,
    spell,
)

VERSION = 1
SALT_BYTES = 32
_COMMITMENT_PREFIX = b"safeconduct/commitment/v1"
_COMMITMENT = "commitment"

_HASH = re.compile(r"[0-9a-f]{64}")
# LIMIT: names are shown in listings and on terminals: printable ASCII, at most 200 characters.
MAX_NAME_CHARACTERS = 200
_SESSION = re.compile(r"[0-9a-z-]{1,64}")


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One record. ``prev`` is the leaf hash (hex) of the session's previous Entry, or None.

    ``time`` is milliseconds since the epoch by the wall clock; ``mono_ns`` nanoseconds since the
    writer opened the log, by a clock that never steps back. Fields stand in the order of their
    encoding.
    """

    body: dict[str, Any]
    kind: EntryKind
    mono_ns: int
    prev: str | None
    session: str
    sseq: int
    time: int
    v: int = VERSION


_decoder = msgspec.json.Decoder(Entry)

_Check: TypeAlias = Callable[[object], bool]


def is_name(value: object) -> bool:
    """Tell whether the value may stand in clear text as a name or id."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARACTERS:
        return False
    return value.isascii() and value.isprintable()


@lru_cache(maxsize=1024)
def _is_clear(text: str) -> bool:
    return is_name(text)


def clear_name(text: str) -> str:
    """Return text fit to stand in clear: itself, or a short stand-in when it is not a name.

    A hostile tool name must not keep its denial out of the log.
    """
    # Few names stand in many entries; long ones, which are none, are not kept.
    if len(text) <= MAX_NAME_CHARACTERS and _is_clear(text):
        return text
    return f"unprintable~{sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def committed_digest(value: object) -> str | None:
    """Return the digest of a commitment, ``{"commitment": <64 hex digits>}``, or None."""
    if type(value) is not dict:
        return None
    fields = cast("dict[object, object]", value)
    digest = fields.get(_COMMITMENT)
    if len(fields) != 1 or not isinstance(digest, str) or not _is_hash(digest):
        return None
    return digest


def _is_commitment(value: object) -> bool:
    return committed_digest(value) is not None


def commit(salt: bytes, data: bytes) -> str:
    """Return the commitment to some bytes, in hex."""
    return sha256(_COMMITMENT_PREFIX + salt + data).hexdigest()


def commit_pieces(salt: bytes, pieces: Iterable[bytes]) -> str:
    """Return the commitment to bytes that come piece by piece, none of which is kept or copied."""
    hashed = sha256(_COMMITMENT_PREFIX + salt)
    for piece in pieces:
        hashed.update(piece)
    return hashed.hexdigest()


def commitment_field(digest: str) -> dict[str, str]:
    """Return a commitment as it stands in a body."""
    return {_COMMITMENT: digest}


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _one_of(*allowed: str) -> _Check:
    return frozenset(allowed).__contains__


_STATUS = _one_of("ok", "failed", "limit", "denied", "error", "unknown")

SHAPES: Final[Mapping[EntryKind, Mapping[str, _Check]]] = {
    EntryKind.LOG_OPEN: {
        "format": _one_of("safeconduct/trace/v1"),
        "origin": is_name,
        "key": _is_text,
        "signer_isolation": is_name,
        "size": _is_count,
    },
    EntryKind.LOG_RECOVERED: {
        "dropped_bytes": _is_count,
        "dropped_sha256": _is_hash,
        "sessions": _is_count,
        "calls": _is_count,
    },
    EntryKind.SESSION_OPEN: {"caller": is_name, "origin": is_name},
    EntryKind.SESSION_CLOSE: {"status": _one_of("closed", "left open", "lost")},
    EntryKind.POLICY_LOAD: {"policy": is_name},
    EntryKind.CALL_INTENT: {
        "call": is_name,
        "tool": is_name,
        "caller": is_name,
        "origin": is_name,
        "document": _is_commitment,
    },
    EntryKind.CALL_DECISION: {
        "call": is_name,
        "effect": _one_of("allow", "ask", "deny"),
        "code": is_name,
        "rules": _is_list,
        "policy": is_name,
        "enforcement": _one_of("object", "sandbox", "advisory"),
    },
    EntryKind.APPROVAL: {"call": is_name, "answer": is_name, "by": is_name},
    EntryKind.CALL_OUTCOME: {"call": is_name, "status": _STATUS},
    EntryKind.KEY_ROTATE: {"old": _is_text, "new": _is_text, "signature": _is_text},
    EntryKind.REDACTION: {"session": is_name, "what": is_name, "by": is_name},
    EntryKind.HEARTBEAT: {"sessions": _is_count, "calls": _is_count},
}


def require_body(kind: EntryKind, body: Mapping[str, object]) -> None:
    """Raise TraceInvalid ``trace.body`` unless the body has what its kind must have."""
    for name, holds in SHAPES[kind].items():
        if name not in body:
            raise TraceInvalid(f"{kind} lacks {name!r}", code="trace.body")
        value = body[name]
        try:
            good = holds(value)
        except TypeError:  # an unhashable value where one of a few words belongs
            good = False
        if not good:
            raise TraceInvalid(f"{kind} has an unfit {name!r}", code="trace.body")


def encode_entry(entry: Entry) -> bytes:
    """Return the bytes that are hashed; the caller vouches for the header.

    Raise TraceInvalid ``trace.encoding`` or ``trace.too_large`` for what may not be recorded.
    """
    require_subset(entry.body)
    return encode_checked(entry)


def encode_checked(entry: Entry) -> bytes:
    """Return the bytes of an Entry whose clear fields lie in the subset, as was checked before."""
    data = spell(entry)
    if len(data) > MAX_ENTRY_BYTES:
        raise TraceInvalid(
            f"an entry of {len(data)} bytes",
            code="trace.too_large",
            hint="commit to large values instead of writing them in clear",
        )
    return data


def parse_entry(data: bytes) -> Entry:
    """Parse hostile bytes into an Entry, refusing any second spelling and any unfit field."""
    entry = read(_decoder, data)
    require_same_spelling(data, spell(entry))
    require_subset(entry.body)
    _require_header(entry)
    require_body(entry.kind, entry.body)
    return entry


def _require_header(entry: Entry) -> None:
    if entry.v != VERSION:
        raise TraceInvalid(f"entry version {entry.v}", code="trace.version")
    counts_fit = all(0 <= n <= MAX_INTEGER for n in (entry.mono_ns, entry.sseq, entry.time))
    if not counts_fit or not (entry.prev is None or _is_hash(entry.prev)):
        raise TraceInvalid("an entry with an unfit header", code="trace.entry")
    if _SESSION.fullmatch(entry.session) is None:
        raise TraceInvalid("an entry with an unfit session id", code="trace.entry")
