"""Policy lattice: where may a Call run with more than the old rules gave it?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from safeconduct.call import Effect, Profile
from safeconduct.policies.binding import Rule
from safeconduct.policies.rules import Policy
from safeconduct.policies.signatures import Kind

from .doubt import Doubt, Rules
from .profiles import profile_within
from .rules import Scope


class ProfileComparison:
    """The profiles of old and new grants of one tool."""

    def __init__(
        self,
        old: Policy,
        new: Policy,
        scope: Scope,
        *,
        was_granted: Rules,
        allow: Rules,
        ask: Rules,
    ) -> None:
        self._old, self._new, self._scope = old, new, scope
        self._was_granted, self._allow, self._ask = was_granted, allow, ask
        self._within: dict[tuple[Profile, Profile], bool] = {}

    def doubts(self, grants: Sequence[Rule]) -> Iterator[Doubt]:
        """Yield which of the new grants may run a Call with more than before."""
        by_profile: dict[Profile, list[Rule]] = {}
        for grant in grants:
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
        if not (hidden and names):
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
        return any(
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
