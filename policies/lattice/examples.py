"""Policy lattice: values that a matcher matches, to show what a policy would allow.

They are guesses that are held against the matcher before anybody sees them, so a matcher that is
not known here only has fewer examples.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from safeconduct.call import Json
from safeconduct.policies.hosts import EmailPattern
from safeconduct.policies.match import (
    Argv,
    Matcher,
    NumberRange,
    PathMatcher,
    SpelledNumber,
    SpelledPath,
)
from safeconduct.policies.match_json import Shape
from safeconduct.policies.match_text import Email, Excluding, Host, Regex
from safeconduct.policies.match_url import UrlMatcher
from safeconduct.policies.shapes import Form, Type
from safeconduct.policies.urls import UrlPattern

from .argv import Element, is_any, listed, owner
from .hosts import example_hosts
from .matchers import AllOf, finite

# LIMIT: values for one argument, and for one element of an argv.
MAX_VALUES: Final = 48
MAX_ELEMENTS: Final = 4
_TEXTS: Final = ("x", "", "a", "A", "0", "x y", "x\ny", "x/y", "x@example.org", "-x", "xxxxxxxxx")
_NAMES: Final = ("x", "a", "xa", "ax")


def examples(matcher: Matcher, others: Iterable[Json] = ()) -> list[Json]:
    """Return some values that a matcher matches; ``others`` are tried as well."""
    found: list[Json] = []
    guesses = itertools.chain(_guess(matcher), others)
    for value in itertools.islice(guesses, MAX_VALUES * 8):
        if len(found) < MAX_VALUES and value not in found and matcher.matches(value):
            found.append(value)
    return found


def _guess(matcher: Matcher) -> Iterator[Json]:
    values = finite(matcher)
    if values is not None:
        yield from values
        return
    match matcher:
        case Excluding(base, _):
            yield from _guess(base)
        case AllOf(parts):
            for part in parts:
                yield from _guess(part)
        case Argv():
            yield from _argv(matcher)
        case NumberRange(low, high):
            yield from (low, high, (low + high) // 2, low + 0.5)
        case Shape():
            yield from (_shape(matcher.form), *_SHAPES)
        case _:
            yield from _texts(matcher)
    yield from _TEXTS
    yield from ("example.org", "x.example.org", "/", "/x", "https://example.org/", 0, 1, True, None)


def _texts(matcher: Matcher) -> Iterator[Json]:
    match matcher:
        case PathMatcher():
            yield from _paths(matcher)
        case UrlMatcher(patterns):
            yield from _in_turn([_urls(pattern) for pattern in patterns])
        case Host(patterns):
            yield from (host for one in patterns for host in example_hosts(one.labels))
        case Email(patterns):
            yield from _addresses(patterns)
        case Regex(patterns):
            yield from (text for pattern in patterns for text in _regex(pattern))
        case _:
            pass


_SHAPES: Final[tuple[Json, ...]] = ({}, [], {"x": "x"}, ["x"], [1], 1.5)


def _in_turn(streams: Sequence[Iterator[Json]]) -> Iterator[Json]:
    for batch in itertools.zip_longest(*streams):
        yield from (value for value in batch if value is not None)


def _paths(matcher: PathMatcher) -> Iterator[Json]:
    plain: list[Iterator[Json]] = [iter(sorted(matcher.exact))]
    for folder in matcher.folders:
        names = ("x", "x/y", ".env", "x/.env", "a", "a/b")
        plain.append(iter([f"{folder}{name}" for name in names]))
    plain += [_filled(glob.components) for glob in matcher.globs]
    yield from _in_turn(plain)


def _filled(components: Sequence[str], lead: str = "/") -> Iterator[Json]:
    """Yield paths of a pattern: its wildcards filled with names, `**` with none, one and two."""
    for deep, name in itertools.product(("", "x", "x/y", ".env"), _NAMES):
        parts = [
            deep if one == "**" else one.replace("*", name).replace("?", name[:1])
            for one in components
        ]
        yield lead + "/".join(part for part in parts if part)


def _urls(pattern: UrlPattern) -> Iterator[Json]:
    default = {"http": 80, "https": 443}[pattern.scheme]
    port = "" if pattern.port == default else f":{pattern.port}"
    for host in example_hosts(pattern.labels):
        start = f"{pattern.scheme}://{host}{port}"
        for path in _filled(pattern.path.components):
            tail = path if pattern.path.components[-1] or path == "/" else f"{path}/"
            yield (
                f"{start}{tail}?{pattern.query}" if pattern.query is not None else f"{start}{tail}"
            )


def _addresses(patterns: Sequence[EmailPattern]) -> Iterator[Json]:
    for pattern in patterns:
        local = pattern.pattern.partition("@")[0].lower()
        for host, name in itertools.product(example_hosts(pattern.host.labels), _NAMES):
            yield f"{local.replace('*', name)}@{host}"


def _argv(matcher: Argv) -> Iterator[Json]:
    elements = [_words(element) for element in matcher.elements]
    tails: tuple[list[str], ...] = ([], ["x"], ["x", "y"]) if matcher.rest else ([],)
    for tail in tails:
        for words in itertools.islice(itertools.product(*elements), MAX_VALUES):
            yield [*words, *tail]


def _words(element: Element) -> list[str]:
    if isinstance(element, str):
        return [element]
    words = listed(element)
    if words is not None:
        return sorted(words)[:MAX_ELEMENTS]
    if is_any(element):
        return ["x", "-x"]
    guesses = [text for text in _guess_words(owner(element)) if element(text)]
    return list(dict.fromkeys(guesses))[:MAX_ELEMENTS]


def _guess_words(found: object) -> Iterator[str]:
    match found:
        case SpelledNumber():
            yield from (str(found.range.low), str(found.range.high))
        case SpelledPath():
            for path in itertools.islice(_paths(found.paths), MAX_VALUES):
                yield str(path)
                yield str(path).removeprefix(found.workspace + "/")
        case Regex(patterns):
            yield from (text for pattern in patterns for text in _regex(pattern))
        case _:
            pass
    yield from _TEXTS


def _shape(form: Form) -> Json:
    """Return a value that a shape probably matches. LIMIT: recursion ends with the shape."""
    if form.enum is not None:
        return min(form.enum)
    match form.type:
        case Type.OBJECT:
            return {name: _shape(inner) for name, inner in form.properties.items()}
        case Type.ARRAY:
            return [_shape(form.items)] if form.items and form.max_items != 0 else []
        case Type.INTEGER | Type.NUMBER:
            low = form.minimum if form.minimum is not None else form.maximum
            return low if low is not None else 0
        case Type.BOOLEAN:
            return True
        case Type.NULL:
            return None
        case _:
            return "x"[: form.max_length]


def _regex(pattern: str) -> Iterator[str]:
    """Guess texts of a regular expression by filling its plainest parts."""
    for branch in pattern.split("|")[:8]:
        plain = re.sub(r"\(\?[a-zA-Z:]*|[()^$]|\\[bAz]", "", branch)
        for letter in ("x", "a", "0", "A"):
            text = re.sub(r"\[[^\]]*\]|\\[dwsS]|(?<!\\)\.", letter, plain)
            yield re.sub(r"\{[0-9,]*\}|[*+?]", "", text).replace("\\", "")
