"""Policy step 2: the shape of a matcher. Exactly one form is written; each has a field here."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, cast

from pydantic import BeforeValidator, Field

from .model_words import (
    ANY_CALL,
    MAX_ARGUMENTS,
    MAX_LITERAL,
    MAX_PATTERNS,
    ArgumentName,
    Model,
    OneOrMore,
    Patterns,
)
from .units import parse_size_bytes

_Size = BeforeValidator(parse_size_bytes)


class TextSpec(Model):
    """Any text of at most ``max`` bytes of UTF-8."""

    max: Annotated[int, _Size, Field(ge=0, le=1 << 20)]


def _or_any(value: object) -> object:
    if isinstance(value, dict):
        raise ValueError("expected a list of patterns, or any")
    return {"any": "any"} if value == "any" else {"patterns": value}


class PatternsSpec(Model):
    """Patterns, or `any` for every value of this form that is valid."""

    any: Literal["any"] | None = None
    patterns: Annotated[Patterns, Field(default_factory=list)]


PatternsOrAny: TypeAlias = Annotated[PatternsSpec, BeforeValidator(_or_any)]
Regex: TypeAlias = Annotated[str, Field(min_length=1, max_length=4096)]


class ElementSpec(Model):
    """One element of a list: a literal, or a matcher where the list is an argv."""

    literal: Annotated[str, Field(max_length=MAX_LITERAL)] | None = None
    path: Patterns | None = None
    in_: Annotated[list[str], Field(max_length=MAX_PATTERNS)] | None = Field(None, alias="in")
    range: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    text: TextSpec | None = None
    regex: Regex | None = None


def _element(value: object) -> object:
    return {"literal": value} if isinstance(value, str) else value


Element: TypeAlias = Annotated[ElementSpec, BeforeValidator(_element)]
Elements: TypeAlias = Annotated[list[Element], Field(max_length=MAX_PATTERNS)]


class MatcherSpec(Model):
    """What one argument may be. One form is set, and perhaps ``not``, which takes away from it.

    ``items`` is the bare list. ``json`` is a shape, which `match_json` reads.
    """

    any: Literal["any"] | None = None
    items: Elements | None = None
    path: Patterns | None = None
    url: Patterns | None = None
    argv: Elements | None = None
    in_: Annotated[list[str], Field(max_length=MAX_PATTERNS)] | None = Field(None, alias="in")
    range: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    text: TextSpec | None = None
    regex: Regex | None = None
    host: PatternsOrAny | None = None
    email: PatternsOrAny | None = None
    json_: object = Field(None, alias="json")
    not_: Annotated[
        list[str] | None,
        OneOrMore,
        Field(alias="not", min_length=1, max_length=MAX_PATTERNS),
    ] = None

    def form(self) -> str:
        """Name the one form that is written."""
        (form,) = self.model_fields_set - {"not_"}
        return form.rstrip("_")


def _matcher(value: object) -> object:
    if value == "any":
        return {"any": "any"}
    if isinstance(value, str):
        raise ValueError("expected a list, a matcher or any")
    if isinstance(value, list):
        return {"items": cast("list[object]", value)}
    if isinstance(value, dict):
        forms = cast("dict[str, object]", value)
        if set(forms) == {"not"}:
            raise ValueError("not takes away from a matcher, so it stands beside one")
        if len(forms.keys() - {"not"}) != 1:
            raise ValueError("expected exactly one matcher")
        if "items" in forms or "any" in forms:
            raise ValueError("expected a list, a matcher or any")
        return forms
    return value


Matcher: TypeAlias = Annotated[MatcherSpec, BeforeValidator(_matcher)]


def _arguments(value: object) -> object:
    if value == "any":
        return {ANY_CALL: "any"}
    if isinstance(value, dict):
        arguments = cast("dict[str, object]", value)
        if ANY_CALL in arguments:
            raise ValueError("* is not an argument; write any instead of the map")
        return arguments
    raise ValueError("expected any, or a map from argument to matcher")


Arguments: TypeAlias = Annotated[
    dict[ArgumentName, Matcher], BeforeValidator(_arguments), Field(max_length=MAX_ARGUMENTS)
]
