"""Policy lattice: the rules of one tool, old and new: where is the new side not surely narrower?

A Doubt is a rule of the new policy for which the lattice has no proof. It is complete: a Call that
the new rules judge more kindly than the old ones always lies in some Doubt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from safeconduct.call import Effect, Profile
from safeconduct.policies.binding import Rule, ToolRules
from safeconduct.policies.match import Argv
from safeconduct.policies.rules import Policy
from safeconduct.policies.signatures import Kind, Signature

from .profiles import profile_within
from .rules import Scope, as_restriction, bound_within

# LIMIT: new rules that are tried as what counts the Calls of one old Bound.
MAX_COUNTING: Final = 16
_EMPTY: Final = ToolRules(signature=Signature())
_CODES: Final = {Effect.ALLOW: "diff.allows", Effect.ASK: "diff.asks"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """A rule of the new policy that may be wider. ``focus`` is the old rule it may get around."""

    code: str
    rule: Rule
    focus: Rule | None = None


class Rules:
    """Some rules, those that say the same as another one first."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.all = tuple(rules)
        self._alike: dict[object, list[Rule]] = {}
        self._programs: dict[str | None, list[Rule]] = {}
        for rule in self.all:
            self._alike.setdefault(_likeness(rule), []).append(rule)
            self._programs.setdefault(_program(rule), []).append(rule)

    def near(self, rule: Rule) -> Iterator[Rule]:
        """Yield all of them; whoever looks for a twin finds it at once."""
        return chain(self._alike.get(_likeness(rule), ()), self.all)

    def of_program(self, rule: Rule) -> Iterable[Rule]:
        """Return those that may speak of the program that a rule names, if it names one."""
        program = _program(rule)
        if program is None:
            return self.all
        return chain(self._programs.get(program, ()), self._programs.get(None, ()))


def _program(rule: Rule) -> str | None:
    """Return the one program that a rule is about; None where it may be about several."""
    matcher = (rule.matchers or {}).get("argv")
    programs = matcher.programs if isinstance(matcher, Argv) else frozenset[str]()
    return next(iter(programs), None)


def _likeness(rule: Rule) -> object:
    # A hint only: what is alike is compared all the same.
    matchers = rule.matchers or {}
    words = tuple((name, matchers[name].describe()) for name in sorted(matchers))
    return (words, rule.when.text if rule.when else None)


def doubts(old: Policy | None, new: Policy, tool: str) -> list[Doubt]:
    """Return the doubts about one tool; ``old`` is None where it knew no such role."""
    rules = new.rules_of(tool)
    if rules is None or not (rules.allow or rules.ask):
        return []
    before = (old.rules_of(tool) if old is not None else None) or _EMPTY
    comparison = _Comparison(old, before, new, rules)
    found = chain(
        comparison.granted(),
        comparison.allowed(),
        comparison.profiles(),
        comparison.bounds(),
        comparison.reversible(tool),
        comparison.joined() if rules.signature.as_text is not None else (),
    )
    return list(found)


