"""Policy step 3: one compiled rule and how it binds. Immutable values; no I/O, no state.

How a rule binds (INVARIANT, decision.py relies on it): allow and ask *grant* only Calls
whose every argument they name (or that the signature leaves free); ask and deny *restrict*
every Call whose named arguments match, whatever else it carries, so that an extra argument
never slips past a deny. A list under a matcher that takes one value grants only if all of
its elements match and restricts if any does. A `when` that cannot be judged is a doubt: it
grants nothing, and restricts. So is a value that is not of the kind that a matcher judges. That
is the matcher's own word and never that of other rules, or one rule less could allow more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias, TypeGuard

from safeconduct.call import Bound, Effect, Json

from .index import RuleIndex, index_rules
from .kinds import KindConflict, implied_by
from .match import AnyValue, Argv, Matcher
from .signatures import AMBIGUOUS, BUILT_IN, MAX_LIST, NO_TEXT, PROGRAMS, UNKNOWN, Signature, fits
from .syntax import Position
from .when.condition import When, WhenError
from .wildcards import ToolPattern, is_ours

__all__ = [
    "KindConflict",
    "Rule",
    "ToolRules",
    "Unfit",
    "Wildcard",
    "holds_all",
    "holds_any",
    "implied_by",
    "join_rules",
    "takes_lists",
]

_TAKE_LISTS: Final = (AnyValue, Argv)
# The arguments of a Call that are not what rules take them for (`Document.unfit`).
Unfit: TypeAlias = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One compiled rule. ``matchers`` is None for `any`; ``where`` is `file:line`.

    ``tool`` is as written, with its wildcards. ``bounds`` are what the Calls it grants may use,
    and ``irreversible`` ones are recorded and signed before they run.
    ``restricting`` are the matchers of an ask in the sense of a restriction, where it differs:
    it grants only what surely is meant, and asks about whatever may be. ``optional`` are
    arguments that the rule as written may find absent: it was compiled to several rules of one
    id, the one that names them all first.
    """

    id: str
    tool: str
    effect: Effect
    matchers: Mapping[str, Matcher] | None
    restricting: Mapping[str, Matcher] | None = None
    optional: tuple[str, ...] = ()
    role: str | None = None
    rest: bool = False
    profile: str | None = None
    when: When | None = None
    bounds: tuple[Bound, ...] = ()
    irreversible: bool = False
    file: str = ""
    position: Position = field(default=Position(0, 0))

    @property
    def where(self) -> str:
        """Say where the rule stands."""
        return f"{self.file}:{self.position.line}"

    @property
    def names(self) -> Iterable[str]:
        """The arguments that its matchers name."""
        return self.matchers or ()

    @property
    def reads(self) -> frozenset[str]:
        """The arguments that its `when` asks for as they are, as no matcher of it says what."""
        if self.when is None:
            return frozenset()
        asked = self.when.arguments.difference(self.optional)
        return frozenset(name for name in asked if not self._judges(name))

    def grants(
        self,
        arguments: Mapping[str, Json],
        signature: Signature,
        workspace: str,
        unfit: Unfit | None = None,
    ) -> bool:
        """Tell whether the rule covers every argument of the Call."""
        matchers = self.matchers
        if matchers is None:
            return True
        matched = 0
        for name, value in arguments.items():
            matcher = matchers.get(name)
            if matcher is None:
                if self.rest or signature.may_be_unnamed(name, value, workspace):
                    continue
                return False
            # The first is what holds_all says of a text, and of an argv.
            plain = type(value) is str or type(matcher) is Argv
            if not (matcher.matches(value) if plain else holds_all(matcher, value)):
                return False
            matched += 1
        if matched != len(matchers):
            return False
        return unfit is None or not any(map(self._judges, unfit))

    def restricts(self, arguments: Mapping[str, Json], unfit: Unfit | None = None) -> bool:
        """Tell whether the arguments that the rule names match, whatever the others are."""
        matchers = self.restricting or self.matchers
        if matchers is None:
            return True
        for name, matcher in matchers.items():
            if unfit is not None and name in unfit:
                continue
            if name not in arguments or not holds_any(matcher, arguments[name]):
                return False
        return True

    def _asks_for(self, name: str, unfit: Unfit) -> bool:
        """Tell whether `when` names an argument that is not what this rule takes it for."""
        if self.when is None or name not in self.when.arguments:
            return False
        if unfit[name][0] in (AMBIGUOUS, UNKNOWN):
            return True
        return self._judges(name) or name in self.optional

    def doubted(self, unfit: Unfit) -> list[str]:
        """Return the arguments that make this rule restrict because it cannot judge them."""
        named = [name for name in self.names if name in unfit]
        return [*named, *(name for name in unfit if self._asks_for(name, unfit))]

    def _judges(self, name: str) -> bool:
        """Tell whether the rule says more of an argument than that it may be anything."""
        matcher = (self.matchers or {}).get(name)
        return matcher is not None and not isinstance(matcher, AnyValue)

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

    def holds(self, facts: Mapping[str, Json], unfit: Unfit | None = None) -> bool | None:
        """Tell whether `when` holds; None where it cannot be judged."""
        if self.when is None:
            return True
        if unfit is not None and any(self._asks_for(name, unfit) for name in unfit):
            return None
        try:
            return self.when.holds(facts)
        except WhenError:
            return None


