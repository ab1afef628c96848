"""Canonical arguments: plain JSON, strictly parsed and bounded before anything looks at it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn, cast

from safeconduct.call import Json
from safeconduct.errors import Denied, ProtocolError

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 32
MAX_NODES: Final = 10_000
# Above this a JavaScript reader of the same bytes sees another number (RFC 8259 §6).
MAX_INTEGER: Final = (1 << 53) - 1
_MAX_DIGITS: Final = 20


def decode_arguments(data: bytes) -> dict[str, Json]:
    """Parse the JSON object that holds the arguments of a Call.

    Stricter than JSON where parsers disagree: UTF-8 without BOM, no duplicate keys, no NaN or
    Infinity, integers of at most 20 digits, nothing after the object. ProtocolError otherwise.
    """
    if len(data) > MAX_BYTES:
        raise _refuse("json.too_large", f"arguments are larger than {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8")
        if text.startswith("\ufeff"):
            raise _refuse("json.bom", "arguments begin with a byte order mark")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_integer,
        )
        plain = copy_json(value)
    except UnicodeDecodeError as error:
        raise _refuse("json.encoding", "arguments are not UTF-8") from error
    except RecursionError as error:
        raise _refuse("json.too_deep", "arguments are nested too deep") from error
    except json.JSONDecodeError as error:
        raise _refuse("json.syntax", f"arguments are not JSON at {error.pos}") from error
    except Denied as denied:
        code = denied.code.replace("call.", "json.")
        raise ProtocolError(denied.message, code=code) from denied
    if not isinstance(plain, dict):
        raise _refuse("json.not_object", "arguments are not a JSON object")
    return plain


def _refuse(code: str, message: str) -> ProtocolError:
    return ProtocolError(message, code=code, hint="send one plain JSON object in UTF-8")


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _refuse("json.duplicate_key", "an object has the same key twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise _refuse("json.number", f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _refuse("json.number", f"an integer has more than {_MAX_DIGITS} digits")
    return int(digits)


class _Budget:
    """What is left of the bounds on one Call's arguments."""

    def __init__(self) -> None:
        self.nodes, self.bytes = MAX_NODES, MAX_BYTES

    def take(self, size: int) -> None:
        self.nodes -= 1
        self.bytes -= size
        if self.nodes < 0 or self.bytes < 0:
            raise Denied("the arguments are too large", code="call.too_large")


def copy_json(value: object, *, max_integer: int = MAX_INTEGER) -> Json:
    """Return an own copy of a plain JSON value, or raise Denied `call.bad_argument`.

    Only the exact built-in types pass: a subclass may compare as one value and print as
    another. Bounded in depth, nodes and bytes; a cycle ends at the depth bound.
    """
    flat = _copy_flat(value, max_integer)
    return _copy(value, MAX_DEPTH, _Budget(), max_integer) if flat is None else flat


def _copy_flat(value: object, max_integer: int) -> dict[str, Json] | None:
    """Copy what nearly every Call has: a map of plain values and lists of ASCII texts.

    None where there is anything else, or more of it than may be: `_copy` then says what it is.
    """
    if type(value) is not dict:
        return None
    copied: dict[str, Json] = {}
    nodes = size = 0
    for key, item in cast("dict[object, object]", value).items():
        if type(key) is not str or not key.isascii():
            return None
        size += len(key)
        if type(item) is list:
            words = cast("list[object]", item)
            for word in words:
                if type(word) is not str or not word.isascii():
                    return None
                size += len(word)
            nodes += len(words)
            copied[key] = cast("list[Json]", words.copy())
        elif type(item) is str and item.isascii():
            size += len(item)
            copied[key] = item
        elif item is None or type(item) is bool or (type(item) is int and abs(item) <= max_integer):
            size += 8
            copied[key] = item
        else:
            return None
        # A key and its value; a container also takes two bytes, as in `_copy`.
        nodes, size = nodes + 2, size + 2
    return copied if nodes < MAX_NODES and size < MAX_BYTES else None


def _copy(value: object, depth: int, budget: _Budget, max_integer: int) -> Json:
    # LIMIT: recursion ends at MAX_DEPTH.
    if type(value) is str:
        budget.take(len(_checked(value)))
        return value
    if value is None or type(value) is bool:
        budget.take(4)
        return value
    if type(value) is int:
        budget.take(8)
        if abs(value) > max_integer:
            raise _bad("an integer is too large to be read alike everywhere")
        return value
    if type(value) is float:
        budget.take(8)
        if not math.isfinite(value):
            raise _bad("a number is not finite")
        return value
    if depth <= 0:
        raise Denied("the arguments are nested too deep", code="call.too_deep")
    budget.take(2)
    step: Callable[[object], Json] = lambda item: _copy(item, depth - 1, budget, max_integer)  # noqa: E731
    if isinstance(value, Mapping):
        return _copy_mapping(cast("Mapping[object, object]", value), budget, step)
    if type(value) is list or type(value) is tuple:
        return [step(item) for item in cast("Sequence[object]", value)]
    raise _bad(f"a value of type {type(value).__name__} is not JSON")


def _copy_mapping(
    value: Mapping[object, object], budget: _Budget, step: Callable[[object], Json]
) -> dict[str, Json]:
    copied: dict[str, Json] = {}
    for key, item in value.items():
        if type(key) is not str:
            raise _bad("an object has a key that is not a text")
        budget.take(len(_checked(key)))
        copied[key] = step(item)
    return copied


def _checked(text: str) -> bytes | str:
    if text.isascii():
        return text
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _bad("a text is not valid Unicode") from error


def _bad(message: str) -> Denied:
    return Denied(message, code="call.bad_argument")
