"""A compiled Policy as bytes and back, for the cache: plain data, and a closed table of types.

Every value is written once, after what it is made of, and named by its number: reading is one
loop, and equal parts become one object. Reading makes nothing that is not in `TYPES`, and
nothing but these values: no name in the bytes is ever looked up anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, TypeAlias, cast

import msgspec

from safeconduct.call import (
    Bound,
    Durability,
    Effect,
    Enforcement,
    Engine,
    Json,
    Limits,
    Per,
    Profile,
    Tier,
    Unit,
    WorkspaceMode,
)

from . import hosts, match, match_json, match_text, match_url, urls
from .binding import Rule, ToolRules, Wildcard
from .globs import Glob
from .rules import Policy, Role, Server
from .signatures import Argument, Holds, Kind, Signature
from .syntax import Position
from .trace_terms import TraceTerms, Witnesses
from .when.condition import When, compile_when
from .wildcards import ToolPattern

# LIMIT: values of one policy; 5,000 rules have about 60,000.
MAX_VALUES: Final = 1_000_000

TYPES: Final[tuple[type[Any], ...]] = (
    *(Bound, Effect, Enforcement, Engine, Limits, Per, Profile, Tier, Unit, WorkspaceMode),
    *(Durability, TraceTerms, Witnesses),
    *(Policy, Role, Server, Rule, ToolRules, Wildcard, ToolPattern),
    *(Argument, Holds, Kind, Signature, Glob, urls.UrlPattern),
    *(hosts.HostPattern, hosts.EmailPattern),
    *(match.AnyValue, match.PathMatcher, match_url.UrlMatcher, match.Literals),
    *(match.NumberRange, match.TextLength, match.SpelledNumber, match.SpelledPath, match.Argv),
    *(match_text.Regex, match_text.Host, match_text.Email, match_text.Excluding),
    *(match_json.Form, match_json.Shape, match_json.Type, When),
)
# What an element of an argv is matched by.
_ELEMENTS: Final = (
    *(match.AnyValue, match.SpelledNumber, match.SpelledPath, match.TextLength),
    match_text.Regex,
)
_Made: TypeAlias = "Callable[[list[Any]], object]"


class NotPlain(ValueError):
    """A value that the table does not know: this policy is not cached."""


def _regex(patterns: tuple[str, ...], restricts: bool) -> match_text.Regex:
    return match_text.compile_regex(patterns, restricts=restricts)


# What is compiled from a text is compiled again; the names are the fields that are kept.
_COMPILED: Final[Mapping[type, tuple[tuple[str, ...], Callable[..., object]]]] = MappingProxyType(
    dict[type, tuple[tuple[str, ...], Callable[..., object]]](
        [(When, (("text",), compile_when)), (match_text.Regex, (("patterns", "restricts"), _regex))]
    )
)
_TUPLE, _LIST, _SET, _DICT, _PROXY, _METHOD, _CONTAINS, _POSITION = range(-1, -9, -1)


def encode_policy(policy: Policy) -> bytes:
    """Write a policy; raise NotPlain where a part of it is not plain data."""
    writer = _Writer()
    writer.add(policy)
    return msgspec.msgpack.encode(writer.values)


def decode_policy(data: bytes) -> Policy:
    """Read what `encode_policy` of this very version wrote; raise ValueError for anything else."""
    try:
        values = msgspec.msgpack.decode(
            data, type=list[bool | int | float | str | list[int] | None]
        )
        found: object = _read(values)
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError("not a policy in this form") from error
    if not isinstance(found, Policy):
        raise ValueError("not a policy")
    return found


def _names(kind: type[Any]) -> tuple[str, ...]:
    if kind in _COMPILED:
        return _COMPILED[kind][0]
    # What is no part of a comparison follows from the rest, and is made again.
    return tuple(field.name for field in fields(kind) if field.init and field.compare)


class _Writer:
    """Number the values of a policy, each after its parts."""

    def __init__(self) -> None:
        self.values: list[Json] = []
        self._numbers: dict[object, int] = {}
        self._kinds = {kind: at for at, kind in enumerate(TYPES)}

    def add(self, value: object) -> int:
        """Return the number of a value. LIMIT: policies are nested as deep as their files."""
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return self._number((kind, value), cast("Json", value))
        entry = self._entry(kind, value)
        return self._number(tuple(entry), entry)

    def _number(self, key: object, value: Json) -> int:
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.values)
            self.values.append(value)
            if found >= MAX_VALUES:
                raise NotPlain("the policy is too large")
        return found

    def _entry(self, kind: type[Any], value: Any) -> list[int]:  # noqa: ANN401 what is not in the table is refused
        if kind in (tuple, list):
            return [_TUPLE if kind is tuple else _LIST, *map(self.add, value)]
        if kind is frozenset:
            return [_SET, *map(self.add, sorted(value))]
        if kind in (dict, MappingProxyType):
            parts = [part for pair in value.items() for part in pair]
            return [_DICT if kind is dict else _PROXY, *map(self.add, parts)]
        if kind is Position:
            # Every rule has its own: the numbers themselves, not those of two more values.
            return [_POSITION, value.line, value.column]
        known = self._kinds.get(kind)
        if known is None:
            return self._method(value)
        if issubclass(kind, Enum):
            return [known, self.add(value.value)]
        return [known, *(self.add(getattr(value, name)) for name in _names(kind))]

    def _method(self, value: object) -> list[int]:
        """Write what an element of an argv is matched by: a method of a value in the table."""
        owner: object = getattr(value, "__self__", None)
        name = getattr(value, "__name__", "")
        if isinstance(owner, frozenset) and name == "__contains__":
            return [_CONTAINS, self.add(cast("frozenset[str]", owner))]
        if isinstance(owner, _ELEMENTS) and name == "matches":
            return [_METHOD, self.add(owner)]
        raise NotPlain(f"a {type(value).__name__} is not plain data")


def _read(values: Sequence[object]) -> object:
    makers = {at: _maker(kind) for at, kind in enumerate(TYPES)} | dict(_BUILT_IN)
    made: list[Any] = []
    for value in values:
        if type(value) is not list:
            made.append(value)
            continue
        kind, *parts = cast("list[int]", value)
        if kind == _POSITION:
            made.append(Position(*parts))
        else:
            # A number names an earlier value; IndexError where it does not.
            made.append(makers[kind]([made[part] for part in parts]))
    return made[-1]


def _maker(kind: type[Any]) -> _Made:
    if kind in _COMPILED:
        compile_again = _COMPILED[kind][1]
        return lambda parts: compile_again(*parts)
    if issubclass(kind, Enum):
        return lambda parts: kind(*parts)
    names = _names(kind)
    if names != tuple(field.name for field in fields(kind)) or hasattr(kind, "__post_init__"):
        return lambda parts: kind(**dict(zip(names, parts, strict=True)))
    # What an __init__ of a frozen class does, without its keywords: a third of the time.
    setters = [getattr(kind, name).__set__ for name in names]

    def make(parts: list[Any]) -> object:
        if len(parts) != len(setters):
            raise ValueError("a value has other parts")
        made = object.__new__(kind)
        for set_part, part in zip(setters, parts, strict=True):
            set_part(made, part)
        return made

    return make


def _pairs(parts: list[Any]) -> dict[Any, Any]:
    return dict(zip(parts[::2], parts[1::2], strict=True))


_BUILT_IN: Final[Mapping[int, _Made]] = MappingProxyType(
    {
        _TUPLE: tuple,
        _LIST: list,
        _SET: frozenset,
        _DICT: _pairs,
        _PROXY: lambda parts: MappingProxyType(_pairs(parts)),
        _METHOD: lambda parts: parts[0].matches,
        _CONTAINS: lambda parts: cast("frozenset[str]", parts[0]).__contains__,
    }
)
