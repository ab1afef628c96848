"""Policy step 2b: what is wrong with a file, in words: where, why, and what to write.

The names of the language that this version does not enforce live here. They are refused at
load: a rule that is read and then not enforced would be worse than no rule.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from safeconduct.errors import PolicyError

from .model import (
    ElementSpec,
    LimitsSpec,
    MatcherSpec,
    Model,
    PolicySpec,
    ProfileSpec,
    RequireSpec,
    RuleSpec,
    TextSpec,
)
from .syntax import Position, Source, to_data

_MATCHERS_LATER = frozenset({"email", "regex", "json", "host", "shell", "not", "all", "one"})


@dataclass(frozen=True, slots=True)
class _Place:
    """A kind of map in the file: the keys it takes, and those a later version will take."""

    what: str
    keys: tuple[str, ...]
    later: frozenset[str] = frozenset()


def _keys(model: type[Model]) -> tuple[str, ...]:
    return tuple(info.alias or name for name, info in model.model_fields.items())


_POLICY = _Place(
    "policy",
    _keys(PolicySpec),
    frozenset(
        [
            "roles",
            "servers",
            "credentials",
            "labels",
            "flows",
            "events",
            "order",
            "extends",
            "rego",
            "managed",
            "tests",
            "trace",
            "approvals",
            "budget",
            "rate",
            "when",
        ]
    ),
)
_REQUIRE = _Place("require", _keys(RequireSpec), frozenset({"signer", "witness"}))
_PROFILE = _Place(
    "profile",
    _keys(ProfileSpec),
    frozenset({"credentials", "environment", "env", "extends", "narrows"}),
)
_LIMITS = _Place("limits", _keys(LimitsSpec), frozenset({"calls", "rate", "budget"}))
_RULE = _Place(
    "rule",
    _keys(RuleSpec),
    frozenset(["rate", "budget", "remember", "when", "narrows", "irreversible", "redact", "role"]),
)
_MATCHER = _Place(
    "matcher",
    tuple(key for key in _keys(MatcherSpec) if key not in ("items", "any")),
    _MATCHERS_LATER,
)
_ELEMENT = _Place(
    "argv element",
    tuple(key for key in _keys(ElementSpec) if key != "literal"),
    _MATCHERS_LATER | {"url"},
)
_TEXT = _Place("text", _keys(TextSpec), frozenset({"min", "utf8", "charset"}))

_MISSING = "policy.missing_key"
_HINTS = {
    "missing": "add it",
    "string_type": "write a text here",
    "list_type": "write a list here, such as [a, b]",
    "dict_type": "write a map here, such as {key: value}",
    "model_type": "write a map here, such as {key: value}",
    "too_long": "split it",
    "too_short": "give the number of values it needs",
}


def refuse_invalid(source: Source, error: ValidationError) -> PolicyError:
    """Translate what pydantic found into the first error of the file, with its place."""
    found = [_translate(source, detail) for detail in error.errors(include_url=False)]
    # What is written comes before what is missing: the unknown key may be the missing one.
    return min(found, key=lambda item: (item.code == _MISSING, item.line, item.column))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the hint for a name that is not known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    listed = ", ".join(names[:20]) or "none is defined"
    return f"did you mean {close[0]!r}?" if close else f"known here: {listed}"


def _translate(source: Source, detail: ErrorDetails) -> PolicyError:
    loc, kind = detail["loc"], detail["type"]
    if kind == "extra_forbidden":
        return _refuse_key(source, loc)
    if loc and loc[-1] == "[key]":
        return _refuse_name(source, loc[:-1])
    if loc and loc[-1] == "net":
        return _not_enforced(source, source.node(loc).position, "net other than none")
    if kind == "missing":
        message = f"the key {loc[-1]!r} is missing"
        position = source.node(loc[:-1]).position
        return source.error(position, message, hint=_HINTS[kind], code=_MISSING)
    position = source.node(loc).position
    if loc == ("version",):
        hint = "this program reads: version: 1"
        return source.error(position, "this version of the language is not known", hint=hint)
    message = detail["msg"].removeprefix("Value error, ")
    where = ".".join(str(step) for step in loc if step not in ("items", "literal"))
    hint = _HINTS.get(kind, "see `safeconduct policy schema` for what can stand here")
    return source.error(position, f"{where or 'policy'}: {message}", hint=hint)


def _refuse_key(source: Source, loc: tuple[int | str, ...]) -> PolicyError:
    place, key, position = _place(source, loc), str(loc[-1]), source.key(loc)
    if key in place.later:
        return _not_enforced(source, position, f"{place.what} key {key!r}")
    message = f"unknown key {key!r} in a {place.what}"
    hint = did_you_mean(key, place.keys)
    return source.error(position, message, hint=hint, code="policy.unknown_key")


def _not_enforced(source: Source, position: Position, what: str) -> PolicyError:
    return source.error(
        position,
        f"{what} is part of the language, but this version does not enforce it",
        hint="remove it: a rule that is not enforced would protect nothing",
        code="policy.not_enforced",
    )


def _refuse_name(source: Source, loc: tuple[int | str, ...]) -> PolicyError:
    name, position = str(loc[-1]), source.key(loc)
    if loc[0] == "tools" and len(loc) == 2 and "*" in name:
        hint = "name each tool; a wildcard over tools would grant tools nobody has read"
        return source.error(position, f"{name!r} is not the name of one tool", hint=hint)
    hint = "use letters, digits, _ and -; tools also take dots between words"
    return source.error(position, f"{name!r} cannot be a name here", hint=hint)


def _place(source: Source, loc: tuple[int | str, ...]) -> _Place:
    head = loc[0]
    if len(loc) == 1:
        return _POLICY
    if head == "require":
        return _REQUIRE
    if head == "profiles":
        return _LIMITS if len(loc) > 3 else _PROFILE
    # tools, <tool>, <index>, <effect>, <argument>, <matcher> …
    if len(loc) == 4:
        return _RULE
    if len(loc) == 6:
        return _MATCHER
    return _TEXT if loc[-2] == "text" else _ELEMENT


def read_spec(source: Source) -> PolicySpec:
    """Validate the tree of a policy file; PolicyError names the first place that is wrong."""
    try:
        return PolicySpec.model_validate(to_data(source.root))
    except ValidationError as error:
        raise refuse_invalid(source, error) from error
