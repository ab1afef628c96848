"""Findings about rules that add nothing beside others, and about grants that keep nothing out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from safeconduct.call import Effect
from safeconduct.policies.binding import Rule, ToolRules, implied_by
from safeconduct.policies.lattice.profiles import profile_within
from safeconduct.policies.lattice.rules import Scope
from safeconduct.policies.match import AnyValue, Matcher
from safeconduct.policies.match_text import Email, Host, Regex
from safeconduct.policies.match_url import UrlMatcher
from safeconduct.policies.rules import Policy

from .findings import Finding, Level, at

# LIMIT: pairs of rules of one tool that are compared; above it, none are.
MAX_PAIRS: Final = 20_000
# Texts that have nothing in common: a pattern that takes them all keeps nothing out.
_ODD_TEXTS: Final = ("x", "../../etc/passwd", "a b; rm -rf /", "-rf", "\u00e9\u202e", "$(id)", "0")


def shadowed(policy: Policy, name: str, tool: ToolRules) -> Iterator[Finding]:
    """Find rules that another one of the same effect covers whole, so that they add nothing.

    Where two grants match, a call gets what both profiles give. So a grant under another one adds
    something only where its own profile takes something away, or its rate or budget counts.
    """
    scope = Scope(tool.signature, policy.workspace)
    for rules in (tool.allow, tool.ask, tool.deny):
        if len(rules) * len(rules) > MAX_PAIRS:
            continue
        for rule in rules:
            if rule.tool != name or rule.bounds:
                continue
            cover = _cover(policy, scope, rule, rules)
            if cover is not None and not _tells_kinds(rule, tool):
                yield _told(policy, rule, cover)


def _tells_kinds(rule: Rule, tool: ToolRules) -> bool:
    """Tell whether an argument is read as what it is only because of this rule."""
    if tool.signature.closed:
        return False
    others = [other for other in tool.all if other is not rule]
    return implied_by(rule.tool, others).arguments != tool.signature.arguments


def _cover(policy: Policy, scope: Scope, rule: Rule, rules: Sequence[Rule]) -> Rule | None:
    for other in rules:
        if other is rule or not _covers(scope, other, rule):
            continue
        if rule.effect is not Effect.DENY and not profile_within(
            policy.profile_of(other), policy.profile_of(rule)
        ):
            continue
        # Of two that say the same, the first one stays.
        if _place(other) > _place(rule) and not other.bounds and _covers(scope, rule, other):
            continue
        return other
    return None


def _place(rule: Rule) -> tuple[int, int]:
    return rule.position.line, rule.position.column


def _covers(scope: Scope, wide: Rule, narrow: Rule) -> bool:
    grants = narrow.effect is Effect.DENY or scope.grant_covers(wide, narrow)
    restricts = narrow.effect is Effect.ALLOW or scope.restriction_covers(wide, None, narrow)
    return grants and restricts


def _told(policy: Policy, rule: Rule, cover: Rule) -> Finding:
    message = f"{rule.id} adds nothing: {cover.id} covers it"
    fix = f"remove it, or narrow {cover.id}"
    if rule.effect is not Effect.DENY:
        own, other = policy.profile_of(rule), policy.profile_of(cover)
        if own != other:
            message = f"{rule.id} never runs a call in all of profile {own.name}: {cover.id} covers"
            message += f" it, and such a call gets only what profile {other.name} grants too"
    return at(rule, Level.WARNING, "check.shadowed", message, fix)


def reach_of_all(policy: Policy) -> Iterator[Finding]:
    """Find grants that keep no host, address or text out, and count nothing either."""
    for name, tool in policy.each():
        for rule in tool.allow:
            if rule.tool != name or rule.when is not None or rule.bounds:
                continue
            for argument, what in _unbounded(rule):
                message = f"{rule.id} lets {argument} be {what}"
                fix = "list what is meant, or add not, when, rate or budget; or ask"
                yield at(rule, Level.WARNING, "check.broad", message, fix)


def _unbounded(rule: Rule) -> Iterator[tuple[str, str]]:
    matchers = rule.matchers or {}
    if rule.tool.startswith("http.") and isinstance(matchers.get("url", AnyValue()), AnyValue):
        yield "url", "any URL"
    for argument, matcher in matchers.items():
        if what := _everything(matcher):
            yield argument, what


def _everything(matcher: Matcher) -> str:
    """Name what a matcher lets pass whole; empty where it keeps something out."""
    match matcher:
        case UrlMatcher(patterns) if any(
            one.labels == ("**",) and one.path.components == ("**",) for one in patterns
        ):
            return "any URL of any host"
        case Host(patterns) if any(one.labels == ("**",) for one in patterns) or not patterns:
            return "any host"
        case Email(patterns) if not patterns or any(
            one.pattern.startswith("*@") and one.host.labels == ("**",) for one in patterns
        ):
            return "any mail address"
        case Regex() if all(map(matcher.matches, _ODD_TEXTS)):
            return "any text: its pattern keeps nothing out"
        case _:
            return ""
