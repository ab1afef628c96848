"""Policy lattice: two argv matchers, element by element. A yes is sure; a doubt is a no."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

from safeconduct.policies.match import AnyValue, Argv, SpelledNumber, SpelledPath, TextLength
from safeconduct.policies.match_text import Regex

Element: TypeAlias = str | Callable[[str], bool]


def owner(element: Element) -> object:
    """Return what decides an element: a literal text, a set of words, or the matcher behind it."""
    return element if isinstance(element, str) else getattr(element, "__self__", None)


def is_any(element: Element) -> bool:
    """Tell whether every word matches."""
    return isinstance(owner(element), AnyValue)


def argv_subsumes(wide: Argv, narrow: Argv) -> bool:
    """Tell whether ``wide`` surely matches every list that ``narrow`` matches."""
    count = len(wide.elements)
    if len(narrow.elements) < count or (narrow.rest and not wide.rest):
        return False
    if len(narrow.elements) > count and not wide.rest:
        return False
    return all(map(element_subsumes, wide.elements, narrow.elements))


def argv_disjoint(one: Argv, other: Argv) -> bool:
    """Tell whether surely no list matches both."""
    if len(one.elements) > len(other.elements):
        one, other = other, one
    if len(one.elements) < len(other.elements) and not one.rest:
        return True
    return any(map(element_disjoint, one.elements, other.elements))


def element_subsumes(wide: Element, narrow: Element) -> bool:
    """Tell whether one element surely matches every word that another matches."""
    if is_any(wide):
        return True
    words = listed(narrow)
    if words is not None:
        return all(_matches(wide, word) for word in words)
    from .matchers import subsumes

    match owner(wide), owner(narrow):
        case SpelledNumber() as one, SpelledNumber() as other:
            within = one.range.low <= other.range.low and other.range.high <= one.range.high
            return within and (one.range.restricts or not other.range.restricts)
        case SpelledPath() as one, SpelledPath() as other:
            return one.workspace == other.workspace and subsumes(one.paths, other.paths)
        case (TextLength() | Regex()) as one, (TextLength() | Regex()) as other:
            return subsumes(one, other)
        case one, other:
            return one is not None and one is other


def element_disjoint(one: Element, other: Element) -> bool:
    """Tell whether surely no word matches both elements."""
    for first, second in ((one, other), (other, one)):
        words = listed(first)
        if words is not None:
            return not any(_matches(second, word) for word in words)
    match owner(one), owner(other):
        case SpelledNumber() as mine, SpelledNumber() as theirs:
            # Two restrictions share the words that are no plain number.
            if mine.range.restricts and theirs.range.restricts:
                return False
            return mine.range.high < theirs.range.low or theirs.range.high < mine.range.low
        case _:
            return False


def listed(element: Element) -> frozenset[str] | None:
    """Return all words that match, where an element lists them."""
    found = owner(element)
    if isinstance(found, str):
        return frozenset({found})
    return cast("frozenset[str]", found) if isinstance(found, frozenset) else None


def _matches(element: Element, word: str) -> bool:
    return element == word if isinstance(element, str) else element(word)
