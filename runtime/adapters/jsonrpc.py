"""Step "adapter": one frame becomes one JSON-RPC message that every parser reads alike.

The proxy judges a copy and mostly forwards the original, so a frame that two parsers could read
differently must not pass: duplicate keys (most parsers keep the last), member names that differ
only in case (Go's encoding/json matches them alike), raw line separators (Python's text files
split at a lone CR, Node's readline at U+2028), lone surrogates, NaN, batches, and numbers that a
reader with doubles rounds. https://www.jsonrpc.org/specification,
https://modelcontextprotocol.io/specification/2025-11-25/basic
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias, cast

from safeconduct.call import Json
from safeconduct.errors import ProtocolError

Id: TypeAlias = "int | str"

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
INVALID_PARAMS = -32602
SERVER_ERROR = -32000

# LIMIT: values in one frame; each costs our parser some sixty bytes.
_NODES_MAX = 500_000
_ID_CHARACTERS_MAX = 256
# Above this a reader with doubles sees another number (RFC 8259 §6), hence another request.
_INTEGER_MAX = (1 << 53) - 1
_DIGITS_MAX = 1000
_MEMBERS = frozenset({"jsonrpc", "id", "method", "params", "result", "error"})
_METHOD = re.compile(r"[A-Za-z0-9_$.-]+(?:/[A-Za-z0-9_$.-]+)*", re.ASCII)
_METHOD_CHARACTERS_MAX = 256
_ANSWERS = frozenset({"result", "error"})
_SPACE = re.compile(r"[ \t\r]*", re.ASCII)
# LIMIT: members of a refused frame that are looked at for its id; a message has four.
_MEMBERS_SALVAGED = 64
_ESCAPES = {
    "\x85".encode(): b"\\u0085",
    "\u2028".encode(): b"\\u2028",
    "\u2029".encode(): b"\\u2029",
}
_SEPARATORS = {
    b"\r": "a carriage return",
    "\x85".encode(): "U+0085",
    "\u2028".encode(): "U+2028",
    "\u2029".encode(): "U+2029",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A request (method and id), a notification (method alone) or a response (no method)."""

    id: Id | None = None
    method: str | None = None
    params: Mapping[str, Json] = field(default_factory=dict[str, Json])
    result: Json = None
    error: Json = None


def parse(frame: bytes) -> Message:
    """Parse one frame, its newline included.

    Raises ProtocolError ``json.*`` or ``jsonrpc.*`` for whatever is not one plain message.
    """
    value = _decode(frame.removesuffix(b"\n").removesuffix(b"\r"))
    if not isinstance(value, dict):
        raise _refuse("json.not_object", "a frame is not a JSON object")
    members = cast("dict[str, Json]", value)
    if not members.keys() <= _MEMBERS:
        raise _refuse("jsonrpc.member", "a frame has a member that JSON-RPC does not know")
    if members.get("jsonrpc") != "2.0":
        raise _refuse("jsonrpc.version", "a frame is not of JSON-RPC 2.0")
    if "method" in members:
        return _request(members)
    return _response(members)


def _decode(body: bytes) -> object:
    _bound(body)
    try:
        text = body.decode("utf-8")
        if text.startswith("\ufeff"):
            raise _refuse("json.bom", "a frame begins with a byte order mark")
        value: object = _DECODER.decode(text)
        if "\\u" in text:
            # Only an escape can spell a lone surrogate, and only encoding again finds it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _refuse("json.encoding", "a frame is not UTF-8") from error
    except UnicodeEncodeError as error:
        raise _refuse("json.surrogate", "a frame holds half of a surrogate pair") from error
    except RecursionError as error:
        raise _refuse("json.too_deep", "a frame is nested too deep") from error
    except json.JSONDecodeError as error:
        raise _refuse("json.syntax", f"a frame is not JSON at character {error.pos}") from error
    return value


def _bound(body: bytes) -> None:
    """Refuse, before it is parsed, what would split as a line or grow as a value."""
    if not body.isascii() or b"\r" in body:
        for separator, name in _SEPARATORS.items():
            if separator in body:
                raise _refuse("json.line_break", f"a frame holds {name} unescaped")
    if len(body) > _NODES_MAX and sum(map(body.count, (b"[", b"{", b","))) > _NODES_MAX:
        raise _refuse("json.too_large", f"a frame holds more than {_NODES_MAX} values")


def _request(members: Mapping[str, Json]) -> Message:
    method = members["method"]
    if not isinstance(method, str) or len(method) > _METHOD_CHARACTERS_MAX:
        raise _refuse("jsonrpc.method", "a method is not a short text")
    if _METHOD.fullmatch(method) is None:
        raise _refuse("jsonrpc.method", "a method is not a name")
    if "result" in members or "error" in members:
        raise _refuse("jsonrpc.shape", "a frame is a request and a response at once")
    params = members.get("params")
    if params is not None and not isinstance(params, Mapping):
        raise _refuse("jsonrpc.params", "params are not an object")
    number = request_id(members["id"]) if "id" in members else None
    return Message(id=number, method=method, params=params or {})