def holds_all(matcher: Matcher, value: Json) -> bool:
    """Match a value, or every element of a list that is not empty."""
    if type(value) is str:
        return matcher.matches(value)
    if _is_list(value) and not takes_lists(matcher):
        return 0 < len(value) <= MAX_LIST and all(matcher.matches(item) for item in value)
    return matcher.matches(value)


def holds_any(matcher: Matcher, value: Json) -> bool:
    """Match a value, or some element of a list; what a matcher cannot judge counts as matched."""
    if type(value) is str:
        return matcher.matches(value) or matcher.kind in NO_TEXT
    if _is_list(value) and not takes_lists(matcher):
        return len(value) > MAX_LIST or any(_may_match(matcher, item) for item in value)
    return _may_match(matcher, value)


def _may_match(matcher: Matcher, value: Json) -> bool:
    return matcher.matches(value) or not fits(matcher.kind, value)


def takes_lists(matcher: Matcher) -> bool:
    """Tell whether a matcher judges a list as one value, not element by element."""
    return isinstance(matcher, _TAKE_LISTS) or bool(getattr(matcher, "whole", False))


def _is_list(value: Json) -> TypeGuard[Sequence[Json]]:
    # Not `list | tuple`: asking about a union takes three times as long.
    return isinstance(value, (list, tuple))


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRules:
    """The rules of one tool by effect, with the signature that its Calls must fit."""

    signature: Signature
    allow: tuple[Rule, ...] = ()
    ask: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()
    # Derived from the rules; several where the rules of wildcards come to those of a name.
    indexes: tuple[RuleIndex, ...] = field(default=(), compare=False, repr=False)
    # The one there is, which nearly all tools have.
    index: RuleIndex | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        indexed = {id(rule) for index in self.indexes for rule in index.rules}
        # A copy with other rules (`replace`) must not keep the index of the old ones.
        if not self.indexes or indexed != {id(rule) for rule in self.all}:
            object.__setattr__(self, "indexes", (index_rules(self.all),))
        index = self.indexes[0] if len(self.indexes) == 1 else None
        object.__setattr__(self, "index", index)

    @property
    def all(self) -> tuple[Rule, ...]:
        """Return every rule: deny first, as they are judged."""
        return self.deny + self.ask + self.allow

    def candidates(
        self, arguments: Mapping[str, Json], unfit: Unfit | None = None
    ) -> Sequence[Rule]:
        """Return every rule that may match these arguments, and few others."""
        indexes = self.indexes
        if unfit is not None:
            return [rule for index in indexes for rule in index.rules]
        if len(indexes) == 1:
            return indexes[0].candidates(arguments)
        return [rule for index in indexes for rule in index.candidates(arguments)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wildcard:
    """The rules under one tool name with wildcards."""

    pattern: ToolPattern
    allow: tuple[Rule, ...] = ()
    ask: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()
    # Derived from the rules: of all of them, and of those that reach our own tools.
    index: RuleIndex = field(init=False, compare=False, repr=False)
    deny_index: RuleIndex = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", index_rules(self.all))
        object.__setattr__(self, "deny_index", index_rules(self.deny))

    @property
    def all(self) -> tuple[Rule, ...]:
        """Return every rule: deny first, as they are judged."""
        return self.deny + self.ask + self.allow


def join_rules(
    tool: str, exact: ToolRules | None, wildcards: Sequence[Wildcard]
) -> ToolRules | None:
    """Join the rules of a name with those of every wildcard that covers it."""
    covering = [item for item in wildcards if item.pattern.matches(tool)]
    # A grant by wildcard never reaches our own tools, whatever its pattern, nor those that a host
    # runs itself, unless it names the host.
    program = tool.partition(".")[0]
    granting = [
        item
        for item in covering
        if not is_ours(tool) and (program not in PROGRAMS or item.pattern.names(program))
    ]
    named = exact or ToolRules(signature=Signature())
    joined = ToolRules(
        signature=named.signature,
        allow=named.allow + tuple(rule for item in granting for rule in item.allow),
        ask=named.ask + tuple(rule for item in granting for rule in item.ask),
        deny=named.deny + tuple(rule for item in covering for rule in item.deny),
        indexes=(
            *named.indexes,
            *(item.index if item in granting else item.deny_index for item in covering),
        ),
    )
    if not joined.all or (exact is None and is_ours(tool) and tool not in BUILT_IN):
        return None
    built_in = BUILT_IN.get(tool)
    return replace(joined, signature=built_in or implied_by(tool, joined.all))
