"""Findings about grants that never count: taken back piece by piece, or by what no policy lifts."""

from __future__ import annotations

from collections.abc import Iterator

from safeconduct.policies.binding import Rule, ToolRules
from safeconduct.policies.lattice.inclusion import Language, search
from safeconduct.policies.lattice.matchers import path_parts
from safeconduct.policies.lattice.rules import Scope
from safeconduct.policies.match import PathMatcher
from safeconduct.policies.match_text import Excluding
from safeconduct.policies.protected import is_protected
from safeconduct.policies.rules import Policy
from safeconduct.policies.signatures import Kind

from .findings import Finding, Level, at

_PATHS = frozenset({Kind.PATH, Kind.NEW_PATH, Kind.TOOL_PATH})
_CODE = "check.unreachable"


def denied_together(policy: Policy, name: str, tool: ToolRules) -> Iterator[Finding]:
    """Find grants that several denies take back whole, and none of them alone."""
    scope = Scope(tool.signature, policy.workspace)
    for rule in tool.allow + tool.ask if len(tool.deny) > 1 else ():
        if rule.tool != name or any(scope.restriction_covers(x, rule, None) for x in tool.deny):
            continue
        pieces = list(scope.pieces(rule))
        if len(pieces) > 1 and all(
            any(scope.restriction_covers(deny, piece, None) for deny in tool.deny)
            for piece in pieces
        ):
            message = f"several denies together take back all that {rule.id} grants"
            yield at(rule, Level.ERROR, _CODE, message, "narrow the denies, or remove this rule")


def hidden(policy: Policy, name: str, tool: ToolRules) -> Iterator[Finding]:
    """Find grants of paths that the profile of the rule itself hides, so that they never count."""
    for rule in tool.allow + tool.ask:
        profile = policy.profile_of(rule)
        if rule.tool != name or not profile.hide:
            continue
        taken = Language((*one.removeprefix("/").split("/"), "**") for one in profile.hide)
        for argument, matcher in (rule.matchers or {}).items():
            known = tool.signature.arguments.get(argument)
            within, without = path_parts(matcher)
            if known is None or known.kind not in _PATHS or not within:
                continue
            if search(within, [*without, taken]).none:
                message = f"{rule.id} grants only what profile {profile.name} hides"
                fix = "take the pattern out of hide, or remove this rule"
                yield at(rule, Level.ERROR, _CODE, message, fix)


def protected(policy: Policy, name: str, tool: ToolRules) -> Iterator[Finding]:
    """Find grants of writing what no policy lets our tools write (protected.py)."""
    for rule in tool.allow + tool.ask:
        if rule.tool != name:
            continue
        for argument in tool.signature.writes:
            for pattern in _protected_patterns(rule, argument):
                message = f"{rule.id} never lets {name} write {pattern}: it decides what runs later"
                fix = "remove the pattern; make such a change yourself"
                yield at(rule, Level.WARNING, "check.protected", message, fix)


def _protected_patterns(rule: Rule, argument: str) -> Iterator[str]:
    matcher = (rule.matchers or {}).get(argument)
    if isinstance(matcher, Excluding):
        matcher = matcher.base
    if not isinstance(matcher, PathMatcher):
        return
    for path in sorted({*matcher.exact, *matcher.folders}):
        # A folder pattern lists the folder itself as well.
        if f"{path}/" not in matcher.folders and is_protected(path):
            yield f"{path}**" if path.endswith("/") else path
    for glob in matcher.globs:
        if is_protected(glob.anchor):
            yield glob.pattern
