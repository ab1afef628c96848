"""Policy lattice: rules of one tool held against each other. A yes is sure; a doubt is a no.

A grant says what every argument may be, a restriction only what some of them are (binding.py).
All comparisons are about Documents of one signature. A restriction also matches what is not of
the kind that it judges, which no matcher says, so kinds are held against each other here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from safeconduct.call import Bound, Json
from safeconduct.policies.binding import Rule, takes_lists
from safeconduct.policies.match import AnyValue, Argv, Literals, Matcher, PathMatcher
from safeconduct.policies.match_text import Email, Excluding, Host
from safeconduct.policies.match_url import UrlMatcher
from safeconduct.policies.signatures import FED, WORKSPACE_DEFAULT, Kind, Signature, fits

from .argv import listed
from .matchers import Only, disjoint, finite, intersect, subsumes
from .restriction import names_fed, restricting

# LIMIT: into how many smaller grants one is taken apart to be covered by several.
MAX_PIECES = 128
_SINGLE_KINDS = frozenset(
    {Kind.PATH, Kind.NEW_PATH, Kind.URL, Kind.HOST, Kind.EMAIL, Kind.TEXT, Kind.NUMBER}
)


@dataclass(frozen=True, slots=True)
class Scope:
    """The Calls that rules speak of: those of one signature in one workspace."""

    signature: Signature
    workspace: str

    def granted(self, rule: Rule, name: str) -> Matcher | None:
        """Return what an argument may be where a rule grants; None where it must be absent."""
        if rule.matchers is not None and name in rule.matchers:
            return rule.matchers[name]
        argument = self.signature.arguments.get(name)
        if argument is None and self.signature.closed:
            return None
        if rule.matchers is None or rule.rest or (argument and argument.free):
            return AnyValue()
        if argument is None or argument.default is None:
            return None
        default = argument.default
        return Only((self.workspace if default == WORKSPACE_DEFAULT else default,))

    def restricted(self, rule: Rule, name: str) -> Matcher | None:
        """Return what an argument may be where a rule restricts; None where it must be absent."""
        matchers = restricting(rule)
        if name in matchers:
            return matchers[name]
        known = name in self.signature.arguments or not self.signature.closed
        return AnyValue() if known else None

    def present(self, rule: Rule, name: str) -> bool:
        """Tell whether every Call that a rule matches surely has an argument."""
        if name in (rule.matchers or {}):
            return True
        argument = self.signature.arguments.get(name)
        return argument is not None and (argument.required or argument.default is not None)

    def _may_be_fed(self, rule: Rule, name: str) -> bool:
        """Tell whether a rule grants parts of shell text in which an argument is not known yet.

        One that names it grants none of them (commands.py).
        """
        return self.signature.closed and name in FED and not names_fed(rule, {name})

    def single(self, name: str) -> bool:
        """Tell whether an argument is surely no list."""
        argument = self.signature.arguments.get(name)
        return self.signature.closed and argument is not None and argument.kind in _SINGLE_KINDS

    def alike(self, name: str, one: Matcher, other: Matcher) -> bool:
        """Tell whether two matchers look at the same value: a list whole, or each element."""
        return self.single(name) or takes_lists(one) == takes_lists(other)

    def grant_covers(self, wide: Rule, narrow: Rule) -> bool:
        """Tell whether ``wide`` surely grants every Call that ``narrow`` grants."""
        if wide.when is not None and wide.when != narrow.when:
            return False
        if wide.matchers is None:
            return True
        for name, matcher in wide.matchers.items():
            found = self.granted(narrow, name)
            if found is None or not self.present(narrow, name) or self._may_be_fed(narrow, name):
                return False
            if not self._covers(name, matcher, found):
                return False
        return wide.rest or self._no_others(wide, narrow)

    def _covers(self, name: str, wide: Matcher, narrow: Matcher) -> bool:
        if isinstance(wide, AnyValue):
            return True
        return self.alike(name, wide, narrow) and subsumes(wide, self._typed(name, narrow))

    def _typed(self, name: str, matcher: Matcher) -> Matcher:
        """Leave of a few values those that a Document can hold: `3` is a number here, or a text."""
        # What the arguments of other tools are called checks nothing.
        argument = self.signature.arguments.get(name) if self.signature.closed else None
        found = finite(matcher) if argument is not None else None
        if argument is None or found is None:
            return matcher
        values = [one for one in found if matcher.matches(one)]
        if argument.kind is Kind.NUMBER:
            typed = [one for one in values if _is_number(one)]
        elif argument.kind in _SINGLE_KINDS:
            typed = [one for one in values if isinstance(one, str)]
        else:
            return matcher
        return Only(tuple(typed))

    def _no_others(self, wide: Rule, narrow: Rule) -> bool:
        """Tell whether ``wide`` lets pass all arguments that it does not name."""
        open_ended = narrow.matchers is None or narrow.rest
        if open_ended and not self.signature.closed:
            return False
        for name in {*self.signature.arguments, *(narrow.matchers or {})} - {
            *(wide.matchers or {})
        }:
            argument = self.signature.arguments.get(name)
            found = self.granted(narrow, name)
            if found is None or (argument is not None and argument.free):
                continue
            let_pass = self.granted(wide, name)
            if let_pass is None or not self._covers(name, let_pass, found):
                return False
        return True

    def restriction_covers(self, wide: Rule, grant: Rule | None, narrow: Rule | None) -> bool:
        """Tell whether ``wide`` surely restricts every Call that is granted and restricted so."""
        whens = [rule.when for rule in (grant, narrow) if rule is not None]
        if wide.when is not None and wide.when not in whens:
            return False
        for name, matcher in restricting(wide).items():
            if not self._restricts(name, matcher, grant, narrow):
                return False
        return True

    def _restricts(self, name: str, wide: Matcher, grant: Rule | None, narrow: Rule | None) -> bool:
        if not any(rule is not None and self.present(rule, name) for rule in (grant, narrow)):
            return False
        if isinstance(wide, AnyValue):
            return True
        # Of a list, all elements are as the grant says and one is as the restriction says.
        other = restricting(narrow).get(name) if narrow else None
        if other is not None and not self._binds_as_widely(wide, other):
            other = None
        bounds = [
            matcher
            for matcher in (self.granted(grant, name) if grant else None, other)
            if matcher is not None
            and not isinstance(matcher, AnyValue)
            and self.alike(name, wide, matcher)
        ]
        if not bounds:
            return False
        narrowest = bounds[0] if len(bounds) == 1 else intersect(*bounds)
        return subsumes(wide, self._typed(name, narrowest))

    def _binds_as_widely(self, wide: Matcher, narrow: Matcher) -> bool:
        """Tell whether what one restriction cannot judge, the other cannot judge either."""
        if self.signature.closed or wide.kind is narrow.kind or narrow.kind is Kind.JSON:
            return True
        return narrow.kind is Kind.SCALAR and wide.kind in (Kind.TEXT, Kind.NUMBER)

    def _judges_all(self, restriction: Matcher, grant: Matcher) -> bool:
        """Tell whether a restriction can judge every value that a grant takes."""
        if self.signature.closed or restriction.kind in (grant.kind, Kind.JSON):
            return True
        values = finite(grant)
        if values is not None:
            return all(fits(restriction.kind, one) for one in values if grant.matches(one))
        return restriction.kind is Kind.SCALAR and grant.kind in (Kind.TEXT, Kind.NUMBER)

    def apart(self, grant: Rule, other: Rule, *, grants: bool) -> bool:
        """Tell whether surely no Call is granted by one rule and matched by another.

        ``grants``: the other one grants too; else it restricts.
        """
        names = {*(grant.matchers or {}), *(other.matchers or {})}
        return any(self._apart(name, grant, other, grants=grants) for name in names)

    def _apart(self, name: str, grant: Rule, other: Rule, *, grants: bool) -> bool:
        mine = self.granted(grant, name)
        theirs = self.granted(other, name) if grants else self.restricted(other, name)
        if mine is None or theirs is None:
            # Absent on one side, so they are apart where the other side must have it.
            rule = other if mine is None else grant
            # A restriction also binds where another name may be taken for the one it judges.
            alike = not grants and mine is None and _names_alike(name, grant)
            return name in (rule.matchers or {}) and not alike
        if AnyValue in (type(mine), type(theirs)):
            return False
        if not grants and not self._judges_all(theirs, mine):
            return False
        return self.alike(name, mine, theirs) and disjoint(mine, theirs)

    def restrictions_apart(self, one: Rule, other: Rule) -> bool:
        """Tell whether surely no Call is matched by two restrictions."""
        mine, theirs = restricting(one), restricting(other)
        # Of other tools, what neither of the two can judge is matched by both.
        return self.signature.closed and any(
            (self.single(name) or (takes_lists(mine[name]) and takes_lists(theirs[name])))
            and disjoint(mine[name], theirs[name])
            for name in mine.keys() & theirs.keys()
        )

    def pieces(self, rule: Rule) -> Iterator[Rule]:
        """Yield smaller grants that together surely grant all that ``rule`` grants."""
        waiting = [(rule, [*(rule.matchers or {})])]
        count = 0
        while waiting:
            piece, names = waiting.pop()
            while names and not self._splits(names[-1], piece):
                names = names[:-1]
            parts = self._split(piece, names[-1]) if names else []
            if not names or count + len(waiting) + len(parts) > MAX_PIECES:
                count += 1
                yield piece
                continue
            waiting += [(part, names[:-1]) for part in parts]

    def _splits(self, name: str, rule: Rule) -> bool:
        matcher = (rule.matchers or {})[name]
        return (self.single(name) or isinstance(matcher, Argv)) and len(split(matcher)) > 1

    def _split(self, rule: Rule, name: str) -> list[Rule]:
        return [
            replace(rule, matchers={**(rule.matchers or {}), name: part})
            for part in split((rule.matchers or {})[name])
        ]


def _names_alike(name: str, grant: Rule) -> bool:
    return any(name.casefold() == other.casefold() for other in grant.matchers or {})


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def split(matcher: Matcher) -> list[Matcher]:
    """Return matchers that together match exactly what one matches, of a value that is no list."""
    match matcher:
        case Excluding(base, exclude):
            return [Excluding(part, exclude) for part in split(base)]
        case PathMatcher():
            return [*_split_paths(matcher)]
        case UrlMatcher(patterns):
            return [UrlMatcher((pattern,)) for pattern in patterns]
        case Host(patterns) if patterns:
            return [Host((pattern,)) for pattern in patterns]
        case Email(patterns) if patterns:
            return [Email((pattern,)) for pattern in patterns]
        case Literals(texts):
            return [Literals(frozenset({text})) for text in sorted(texts)]
        case Argv():
            return [*_split_argv(matcher)]
        case _:
            return [matcher]


def _split_paths(matcher: PathMatcher) -> Iterator[PathMatcher]:
    covered = {folder.rstrip("/") or "/" for folder in matcher.folders}
    for path in sorted(matcher.exact - covered):
        yield PathMatcher((path,), frozenset({path}), (), ())
    for folder in matcher.folders:
        itself = folder.rstrip("/") or "/"
        yield PathMatcher((f"{folder}**",), frozenset({itself}), (folder,), ())
    for glob in matcher.globs:
        yield PathMatcher((glob.pattern,), frozenset(), (), (glob,))


def _split_argv(matcher: Argv) -> Iterator[Argv]:
    for at, element in enumerate(matcher.elements):
        words = listed(element)
        if words is not None and len(words) > 1:
            for word in sorted(words):
                elements = (*matcher.elements[:at], word, *matcher.elements[at + 1 :])
                yield from _split_argv(replace(matcher, elements=elements))
            return
    yield matcher


def bound_within(narrow: Bound, wide: Bound) -> bool:
    """Tell whether one Bound lets pass at most what another does, of the same Calls."""
    return (
        (narrow.unit, narrow.per, narrow.window_ms) == (wide.unit, wide.per, wide.window_ms)
        and narrow.most <= wide.most
        and narrow.reserve >= wide.reserve
    )
