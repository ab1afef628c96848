"""Policy lattice: a Call that shows a doubt to be right, verified with `decide` on both sides."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from safeconduct.call import Decision, Document, Effect, Facts, Json
from safeconduct.policies.binding import Rule, takes_lists
from safeconduct.policies.decision import decide
from safeconduct.policies.match import AnyValue, Matcher
from safeconduct.policies.rules import Judged
from safeconduct.policies.signatures import Kind, Signature

from .difference_shell import fed_calls, joined_calls, writing_calls
from .doubt import Doubt
from .examples import examples
from .inclusion import Language, search
from .matchers import path_parts
from .profiles import profile_widenings
from .restriction import restricting
from .rules import Scope, bound_within

# LIMIT: Calls that are judged to find one example.
MAX_TRIED: Final = 900
# LIMIT: shell texts among them, in which an argument is not known yet.
MAX_TEXTS: Final = 300
_PATHS: Final = frozenset({Kind.PATH, Kind.NEW_PATH, Kind.TOOL_PATH})
_SEVERITY: Final = {Effect.ALLOW: 0, Effect.ASK: 1, Effect.DENY: 2}
_HOUR_MS: Final = 3_600_000
_DAY_MS: Final = 24 * _HOUR_MS
_NOON_MS: Final = 4 * _DAY_MS + 12 * _HOUR_MS
_WORD = re.compile(r"""["']([^"']*)["']|(-?[0-9]+)""")


@dataclass(frozen=True, slots=True)
class Sides:
    """Both policies in one role; None where a policy has no such role, and so allows nothing."""

    old: Judged | None
    new: Judged | None
    role: str | None

    def decide(self, document: Document, facts: Facts) -> tuple[Decision | None, Decision] | None:
        """Judge by both; None where the new one refuses, which no example does."""
        after = decide(self.new, document, facts) if self.new is not None else None
        if after is None or after.effect is Effect.DENY:
            return None
        return decide(self.old, document, facts) if self.old is not None else None, after


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A Call, what it was judged by, and what each policy said; None is a missing role."""

    document: Document
    facts: Facts
    old: Decision | None
    new: Decision


def find_example(sides: Sides, tool: str, doubt: Doubt, rules: Sequence[Rule]) -> Case | None:
    """Look for a Call that both policies judge and the new one more kindly.

    ``rules`` are all rules of the tool on either side: their patterns are where the edges are.
    """
    if sides.new is None:
        return None
    signature = sides.new.signature(tool) or Signature()
    scope = Scope(signature, sides.new.workspace)
    shows = _SHOWS.get(doubt.code, _is_kinder)
    if doubt.code == "diff.joined":
        documents = joined_calls(scope.workspace, rules)
    else:
        documents = _calls(scope, tool, doubt, rules)
    calls = list(itertools.islice(documents, MAX_TRIED))
    calls += itertools.islice(_in_text(sides, tool, calls, rules), MAX_TEXTS)
    for document, facts in _tries(calls, _situations(sides.role, rules)):
        decisions = sides.decide(document, facts)
        if decisions is not None and shows(*decisions):
            before, after = decisions
            return Case(document=document, facts=facts, old=before, new=after)
    return None


def _in_text(
    sides: Sides, tool: str, calls: Sequence[Document], rules: Sequence[Rule]
) -> Iterator[Document]:
    """Yield shell texts whose parts are Calls like these, with an input that nobody knows."""
    if sides.new is None:
        return
    if tool == "shell.run":
        yield from fed_calls(sides.new.workspace, rules)
    if tool == "fs.write":
        policies = [*(sides.old.parts if sides.old is not None else ()), *sides.new.parts]
        found = (policy.rules_of("shell.run") for policy in policies)
        programs = [rule for one in found if one is not None for rule in one.all]
        paths = dict.fromkeys(str(call.arguments.get("path")) for call in calls)
        yield from writing_calls(sides.new.workspace, programs, paths)


