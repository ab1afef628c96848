"""What the lattice claims is held against matching random values: a yes must never be wrong."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from safeconduct.call import Json, Limits, Profile
from safeconduct.errors import PolicyError
from safeconduct.policies import hidden_by, narrow_profiles, parse_policy
from safeconduct.policies.capability import covers
from safeconduct.policies.globs import Glob
from safeconduct.policies.lattice.examples import examples
from safeconduct.policies.lattice.inclusion import Language, classes, search
from safeconduct.policies.lattice.matchers import disjoint, intersect, subsumes
from safeconduct.policies.lattice.profiles import profile_within
from safeconduct.policies.match import Matcher

from .generate import WORKSPACE, Generator, seeded, write

FORMS = ("path", "url", "email", "host", "argv", "range", "text", "json")
CASES = 500


def compiled(form: str, node: object, effect: str = "allow") -> Matcher:
    """Compile one written matcher through a policy."""
    text = f"version: 1\ntools: {{t: {{{effect}: {{x: {node}}}}}}}"
    rule = parse_policy(text.encode(), name="p", workspace=Path(WORKSPACE)).tools["t"].all[0]
    assert rule.matchers is not None
    return rule.matchers["x"]


def drawn(generator: Generator, form: str) -> Matcher:
    """Draw a matcher as a grant or as a restriction has it."""
    while True:
        deny = generator.chance(0.3)
        node = generator.matcher(form, deny=deny)
        # What can never match is refused.
        with suppress(PolicyError):
            return compiled(form, write(node), "deny" if deny else "allow")


@pytest.mark.parametrize("form", FORMS)
def test_every_claim_holds_for_random_values(form: str) -> None:
    claims = {"subsumes": 0, "disjoint": 0}
    for seed in range(CASES):
        generator = seeded(seed)
        one, other = drawn(generator, form), drawn(generator, form)
        values = [generator.value(form) for _ in range(30)]
        values += [*examples(one), *examples(other)]
        both = intersect(one, other)
        wider, apart = subsumes(one, other), disjoint(one, other)
        claims["subsumes"] += wider
        claims["disjoint"] += apart
        for value in values:
            mine, theirs = one.matches(value), other.matches(value)
            shown = f"seed {seed}: {one.describe()} / {other.describe()} / {value!r}"
            assert not wider or mine or not theirs, shown
            assert not (apart and mine and theirs), shown
            assert both.matches(value) is (mine and theirs), shown
    # Claims that are never made would pass too.
    assert claims["subsumes"] > CASES / 20
    assert claims["disjoint"] > CASES / 20 or form in ("json", "text")


@pytest.mark.parametrize("form", FORMS)
def test_reflexive(form: str) -> None:
    for seed in range(200):
        # Compiled twice: no identity of objects helps.
        one, other = drawn(seeded(seed), form), drawn(seeded(seed), form)
        assert subsumes(one, other), one.describe()


@pytest.mark.parametrize("form", FORMS)
def test_examples_match(form: str) -> None:
    found = 0
    for seed in range(300):
        matcher = drawn(seeded(seed), form)
        values = examples(matcher)
        assert all(matcher.matches(value) for value in values)
        found += bool(values)
    assert found > 240


SURE: Mapping[str, list[tuple[str, str, bool]]] = {
    "path": [
        ('{path: ["$WS/**"]}', '{path: ["$WS/src/**", "$WS/a"]}', True),
        ('{path: ["$WS/a/**", "$WS/b/**"]}', '{path: ["$WS/?/**"]}', False),
        ('{path: ["**/.env"], not: ["$WS/a/**"]}', '{path: ["$WS/b/**/.env"]}', True),
        ('{path: ["$WS/**"], not: ["**/.env"]}', '{path: ["$WS/src/*.py"]}', True),
        ('{path: ["$WS/**"], not: ["**/.env"]}', '{path: ["$WS/src/*"]}', False),
        ('{path: ["/srv/a/**"]}', '{path: ["/srv/a-b/**"]}', False),
    ],
    "url": [
        ('{url: ["https://**.example.org/**"]}', '{url: ["https://*.example.org/a/*"]}', True),
        ('{url: ["https://**/**"]}', '{url: ["https://*.local/**"]}', False),
        ('{url: ["https://a.test/**"]}', '{url: ["http://a.test/**"]}', False),
        (
            '{url: ["https://a.test/*", "https://a.test/*/**"]}',
            '{url: ["https://a.test/x/y"]}',
            True,
        ),
    ],
    "email": [
        ("{email: any}", '{email: ["*@a.test"]}', True),
        ('{email: ["*@**.a.test"]}', '{email: ["ann@x.y.a.test"]}', True),
        ('{email: ["a*@a.test"]}', '{email: ["*a@a.test"]}', False),
    ],
    "argv": [
        ("{argv: [git, ...]}", "{argv: [git, {in: [log, diff]}, ...]}", True),
        ("{argv: [git, any]}", "{argv: [git, ...]}", False),
        ("{argv: [head, {range: [0, 9]}]}", "{argv: [head, {in: ['1', '8']}]}", True),
        ("{argv: [cat, {path: ['$WS/**']}]}", "{argv: [cat, {path: ['$WS/src/*']}]}", True),
        ("{argv: [any, ...]}", '{argv: ["any", ...]}', True),
        ('{argv: ["any", ...]}', "{argv: [any, ...]}", False),
    ],
    "json": [
        (
            "{json: {type: object, properties: {p: {type: number}}, rest: any}}",
            "{json: {type: object, properties: {p: {type: integer, minimum: 0}}}}",
            True,
        ),
        ("{json: {type: integer, minimum: 0}}", "{json: {type: integer, maximum: 9}}", False),
        ("{json: {type: string, maxLength: 5}}", "{json: {type: string, enum: [abc]}}", True),
    ],
}


@pytest.mark.parametrize(
    ("form", "wide", "narrow", "expected"),
    [(form, *case) for form, cases in SURE.items() for case in cases],
)
def test_what_people_write_is_answered(form: str, wide: str, narrow: str, expected: bool) -> None:
    assert subsumes(compiled(form, wide), compiled(form, narrow)) is expected


def test_a_search_ends_with_a_proof_or_says_that_it_is_not_sure() -> None:
    letters = [f"a{'?' * index}b*" for index in range(12)]
    hard = Language([("**", f"*a{'?' * 12}"), *((letter,) for letter in letters)])
    answer = search([hard], [Language([("**", f"*b{'?' * 14}")])])
    assert answer.example is not None or not answer.sure


def random_pattern(source: random.Random) -> tuple[str, ...]:
    parts = ("**", "*", "a", "b", "?", "a*", "*b", "a?", "*a*")
    return tuple(source.choice(parts) for _ in range(source.randint(1, 4)))


def test_search_and_classes_agree_with_matching() -> None:
    source = seeded(7).random
    for _ in range(300):
        patterns = [random_pattern(source) for _ in range(3)]
        languages = [Language([pattern]) for pattern in patterns]
        answer = search(languages[:2], languages[2:])
        found, sure = classes(languages)
        vectors = {
            tuple(Glob("", pattern).matches(list(path)) for pattern in patterns) for path in found
        }
        assert len(vectors) == len(found)
        if answer.example is not None:
            hits = [Glob("", pattern).matches(list(answer.example)) for pattern in patterns]
            assert hits == [True, True, False]
        assert not sure or (answer.example is not None) == ((True, True, False) in vectors)


def drawn_profile(generator: Generator, name: str) -> Profile:
    draw = generator.random
    return Profile(
        name=name,
        read=tuple(generator.path() for _ in range(draw.randint(0, 2))),
        write=tuple(generator.path() for _ in range(draw.randint(0, 2))),
        hide=tuple(draw.sample(("/**/.env", "/ws/a", "/ws/**/b", "/ws/**"), draw.randint(0, 2))),
        imports=tuple(draw.sample(("json", "csv"), draw.randint(0, 2))),
        limits=Limits(wall_ms=draw.randint(1, 3), cpu_ms=draw.choice((None, 1, 2))),
    )


def test_what_two_profiles_grant_is_within_both() -> None:
    apart = 0
    for seed in range(500):
        generator = seeded(seed)
        one, other = (drawn_profile(generator, name) for name in ("a", "b"))
        common = narrow_profiles(one, other)
        assert profile_within(common, one)
        assert profile_within(common, other)
        apart += not profile_within(one, other)
        if profile_within(one, other):
            # What is within adds nothing to take away.
            assert profile_within(one, common)
            for path in (generator.path() for _ in range(20)):
                for reach in ("write", "hide"):
                    assert holds(one, reach, path) <= holds(other, reach, path)
    assert apart > 100


def holds(profile: Profile, reach: str, path: str) -> bool:
    """Tell whether a program may write a path, or whether it may see it at all."""
    if reach == "hide":
        return not hidden_by(profile.hide, path)
    return any(covers(folder, path) for folder in profile.write)


def test_an_unknown_matcher_subsumes_only_itself() -> None:
    class Odd:
        kind = compiled("text", "any").kind
        words = ()

        def matches(self, value: Json) -> bool:
            return value == "odd"

        def describe(self) -> str:
            return "odd"

    odd, text = Odd(), compiled("text", "{text: {max: 9B}}")
    assert subsumes(odd, odd)
    assert not subsumes(text, odd)
    assert not subsumes(odd, text)
    assert not disjoint(odd, text)
    assert subsumes(compiled("text", "any"), odd)
