"""Policy step 3: the compiled policy. Immutable values, indexed by tool; no I/O, no state.

How a rule binds (INVARIANT, decision.py relies on it): allow and ask *grant* only Calls
whose every argument they name (or that the signature leaves free); ask and deny *restrict*
every Call whose named arguments match, whatever else it carries, so that an extra argument
never slips past a deny. A list under a matcher that takes one value grants only if all of
its elements match and restricts if any does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeGuard

from safeconduct.call import Effect, Json, Profile, Tier

from .match import AnyValue, Argv, Matcher
from .signatures import BUILT_IN, Signature
from .syntax import Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One compiled rule. ``matchers`` is None for `any`; ``where`` is `file:line`."""

    id: str
    tool: str
    effect: Effect
    matchers: Mapping[str, Matcher] | None
    rest: bool = False
    profile: str | None = None
    file: str = ""
    position: Position = field(default=Position(0, 0))

    @property
    def where(self) -> str:
        """Say where the rule stands."""
        return f"{self.file}:{self.position.line}"

    def grants(self, arguments: Mapping[str, Json], signature: Signature, workspace: str) -> bool:
        """Tell whether the rule covers every argument of the Call."""
        if self.matchers is None:
            return True
        for name, matcher in self.matchers.items():
            if name not in arguments or not holds_all(matcher, arguments[name]):
                return False
        return self.rest or not self.unnamed(arguments, signature, workspace)

    def restricts(self, arguments: Mapping[str, Json]) -> bool:
        """Tell whether the arguments that the rule names match, whatever the others are."""
        if self.matchers is None:
            return True
        return all(
            name in arguments and holds_any(matcher, arguments[name])
            for name, matcher in self.matchers.items()
        )

    def unnamed(
        self, arguments: Mapping[str, Json], signature: Signature, workspace: str
    ) -> list[str]:
        """Return the arguments that this rule neither names nor leaves free."""
        named = self.matchers or {}
        if len(named) == len(arguments) and all(name in named for name in arguments):
            return []
        return [
            name
            for name, value in arguments.items()
            if name not in named and not signature.may_be_unnamed(name, value, workspace)
        ]


def holds_all(matcher: Matcher, value: Json) -> bool:
    """Match a value, or every element of a list that is not empty."""
    if _is_list(value) and not isinstance(matcher, AnyValue | Argv):
        return len(value) > 0 and all(matcher.matches(item) for item in value)
    return matcher.matches(value)


def holds_any(matcher: Matcher, value: Json) -> bool:
    """Match a value, or some element of a list."""
    if _is_list(value) and not isinstance(matcher, AnyValue | Argv):
        return any(matcher.matches(item) for item in value)
    return matcher.matches(value)


def _is_list(value: Json) -> TypeGuard[Sequence[Json]]:
    return isinstance(value, list | tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRules:
    """The rules of one tool by effect, with the signature that its Calls must fit."""

    signature: Signature
    allow: tuple[Rule, ...] = ()
    ask: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()

    @property
    def all(self) -> tuple[Rule, ...]:
        """Return every rule: deny first, as they are judged."""
        return self.deny + self.ask + self.allow


class Judged(Protocol):
    """What `decide` and `canonicalize` need: one policy, or several that all must agree."""

    @property
    def version(self) -> str:
        """The content hash that decisions carry."""
        ...

    @property
    def workspace(self) -> str:
        """The absolute real path that `$WS` stands for."""
        ...

    @property
    def require_tier(self) -> Tier | None:
        """The least tier to run on."""
        ...

    @property
    def require_cgroup(self) -> bool:
        """Whether limits must hold for whole process trees."""
        ...

    @property
    def profiles(self) -> Mapping[str, Profile]:
        """The named profiles."""
        ...

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policies whose strictest verdict counts."""
        ...

    def signature(self, tool: str) -> Signature | None:
        """Return the signature of a tool this policy speaks of, else None."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A compiled policy file. ``version`` is `sha256:<hex>` of its bytes."""

    file: str
    version: str
    workspace: str
    require_tier: Tier | None = None
    require_cgroup: bool = False
    profiles: Mapping[str, Profile]
    tools: Mapping[str, ToolRules]
    default_profile: Profile
    profile_positions: Mapping[str, Position]

    @property
    def parts(self) -> tuple[Policy, ...]:
        """Return this policy alone."""
        return (self,)

    def signature(self, tool: str) -> Signature | None:
        """Return the signature of a tool: ours, or the one its rules imply."""
        found = self.tools.get(tool)
        return found.signature if found else BUILT_IN.get(tool)

    def profile_of(self, rule: Rule) -> Profile:
        """Return where a rule runs its Calls."""
        return self.profiles[rule.profile] if rule.profile else self.default_profile