def _tries(
    calls: Sequence[Document], situations: Sequence[Facts]
) -> Iterator[tuple[Document, Facts]]:
    """Yield every call in the plainest situation, then the plainest calls in every other one."""
    for document in calls:
        yield document, situations[0]
    others = situations[1:]
    for document in calls[: MAX_TRIED // max(1, len(others))]:
        for facts in others:
            yield document, facts


def _is_kinder(before: Decision | None, after: Decision) -> bool:
    was = before.effect if before is not None else Effect.DENY
    return _SEVERITY[after.effect] < _SEVERITY[was]


def _runs_with_more(before: Decision | None, after: Decision) -> bool:
    if before is None or _is_kinder(before, after):
        return after.effect is not Effect.DENY
    if before.profile is None or after.profile is None:
        return False
    return next(profile_widenings(before.profile, after.profile), None) is not None


def _counts_less(before: Decision | None, after: Decision) -> bool:
    if before is None or after.effect is Effect.DENY:
        return False
    return not all(
        any(bound_within(mine, bound) for mine in after.obligations) for bound in before.obligations
    )


def _runs_unsigned(before: Decision | None, after: Decision) -> bool:
    if before is None or Effect.DENY in (before.effect, after.effect):
        return False
    return before.irreversible and not after.irreversible


_SHOWS: Final[Mapping[str, Callable[[Decision | None, Decision], bool]]] = {
    "diff.profile": _runs_with_more,
    "diff.bounds": _counts_less,
    "diff.reversible": _runs_unsigned,
}


def _situations(role: str | None, rules: Sequence[Rule]) -> list[Facts]:
    """Return facts in which conditions differ; one is enough where there is no `when`."""
    plain = Facts(role=role, now_ms=_NOON_MS)
    conditions = [rule.when for rule in rules if rule.when is not None]
    if not conditions:
        return [plain]
    words = [found for when in conditions for found in _WORD.findall(when.text)]
    counts = sorted({0, *(int(n) + step for _, n in words if n for step in (0, 1) if int(n) >= 0)})
    names = [text for text, _ in words if text]
    days = (4, 1, 2)  # 1970-01-05 was a Monday, the 2nd a Friday, the 3rd a Saturday.
    found = [
        Facts(role=role, calls=count, denied=count, now_ms=day * _DAY_MS + hour * _HOUR_MS + 1)
        for count in counts[:6]
        for day, hour in itertools.product(days, (3, 8, 12, 23))
    ]
    found += [
        Facts(role=role, caller=name, origin=name, now_ms=_NOON_MS)
        for name in [*names[:8], "somebody"]
    ]
    return [plain, Facts(role=role), *reversed(found)][:80]


def _calls(scope: Scope, tool: str, doubt: Doubt, rules: Sequence[Rule]) -> Iterator[Document]:
    """Yield Calls that the doubted rule grants, those at the edges of other rules among them."""
    names = {name for rule in rules for name in rule.matchers or {}} | {*scope.signature.arguments}
    choices: dict[str, list[Json | None]] = {}
    for name in sorted(names):
        found = scope.granted(doubt.rule, name)
        if found is None:
            continue
        values: list[Json | None] = list(_values(scope, name, found, doubt, rules))
        if not scope.present(doubt.rule, name):
            # None stands for an absent argument.
            values = [None, *values]
        if not values:
            return
        choices[name] = values
    if not scope.signature.closed and (doubt.rule.matchers is None or doubt.rule.rest):
        # One that no rule names, put last so that the plainest examples come first.
        unnamed = next(
            name for count in itertools.count() if (name := f"other{count}") not in names
        )
        choices[unnamed] = [None, "x"]
    for chosen in _combinations([*choices.values()]):
        arguments = {
            name: value for name, value in zip(choices, chosen, strict=True) if value is not None
        }
        yield Document(tool=tool, arguments=arguments, workspace=scope.workspace)


def _combinations(choices: Sequence[Sequence[Json | None]]) -> Iterator[Sequence[Json | None]]:
    total = 1
    for values in choices:
        total *= len(values)
    if total <= MAX_TRIED:
        yield from itertools.product(*choices)
        return
    draw = random.Random(0)  # noqa: S311 - the same examples in every run
    # First each value of one argument with the first of the others, then whatever comes.
    first = [values[0] for values in choices]
    for at, values in enumerate(choices):
        for value in values:
            yield [*first[:at], value, *first[at + 1 :]]
    while True:
        yield [draw.choice(values) for values in choices]


def _values(
    scope: Scope, name: str, matcher: Matcher, doubt: Doubt, rules: Sequence[Rule]
) -> list[Json]:
    others = [restricting(rule)[name] for rule in rules if name in restricting(rule)]
    focus = restricting(doubt.focus).get(name) if doubt.focus else None
    guesses: list[Json] = [*_edges(scope, name, matcher, focus, others)]
    for other in ([focus] if focus is not None else []) + others:
        guesses += examples(other)[:12]
    guesses += [word for rule in rules if rule.when for word in _words(rule.when.text)]
    if isinstance(matcher, AnyValue):
        return _unique([*guesses, *examples(matcher)])
    found = [*examples(matcher, guesses), *(one for one in guesses if matcher.matches(one))]
    values = _unique(sorted(found, key=lambda one: not _by_focus(focus, one)))
    if scope.single(name) or takes_lists(matcher):
        return values
    return [*values, *([value, other] for value, other in itertools.pairwise(values[:6]))]


def _by_focus(focus: Matcher | None, value: Json) -> bool:
    return focus is not None and focus.matches(value)


def _words(text: str) -> Iterator[Json]:
    for word, number in _WORD.findall(text):
        yield int(number) if number else word


def _unique(values: Sequence[Json]) -> list[Json]:
    found: list[Json] = []
    for value in values:
        if not any(type(value) is type(one) and value == one for one in found):
            found.append(value)
    return found


def _edges(
    scope: Scope, name: str, matcher: Matcher, focus: Matcher | None, others: Sequence[Matcher]
) -> Iterator[Json]:
    """Yield paths inside the grant and the focus and outside of other rules, found by walking."""
    argument = scope.signature.arguments.get(name)
    if argument is None or argument.kind not in _PATHS:
        return
    within, without = path_parts(matcher)
    more, less = path_parts(focus) if focus is not None else ([], [])
    musts = [*within, *more] or [Language([("**",)])]
    outside = [language for other in others for language in path_parts(other)[0]]
    mine = {id(language) for language in musts}
    apart = [language for language in outside if id(language) not in mine]
    tries: list[tuple[list[Language], list[Language]]]
    tries = [([], nots) for nots in (apart, *([one] for one in apart[:16]), [])]
    # What another rule takes away from its own patterns lies outside of it as well.
    for other in others[:16]:
        bases, excluded = path_parts(other)
        left = [one for one in apart if id(one) not in {id(base) for base in bases}]
        tries += [([one], left) for one in excluded] + [([one], []) for one in excluded]
    for inside, nots in tries:
        answer = search([*musts, *inside], [*without, *less, *nots])
        if answer.example is not None:
            yield "/" + "/".join(answer.example)
