"""Shapes of structured values: closed, typed, bounded; a deny is never slipped past."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.call import Json
from safeconduct.errors import ProtocolError
from safeconduct.policies.arguments import decode_arguments
from safeconduct.policies.lattice.shapes import shape_subsumes
from safeconduct.policies.match_json import (
    MAX_SHAPE_DEPTH,
    MAX_SHAPE_NODES,
    Shape,
    ShapeError,
    compile_shape,
)
from safeconduct.policies.syntax import Data

ORDER: Data = {
    "type": "object",
    "properties": {
        "item": {"type": "string", "enum": ["book", "pen"]},
        "count": {"type": "integer", "minimum": "1", "maximum": "10"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": "3"}, "maxItems": "2"},
        "gift": {"type": "boolean"},
    },
    "required": ["item", "count"],
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"item": "book", "count": 1}, True),
        ({"item": "pen", "count": 10, "tags": [], "gift": False}, True),
        ({"item": "pen", "count": 3.0, "tags": ["a", "abc"]}, True),
        ({"item": "book"}, False),
        ({"item": "book", "count": 1, "extra": 1}, False),
        ({"item": "book", "count": 1, "__proto__": {}}, False),
        ({"item": "book", "count": 1, "Item": "pen"}, False),
        ({"item": "Book", "count": 1}, False),
        ({"item": ["book"], "count": 1}, False),
        ({"item": None, "count": 1}, False),
        ({"item": "book", "count": 0}, False),
        ({"item": "book", "count": 11}, False),
        ({"item": "book", "count": 1.5}, False),
        ({"item": "book", "count": 1e300}, False),
        ({"item": "book", "count": "1"}, False),
        ({"item": "book", "count": True}, False),
        ({"item": "book", "count": 1, "tags": "a"}, False),
        ({"item": "book", "count": 1, "tags": ["a", 1]}, False),
        ({"item": "book", "count": 1, "tags": ["a", "abcd"]}, False),
        ({"item": "book", "count": 1, "tags": ["a", "b", "c"]}, False),
        ({"item": "book", "count": 1, "tags": {"0": "a"}}, False),
        ({"item": "book", "count": 1, "gift": "true"}, False),
        ({"item": "book", "count": 1, "gift": 1}, False),
        ({}, False),
        ([], False),
        ([{"item": "book", "count": 1}], False),
        ('{"item": "book", "count": 1}', False),
        (None, False),
    ],
)
def test_an_order(value: Json, expected: bool) -> None:
    assert compile_shape(ORDER).matches(value) is expected


VALUES: list[Json] = ["", "a", 0, 1, -1, 1.0, 1.5, -0.0, True, False, None, [], [1], {}, {"a": 1}]


TYPED: list[tuple[Data, list[Json]]] = [
    ({"type": "string"}, ["", "a"]),
    ({"type": "integer"}, [0, 1, -1, 1.0, -0.0]),
    ({"type": "number"}, [0, 1, -1, 1.0, 1.5, -0.0]),
    ({"type": "boolean"}, [True, False]),
    ({"type": "null"}, [None]),
    ({"type": "array"}, [[], [1]]),
    ({"type": "object"}, [{}]),
    ({"type": "object", "rest": "any"}, [{}, {"a": 1}]),
    ({"type": "integer", "enum": ["1", "-0"]}, [0, 1, 1.0, -0.0]),
    ({"type": "boolean", "enum": ["true"]}, [True]),
    ({"type": "string", "enum": ["1", "a", "true", "null"]}, ["a"]),
    ({"type": "number", "minimum": "1"}, [1, 1.0, 1.5]),
    ({"type": "integer", "maximum": "-1"}, [-1]),
    ({"type": "string", "maxLength": "0"}, [""]),
    ({"type": "array", "maxItems": "0"}, [[]]),
    ({"type": "array", "items": {"type": "string"}}, [[]]),
    ({"type": "array", "items": "any"}, [[], [1]]),
    ({"type": "object", "properties": {"a": "any"}}, [{}, {"a": 1}]),
    ({"type": "object", "properties": {"a": {"type": "string"}}, "rest": "any"}, [{}]),
    ({"type": "object", "required": ["a"], "rest": "any"}, [{"a": 1}]),
    ("any", VALUES),
]


@pytest.mark.parametrize(("shape", "matching"), TYPED)
def test_types_do_not_mix(shape: Data, matching: list[Json]) -> None:
    # The text of a value tells `1` from `1.0` and `True`, which are equal in Python.
    found = [json.dumps(value) for value in VALUES if compile_shape(shape).matches(value)]
    assert found == [json.dumps(value) for value in VALUES if json.dumps(value) in found]
    assert sorted(found) == sorted(json.dumps(value) for value in matching)


def test_length_is_in_characters() -> None:
    shape = compile_shape({"type": "string", "maxLength": "2"})
    assert shape.matches("\U0001f512é")
    assert not shape.matches("e\N{COMBINING ACUTE ACCENT}e")


@pytest.mark.parametrize(
    ("shape", "path", "said"),
    [
        ("object", (), "a map"),
        ([], (), "a map"),
        ({}, ("type",), "type must be"),
        ({"type": "any"}, ("type",), "type must be"),
        ({"type": "String"}, ("type",), "type must be"),
        ({"type": ["string", "null"]}, ("type",), "type must be"),
        ({"type": "string", "pattern": "a"}, ("pattern",), "does not fit"),
        ({"type": "string", "minLength": "1"}, ("minLength",), "does not fit"),
        ({"type": "string", "minimum": "1"}, ("minimum",), "does not fit"),
        ({"type": "object", "additionalProperties": "true"}, ("additionalProperties",), "takes"),
        ({"type": "object", "$ref": "x"}, ("$ref",), "does not fit"),
        ({"type": "object", "anyOf": []}, ("anyOf",), "does not fit"),
        ({"type": "null", "enum": ["null"]}, ("enum",), "nothing else"),
        ({"type": "object", "properties": ["a"]}, ("properties",), "a map"),
        ({"type": "object", "properties": {"a": "b"}}, ("properties", "a"), "a map"),
        ({"type": "object", "required": ["a"]}, ("required",), "properties does not name"),
        ({"type": "object", "required": "a"}, ("required",), "a list"),
        ({"type": "object", "rest": "all"}, ("rest",), "only any"),
        ({"type": "array", "items": [{"type": "string"}]}, ("items",), "a map"),
        ({"type": "array", "maxItems": "-1"}, ("maxItems",), "not negative"),
        ({"type": "array", "maxItems": "1.5"}, ("maxItems",), "a whole number"),
        ({"type": "integer", "minimum": "1e3"}, ("minimum",), "a whole number"),
        ({"type": "integer", "minimum": "5", "maximum": "4"}, ("minimum",), "nothing matches"),
        ({"type": "integer", "enum": ["1", "x"]}, ("enum", 1), "whole number"),
        ({"type": "boolean", "enum": ["True"]}, ("enum", 0), "true or false"),
        ({"type": "string", "enum": []}, ("enum",), "not empty"),
        ({"type": "string", "enum": [["a"]]}, ("enum", 0), "words"),
        ({"type": "string", "enum": {"a": "b"}}, ("enum",), "a list"),
    ],
)
def test_no_shape(shape: Data, path: tuple[str | int, ...], said: str) -> None:
    with pytest.raises(ShapeError) as error:
        compile_shape(shape)
    assert error.value.path == path
    assert said in str(error.value)


def test_the_place_of_a_fault_is_exact() -> None:
    inner: Data = {"type": "object", "properties": {"b": {"type": "x"}}}
    with pytest.raises(ShapeError) as error:
        compile_shape({"type": "array", "items": inner})
    assert error.value.path == ("items", "properties", "b", "type")


def _nested(depth: int) -> Data:
    shape: Data = {"type": "string"}
    for _ in range(depth):
        shape = {"type": "array", "items": shape}
    return shape


def test_shapes_are_bounded() -> None:
    compile_shape(_nested(MAX_SHAPE_DEPTH))
    for shape in (_nested(MAX_SHAPE_DEPTH + 1), _nested(500)):
        with pytest.raises(ShapeError, match="deeper"):
            compile_shape(shape)
    properties: dict[str, Data] = {str(at): "any" for at in range(MAX_SHAPE_NODES)}
    with pytest.raises(ShapeError, match="parts"):
        compile_shape({"type": "object", "properties": properties})


def test_a_hostile_value_costs_no_more_than_its_size() -> None:
    deep: Json = 1
    for _ in range(100_000):
        deep = [deep]
    wide: Json = {str(at): [0] * 100 for at in range(1000)}
    started = time.process_time()
    for shape in ("any", _nested(3), ORDER):
        for restricts in (False, True):
            compile_shape(shape, restricts=restricts).matches(deep)
            compile_shape(shape, restricts=restricts).matches(wide)
    assert time.process_time() - started < 0.5
    # Taken apart by hand: freeing it all at once is deep recursion for some interpreters.
    while isinstance(deep, list) and deep:
        deep = deep.pop()


def test_no_value_has_one_key_twice() -> None:
    with pytest.raises(ProtocolError, match="same key twice"):
        decode_arguments(b'{"x": {"item": "book", "count": 1, "item": "gun"}}')


def test_a_deny_is_not_slipped_past() -> None:
    shape: Data = {
        "type": "object",
        "properties": {
            "force": {"type": "boolean", "enum": ["true"]},
            "paths": {"type": "array", "items": {"type": "string", "enum": ["/"]}},
        },
        "required": ["force"],
    }
    attack: Json = {"force": True, "paths": ["/tmp", "/"], "extra": 1}
    assert not compile_shape(shape).matches(attack)
    assert compile_shape(shape, restricts=True).matches(attack)
    assert not compile_shape(shape, restricts=True).matches({"force": False, "extra": 1})
    assert not compile_shape(shape, restricts=True).matches({"force": True, "paths": ["/tmp"]})


@dataclass(frozen=True)
class Plain:
    """A shape beside what it means, said as plainly as can be."""

    data: Data
    means: Callable[[Json], bool]


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


LEAVES = [
    Plain("any", lambda value: True),
    Plain({"type": "string"}, lambda value: isinstance(value, str)),
    Plain({"type": "string", "enum": ["a"]}, lambda value: value == "a"),
    Plain({"type": "string", "maxLength": "1"}, lambda value: value in ("", "a")),
    Plain(
        {"type": "integer", "minimum": "0", "maximum": "1"},
        lambda value: _is_number(value) and value in (0, 1),
    ),
    Plain({"type": "number"}, _is_number),
    Plain({"type": "boolean"}, lambda value: isinstance(value, bool)),
    Plain({"type": "null"}, lambda value: value is None),
]


def _array(items: Plain) -> Plain:
    def means(value: Json) -> bool:
        return isinstance(value, list) and len(value) <= 2 and all(map(items.means, value))

    return Plain({"type": "array", "items": items.data, "maxItems": "2"}, means)


def _object(properties: dict[str, Plain], required: list[str], rest: bool) -> Plain:
    named: list[Data] = [name for name in properties if name in required]

    def means(value: Json) -> bool:
        if not isinstance(value, dict) or not all(name in value for name in named):
            return False
        if not rest and not all(name in properties for name in value):
            return False
        if len({name.casefold() for name in [*value, *properties]}) < len({*value, *properties}):
            return False  # one may be taken for another
        return all(form.means(value[name]) for name, form in properties.items() if name in value)

    inner: dict[str, Data] = {name: form.data for name, form in properties.items()}
    data: dict[str, Data] = {"type": "object", "properties": inner}
    data |= {"required": named} if named else {}
    return Plain(data | ({"rest": "any"} if rest else {}), means)


def test_a_member_in_another_case_is_the_same_member() -> None:
    """Go's encoding/json takes `Mode` for `mode`, and the last of both."""
    mode: Data = {"mode": {"type": "string", "enum": ["rw"]}}
    shape: Data = {"type": "object", "properties": mode, "required": ["mode"], "rest": "any"}
    outer: Data = {"type": "object", "properties": {"o": shape}}
    attacks: list[Json] = [
        {"Mode": "rw"},
        {"mode": "ro", "Mode": "rw"},
        {"MODE": "ro", "Mode": "rw"},
    ]
    for attack in attacks:
        assert compile_shape(shape, restricts=True).matches(attack)
        assert compile_shape(outer, restricts=True).matches({"o": attack})
    grant = compile_shape(shape)
    assert grant.matches({"mode": "rw", "other": 1})
    for attack in ({"mode": "rw", "Mode": "x"}, {"mode": "rw", "a": 1, "A": 2}):
        assert not grant.matches(attack)
    unnamed = compile_shape({"type": "object", "properties": mode, "rest": "any"})
    assert unnamed.matches({"other": 1})
    assert not unnamed.matches({"Mode": "x"})
    wide = compile_shape({"type": "object", "properties": {"Mode": "any"}, "rest": "any"})
    assert not shape_subsumes(wide, compile_shape({"type": "object", "rest": "any"}))
    assert not shape_subsumes(wide, compile_shape({"type": "object", "properties": mode}))


