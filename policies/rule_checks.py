"""Policy step 3b: what is wrong with one compiled rule, though each part of it means something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from safeconduct.call import Effect, Profile

from .binding import Rule
from .forms import Loc
from .language import did_you_mean
from .match import Argv
from .signatures import Signature
from .syntax import Position, Source

# LIMIT: rules of a file that come to be as arguments are optional (_compile): 1 s and 30 MB.
MAX_VARIANTS: Final = 16_384


class RuleChecks:
    """Refuse rules that can never match, or mean something else than they say."""

    def __init__(self, source: Source, profiles: Mapping[str, Profile]) -> None:
        self._source = source
        self._profiles = profiles
        self._ids: dict[str, Position] = {}
        self._variants = 0

    def check(self, rule: Rule, signature: Signature | None, loc: Loc) -> None:
        """Raise PolicyError for what is wrong with the rule at ``loc``."""
        place: Loc = (*loc, rule.effect.value)
        self._empty(rule, place)
        self._options(rule, loc)
        self._variety(rule, loc)
        self._spelling(rule, place)
        self._reachable(rule, signature, place)

    def _empty(self, rule: Rule, place: Loc) -> None:
        """Refuse `deny: {}`, which reads like nothing and would deny everything."""
        if rule.effect is Effect.DENY and rule.matchers == {}:
            position = self._source.node(place).position
            hint = "write deny: any, or name an argument"
            raise self._source.error(position, "this deny names nothing", hint=hint)

    def _options(self, rule: Rule, loc: Loc) -> None:
        if rule.id in self._ids:
            position = self._source.node((*loc, "id")).position
            message = f"the id {rule.id!r} is taken by the rule on line {self._ids[rule.id].line}"
            raise self._source.error(position, message, hint="give each rule an id of its own")
        self._ids[rule.id] = rule.position
        if rule.effect is Effect.DENY and rule.bounds:
            position = self._source.node(loc).position
            hint = "remove rate and budget; to grant so much and no more, put them on the grant"
            raise self._source.error(position, "a deny has nothing to count", hint=hint)
        if rule.effect is Effect.DENY and rule.irreversible:
            position = self._source.key((*loc, "irreversible"))
            hint = "remove it: a Call that is denied has no effect"
            raise self._source.error(position, "a deny is never irreversible", hint=hint)
        if rule.profile is None:
            return
        position = self._source.node((*loc, "profile")).position
        if rule.effect is Effect.DENY:
            hint = "remove it: a Call that is denied runs nowhere"
            raise self._source.error(position, "a deny has no profile", hint=hint)
        if rule.profile not in self._profiles:
            hint = did_you_mean(rule.profile, self._profiles)
            raise self._source.error(position, f"there is no profile {rule.profile!r}", hint=hint)

    def _variety(self, rule: Rule, loc: Loc) -> None:
        """Refuse a file whose optional arguments make far more rules than are written in it."""
        self._variants += (1 << len(rule.optional)) - 1
        if self._variants > MAX_VARIANTS:
            position = self._source.key((*loc, "optional"))
            message = f"the optional arguments of this file make more than {MAX_VARIANTS} rules"
            hint = "each one doubles its rule; name fewer, or list more values in one rule"
            raise self._source.error(position, message, hint=hint)

    def _spelling(self, rule: Rule, place: Loc) -> None:
        """Refuse a path inside argv where its spelling decides nothing."""
        matchers = rule.matchers or {}
        for name, matcher in matchers.items():
            if not isinstance(matcher, Argv) or not matcher.judges_spelling:
                continue
            position = self._source.node((*place, name)).position
            if rule.effect is Effect.DENY:
                message = "a path inside argv judges a spelling, so a deny can be walked around"
                hint = "take the files away from the program with hide in its profile"
                raise self._source.error(position, message, hint=hint)
            if rule.rest or "cwd" in matchers:
                message = "a path inside argv is read from the workspace, so cwd must stay there"
                hint = "remove cwd and rest from this rule"
                raise self._source.error(position, message, hint=hint)

    def _reachable(self, rule: Rule, signature: Signature | None, place: Loc) -> None:
        """Refuse a grant that leaves out an argument every Call must have."""
        if signature is None or rule.matchers is None or rule.rest:
            return
        if rule.effect is Effect.DENY:
            return
        for name, argument in signature.arguments.items():
            if argument.required and not argument.free and name not in rule.matchers:
                message = f"this can never match: {rule.tool} always has the argument {name!r}"
                hint = f"add {name}: any, or a matcher for it"
                raise self._source.error(self._source.node(place).position, message, hint=hint)
