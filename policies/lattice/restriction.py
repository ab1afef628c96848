"""Policy lattice: a rule as it restricts, also where nobody knows yet what it judges."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

from safeconduct.policies.binding import Rule
from safeconduct.policies.match import Matcher
from safeconduct.policies.signatures import FED


def restricting(rule: Rule) -> Mapping[str, Matcher]:
    """Return what the arguments are where a rule restricts (binding.py)."""
    return rule.restricting or rule.matchers or {}


def as_restriction(rule: Rule) -> Rule:
    """Return a rule whose only form is the one in which it restricts."""
    return replace(rule, matchers=rule.restricting, restricting=None) if rule.restricting else rule


def names_fed(rule: Rule, names: Set[str] = FED) -> bool:
    """Tell whether a rule asks for what is not known yet of a part of shell text."""
    asked = rule.when.arguments if rule.when is not None else frozenset[str]()
    return not names.isdisjoint(restricting(rule)) or not names.isdisjoint(asked)


def of_unknown(rule: Rule) -> Rule:
    """Return a restriction as it binds a part of shell text: for some input that nobody knows."""
    known = {name: x for name, x in restricting(rule).items() if name not in FED}
    asks = rule.when is not None and not FED.isdisjoint(rule.when.arguments)
    return replace(rule, matchers=known, restricting=None, when=None if asks else rule.when)
