"""Step "sandbox": what Python tools say to us, decoded. All of it is hostile bytes."""

from __future__ import annotations

import json
import math
from typing import Annotated, NoReturn, TypeAlias, cast

import msgspec

from safeconduct.call import Json
from safeconduct.errors import SandboxFailed, SandboxUnavailable, ToolFailed

# LIMIT: of a result; the same as for the arguments of a Call.
_DEPTH_MAX, _NODES_MAX = 32, 10_000
# Above this a JavaScript reader of the same bytes sees another number (RFC 8259 section 6).
_INTEGER_MAX = (1 << 53) - 1
_DIGITS_MAX = 20
_NAME_CHARACTERS_MAX, _TEXT_CHARACTERS_MAX = 100, 500
# What a trace can hold, in bytes where it is told in KiB; and wait(2), signal(7), errno(3).
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_INTEGER_MAX >> 10)]
_Code: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=255)]
_Signal: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=64)]
_Errno: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=4095)]


class Ready(msgspec.Struct, tag_field="type", tag="ready", forbid_unknown_fields=True):
    """A zygote has imported everything and can fork."""

    version: int


class Broken(msgspec.Struct, tag_field="type", tag="broken", forbid_unknown_fields=True):
    """An import of the zygote failed."""

    error: str
    message: str


class Unable(msgspec.Struct, tag_field="type", tag="unable", forbid_unknown_fields=True):
    """The kernel refused a step of the confinement."""

    step: str
    errno: _Errno


class Ended(msgspec.Struct, tag_field="type", tag="ended", forbid_unknown_fields=True):
    """A fork and all its processes are gone."""

    code: _Code | None
    signal: _Signal | None
    cpu_us: _Count
    peak_rss_kib: _Count


class Done(msgspec.Struct, tag_field="type", tag="done", forbid_unknown_fields=True):
    """The call's result, not yet decoded."""

    value: msgspec.Raw


class Raised(msgspec.Struct, tag_field="type", tag="raised", forbid_unknown_fields=True):
    """The call's code ended with an exception."""

    error: str
    message: str
    line: int


class NoResult(msgspec.Struct, tag_field="type", tag="result", forbid_unknown_fields=True):
    """The call's result is no JSON."""

    error: str
    message: str
    line: int


_greetings: msgspec.json.Decoder[Ready | Broken | Unable] = msgspec.json.Decoder(
    Ready | Broken | Unable
)
_fates: msgspec.json.Decoder[Ended | Unable] = msgspec.json.Decoder(Ended | Unable)
_replies: msgspec.json.Decoder[Done | Raised | NoResult] = msgspec.json.Decoder(
    Done | Raised | NoResult
)


def greeting(data: bytes) -> Ready | Broken | Unable:
    """Decode the first message of a zygote."""
    try:
        return _greetings.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise unexpected("The Python zygote sent an unreadable message.") from error


def fate(data: bytes) -> Ended | Unable:
    """Decode what a zygote says of one fork."""
    try:
        return _fates.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise unexpected("The Python zygote sent an unreadable message.") from error


def value_of(reply: bytes) -> Json:
    """Return the result of a call. Raises ToolFailed where it failed or has none."""
    try:
        decoded = _replies.decode(reply)
    except (msgspec.DecodeError, RecursionError) as error:
        # Only the call's own code can have written something else to its channel.
        raise ToolFailed("The tool's answer is unreadable.", code="python.result") from error
    if isinstance(decoded, Done):
        return _result(bytes(decoded.value))
    where = f" (line {decoded.line})" if 0 < decoded.line < 1_000_000 else ""
    name = printable(decoded.error, _NAME_CHARACTERS_MAX)
    message = printable(decoded.message, _TEXT_CHARACTERS_MAX)
    if isinstance(decoded, NoResult):
        raise ToolFailed(f"The result is not JSON: {message}", code="python.result")
    raise ToolFailed(f"{name}: {message}{where}", code="python.raised")


def _result(data: bytes) -> Json:
    """Parse strictly: no duplicate keys, no NaN, bounded depth, nodes and integers."""
    try:
        value = cast(
            "Json",
            json.loads(
                data,
                object_pairs_hook=_unique,
                parse_constant=_refuse_constant,
                parse_int=_integer,
                parse_float=_float,
            ),
        )
    except (ValueError, RecursionError) as error:
        raise _refused(str(error) if isinstance(error, _Refused) else "unreadable") from error
    _measure(value)
    return value


class _Refused(ValueError):
    pass


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused("an object has the same key twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS_MAX or abs(int(digits)) > _INTEGER_MAX:
        raise _Refused("an integer is too large to be read alike everywhere")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _Refused("a number is not finite")
    return number


def _measure(value: Json) -> None:
    """Refuse what is nested too deep or has too many parts. Walks without recursion."""
    waiting: list[tuple[Json, int]] = [(value, 0)]
    nodes = 0
    while waiting:
        item, depth = waiting.pop()
        nodes += 1
        if nodes > _NODES_MAX or depth > _DEPTH_MAX:
            raise _refused("it has too many parts or is nested too deep")
        if isinstance(item, dict):
            for key in item:
                _check_text(key)
            waiting += [(part, depth + 1) for part in item.values()]
        elif isinstance(item, list):
            waiting += [(part, depth + 1) for part in item]
        elif isinstance(item, str):
            _check_text(item)


def _check_text(text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text if character > "\x7f"):
        raise _refused("a text is not valid Unicode")


def _refused(why: str) -> ToolFailed:
    return ToolFailed(f"The result is not acceptable JSON: {why}.", code="python.result")


def printable(text: str, limit: int) -> str:
    """Return a hostile text cut and without anything that a terminal could obey."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:limit])


def unexpected(message: str) -> SandboxFailed:
    """Say that the inside of a Python tool broke the protocol."""
    return SandboxFailed(message, step="python")


def imports_failed(reason: str) -> SandboxUnavailable:
    """Say that what a profile names cannot be imported."""
    return SandboxUnavailable(
        f"What the profile imports cannot be imported: {printable(reason, 300)}",
        missing="python-imports",
        hint="Install the package beside safeconduct, or take it out of imports in the profile.",
    )
