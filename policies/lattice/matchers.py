"""Policy lattice: which of two matchers allows more. A yes is sure; a doubt is a no.

``subsumes(wide, narrow)``: whatever ``narrow`` matches, ``wide`` matches. ``disjoint``: nothing
matches both. ``intersect``: what both match. A kind of matcher that is not known here is equal
to itself and subsumes nothing else, so that a new one can only make answers less sure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias

from safeconduct.call import Json
from safeconduct.policies.match import (
    AnyValue,
    Argv,
    Literals,
    Matcher,
    NumberRange,
    PathMatcher,
    TextLength,
)
from safeconduct.policies.match_json import Shape
from safeconduct.policies.match_text import Email, Excluding, Host, Regex
from safeconduct.policies.match_url import UrlMatcher
from safeconduct.policies.signatures import Kind

from .argv import argv_disjoint, argv_subsumes
from .hosts import (
    emails_disjoint,
    emails_subsume,
    hosts_disjoint,
    hosts_subsume,
    url_disjoint,
    url_subsumes,
)
from .inclusion import Language, afford, search
from .shapes import shape_subsumes, spelled

_Comparison: TypeAlias = Callable[[Matcher, Matcher], bool]
# LIMIT: texts of one list that are held against a matcher one by one.
MAX_LITERALS: Final = 4096
# LIMIT: pairs of patterns of two matchers; above it, only equal ones are compared.
MAX_PAIRS: Final = 100_000


@dataclass(frozen=True, slots=True)
class AllOf:
    """What every one of some matchers matches."""

    parts: tuple[Matcher, ...]

    @property
    def kind(self) -> Kind:
        """What the argument must be: what the first part says."""
        return self.parts[0].kind

    def matches(self, value: Json) -> bool:
        return all(part.matches(value) for part in self.parts)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(word for part in self.parts for word in part.words)

    def describe(self) -> str:
        return ", and ".join(part.describe() for part in self.parts)


@dataclass(frozen=True, slots=True)
class Only:
    """Exactly these values: an argument that stays at its default, or texts of one type."""

    values: tuple[Json, ...]
    kind: Kind = Kind.JSON

    def matches(self, value: Json) -> bool:
        return any(type(value) is type(one) and value == one for one in self.values)

    @property
    def words(self) -> tuple[str, ...]:
        return ()

    def describe(self) -> str:
        return f"exactly {', '.join(map(repr, self.values))}"


def subsumes(wide: Matcher, narrow: Matcher) -> bool:
    """Tell whether ``wide`` surely matches every value that ``narrow`` matches."""
    if isinstance(wide, AnyValue) or wide == narrow:
        return True
    if not _affords(wide, narrow):
        return False
    if isinstance(wide, AllOf):
        return all(subsumes(part, narrow) for part in wide.parts)
    if isinstance(wide, Excluding):
        return subsumes(wide.base, narrow) and disjoint(wide.exclude, narrow)
    values = finite(narrow)
    if values is not None:
        return all(wide.matches(value) for value in values if narrow.matches(value))
    if isinstance(wide, PathMatcher) and not isinstance(narrow, PathMatcher):
        within, without = path_parts(narrow)
        return bool(within) and search(within, [*without, path_language(wide)]).none
    if isinstance(narrow, AllOf):
        return any(subsumes(wide, part) for part in narrow.parts)
    if isinstance(narrow, Excluding):
        return subsumes(wide, narrow.base)
    return any(comparison(wide, narrow) for comparison in _SUBSUMES)


def disjoint(one: Matcher, other: Matcher) -> bool:
    """Tell whether surely no value matches both."""
    if not _affords(one, other):
        return False
    for first, second in ((one, other), (other, one)):
        values = finite(first)
        if values is not None:
            return not any(first.matches(v) and second.matches(v) for v in values)
    (mine, mine_not), (theirs, theirs_not) = path_parts(one), path_parts(other)
    if mine and theirs:
        return search([*mine, *theirs], [*mine_not, *theirs_not]).none
    for first, second in ((one, other), (other, one)):
        if isinstance(first, AllOf):
            return any(disjoint(part, second) for part in first.parts)
        if isinstance(first, Excluding):
            return disjoint(first.base, second) or subsumes(first.exclude, second)
    types = {_type(one), _type(other)}
    if None not in types and len(types) > 1:
        return True
    return any(comparison(one, other) for comparison in _DISJOINT)


def _affords(one: Matcher, other: Matcher) -> bool:
    pairs = _size(one) * _size(other)
    return pairs <= MAX_PAIRS and afford(pairs)


def _size(matcher: Matcher) -> int:
    """Count what two matchers are compared by: patterns or texts."""
    if isinstance(matcher, PathMatcher | UrlMatcher | Host | Email | Regex):
        return len(matcher.patterns) + 1
    if isinstance(matcher, Excluding):
        return _size(matcher.base) + _size(matcher.exclude)
    return len(matcher.texts) if isinstance(matcher, Literals) else 1


def intersect(one: Matcher, other: Matcher) -> Matcher:
    """Return what matches exactly the values that both match."""
    if subsumes(one, other):
        return other
    if subsumes(other, one):
        return one
    both = [item.parts if isinstance(item, AllOf) else (item,) for item in (one, other)]
    return AllOf((*both[0], *both[1]))


def finite(matcher: Matcher) -> Sequence[Json] | None:
    """Return values among which are all that a matcher can match, where they are few."""
    if isinstance(matcher, Only):
        return matcher.values
    if isinstance(matcher, Literals) and len(matcher.texts) <= MAX_LITERALS:
        return [value for text in sorted(matcher.texts) for value in spelled(text)]
    if isinstance(matcher, NumberRange) and matcher.low == matcher.high:
        return (matcher.low, float(matcher.low))
    if isinstance(matcher, PathMatcher) and not (matcher.folders or matcher.globs):
        return sorted(matcher.exact)
    if isinstance(matcher, AllOf):
        return next(filter(None, map(finite, matcher.parts)), None)
    return finite(matcher.base) if isinstance(matcher, Excluding) else None


@lru_cache(maxsize=1024)
def path_language(matcher: PathMatcher) -> Language:
    """Return the patterns of a path matcher as one language."""
    exact = [tuple(path[1:].split("/")) for path in sorted(matcher.exact)]
    folders = [(*folder[1:].split("/")[:-1], "**") for folder in matcher.folders]
    return Language([*exact, *folders, *(glob.components for glob in matcher.globs)])


def path_parts(matcher: Matcher) -> tuple[list[Language], list[Language]]:
    """Return path patterns that all must match and that none may; more may be demanded."""
    if isinstance(matcher, PathMatcher):
        return [path_language(matcher)], []
    if isinstance(matcher, Excluding):
        within, without = path_parts(matcher.base)
        if isinstance(matcher.exclude, PathMatcher):
            without = [*without, path_language(matcher.exclude)]
        return within, without
    if isinstance(matcher, AllOf):
        found = [path_parts(part) for part in matcher.parts]
        return [x for one, _ in found for x in one], [x for _, one in found for x in one]
    return [], []


def _path_subsumes(wide: Matcher, narrow: Matcher) -> bool:
    if not isinstance(wide, PathMatcher) or not isinstance(narrow, PathMatcher):
        return False
    plain = all(map(wide.matches, narrow.exact)) and all(
        folder.startswith(wide.folders) for folder in narrow.folders
    )
    if not narrow.globs and (plain or not wide.globs):
        return plain
    return search([path_language(narrow)], [path_language(wide)]).none


def _type(matcher: Matcher) -> str | None:
    """Return what JSON type a matcher admits. Two of different types have nothing in common."""
    if isinstance(matcher, PathMatcher | UrlMatcher | TextLength | Regex | Host | Email):
        return "text"
    if isinstance(matcher, Argv):
        return "list"
    return "number" if isinstance(matcher, NumberRange) else None


def _numbers_subsume(wide: Matcher, narrow: Matcher) -> bool:
    if isinstance(wide, NumberRange) and isinstance(narrow, NumberRange):
        within = wide.low <= narrow.low and narrow.high <= wide.high
        return within and (wide.restricts or not narrow.restricts)
    return False


def _numbers_disjoint(one: Matcher, other: Matcher) -> bool:
    if isinstance(one, NumberRange) and isinstance(other, NumberRange):
        return one.high < other.low or other.high < one.low
    return False


def _texts_subsume(wide: Matcher, narrow: Matcher) -> bool:
    if isinstance(wide, TextLength) and isinstance(narrow, TextLength):
        return narrow.max_bytes <= wide.max_bytes
    if isinstance(wide, Regex) and isinstance(narrow, Regex):
        # The restricting form of a pattern matches what the granting one does (match_text.py).
        same = {*narrow.patterns} <= {*wide.patterns}
        return same and (wide.restricts or not narrow.restricts)
    return False


def _names_subsume(wide: Matcher, narrow: Matcher) -> bool:
    if isinstance(wide, UrlMatcher) and isinstance(narrow, UrlMatcher):
        return url_subsumes(wide.patterns, narrow.patterns)
    if isinstance(wide, Host) and isinstance(narrow, Host):
        return hosts_subsume(wide.patterns, narrow.patterns)
    if isinstance(wide, Email) and isinstance(narrow, Email):
        return emails_subsume(wide.patterns, narrow.patterns)
    return False


def _names_disjoint(one: Matcher, other: Matcher) -> bool:
    if isinstance(one, UrlMatcher) and isinstance(other, UrlMatcher):
        return url_disjoint(one.patterns, other.patterns)
    if isinstance(one, Host) and isinstance(other, Host):
        return hosts_disjoint(one.patterns, other.patterns)
    if isinstance(one, Email) and isinstance(other, Email):
        return emails_disjoint(one.patterns, other.patterns)
    return False


def _lists_subsume(wide: Matcher, narrow: Matcher) -> bool:
    if isinstance(wide, Argv) and isinstance(narrow, Argv):
        return argv_subsumes(wide, narrow)
    if isinstance(wide, Shape) and isinstance(narrow, Shape):
        return shape_subsumes(wide, narrow)
    return False


def _lists_disjoint(one: Matcher, other: Matcher) -> bool:
    return isinstance(one, Argv) and isinstance(other, Argv) and argv_disjoint(one, other)


_SUBSUMES: Final[tuple[_Comparison, ...]] = (
    _path_subsumes,
    _numbers_subsume,
    _texts_subsume,
    _names_subsume,
    _lists_subsume,
)
_DISJOINT: Final[tuple[_Comparison, ...]] = (_numbers_disjoint, _names_disjoint, _lists_disjoint)
