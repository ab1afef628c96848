"""Step "record": the one encoder of what is hashed and signed, and its strict decoder.

An Entry is JSON in the I-JSON subset of docs/trace-format.md §2 (ASCII keys, no floats, integers
below 2**53, no duplicate keys). Inside that subset msgspec's deterministic output equals RFC 8785,
so every value has exactly one spelling. Hashes are always taken over stored bytes; the decoder
encodes again only to refuse a second spelling, never to replace what was stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TypeVar, cast

import msgspec

from safeconduct.call import Json
from safeconduct.errors import TraceInvalid

# LIMIT: the length prefix of a C2SP entry bundle has 16 bits (tlog-tiles, "Log entries").
MAX_ENTRY_BYTES = 65_535
# LIMIT: a ``key.rotate`` entry: three lines fit many times. A verifier follows no larger one.
MAX_ROTATION_BYTES = 8 << 10
# LIMIT: arrays and objects inside each other; deeper input is refused before anything walks it.
MAX_DEPTH = 32
# LIMIT: the largest integer every JSON implementation reads exactly (RFC 7493 §2.2).
MAX_INTEGER = 2**53 - 1
# LIMIT: what msgspec and every 64-bit reader hold; only committed values may go this far.
_MAX_COMMITTED_INTEGER = 2**64 - 1

_Value = TypeVar("_Value")

_PLAIN_KINDS = frozenset({str, bool, type(None)})
_BYTE_POSITION = re.compile(r"\(byte (\d+)\)")


def _plain(value: object) -> object:
    """Give msgspec a mapping that is no dict (a read-only view) as one."""
    if isinstance(value, Mapping):
        return dict(cast("Mapping[object, object]", value))
    raise TypeError(f"{type(value).__name__} is not JSON")


_encoder = msgspec.json.Encoder(order="deterministic", enc_hook=_plain)
_decoder: msgspec.json.Decoder[object] = msgspec.json.Decoder()


def encode(value: Json) -> bytes:
    """Encode a value of the subset. Raise TraceInvalid ``trace.encoding`` outside it."""
    require_subset(value)
    return spell(value)


def encode_committed(value: Json) -> bytes:
    """Encode a value that is committed to, not hashed into the tree: any finite JSON value.

    Tool arguments may hold fractions and keys in any script. Their bytes are kept as they are in
    the opening, so they need no canonical form; duplicate keys cannot arise.
    """
    data = spell(value)
    # NaN and infinity are spelled null: only where a null stands must the value be looked at.
    if b"null" in data:
        _walk(value, committed=True)
    return data


def decode(data: bytes) -> Json:
    """Decode bytes of the subset. ``offset`` of the TraceInvalid is the first bad byte."""
    value = read(_decoder, data)
    require_subset(value)
    require_same_spelling(data, spell(value))
    return value  # type: ignore[return-value]


def spell(value: object) -> bytes:
    """Return the bytes of a checked value: sorted keys, no spaces, shortest escapes."""
    try:
        return _encoder.encode(value)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        # UnicodeEncodeError (a lone surrogate) is a ValueError.
        raise TraceInvalid(f"value cannot be encoded: {error}", code="trace.encoding") from error


def read(decoder: msgspec.json.Decoder[_Value], data: bytes) -> _Value:
    """Decode bounded hostile bytes, turning every way that fails into TraceInvalid."""
    if len(data) > MAX_ENTRY_BYTES:
        raise TraceInvalid(
            f"{len(data)} bytes where at most {MAX_ENTRY_BYTES} are allowed",
            code="trace.encoding",
            offset=MAX_ENTRY_BYTES,
        )
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise TraceInvalid(
            f"not an entry's JSON: {error}", code="trace.encoding", offset=_offset(data, error)
        ) from error


def require_same_spelling(data: bytes, spelled: bytes) -> None:
    """Refuse a second spelling: duplicate keys, spaces, key order, escapes, ``-0``."""
    if data == spelled:
        return
    pairs = zip(data, spelled, strict=False)
    same = min(len(data), len(spelled))
    offset = next((at for at, (left, right) in enumerate(pairs) if left != right), same)
    raise TraceInvalid(
        f"not the canonical spelling from byte {offset} on", code="trace.encoding", offset=offset
    )


def require_subset(value: object) -> None:
    """Raise TraceInvalid unless the value lies in the subset."""
    _walk(value, committed=False)


def require_plain(body: Mapping[str, object]) -> None:
    """Do the same for a body, quickly where it is flat: most of the hot path's are."""
    if all(type(item) in _PLAIN_KINDS for item in body.values()):
        _require_keys(cast("Mapping[object, object]", body), committed=False)
    else:
        _walk(body, committed=False)


def _walk(value: object, *, committed: bool) -> None:
    """Look at every part of a value, level by level: no recursion over hostile input."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[object] = []
        nested = False
        for item in level:
            if type(item) in _PLAIN_KINDS:
                continue
            if isinstance(item, (dict, Mapping)):
                nested = True
                items = cast("Mapping[object, object]", item)
                _require_keys(items, committed=committed)
                below += items.values()
            elif isinstance(item, (list, tuple)):
                nested = True
                below += cast("list[object]", item)
            else:
                _require_scalar(item, committed=committed)
        if not nested:
            return
        level = below
    raise TraceInvalid(f"nested deeper than {MAX_DEPTH}", code="trace.encoding")


def _require_keys(item: Mapping[object, object], *, committed: bool) -> None:
    try:
        keys = "".join(cast("Mapping[str, object]", item))
    except TypeError as error:
        raise TraceInvalid("an object has a key that is not text", code="trace.encoding") from error
    if not committed and not keys.isascii():
        raise TraceInvalid("an object has a key that is not ASCII", code="trace.encoding")


def _require_scalar(item: object, *, committed: bool) -> None:
    if isinstance(item, str):  # StrEnum members are spelled as their value
        return
    if isinstance(item, int):
        bound = _MAX_COMMITTED_INTEGER if committed else MAX_INTEGER
        if -bound <= item <= bound:
            return
        raise TraceInvalid(
            "an integer too large to be read alike everywhere", code="trace.encoding"
        )
    if isinstance(item, float) and committed and math.isfinite(item):
        return
    raise TraceInvalid(f"{type(item).__name__} is not allowed here", code="trace.encoding")


def _offset(data: bytes, error: Exception) -> int:
    if isinstance(error, UnicodeDecodeError):
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as whole:
            return whole.start
    match = _BYTE_POSITION.search(str(error))
    if match:
        return int(match[1])
    return len(data) if "truncated" in str(error) else 0
