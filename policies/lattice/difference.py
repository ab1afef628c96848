"""Policy lattice: does a new policy allow anything that the old one refused?

Rule is held against rule (lattice_rules.py). Where the lattice is not sure that nothing became
wider, an example is looked for; a Widening that has one was verified with `decide` on both. One
that has none means: nobody can say that the new policy is not wider, so a person must look.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from safeconduct.call import Document, Effect, Facts, Json
from safeconduct.errors import PolicyError
from safeconduct.policies.binding import Rule
from safeconduct.policies.match import AnyValue
from safeconduct.policies.rules import Judged, Policy
from safeconduct.policies.signatures import BUILT_IN, RESERVED, Kind
from safeconduct.policies.wildcards import is_ours, is_wildcard

from .difference_examples import Case, Sides, find_example
from .difference_rules import doubts
from .difference_settings import SETTINGS, settings
from .doubt import Doubt
from .inclusion import Effort, Language, bounded, classes
from .profiles import profile_widenings
from .rules import Scope

# LIMIT: widenings that are told; a policy that has more is another policy.
MAX_WIDENINGS: Final = 200
# LIMIT: steps of all comparisons: about 20 s. Beyond, nothing is sure any more, which is told.
MAX_EFFORT: Final = 100_000_000
_AROUND: Final = frozenset({"diff.allows", "diff.asks", "diff.unasked"})
_ANY: Final = AnyValue()
# What is read as the second kind is also checked as the first.
_STRICTER: Final = frozenset({(Kind.SCALAR, Kind.TEXT), (Kind.SCALAR, Kind.NUMBER)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Widening:
    """One way in which the new policy is, or may be, wider.

    ``example`` is a Call in its canonical form that shows it, with the facts it was judged by;
    without one it is a doubt. ``file`` and ``line`` lead to the rule of the new policy.
    """

    code: str
    message: str
    role: str | None = None
    tool: str = ""
    rule: str = ""
    file: str = ""
    line: int = 0
    column: int = 0
    example: Document | None = None
    facts: Facts | None = None
    old: Effect | None = None
    new: Effect | None = None

    @property
    def certain(self) -> bool:
        """Tell whether this is known, and no mere doubt."""
        return self.example is not None or self.code in SETTINGS

    def to_json(self) -> dict[str, Json]:
        """Return it as plain JSON."""
        shown = self.example
        return {
            "code": self.code,
            "certain": self.certain,
            "message": self.message,
            "role": self.role,
            "tool": self.tool,
            "rule": self.rule,
            "file": self.file,
            "line": self.line,
            "example": None
            if shown is None
            else {"tool": shown.tool, "arguments": shown.arguments},
            "old": self.old,
            "new": self.new,
        }


def difference(old: Judged, new: Judged) -> tuple[Widening, ...]:
    """Return every way in which ``new`` may allow more than ``old``; none means surely none.

    Both must be for one workspace. Narrower policies and equal ones give nothing.
    """
    if old.workspace != new.workspace:
        message = "the two policies are for different workspaces, so nothing can be compared"
        return (Widening(code="diff.workspace", message=message),)
    with bounded(Effort(MAX_EFFORT)):
        return tuple(itertools.islice(_differences(old, new), MAX_WIDENINGS))


def _differences(old: Judged, new: Judged) -> Iterator[Widening]:
    for code, message in settings(old, new):
        yield Widening(code=code, message=message)
    for role in _roles(old, new):
        sides = Sides(_judged(old, role), _judged(new, role), role)
        yield from _in_role(sides)


def _roles(old: Judged, new: Judged) -> list[str | None]:
    named = {name for side in (old, new) for part in side.parts for name in part.roles}
    return [None, *sorted(named)]


def _judged(policy: Judged, role: str | None) -> Judged | None:
    try:
        return policy.for_role(role)
    except PolicyError:
        return None


def _in_role(sides: Sides) -> Iterator[Widening]:
    """Yield what is wider in one role: every old part must be held by some new part."""
    if sides.new is None:
        return
    if sides.old is not None:
        names, _ = _tool_names([*sides.old.parts, *sides.new.parts])
        for tool in names:
            yield from _kinds(sides.old, sides.new, tool, sides.role)
    for at, old in enumerate(sides.old.parts if sides.old is not None else (None,)):
        # The part in the same place is most likely the one that holds it.
        parts = sorted(enumerate(sides.new.parts), key=lambda item: abs(item[0] - at))
        ways: list[_Doubts] = []
        for _, new in parts:
            ways.append(_doubts(old, new, sides.new))
            if not ways[-1].count:
                break
        yield from _told(sides, min(ways, key=lambda way: way.count))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Doubts:
    """What may be wider in one part of the new policy than in one of the old one, by tool."""

    old: Policy | None
    new: Policy
    tools: Mapping[str, Sequence[Doubt]]
    sure: bool

    @property
    def count(self) -> int:
        """How many doubts there are."""
        return sum(map(len, self.tools.values())) + (not self.sure)


def _doubts(old: Policy | None, new: Policy, whole: Judged) -> _Doubts:
    names, sure = _tool_names([*whole.parts, *([old] if old is not None else [])])
    tools = {
        name: found
        for name in names
        # Every part must grant a call, so where one grants none there is nothing to doubt.
        if all(_granting(part, name) for part in whole.parts) and (found := doubts(old, new, name))
    }
    return _Doubts(old=old, new=new, tools=tools, sure=sure)


def _told(sides: Sides, found: _Doubts) -> Iterator[Widening]:
    """Look for an example of each doubt: one for each rule and what it may do."""
    if not found.sure:
        message = "its tool names with * cannot be told apart"
        yield Widening(code="diff.tools", message=message, role=sides.role)
    for tool, listed in found.tools.items():
        told: dict[tuple[str, str], Widening] = {}
        for doubt in listed:
            key = (doubt.code, doubt.rule.id)
            if key in told and told[key].certain:
                continue
            told[key] = _tell(sides, found.old, found.new, tool, doubt)
        yield from told.values()


def _tool_names(policies: Sequence[Policy]) -> tuple[list[str], bool]:
    """Return every tool that is named, and one more for each way to meet the wildcards."""
    names = {name for policy in policies for name in policy.tools}
    patterns = sorted({item.pattern.pattern for policy in policies for item in policy.wildcards})
    listed = {one.pattern for policy in policies for one in policy.trace.irreversible}
    names |= {name for name in listed if not is_wildcard(name)}
    if not patterns:
        return sorted(names), True
    ours = Language([pattern for word in sorted(RESERVED) for pattern in ((word,), (word, "**"))])
    patterns += sorted(name for name in listed if is_wildcard(name))
    languages = [Language([tuple(pattern.split("."))]) for pattern in patterns]
    found, sure = classes([*languages, ours])
    fresh = {".".join(path) for path in found}
    return sorted(names | {*BUILT_IN} | {name for name in fresh if not is_ours(name)}), sure


def _granting(part: Policy, tool: str) -> tuple[Rule, ...]:
    """Return the rules that may grant a call of a tool: those that no deny takes back whole."""
    rules = part.rules_of(tool)
    if rules is None:
        return ()
    if any(rule.matchers is None and rule.when is None for rule in rules.deny):
        return ()
    return rules.allow + rules.ask


def _kinds(old: Judged, new: Judged, tool: str, role: str | None) -> Iterator[Widening]:
    """Find arguments that are no longer checked as what they were, so spellings differ."""
    before, after = old.signature(tool), new.signature(tool)
    if before is None or after is None or tool in BUILT_IN:
        return
    # Every part must agree, so the grants of one are as good as those of all.
    if not all(_granting(part, tool) for part in new.parts):
        return
    grants = _granting(new.parts[-1], tool)
    scope = Scope(after, new.workspace)
    for name, argument in before.arguments.items():
        known = after.arguments.get(name)
        kind = known.kind if known else Kind.JSON
        # What may be anything is taken as it stands, then as now: no rule says what it is.
        if argument.kind in (kind, Kind.JSON) or (argument.kind, kind) in _STRICTER:
            continue
        if known is None or not _is_judged(new, tool, name):
            continue
        rule = next((one for one in grants if scope.granted(one, name) is not None), None)
        if rule is not None:
            message = f"{tool}: {name!r} is no longer read as a {argument.kind}, but as a {kind}"
            yield _at(rule, Widening(code="diff.kind", message=message, role=role, tool=tool))


def _is_judged(policy: Judged, tool: str, name: str) -> bool:
    """Tell whether some rule says more of an argument than that it may be anything."""
    found = (part.rules_of(tool) for part in policy.parts)
    return any(
        not isinstance((rule.matchers or {}).get(name, _ANY), AnyValue)
        for rules in found
        if rules is not None
        for rule in rules.all
    )


def _tell(sides: Sides, old: Policy | None, new: Policy, tool: str, doubt: Doubt) -> Widening:
    rules = [
        rule
        for part in (old, new)
        if part is not None and (found := part.rules_of(tool)) is not None
        for rule in found.all
    ]
    case = find_example(sides, tool, doubt, rules)
    widening = Widening(code=doubt.code, message=_message(doubt, case), role=sides.role, tool=tool)
    if case is not None:
        widening = replace(
            widening,
            example=case.document,
            facts=case.facts,
            old=case.old.effect if case.old else Effect.DENY,
            new=case.new.effect,
        )
    return _at(doubt.rule, widening)


def _at(rule: Rule, widening: Widening) -> Widening:
    position = rule.position
    return replace(
        widening, rule=rule.id, file=rule.file, line=position.line, column=position.column
    )


def _message(doubt: Doubt, case: Case | None) -> str:
    rule, focus = doubt.rule.id, doubt.focus.id if doubt.focus else ""
    what = {
        "diff.allows": f"{rule} allows what was refused",
        "diff.asks": f"{rule} asks about what was refused",
        "diff.unasked": f"{rule} allows what was asked about",
        "diff.profile": f"{rule} lets a call run with more than {focus} did",
        "diff.bounds": f"{rule} grants calls that the rate or budget of {focus} counted",
        "diff.reversible": f"{rule} lets a call that {focus} marked irreversible run unsigned",
        "diff.joined": "programs that had two profiles may run as one shell text",
    }[doubt.code]
    if focus and doubt.code in _AROUND:
        what += f" by {focus}"
    if case is None:
        return f"it cannot be shown that nothing becomes wider: perhaps {what}"
    if doubt.code == "diff.profile" and case.old and case.old.profile and case.new.profile:
        gains = profile_widenings(case.old.profile, case.new.profile)
        what += f": it {', '.join(itertools.islice(gains, 3))}"
    return what