def _response(members: Mapping[str, Json]) -> Message:
    if ("result" in members) == ("error" in members) or "params" in members:
        raise _refuse("jsonrpc.shape", "a frame is neither a request nor a response")
    # JSON-RPC 2.0 §5: the id of an error is null where the request's could not be read.
    unknown = members.get("id") is None and "error" in members
    number = None if unknown else request_id(members.get("id"))
    return Message(id=number, result=members.get("result"), error=members.get("error"))


def request_id(value: Json) -> Id:
    """Return an id that all peers echo alike; ProtocolError ``jsonrpc.id`` for others."""
    if type(value) is int and abs(value) <= _INTEGER_MAX:
        return value
    if isinstance(value, str) and len(value) <= _ID_CHARACTERS_MAX:
        return value
    raise _refuse("jsonrpc.id", "an id is neither a short text nor a 53-bit integer")


def salvage_id(frame: bytes) -> Id | None:
    """Return the id of a refused or cut frame, if its outermost level names exactly one."""
    return _salvage(frame)[0]


def salvage_answered(frame: bytes) -> Id | None:
    """Return the id of the request that a refused frame answers, if it answers one.

    Ids of requests that a server makes are another space: its id 1 is not the client's.
    """
    number, keys = _salvage(frame)
    return number if "method" not in keys and not keys.isdisjoint(_ANSWERS) else None


def _salvage(frame: bytes) -> tuple[Id | None, set[str]]:
    """Return the one id of the outermost level, and all of its keys up to where it breaks."""
    found: list[Json] = []
    keys: set[str] = set()
    with suppress(ValueError, IndexError, RecursionError):
        for key, value in _outermost(frame.decode("utf-8", "replace").strip(), keys):
            found += [value] if key == "id" else []
    with suppress(ProtocolError):
        return (request_id(found[0]) if len(found) == 1 else None), keys
    return None, keys


def _outermost(text: str, keys: set[str]) -> Iterator[tuple[str, Json]]:
    """Yield the members of an object, read leniently; note each key before its value is read."""
    lenient, position = json.JSONDecoder(), 1
    for _ in range(_MEMBERS_SALVAGED if text[:1] == "{" else 0):
        key, position = lenient.raw_decode(text, _skip(text, position))
        position = _skip(text, position)
        if text[position] != ":" or not isinstance(key, str):
            return
        keys.add(key)
        value, position = lenient.raw_decode(text, _skip(text, position + 1))
        yield key, value
        position = _skip(text, position)
        if text[position] != ",":
            return
        position += 1


def _skip(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    return space.end() if space else position


def escape_separators(frame: bytes) -> bytes:
    """Escape what some readers take for the end of a line and JSON allows raw in a text.

    JSON.stringify and most other encoders write them as they are, so a file that holds one comes
    so. Outside of a text an escape is no JSON, as the character was none.
    """
    if frame.isascii():
        return frame
    for separator, escape in _ESCAPES.items():
        frame = frame.replace(separator, escape)
    return frame


def error_frame(number: Id | None, code: int, message: str) -> bytes:
    """Write an error response. ASCII throughout, so that no text in it splits the line."""
    body = {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": message}}
    return json.dumps(body).encode() + b"\n"


def result_frame(number: Id, result: Mapping[str, Json]) -> bytes:
    """Write a response with a result."""
    return json.dumps({"jsonrpc": "2.0", "id": number, "result": result}).encode() + b"\n"


def request_frame(message: Message, params: Mapping[str, Json]) -> bytes:
    """Write a request anew with other params. Raises ProtocolError ``json.too_deep``."""
    # INVARIANT: a request has these members and no others (_request).
    body = {"jsonrpc": "2.0", "id": message.id, "method": message.method, "params": params}
    try:
        return json.dumps(body).encode() + b"\n"
    except RecursionError as error:
        raise _refuse("json.too_deep", "a frame is nested too deep") from error


def _refuse(code: str, message: str) -> ProtocolError:
    return ProtocolError(f"Refused: {message}.", code=code)


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _refuse("json.duplicate_key", "an object has the same key twice")
    return found


def _constant(name: str) -> NoReturn:
    raise _refuse("json.number", f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS_MAX:
        raise _refuse("json.number", f"an integer has more than {_DIGITS_MAX} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _refuse("json.number", "a number is too large")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_constant, parse_int=_integer, parse_float=_float
)
