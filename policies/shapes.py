"""Policy matching: the forms that a shape is made of, and whether a value has one (match_json.py).

A form that restricts (ask, deny) holds whatever may be meant: its objects are open, so that an
extra property never slips past a deny, and an array has it if any of its items does.
INVARIANT: what has the granting form has the restricting form too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final, TypeGuard, TypeVar

from safeconduct.call import Json

from .match import scalar_text, spell


class Type(StrEnum):
    """The type of a value, as JSON Schema names it. An integer is a number without fraction."""

    OBJECT = "object"
    ARRAY = "array"
    STRING = "string"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    NULL = "null"
    ANY = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One level of a shape. ``enum`` holds the values as `scalar_text` spells them."""

    type: Type
    properties: Mapping[str, Form] = field(default_factory=lambda: MappingProxyType({}))
    required: frozenset[str] = frozenset()
    open: bool = False
    items: Form | None = None
    enum: frozenset[str] | None = None
    minimum: int | None = None
    maximum: int | None = None
    max_length: int | None = None
    max_items: int | None = None

    def holds(self, value: Json, *, restricts: bool) -> bool:
        """Tell whether the value has this form. LIMIT: recursion ends with the shape."""
        if not _HAS_TYPE[self.type](value):
            return False
        if self.enum is not None and scalar_text(value) not in self.enum:
            return False
        if isinstance(value, str):
            return self.max_length is None or len(value) <= self.max_length
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self._in_range(value)
        if _is_list(value):
            return self._holds_items(value, restricts=restricts)
        if isinstance(value, Mapping) and self.type is not Type.ANY:
            return self._may_hold(value) if restricts else self._holds_members(value)
        return True

    def _in_range(self, value: int | float) -> bool:
        above = self.minimum is None or self.minimum <= value
        return above and (self.maximum is None or value <= self.maximum)

    def _holds_items(self, value: Sequence[Json], *, restricts: bool) -> bool:
        if self.max_items is not None and len(value) > self.max_items:
            return False
        if self.items is None or not value:
            return True
        form = self.items
        quantify = any if restricts else all
        return quantify(form.holds(item, restricts=restricts) for item in value)

    def _holds_members(self, value: Mapping[str, Json]) -> bool:
        # Two names that differ only in case are one for some tools (spelling.py).
        if len({name.casefold() for name in value}) < len(value):
            return False
        others = value.keys() - self.properties.keys()
        if others:
            known = {name.casefold() for name in self.properties}
            if not self.open or any(name.casefold() in known for name in others):
                return False
        return self.required <= value.keys() and all(
            form.holds(value[name], restricts=False)
            for name, form in self.properties.items()
            if name in value
        )

    def _may_hold(self, value: Mapping[str, Json]) -> bool:
        """Tell whether the members may be taken for such: a name is met in any case."""
        given = _by_name(value)
        if not all(name.casefold() in given for name in self.required):
            return False
        forms = _by_name(self.properties)
        return all(
            any(form.holds(item, restricts=True) for form in forms[name] for item in given[name])
            for name in forms.keys() & given.keys()
        )


_T = TypeVar("_T")


def _by_name(members: Mapping[str, _T]) -> dict[str, list[_T]]:
    found: dict[str, list[_T]] = {}
    for name, member in members.items():
        found.setdefault(name.casefold(), []).append(member)
    return found


def _is_list(value: Json) -> TypeGuard[Sequence[Json]]:
    return isinstance(value, list | tuple)


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Json) -> bool:
    # 3.0 is an integer (JSON Schema 2020-12 §6.1.1): many parsers cannot tell it from 3.
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


_HAS_TYPE: Final[Mapping[Type, Callable[[Json], bool]]] = MappingProxyType(
    {
        Type.OBJECT: lambda value: isinstance(value, Mapping),
        Type.ARRAY: _is_list,
        Type.STRING: lambda value: isinstance(value, str),
        Type.INTEGER: _is_integer,
        Type.NUMBER: _is_number,
        Type.BOOLEAN: lambda value: isinstance(value, bool),
        Type.NULL: lambda value: value is None,
        Type.ANY: lambda value: True,
    }
)


def describe_form(form: Form) -> str:
    """Write a form in full: a person agrees to what this says. Ends with the shape."""
    if form.type is Type.ANY:
        return "any"
    parts = [f"type: {form.type}"]
    if form.properties:
        inner = ", ".join(f"{spell(k)}: {describe_form(v)}" for k, v in form.properties.items())
        parts.append(f"properties: {{{inner}}}")
    for key, words in (("required", form.required), ("enum", form.enum)):
        if words:
            parts.append(f"{key}: [{', '.join(spell(word) for word in sorted(words))}]")
    if form.open:
        parts.append("rest: any")
    if form.items is not None:
        parts.append(f"items: {describe_form(form.items)}")
    for key, bound in (
        ("minimum", form.minimum),
        ("maximum", form.maximum),
        ("maxLength", form.max_length),
        ("maxItems", form.max_items),
    ):
        if bound is not None:
            parts.append(f"{key}: {bound}")
    return f"{{{', '.join(parts)}}}"