def _grow(inner: st.SearchStrategy[Plain]) -> st.SearchStrategy[Plain]:
    names = st.sampled_from(["a", "b"])
    properties = st.dictionaries(names, inner, max_size=2)
    return st.one_of(
        st.builds(_array, inner), st.builds(_object, properties, st.lists(names), st.booleans())
    )


shapes = st.recursive(st.sampled_from(LEAVES), _grow, max_leaves=5)
values: st.SearchStrategy[Json] = st.recursive(
    st.sampled_from(["", "a", "bb", 0, 1, 2, 1.5, 1.0, True, False, None]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b", "c", "A"]), inner, max_size=3),
    ),
    max_leaves=6,
)


@given(shapes, values)
def test_the_plain_meaning_agrees(shape: Plain, value: Json) -> None:
    assert compile_shape(shape.data).matches(value) is shape.means(value)


@given(shapes, values)
def test_what_grants_also_restricts(shape: Plain, value: Json) -> None:
    restricting = compile_shape(shape.data, restricts=True)
    assert not shape.means(value) or restricting.matches(value)


@given(shapes, values, values)
def test_nothing_added_slips_past_a_deny(shape: Plain, value: Json, extra: Json) -> None:
    restricting = compile_shape(shape.data, restricts=True)
    if isinstance(value, dict) and restricting.matches(value):
        assert restricting.matches({**value, "extra": extra})


def test_it_says_what_it_means() -> None:
    shape = compile_shape(ORDER)
    assert isinstance(shape, Shape)
    assert shape.whole
    assert shape.describe() == (
        "a value of the shape {type: object, properties: {"
        "item: {type: string, enum: [book, pen]}, "
        "count: {type: integer, minimum: 1, maximum: 10}, "
        "tags: {type: array, items: {type: string, maxLength: 3}, maxItems: 2}, "
        "gift: {type: boolean}}, required: [count, item]}"
    )
    assert shape == compile_shape(ORDER)
    assert shape != compile_shape(ORDER, restricts=True)
