"""Policy step 2b: what is wrong with a file, in words: where, why, and what to write.

The names of the language that this version does not enforce live here. They are refused at
load: a rule that is read and then not enforced would be worse than no rule.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from safeconduct.errors import PolicyError

from .model import (
    BudgetSpec,
    LimitsSpec,
    PolicySpec,
    ProfileSpec,
    RequireSpec,
    RuleSpec,
    ServerSpec,
)
from .model_matchers import ElementSpec, MatcherSpec, TextSpec
from .model_trace import TraceSpec, WitnessSpec
from .model_words import Model
from .syntax import Position, Source, to_data

# What the language reserves, and what each will be: it is designed with the rest, so that a
# policy of today means the same when it comes.
_LATER: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "policy": {
            "labels": "where data comes from: {NAME: {from: [TOOL, {TOOL: {ARGUMENT: matcher}}]}}",
            "flows": "where such data must not go: [{deny: LABEL, into: [TOOL, TOOL.ARGUMENT]}]",
            "events": "names for calls that happened: {NAME: {on: TOOL, exit: 0}}",
            "order": "what must come before what: [{require: EVENT, after: EVENT, before: EVENT}]",
            "credentials": "secrets that a broker adds: {NAME: {from, header, for: [URLS]}}",
            "rego": "a policy in Rego that narrows this one",
            "approvals": "who may say yes",
            "budget": "a budget for the whole session",
            "rate": "a rate for the whole session",
        },
        "require": {"signer": "a signer of its own", "witness": "witnesses of the trace"},
        "profile": {
            "credentials": "secrets that a broker adds to requests",
            "environment": "variables that programs see",
            "env": "variables that programs see",
        },
        "limits": {"calls": "how many calls of tools"},
        "rule": {
            "remember": "how long a person's yes holds",
            "redact": "what the trace leaves out",
            "credentials": "secrets that a broker adds to requests",
        },
        "server": {
            "url": "a server on another machine",
            "install": "how the server is installed before it runs",
            "environment": "variables that the server sees",
        },
        "matcher": {"shell": "the words of a shell text"},
        "argv element": {
            form: "a matcher for one argument word"
            for form in ("url", "host", "email", "json", "not")
        },
        "text": {"min": "the least length", "charset": "the characters of a text"},
    }
)


@dataclass(frozen=True, slots=True)
class _Place:
    """A kind of map in the file and the keys it takes."""

    what: str
    keys: tuple[str, ...]

    @property
    def later(self) -> Mapping[str, str]:
        return _LATER.get(self.what, {})


def _keys(model: type[Model], *without: str) -> tuple[str, ...]:
    names = (info.alias or name for name, info in model.model_fields.items())
    return tuple(name for name in names if name not in without)


_POLICY = _Place("policy", _keys(PolicySpec))
_REQUIRE = _Place("require", _keys(RequireSpec))
_TRACE = _Place("trace", _keys(TraceSpec))
_WITNESS = _Place("witness", _keys(WitnessSpec))
_PROFILE = _Place("profile", _keys(ProfileSpec))
_LIMITS = _Place("limits", _keys(LimitsSpec))
_SERVER = _Place("server", _keys(ServerSpec))
_RULE = _Place("rule", _keys(RuleSpec))
_BUDGET = _Place("budget", _keys(BudgetSpec))
_MATCHER = _Place("matcher", _keys(MatcherSpec, "items", "any"))
_ELEMENT = _Place("argv element", _keys(ElementSpec, "literal"))
_TEXT = _Place("text", _keys(TextSpec))

# Steps that pydantic adds where a short form was brought to its long one.
_INNER: Final = frozenset({"items", "literal", "patterns"})
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
    # A file of 1 MiB can be wrong in 190,000 places: only the first of them is put into words.
    found = error.errors(include_url=False, include_input=False)
    return _translate(source, min(found, key=lambda detail: _order(source, detail)))


def _order(source: Source, detail: ErrorDetails) -> tuple[bool, int, int]:
    """Sort what is written before what is missing: the unknown key may be the missing one."""
    loc, kind = detail["loc"], detail["type"]
    if kind == "extra_forbidden":
        position = source.key(loc)
    elif loc and loc[-1] == "[key]":
        position = source.key(loc[:-1])
    else:
        position = source.node(loc[:-1] if kind == "missing" else loc).position
    return kind == "missing", position.line, position.column


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
        position, meaning = source.node(loc).position, "what a program may reach"
        return _not_enforced(source, position, "net other than none", meaning)
    if kind == "missing":
        message = f"the key {loc[-1]!r} is missing"
        position = source.node(loc[:-1]).position
        return source.error(position, message, hint=_HINTS[kind], code=_MISSING)
    position = source.node(loc).position
    if loc == ("version",):
        hint = "this program reads: version: 1"
        return source.error(position, "this version of the language is not known", hint=hint)
    message = detail["msg"].removeprefix("Value error, ")
    where = ".".join(str(step) for step in loc if step not in _INNER)
    hint = _HINTS.get(kind, "see `safeconduct policy schema` for what can stand here")
    return source.error(position, f"{where or 'policy'}: {message}", hint=hint)


def _refuse_key(source: Source, loc: tuple[int | str, ...]) -> PolicyError:
    place, key, position = _place(source, loc), str(loc[-1]), source.key(loc)
    if key in place.later:
        return _not_enforced(source, position, f"{place.what} key {key!r}", place.later[key])
    message = f"unknown key {key!r} in a {place.what}"
    hint = did_you_mean(key, place.keys)
    return source.error(position, message, hint=hint, code="policy.unknown_key")


def _not_enforced(source: Source, position: Position, what: str, meaning: str) -> PolicyError:
    return source.error(
        position,
        f"{what} ({meaning}) is part of the language, but this version does not enforce it",
        hint="remove it: a rule that is not enforced would protect nothing",
        code="policy.not_enforced",
    )


def _refuse_name(source: Source, loc: tuple[int | str, ...]) -> PolicyError:
    name, position = str(loc[-1]), source.key(loc)
    hint = "use letters, digits, _ and -; tools also take dots between words, and * in them"
    return source.error(position, f"{name!r} cannot be a name here", hint=hint)


def _place(source: Source, loc: tuple[int | str, ...]) -> _Place:
    head = loc[0]
    if len(loc) == 1:
        return _POLICY
    if head == "require":
        return _REQUIRE
    if head == "trace":
        return _WITNESS if len(loc) > 2 else _TRACE
    if head == "servers":
        return _SERVER
    if head == "profiles":
        return _LIMITS if len(loc) > 3 else _PROFILE
    if head == "roles":
        # roles, <role>, tools, and from there as under the tools of sessions without a role.
        loc = loc[2:]
    # tools, <tool>, <index>, <effect>, <argument>, <matcher> …
    if len(loc) == 4:
        return _RULE
    if loc[3] == "budget":
        return _BUDGET
    if len(loc) == 6:
        return _MATCHER
    return _TEXT if loc[-2] == "text" else _ELEMENT


def read_spec(source: Source) -> PolicySpec:
    """Validate the tree of a policy file; PolicyError names the first place that is wrong."""
    try:
        return PolicySpec.model_validate(to_data(source.root))
    except ValidationError as error:
        raise refuse_invalid(source, error) from error
