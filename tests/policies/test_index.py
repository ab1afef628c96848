"""The index of a tool's rules never leaves out a rule that judges a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeconduct.call import Effect, Json
from safeconduct.policies.binding import Rule, ToolRules
from safeconduct.policies.globs import compile_glob
from safeconduct.policies.index import MIN_RULES, index_rules
from safeconduct.policies.match import (
    AnyValue,
    Argv,
    Literals,
    Matcher,
    NumberRange,
    path_matcher,
)
from safeconduct.policies.match_text import Excluding, compile_regex
from safeconduct.policies.match_url import UrlMatcher
from safeconduct.policies.signatures import Signature
from safeconduct.policies.urls import compile_url

_WORKSPACE = "/ws"
_NAMES = st.sampled_from(["a", "b", "ab", "a.py"])
_WILD = st.sampled_from(["a", "b", "ab", "a.py", "*", "*.py", "a?", "**"])
_PATHS = st.lists(_NAMES, max_size=4).map(lambda names: "/".join(["/ws", *names]))
_PATTERNS = st.lists(_WILD, min_size=1, max_size=4).flatmap(
    lambda names: st.sampled_from(["$WS/", "/", "/ws/"]).map(lambda start: start + "/".join(names))
)
_HOSTS = st.sampled_from(["a.org", "b.a.org", "c.b.a.org", "[2001:db8::1]", "10.0.0.1", "local"])
_WILD_HOSTS = st.sampled_from(["a.org", "*.a.org", "**.a.org", "*.*.org", "10.0.0.1", "b.*.org"])
_PORTS = st.sampled_from(["", ":8443", ":443"])
# What is encoded is one more spelling of it; only a query is compared as it is written.
_TAILS = st.lists(
    st.sampled_from(["a", "b", "", "%61", "%C3%A9", "\u00e9", "a%20b", "1%25", "%A9"]), max_size=3
).map("/".join)
_URLS = st.builds(
    "https://{}{}/{}{}".format, _HOSTS, _PORTS, _TAILS, st.sampled_from(["", "?a/b", "?%61"])
)
_WILD_TAILS = st.lists(
    st.sampled_from(["a", "b", "*", "**", "%61", "\u00e9", "a%20b", "1%25"]), max_size=3
).map("/".join)
_URL_PATTERNS = st.builds("https://{}{}/{}".format, _WILD_HOSTS, _PORTS, _WILD_TAILS)
_ELEMENTS = st.one_of(
    _NAMES,
    st.frozensets(_NAMES, min_size=1).map(lambda words: words.__contains__),
    st.just(AnyValue().matches),
)
_SCALARS = st.one_of(_NAMES, st.sampled_from([1, 2.0, True, None, "1", "true", "null"]))


def _argv(elements: list[object], rest: bool) -> Argv:
    return Argv(tuple(elements), rest, ("shown",))  # type: ignore[arg-type]


_MATCHERS: st.SearchStrategy[Matcher] = st.one_of(
    st.just(AnyValue()),
    st.just(NumberRange(1, 3)),
    st.just(compile_regex("a.*")),
    st.frozensets(st.sampled_from(["a", "ab", "1", "2", "true", "null"]), min_size=1).map(Literals),
    st.lists(_PATTERNS, min_size=1, max_size=3).map(
        lambda listed: path_matcher([compile_glob(one, workspace=_WORKSPACE) for one in listed])
    ),
    st.lists(_URL_PATTERNS, min_size=1, max_size=3).map(
        lambda listed: UrlMatcher(tuple(compile_url(one) for one in listed))
    ),
    st.builds(_argv, st.lists(_ELEMENTS, min_size=1, max_size=3), st.booleans()),
)
_WITH_NOT = st.one_of(_MATCHERS, st.builds(Excluding, _MATCHERS, _MATCHERS))
_ONE_VALUE = st.one_of(_SCALARS, _PATHS, _URLS)
_VALUES: st.SearchStrategy[Json] = st.one_of(
    _ONE_VALUE, st.lists(_ONE_VALUE, max_size=3), st.just({"a": 1})
)


def _paths(patterns: list[str]) -> Matcher:
    return path_matcher([compile_glob(one, workspace=_WORKSPACE) for one in patterns])


def _url(pattern: str) -> Matcher:
    return UrlMatcher((compile_url(pattern),))


# What is filed in one way alone, with the values that it may match.
_FAMILIES: dict[str, tuple[st.SearchStrategy[Matcher], st.SearchStrategy[Json]]] = {
    "mixed": (_WITH_NOT, _VALUES),
    "texts": (
        st.frozensets(_NAMES, min_size=1).map(Literals),
        st.one_of(_NAMES, st.lists(_NAMES, max_size=3)),
    ),
    "hosts": (_URL_PATTERNS.map(_url), _URLS),
    "two words": (
        st.builds(_argv, st.tuples(st.just("a"), _ELEMENTS).map(list), st.booleans()),
        st.lists(_NAMES, max_size=3).map(lambda words: ["a", *words]),
    ),
    "folders": (_PATTERNS.map(lambda one: _paths([one])), _PATHS),
    "last names": (
        st.lists(_NAMES.map(lambda name: f"**/{name}"), min_size=1, max_size=2).map(_paths),
        _PATHS,
    ),
    "whole folders of hosts": (
        st.builds(
            "https://a.org{}/{}**".format,
            _PORTS,
            st.sampled_from(["", "a/", "a/b/", "b/", "\u00e9/", "1%25/"]),
        ).map(_url),
        st.builds("https://a.org{}/{}{}".format, _PORTS, _TAILS, st.sampled_from(["", "?a/b"])),
    ),
}


def _check(rules: tuple[Rule, ...], arguments: dict[str, Json]) -> None:
    found = index_rules(rules).candidates(arguments)
    places = [int(rule.id) for rule in found]
    assert places == sorted(set(places))
    for at, rule in enumerate(rules):
        if rule.restricts(arguments) or rule.grants(arguments, Signature(closed=False), _WORKSPACE):
            assert at in places


@pytest.mark.parametrize("family", _FAMILIES)
@settings(max_examples=150)
@given(st.data())
def test_an_index_leaves_out_no_rule_that_judges(family: str, data: st.DataObject) -> None:
    matchers, values = _FAMILIES[family]
    names = st.sampled_from(["x", "y"]) if family == "mixed" else st.just("x")
    named = st.dictionaries(names, matchers, min_size=1)
    written = st.one_of(st.none(), named) if family == "mixed" else named
    rules = tuple(
        Rule(id=str(at), tool="t.t", effect=Effect.ALLOW, matchers=found, rest=True)
        for at, found in enumerate(data.draw(st.lists(written, min_size=MIN_RULES, max_size=20)))
    )
    for arguments in data.draw(st.lists(st.dictionaries(names, values), min_size=1, max_size=8)):
        _check(rules, arguments)


@pytest.mark.parametrize(
    ("pattern", "url", "found"),
    [
        ("https://a.org/v1/admin/**", "https://a.org/v1/%61dmin/x", True),
        ("https://a.org/v1/admin/**", "https://a.org/v1/adm%69n?%2f", True),
        ("https://a.org/v1/admin/*/z", "https://a.org/v1/%61dmin/x/z", True),
        ("https://a.org/v1/admin", "https://a.org/v1/%61dmin", True),
        ("https://a.org/\u00e9/**", "https://a.org/%C3%A9/x", True),
        ("https://a.org/a%20b/**", "https://a.org/a%20b/x", True),
        ("https://a.org/a%20b/*/z", "https://a.org/%61%20b/x/z", True),
        ("https://a.org/100%25/**", "https://a.org/100%25/x", True),
        ("https://a.org/100%25/**", "https://a.org/%31%300%25/x", True),
        ("https://a.org/100%25/**", "https://a.org/100/x", False),
    ],
)
def test_a_url_is_found_in_each_of_its_spellings(pattern: str, url: str, found: bool) -> None:
    others = [f"https://a.org/x{at}/{'*/z' if '*/z' in pattern else '**'}" for at in range(9)]
    rules = [
        Rule(id=one, tool="t.t", effect=Effect.DENY, matchers={"x": _url(one)})
        for one in [pattern, *others]
    ]
    for value in (url, [url]):
        kept = [rule for rule in index_rules(rules).candidates({"x": value})]
        assert [rule.id for rule in kept if rule.restricts({"x": value})] == [pattern] * found


def test_of_thousands_of_rules_few_are_looked_at() -> None:
    def rule(at: int, matcher: Matcher) -> Rule:
        return Rule(id=str(at), tool="t.t", effect=Effect.ALLOW, matchers={"x": matcher})

    def path(pattern: str) -> Matcher:
        return path_matcher([compile_glob(pattern, workspace=_WORKSPACE)])

    makers: dict[str | tuple[str, ...], Callable[[int], Matcher]] = {
        "/ws/p17/src/main.py": lambda at: path(f"$WS/p{at}/src/**"),
        "/ws/p17/src/x/main.py": lambda at: path(f"$WS/p{at}/*/x/*.py"),
        "/ws/deep/down/key17": lambda at: path(f"**/key{at}"),
        "https://h.org/v1/r17/x?y": lambda at: UrlMatcher(
            (compile_url(f"https://h.org/v1/r{at}/**"),)
        ),
        "https://x.h17.org/v1": lambda at: UrlMatcher((compile_url(f"https://*.h{at}.org/**"),)),
        "account17": lambda at: Literals(frozenset([f"account{at}"])),
        ("git", "c17", "-v"): lambda at: _argv(["git", f"c{at}"], True),
    }
    for value, make in makers.items():
        index = index_rules([rule(at, make(at)) for at in range(2000)])
        assert [found.id for found in index.candidates({"x": value})] == ["17"]


def test_a_copy_with_other_rules_has_another_index() -> None:
    def rules(word: str) -> tuple[Rule, ...]:
        listed = [Literals(frozenset([f"{word}{at}"])) for at in range(MIN_RULES)]
        return tuple(
            Rule(id=f"{word}{at}", tool="t.t", effect=Effect.ALLOW, matchers={"x": matcher})
            for at, matcher in enumerate(listed)
        )

    tool = ToolRules(signature=Signature(closed=False), allow=rules("a"))
    other = replace(tool, allow=rules("b"))
    assert [rule.id for rule in tool.candidates({"x": "a1"})] == ["a1"]
    assert [rule.id for rule in other.candidates({"x": "b1"})] == ["b1"]
    assert not other.candidates({"x": "a1"})
