"""Policy step 3: the compiled policy. Immutable values, indexed by tool; no I/O, no state."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

from safeconduct.call import Decision, Profile, Tier

from .binding import Rule, ToolRules, Wildcard, holds_all, holds_any, implied_by, join_rules
from .signatures import BUILT_IN, PROGRAMS, RESERVED, Signature
from .syntax import Position
from .trace_terms import DEFAULT_TERMS, TraceTerms

__all__ = [
    "Judged",
    "Policy",
    "Role",
    "Rule",
    "Server",
    "ToolRules",
    "Wildcard",
    "holds_all",
    "holds_any",
]

# LIMIT: tool names whose rules are remembered; an agent can make up any number of names.
MAX_NAMES = 1024
# LIMIT: Decisions of one rule that are remembered.
MAX_DECIDED = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What a session in one role may do, within what the role ``narrows`` may do."""

    name: str
    narrows: str | None = None
    tools: Mapping[str, ToolRules]
    wildcards: tuple[Wildcard, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that the operator named: the command that runs it and its profile."""

    name: str
    run: tuple[str, ...]
    profile: str | None = None


def server_profile(profiles: Container[str], name: str, named: str | None) -> str | None:
    """Say which profile a server runs in and its calls are judged in; None is the default one.

    The one that is ``named`` for it (under `servers`, with `--profile`), where these have it, else
    its namesake. What is no name of a server (our own tools, those that a host runs) has none.
    """
    if named is not None and named in profiles:
        return named
    return name if name in profiles and name not in RESERVED | PROGRAMS else None


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

    @property
    def servers(self) -> Mapping[str, Server]:
        """The servers that the operator named."""
        ...

    @property
    def trace(self) -> TraceTerms:
        """How the log is kept."""
        ...

    def for_role(self, name: str | None) -> Judged:
        """Return what is judged in a session of this role; None is a session without one.

        PolicyError ``policy.unknown_role`` where there is no such role.
        """
        ...

    def signature(self, tool: str) -> Signature | None:
        """Return the signature of a tool this policy speaks of, else None."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A compiled policy file. ``version`` is `sha256:<hex>` of its bytes.

    ``tools`` and ``wildcards`` are what is judged: those of the sessions without a role, or of
    the one in ``role``.
    """

    file: str
    version: str
    workspace: str
    require_tier: Tier | None = None
    require_cgroup: bool = False
    profiles: Mapping[str, Profile]
    tools: Mapping[str, ToolRules]
    default_profile: Profile
    profile_positions: Mapping[str, Position]
    wildcards: tuple[Wildcard, ...] = ()
    role: str | None = None
    roles: Mapping[str, Role] = field(default_factory=lambda: MappingProxyType(dict[str, Role]()))
    servers: Mapping[str, Server] = field(
        default_factory=lambda: MappingProxyType(dict[str, Server]())
    )
    # The profiles named for servers, here and in what this policy extends.
    server_profiles: Mapping[str, str] = field(
        default_factory=lambda: MappingProxyType(dict[str, str]())
    )
    trace: TraceTerms = DEFAULT_TERMS
    # The Decisions that one rule alone made, for `decide`, which makes them of nothing else.
    decided: dict[tuple[str, str, object], Decision] = field(
        default_factory=dict[tuple[str, str, object], Decision],
        init=False,
        repr=False,
        compare=False,
    )
    # What rules_of found. It only remembers: nothing that is judged depends on what is in it.
    _names: dict[str, ToolRules | None] = field(
        default_factory=dict[str, "ToolRules | None"], init=False, repr=False, compare=False
    )

    @property
    def parts(self) -> tuple[Policy, ...]:
        """Return this policy alone."""
        return (self,)

    def signature(self, tool: str) -> Signature | None:
        """Return the signature of a tool: ours, or the one its rules imply."""
        found = self.rules_of(tool)
        return found.signature if found else BUILT_IN.get(tool)

    def rules_of(self, tool: str) -> ToolRules | None:
        """Return the rules that a Call of this tool meets: those of its name and its wildcards."""
        if not self.wildcards:
            return self.tools.get(tool)
        try:
            return self._names[tool]
        except KeyError:
            joined = join_rules(tool, self.tools.get(tool), self.wildcards)
            found = joined and self._in_server(tool, joined)
            if len(self._names) >= MAX_NAMES:
                self._names.clear()
            self._names[tool] = found
            return found

    def _in_server(self, tool: str, rules: ToolRules) -> ToolRules:
        """Judge in the profile of the tool's server what names none.

        Where a rule names the server itself, compilation did so; `*.read` may mean any.
        """
        name, dot, _ = tool.partition(".")
        found = server_profile(self.profiles, name, self.server_profiles.get(name)) if dot else None
        if found is None:
            return rules

        def within(granting: tuple[Rule, ...]) -> tuple[Rule, ...]:
            return tuple(x if x.profile else replace(x, profile=found) for x in granting)

        return replace(rules, allow=within(rules.allow), ask=within(rules.ask))

    def each(self) -> Iterator[tuple[str, ToolRules]]:
        """Yield each name of a tool as written, with the rules that bind its Calls.

        A name with wildcards comes with its own rules and the denies that surely cover it.
        """
        for tool, exact in self.tools.items():
            yield tool, self.rules_of(tool) or exact
        for wildcard in self.wildcards:
            name = wildcard.pattern.pattern
            denies = (item.deny for item in self.wildcards if item.pattern.matches(name))
            yield (
                name,
                ToolRules(
                    signature=implied_by(name, wildcard.all),
                    allow=wildcard.allow,
                    ask=wildcard.ask,
                    deny=tuple(rule for listed in denies for rule in listed),
                ),
            )

    def every_rule(self) -> Iterator[Rule]:
        """Yield every rule of the file once, as written, those of all roles among them."""
        roles: tuple[Policy | Role, ...] = (self, *self.roles.values())
        for role in roles:
            named: list[ToolRules | Wildcard] = [*role.tools.values(), *role.wildcards]
            for rules in named:
                for _, compiled in itertools.groupby(rules.all, key=lambda rule: rule.id):
                    yield next(compiled)

    def for_role(self, name: str | None) -> Judged:
        """Return what is judged in a session of this role: one part for each role in the chain."""
        from .capability import judged_in_role

        return judged_in_role(self, name)

    def profile_of(self, rule: Rule) -> Profile:
        """Return where a rule runs its Calls."""
        return self.profiles[rule.profile] if rule.profile else self.default_profile

    def profile_of_server(self, name: str, named: str | None) -> Profile:
        """Return where a server runs for which this profile, or none, is named."""
        found = server_profile(self.profiles, name, named)
        return self.profiles[found] if found else self.default_profile