class _Comparison:
    """Old and new rules of one tool."""

    def __init__(
        self, old: Policy | None, before: ToolRules, new: Policy, after: ToolRules
    ) -> None:
        self._old, self._new = old, new
        self._scope = Scope(after.signature, new.workspace)
        self._allow, self._ask, self._deny = map(Rules, (after.allow, after.ask, after.deny))
        self._was_allow, self._was_ask, self._was_deny = map(
            Rules, (before.allow, before.ask, before.deny)
        )
        self._was_granted = Rules(before.allow + before.ask)
        self._grants = [
            rule for rule in after.allow + after.ask if not self._swallowed(rule, self._deny)
        ]
        self._within: dict[tuple[Profile, Profile], bool] = {}

    def granted(self) -> Iterator[Doubt]:
        """Yield where a Call may be granted that was denied."""
        for grant in self._grants:
            if not self._covered(grant, self._was_granted, [self._deny]):
                yield Doubt(code=_CODES[grant.effect], rule=grant)
        for deny, part in self._lost(self._was_deny, [self._deny]):
            for grant in self._grants:
                if self._gets_around(grant, part, [self._deny]):
                    yield Doubt(code=_CODES[grant.effect], rule=grant, focus=deny)

    def allowed(self) -> Iterator[Doubt]:
        """Yield where a Call may be allowed that was asked about."""
        restrictions = [self._ask, self._deny]
        allows = [
            rule
            for rule in self._grants
            if rule.effect is Effect.ALLOW and not self._swallowed(rule, self._ask)
        ]
        for grant in allows:
            if self._covered(grant, self._was_allow, restrictions):
                continue
            if self._covered(grant, self._was_granted, restrictions):
                yield Doubt(code="diff.unasked", rule=grant)
        for ask, part in self._lost(self._was_ask, restrictions):
            for grant in allows:
                if self._gets_around(grant, part, restrictions):
                    yield Doubt(code="diff.unasked", rule=grant, focus=ask)

    def _swallowed(self, grant: Rule, restrictions: Rules) -> bool:
        return any(
            self._scope.restriction_covers(rule, grant, None) for rule in restrictions.near(grant)
        )

    def _covered(self, grant: Rule, by: Rules, restrictions: Sequence[Rules]) -> bool:
        """Tell whether all that a grant gives was given before, or is restricted now."""
        if any(self._scope.grant_covers(rule, grant) for rule in by.near(grant)):
            return True
        return all(
            any(self._scope.grant_covers(rule, piece) for rule in by.all)
            or any(self._swallowed(piece, rules) for rules in restrictions)
            for piece in self._scope.pieces(grant)
        )

    def _lost(self, old: Rules, new: Sequence[Rules]) -> Iterator[tuple[Rule, Rule]]:
        """Yield each old restriction with the parts of it that no new one surely holds."""
        for rule in old.all:
            if self._restricted(new, None, rule):
                continue
            for piece in self._scope.pieces(as_restriction(rule)):
                if not self._restricted(new, None, piece):
                    yield rule, piece

    def _restricted(self, by: Sequence[Rules], grant: Rule | None, rule: Rule) -> bool:
        return any(
            self._scope.restriction_covers(one, grant, rule)
            for rules in by
            for one in rules.near(rule)
        )

    def _gets_around(self, grant: Rule, part: Rule, restrictions: Sequence[Rules]) -> bool:
        if self._scope.apart(grant, part, grants=False):
            return False
        return not self._restricted(restrictions, grant, part)

    def profiles(self) -> Iterator[Doubt]:
        """Yield where a Call may run with more than before."""
        if self._old is None:
            return
        by_profile: dict[Profile, list[Rule]] = {}
        for grant in self._grants:
            by_profile.setdefault(self._new.profile_of(grant), []).append(grant)
        for was in self._was_granted.all:
            before = self._old.profile_of(was)
            wider = [one for one in by_profile if not self._is_within(one, before)]
            holders = self._holders(was, before) if wider else []
            for grant in (rule for profile in wider for rule in by_profile[profile]):
                if grant.effect is Effect.ASK:
                    alike = self._asked_alike(grant, was, before)
                else:
                    # What was asked about is what `allowed` speaks of.
                    alike = any(self._is_held(rule, was, grant) for rule in holders)
                    alike = alike or was.effect is Effect.ASK
                    alike = alike or self._scope.apart(grant, was, grants=True)
                    alike = alike or self._holds_profile(was, before, grant)
                if not alike:
                    yield Doubt(code="diff.profile", rule=grant, focus=was)

    def _holds_profile(self, was: Rule, before: Profile, grant: Rule) -> bool:
        """Tell whether one new allow gives all of a grant no more than the old rule's profile."""
        return any(
            self._scope.grant_covers(rule, grant)
            and self._is_within(self._new.profile_of(rule), before)
            and self._is_held(rule, was, grant)
            for rule in self._allow.near(was)
        )

    def _holders(self, was: Rule, before: Profile) -> list[Rule]:
        """Return the new allows that give all of an old rule no more than its profile."""
        return [
            rule
            for rule in self._allow.near(was)
            if self._scope.grant_covers(rule, was)
            and self._is_within(self._new.profile_of(rule), before)
        ]

    def _is_held(self, holder: Rule, was: Rule, grant: Rule) -> bool:
        """Tell whether a rule's profile counts wherever an old rule's did, and another one grants.

        A grant covers nothing that its own profile hides: there its profile does not count.
        """
        return self._shows(holder, grant) and self._stays(holder, was, grant)

    def _stays(self, holder: Rule, was: Rule, grant: Rule) -> bool:
        """Tell whether what a rule hides, the old one hid or the other one hides too."""
        hidden = {*self._new.profile_of(holder).hide}
        names = self._paths_of(holder)
        if self._old is None or not (hidden and names):
            return True
        for policy, rule in ((self._old, was), (self._new, grant)):
            if names <= self._paths_of(rule):
                hidden.difference_update(policy.profile_of(rule).hide)
        return not hidden

    def _paths_of(self, rule: Rule) -> set[str]:
        """Return the arguments in which a profile may hide what a rule grants (hiding.py)."""
        signature = self._scope.signature
        if signature.closed:
            return {*signature.paths}
        matchers = rule.matchers or {}
        return {name for name in matchers if matchers[name].kind is Kind.PATH}

    def _shows(self, holder: Rule, grant: Rule) -> bool:
        """Tell whether a rule grants what another one does, also of what its own profile hides.

        What it hides the other one alone grants then, which is nothing new where an old rule did.
        """
        hidden = {*self._new.profile_of(holder).hide}
        shown = {*self._new.profile_of(grant).hide}
        if hidden <= shown or not self._scope.signature.paths:
            return True
        old = self._old
        return old is not None and any(
            {*old.profile_of(was).hide} <= shown and self._scope.grant_covers(was, grant)
            for was in self._was_granted.near(grant)
        )

    def _asked_alike(self, ask: Rule, was: Rule, before: Profile) -> bool:
        """Tell whether what an ask lets run was surely judged with the old rule's profile or less.

        It runs with what every ask and every grant gives (decision.py).
        """
        scope = self._scope
        if scope.restrictions_apart(ask, was):
            return True
        if any(
            self._is_within(self._new.profile_of(rule), before)
            and (
                scope.restriction_covers(rule, None, was)
                or scope.restriction_covers(rule, None, ask)
            )
            for rule in self._ask.near(was)
        ):
            return True
        return was.effect is Effect.ALLOW and self._grants_within(was, before, ask)

    def _grants_within(self, was: Rule, before: Profile, ask: Rule) -> bool:
        """Tell whether a new grant gives all of an old one, and no more than its profile."""
        return any(
            self._is_within(self._new.profile_of(rule), before)
            and self._scope.grant_covers(rule, was)
            and self._is_held(rule, was, ask)
            for rule in chain(self._allow.near(was), self._ask.all)
        )

    def _is_within(self, narrow: Profile, wide: Profile) -> bool:
        key = (narrow, wide)
        if key not in self._within:
            self._within[key] = profile_within(narrow, wide)
        return self._within[key]

    def bounds(self) -> Iterator[Doubt]:
        """Yield where a rate or a budget may no longer count every Call that it counted."""
        for was in self._was_granted.all:
            for bound in was.bounds:
                counting = [
                    rule
                    for rule in chain(self._allow.near(was), self._ask.all)
                    if any(bound_within(one, bound) for one in rule.bounds)
                    # An ask counts also what it does not grant.
                    and (rule.effect is Effect.ASK or was.effect is Effect.ALLOW)
                ]
                left = [self._uncounted(was, rule) for rule in counting[:MAX_COUNTING]]
                # One rule must count them all: two of them would each have the whole amount.
                if not left or all(one is not None for one in left):
                    first = self._uncounted(was, None) if not left else left[0]
                    if first is not None:
                        yield Doubt(code="diff.bounds", rule=first, focus=was)

    def reversible(self, tool: str) -> Iterator[Doubt]:
        """Yield where a Call may run unsigned that was marked irreversible."""
        if self._old is None or self._new.trace.is_irreversible(tool):
            return
        listed = self._old.trace.is_irreversible(tool)
        marked = [rule for rule in self._allow.all + self._ask.all if rule.irreversible]
        for was in self._was_granted.all:
            if not (listed or was.irreversible):
                continue
            # Whatever of the rules that grant a Call says so, it is.
            if any(self._scope.grant_covers(rule, was) for rule in marked):
                continue
            for grant in self._grants:
                if not self._scope.apart(grant, was, grants=True) and not any(
                    self._scope.grant_covers(rule, grant) for rule in marked
                ):
                    yield Doubt(code="diff.reversible", rule=grant, focus=was)

    def _uncounted(self, was: Rule, by: Rule | None) -> Rule | None:
        """Return a grant of Calls that an old rule counted and a new one perhaps does not."""
        if by is not None and self._scope.grant_covers(by, was):
            return None
        for grant in self._grants:
            if not self._scope.apart(grant, was, grants=True) and (
                by is None or not self._scope.grant_covers(by, grant)
            ):
                return grant
        return None

    def joined(self) -> Iterator[Doubt]:
        """Yield where two programs that had two profiles may now run as one text (commands.py)."""
        if self._old is None or self._unchanged():
            return
        seen: dict[Profile, frozenset[Profile]] = {}
        grants = Rules(self._grants)
        for grant in self._grants:
            now = {self._new.profile_of(rule) for rule in self._overlapping(grant, grants)}
            was = frozenset(
                self._old.profile_of(rule) for rule in self._overlapping(grant, self._was_granted)
            )
            for profile in now:
                if seen.setdefault(profile, was) != was or len(was) > 1:
                    yield Doubt(code="diff.joined", rule=grant)
                    return

    def _overlapping(self, grant: Rule, rules: Rules) -> Iterator[Rule]:
        # A rule that asks counts wherever it restricts, one that allows only where it grants.
        return (
            rule
            for rule in rules.of_program(grant)
            if not self._scope.apart(grant, rule, grants=rule.effect is Effect.ALLOW)
        )

    def _unchanged(self) -> bool:
        if self._old is None:
            return False
        old = {(_likeness(x), x.effect, self._old.profile_of(x)) for x in self._was_granted.all}
        granting = self._allow.all + self._ask.all
        new = {(_likeness(x), x.effect, self._new.profile_of(x)) for x in granting}
        return len({profile for _, _, profile in old}) <= 1 or new == old
