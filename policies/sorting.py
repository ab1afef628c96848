"""Step 3 of the path of one Call: which rules of a tool deny it, which grant it, and which ask.

What a rule says is its own word alone. That must hold for what it takes to hear it too: where the
work is more than a little, each grant has a share of its own (`Apart`), so that one grant less
never lets another be heard; and all restrictions together have one, which no grant is part of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from safeconduct.call import Document, Effect, Facts, Json

from .binding import Unfit
from .index import may_match
from .rules import Policy, Rule, ToolRules
from .when.condition import when_facts
from .work import MAX_GRANT_STEPS, WORK, TooMuchWork

# Those that deny, those that grant, and those that ask. A rule that asks grants as well.
Sorted: TypeAlias = tuple[list[Rule], list[Rule], list[Rule]]

# Bound once: each look-up of a member of an enumeration takes as long as a comparison.
_ALLOW, _DENY = Effect.ALLOW, Effect.DENY


class Known:
    """What the `when` of a rule may ask for, put together when the first rule asks."""

    __slots__ = ("_document", "_facts", "_named")

    def __init__(self, document: Document, facts: Facts) -> None:
        self._document, self._facts = document, facts
        self._named: Mapping[str, Json] | None = None

    def surely_holds(self, rule: Rule) -> bool:
        """Tell whether the rule has no `when`, or one that holds."""
        return rule.when is None or rule.holds(self.named, self._document.unfit) is True

    def may_hold(self, rule: Rule) -> bool:
        """Tell whether the rule has no `when`, or one that holds or cannot be judged."""
        return rule.when is None or rule.holds(self.named, self._document.unfit) is not False

    @property
    def unfit(self) -> Unfit | None:
        """The arguments that are not what the rules take them for."""
        return self._document.unfit

    @property
    def named(self) -> Mapping[str, Json]:
        """The facts by their names in the language."""
        if self._named is None:
            self._named = when_facts(self._document.arguments, self._facts)
        return self._named


def sort(
    policy: Policy, tool: ToolRules, document: Document, facts: Facts, candidates: Sequence[Rule]
) -> Sorted:
    """Hear the rules that may match. Raises TooMuchWork."""
    arguments, unfit = document.arguments, document.unfit
    known = Known(document, facts)
    denying: list[Rule] = []
    granting: list[Rule] = []
    asking: list[Rule] = []
    for rule in candidates:
        effect = rule.effect
        if effect is not _DENY:
            grants = rule.grants(arguments, tool.signature, policy.workspace, unfit)
            if grants and (rule.when is None or known.surely_holds(rule)):
                granting.append(rule)
        if effect is _ALLOW or not rule.restricts(arguments, unfit):
            continue
        if rule.when is None or known.may_hold(rule):
            (denying if effect is _DENY else asking).append(rule)
    return denying, granting, asking


@dataclass(frozen=True, slots=True)
class Apart:
    """What each grant of one Call may still cost, by its identity; a Call may have many parts.

    A grant beyond its share grants nothing. What all restrictions may cost stands in `WORK`.
    """

    _left: dict[int, float] = field(default_factory=dict[int, float])

    def sort(self, policy: Policy, tool: ToolRules, document: Document, facts: Facts) -> Sorted:
        """Hear each rule apart. Raises TooMuchWork: beyond the share of the restrictions, and where
        nothing grants but a grant was not heard to its end."""
        known = Known(document, facts)
        asking = [rule for rule in tool.ask if _restricts(rule, document, known)]
        denying = [rule for rule in tool.deny if _restricts(rule, document, known)]
        granting: list[Rule] = []
        unheard = False
        for rule in tool.candidates(document.arguments, document.unfit):
            if rule.effect is _DENY:
                continue
            try:
                if self._grants(rule, policy, tool, document) and known.surely_holds(rule):
                    granting.append(rule)
            except TooMuchWork:
                unheard = True
        if unheard and not granting and not denying:
            raise TooMuchWork
        return denying, granting, asking

    def _grants(self, rule: Rule, policy: Policy, tool: ToolRules, document: Document) -> bool:
        restrictions = WORK.left
        WORK.left = self._left.get(id(rule), MAX_GRANT_STEPS)
        try:
            return rule.grants(document.arguments, tool.signature, policy.workspace, document.unfit)
        except TooMuchWork:
            WORK.left = 0
            raise
        finally:
            self._left[id(rule)], WORK.left = WORK.left, restrictions


def _restricts(rule: Rule, document: Document, known: Known) -> bool:
    """Tell whether a rule restricts. Which rules are asked depends on no other rule.

    Not by the index of the tool: where a rule stands in that depends on those beside it.
    """
    arguments, unfit = document.arguments, document.unfit
    if unfit is None and not may_match(rule, arguments):
        return False
    return rule.restricts(arguments, unfit) and known.may_hold(rule)
