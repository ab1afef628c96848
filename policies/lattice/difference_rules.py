"""Policy lattice: the rules of one tool, old and new: where is the new side not surely narrower?

A Doubt is a rule of the new policy for which the lattice has no proof. It is complete: a Call that
the new rules judge more kindly than the old ones always lies in some Doubt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Final

from safeconduct.call import Effect, Profile
from safeconduct.policies.binding import Rule, ToolRules
from safeconduct.policies.rules import Policy
from safeconduct.policies.signatures import Signature

from .difference_profiles import ProfileComparison
from .doubt import Doubt, Rules, likeness
from .restriction import as_restriction, names_fed, of_unknown
from .rules import Scope, bound_within

# LIMIT: new rules that are tried as what counts the Calls of one old Bound.
MAX_COUNTING: Final = 16
_EMPTY: Final = ToolRules(signature=Signature())
_CODES: Final = {Effect.ALLOW: "diff.allows", Effect.ASK: "diff.asks"}


def doubts(old: Policy | None, new: Policy, tool: str) -> list[Doubt]:
    """Return the doubts about one tool; ``old`` is None where it knew no such role."""
    rules = new.rules_of(tool)
    if rules is None or not (rules.allow or rules.ask):
        return []
    before = (old.rules_of(tool) if old is not None else None) or _EMPTY
    comparison = _Comparison(old, before, new, rules)
    found = chain(
        comparison.granted(),
        comparison.unjudged(),
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

    def granted(self) -> Iterator[Doubt]:
        """Yield where a Call may be granted that was denied."""
        for grant in self._grants:
            if not self._covered(grant, self._was_granted, [self._deny]):
                yield Doubt(code=_CODES[grant.effect], rule=grant)
        for deny, part in self._lost(self._was_deny, [self._deny]):
            for grant in self._grants:
                if self._gets_around(grant, part, [self._deny]):
                    yield Doubt(code=_CODES[grant.effect], rule=grant, focus=deny)

    def unjudged(self) -> Iterator[Doubt]:
        """Yield where a part of shell text is granted that was refused as its input is not known.

        An ask that names stdin or content refuses it as a deny does (commands.py).
        """
        asks = [of_unknown(rule) for rule in self._was_ask.all if names_fed(rule)]
        if not (asks and self._scope.signature.closed):
            return
        refusing = [rule for rule in self._ask.all if names_fed(rule)]
        now = [Rules(of_unknown(rule) for rule in chain(self._deny.all, refusing))]
        grants = [rule for rule in self._grants if not names_fed(rule)]
        for ask, part in self._lost(Rules(asks), now):
            for grant in grants:
                if self._gets_around(grant, part, now):
                    asked = self._restricted([self._ask], grant, part)
                    code = _CODES[Effect.ASK if asked else grant.effect]
                    yield Doubt(code=code, rule=grant, focus=ask)

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
        compared = ProfileComparison(
            self._old, self._new, self._scope,
            was_granted=self._was_granted, allow=self._allow, ask=self._ask,
        )  # fmt: skip
        yield from compared.doubts(self._grants)

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
            # An ask marks also what it does not grant; the list of the trace what any rule grants.
            asked = was.irreversible and was.effect is Effect.ASK
            if not (listed or was.irreversible) or any(
                self._counts_all(rule, was, asked=asked) for rule in marked
            ):
                continue
            for grant in self._grants:
                if not self._scope.apart(grant, was, grants=not asked) and not any(
                    self._counts(rule, grant, was if asked else None) for rule in marked
                ):
                    yield Doubt(code="diff.reversible", rule=grant, focus=was)

    def _counts_all(self, rule: Rule, was: Rule, *, asked: bool) -> bool:
        """Tell whether a rule counts or marks all that an old one did, whatever grants it."""
        if asked:
            return rule.effect is Effect.ASK and self._scope.restriction_covers(rule, None, was)
        return self._scope.grant_covers(rule, was)

    def _counts(self, rule: Rule, grant: Rule, ask: Rule | None) -> bool:
        """Tell whether a rule counts or marks all Calls of a grant that an old ``ask`` asked of."""
        if rule.effect is Effect.ASK and self._scope.restriction_covers(rule, grant, ask):
            return True
        return self._scope.grant_covers(rule, grant)

    def _uncounted(self, was: Rule, by: Rule | None) -> Rule | None:
        """Return a grant of Calls that an old rule counted and a new one perhaps does not."""
        asked = was.effect is Effect.ASK
        if by is not None and self._counts_all(by, was, asked=asked):
            return None
        for grant in self._grants:
            if not self._scope.apart(grant, was, grants=not asked) and (
                by is None or not self._counts(by, grant, was if asked else None)
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
        old = {(likeness(x), x.effect, self._old.profile_of(x)) for x in self._was_granted.all}
        granting = self._allow.all + self._ask.all
        new = {(likeness(x), x.effect, self._new.profile_of(x)) for x in granting}
        return len({profile for _, _, profile in old}) <= 1 or new == old
