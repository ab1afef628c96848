"""`when` against a plain evaluator, and what holds for every condition whatever it says."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.call import Json
from safeconduct.policies.when.condition import WhenError, WhenSyntaxError, compile_when

Run = Callable[[Mapping[str, Json]], Json]


class Bad(Exception):
    """The plain evaluator has no answer."""


@dataclass(frozen=True)
class Part:
    """A part of a condition beside what it means, said as plainly as can be."""

    text: str
    run: Run


def _kind(value: Json) -> str:
    return type(value).__name__.replace("float", "int")


def _spell(value: Json) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)


def _literal(value: Json) -> Part:
    return Part(_spell(value), lambda _: value)


def _fact(name: str) -> Part:
    def run(arguments: Mapping[str, Json]) -> Json:
        if name not in arguments:
            raise Bad
        return arguments[name]

    return Part(f"call.{name}", run)


def _default(name: str, value: Json) -> Part:
    return Part(f"default(call.{name}, {_spell(value)})", lambda facts: facts.get(name, value))


def _length(part: Part) -> Part:
    def run(arguments: Mapping[str, Json]) -> Json:
        value = part.run(arguments)
        if not isinstance(value, str | list | dict):
            raise Bad
        return len(value)

    return Part(f"len({part.text})", run)


def _same(left: Json, right: Json) -> bool:
    if _kind(left) != _kind(right) or _kind(left) in ("list", "dict"):
        raise Bad
    return left == right


SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _number(value: Json) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Bad
    return value


def _compare(left: Part, sign: str, right: Part) -> Part:
    def run(arguments: Mapping[str, Json]) -> Json:
        one, other = left.run(arguments), right.run(arguments)
        if sign in ("==", "!="):
            return _same(one, other) is (sign == "==")
        return SIGNS[sign](_number(one), _number(other))

    return Part(f"{left.text} {sign} {right.text}", run)


def _is_null(part: Part, sign: str) -> Part:
    return Part(f"null {sign} {part.text}", lambda x: (part.run(x) is None) is (sign == "=="))


def _member(item: Part, sign: str, container: Part) -> Part:
    def run(arguments: Mapping[str, Json]) -> Json:
        one, listed = item.run(arguments), container.run(arguments)
        if not isinstance(listed, list):
            raise Bad
        found = [_same(one, element) for element in listed]
        return (True in found) is (sign == "in")

    return Part(f"{item.text} {sign} {container.text}", run)


def _listed(words: list[Json]) -> Part:
    return Part(f"[{', '.join(map(_spell, words))}]", lambda _: words)


def _truth(value: Json) -> bool:
    if not isinstance(value, bool):
        raise Bad
    return value


def _negated(part: Part) -> Part:
    return Part(f"not ({part.text})", lambda facts: not _truth(part.run(facts)))


def _joined(word: str, parts: list[Part]) -> Part:
    def run(arguments: Mapping[str, Json]) -> Json:
        answers = [_truth(part.run(arguments)) for part in parts]
        return all(answers) if word == "and" else any(answers)

    return Part(f" {word} ".join(f"({part.text})" for part in parts), run)


names = st.sampled_from(["a", "b", "c"])
scalars: st.SearchStrategy[Json] = st.one_of(
    st.sampled_from(["x", "y", "3"]), st.integers(-3, 3), st.booleans(), st.just(0.5)
)
values: st.SearchStrategy[Json] = st.one_of(
    scalars, st.none(), st.lists(scalars, max_size=3), st.just({"k": 1})
)
arguments = st.dictionaries(names, values)

facts = st.builds(_fact, names)
operands = st.one_of(
    facts,
    st.builds(_literal, scalars),
    st.builds(_default, names, scalars),
    st.builds(_length, facts),
)
lists = st.builds(_listed, st.lists(st.sampled_from(["x", "y"]), min_size=1, max_size=3))
leaves = st.one_of(
    facts,
    st.builds(_compare, facts, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), operands),
    st.builds(_is_null, facts, st.sampled_from(["==", "!="])),
    st.builds(_member, operands, st.sampled_from(["in", "not in"]), st.one_of(facts, lists)),
)


def _grow(inner: st.SearchStrategy[Part]) -> st.SearchStrategy[Part]:
    several = st.lists(inner, min_size=2, max_size=3)
    return st.one_of(
        st.builds(_joined, st.sampled_from(["and", "or"]), several), st.builds(_negated, inner)
    )


conditions = st.recursive(leaves, _grow, max_leaves=6)


def _answer(text: str, given_arguments: Mapping[str, Json]) -> bool | None:
    """Answer, or None for no answer."""
    try:
        return compile_when(text).holds({"call": given_arguments, "session": {}, "time": {}})
    except WhenError:
        return None


def _typed(part: Part) -> bool:
    """Tell whether the condition passes the check of types; what fails it is never judged."""
    try:
        compile_when(part.text)
    except WhenSyntaxError:
        return False
    return True


@given(conditions, arguments)
def test_the_plain_evaluator_agrees(part: Part, given_arguments: dict[str, Json]) -> None:
    expected: bool | None = None
    with contextlib.suppress(Bad):
        expected = _truth(part.run(given_arguments))
    if _typed(part):
        assert _answer(part.text, given_arguments) is expected
    else:
        # What the check of types refuses could never have been answered, or names no fact.
        assert expected is None or "call" not in part.text


@given(conditions.filter(_typed), conditions.filter(_typed), arguments)
def test_order_never_matters_and_nothing_hides(
    one: Part, other: Part, given_arguments: dict[str, Json]
) -> None:
    first, second = _answer(one.text, given_arguments), _answer(other.text, given_arguments)
    for word, combine in (("and", all), ("or", any)):
        answers = {
            _answer(f"({left.text}) {word} ({right.text})", given_arguments)
            for left, right in ((one, other), (other, one))
        }
        known = None not in (first, second)
        assert answers == {combine([bool(first), bool(second)]) if known else None}


@given(conditions.filter(_typed), arguments, names, values)
def test_what_is_not_named_does_not_matter(
    part: Part, given_arguments: dict[str, Json], name: str, value: Json
) -> None:
    if name in compile_when(part.text).arguments:
        return
    changed = {**given_arguments, name: value}
    assert _answer(part.text, changed) is _answer(part.text, given_arguments)


WORDS = [
    *("call", "session", "time", ".", "a", "b", "role", "hour", "len", "default", "true", "null"),
    *("(", ")", "[", "]", ",", "and", "or", "not", "in", "==", "<", "'x'", "3", "-1.5", '"', "\0"),
]


@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(
            st.sampled_from(WORDS),
            max_size=30,
        ).map(" ".join),
    )
)
def test_any_text_is_a_condition_or_refused(text: str) -> None:
    position = 1
    try:
        when = compile_when(text)
    except WhenSyntaxError as error:
        position = error.position
    else:
        with contextlib.suppress(WhenError):
            assert when.holds({"call": {"a": True}, "session": {}, "time": {}}) in (True, False)
    assert len(text) + 1 >= position >= 1


def test_a_fact_never_writes_the_condition() -> None:
    """Values are data: nothing of them is read as a condition."""
    assert _answer("call.a == 'x'", {"a": "' or true or '"}) is False
    with pytest.raises(WhenError):
        compile_when("call.a").holds({"call": {"a": "true"}, "session": {}, "time": {}})
