"""Findings about rules: those that never count, and those that grant more than is seen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from safeconduct.call import Effect, Engine, Profile, WorkspaceMode
from safeconduct.policies.binding import Rule, ToolRules
from safeconduct.policies.lattice.rules import Scope
from safeconduct.policies.match import Literals, Matcher, spell
from safeconduct.policies.match_text import Excluding
from safeconduct.policies.rules import Policy
from safeconduct.policies.syntax import Position

from .findings import Finding, Level, at, finding

# Tools of ours that refuse a profile whose writes go to an overlay.
_WITHOUT_OVERLAY: Final = frozenset(["fs.write", "python.run"])
# And those that would not see what earlier calls of a session left in its overlay.
_WITHOUT_SESSION: Final = _WITHOUT_OVERLAY | {"fs.read", "fs.list"}
# Tools of ours that run in a native sandbox alone.
_NATIVE_ONLY: Final = frozenset(["agent.run", "shell.run", "python.run"])
# LIMIT: pairs of rules of one tool that are compared; above it, only equal ones are found.
_PAIRS_MAX: Final = 20_000
# What is written as a path, a URL, a host or an address is: hardly the text itself.
_PATTERN: Final = re.compile(
    r"\$WS(?:/|\Z)|(?:.*/)?\*\*(?:/|\Z)|[a-z+]+://.*\*|/.*\*|\*@|\*\*?\.", re.DOTALL
)


def no_overlay(policy: Policy, name: str, tool: ToolRules) -> Iterator[Finding]:
    """Find tools of ours whose every call is refused, because of the profile's overlay."""
    for rule in tool.allow + tool.ask if name in _WITHOUT_SESSION else ():
        profile = policy.profile_of(rule)
        if _refuses_overlay(name, profile):
            message = f"{name} has no overlay, so profile {profile.name} refuses every call of it"
            fix = "name a profile with workspace: direct in the rule"
            yield at(rule, Level.ERROR, "check.no_overlay", message, fix)


def no_engine(policy: Policy, name: str, tool: ToolRules) -> Iterator[Finding]:
    """Find tools of ours whose every call is refused, because of the profile's engine."""
    for rule in tool.allow + tool.ask if name in _NATIVE_ONLY else ():
        profile = policy.profile_of(rule)
        if profile.engine is not Engine.NATIVE:
            message = f"{name} has no engine: wasm, so profile {profile.name} refuses every call"
            fix = "name a profile with engine: native in the rule"
            yield at(rule, Level.ERROR, "check.no_engine", message, fix)


def _refuses_overlay(tool: str, profile: Profile) -> bool:
    if profile.workspace is WorkspaceMode.SESSION:
        return True
    overlaid = profile.workspace is WorkspaceMode.OVERLAY and tool in _WITHOUT_OVERLAY
    return overlaid and (bool(profile.write) or tool == "fs.write")


def swallowed(policy: Policy, tool: ToolRules) -> Iterator[Finding]:
    """Find grants that an ask always turns into a question."""
    for ask, allow in _covered(policy, tool, tool.ask, tool.allow):
        message = f"{ask.id} asks whenever {allow.id} allows, so the allow never counts"
        fix = "narrow the ask, or remove the allow"
        yield at(allow, Level.WARNING, "check.swallowed", message, fix)


def unreachable(policy: Policy, tool: ToolRules) -> Iterator[Finding]:
    """Find grants that a deny takes back whole."""
    for deny, rule in _covered(policy, tool, tool.deny, tool.ask + tool.allow):
        message = f"{deny.id} denies all that {rule.id} grants"
        fix = "narrow the deny, or remove this rule"
        yield at(rule, Level.ERROR, "check.unreachable", message, fix)


def _covered(
    policy: Policy, tool: ToolRules, wide: Sequence[Rule], narrow: Sequence[Rule]
) -> Iterator[tuple[Rule, Rule]]:
    scope = Scope(tool.signature, policy.workspace)
    few = len(wide) * len(narrow) <= _PAIRS_MAX
    for one in wide:
        for other in narrow:
            alike = one.matchers == other.matchers and one.when == other.when
            if alike or (few and scope.restriction_covers(one, other, None)):
                yield one, other


def broad(policy: Policy) -> Iterator[Finding]:
    """Find grants by wildcard that reach tools nobody has read about."""
    for wildcard in policy.wildcards:
        name = wildcard.pattern.pattern
        for rule in wildcard.allow + wildcard.ask:
            if "*" in name.partition(".")[0]:
                message = f"{rule.id} grants {name} of every server, whoever names the tools"
                fix = "begin with the name of the server"
                yield at(rule, Level.WARNING, "check.broad_wildcard", message, fix)
            elif rule.effect is Effect.ALLOW and (rule.matchers is None or rule.rest):
                message = f"{rule.id} grants every {name}, now and later, with arguments unseen"
                fix = "name the tools, or their arguments, or ask"
                yield at(rule, Level.WARNING, "check.broad_wildcard", message, fix)


def narrowed_away(parts: Sequence[Policy]) -> Iterator[Finding]:
    """Find grants of tools that a wider policy, or role, does not grant at all."""
    for index, part in enumerate(parts):
        for name, tool in part.each():
            if "*" in name:
                continue
            for wider in parts[:index]:
                there = wider.rules_of(name)
                if there is not None and (there.allow or there.ask):
                    continue
                what = f"role {wider.role}" if wider.role else wider.file
                for rule in tool.allow + tool.ask:
                    message = f"{rule.id} never grants: it is within {what}, which grants no {name}"
                    fix = "grant it there too, or remove this rule"
                    yield at(rule, Level.ERROR, "check.unreachable", message, fix)


def literal_patterns(policy: Policy) -> Iterator[Finding]:
    """Find bare words that look like patterns and are the text itself: nothing says otherwise."""
    for rule in policy.every_rule():
        level = Level.WARNING if rule.effect is Effect.ALLOW else Level.ERROR
        for name, matcher in (rule.restricting or rule.matchers or {}).items():
            for text in sorted(text for text in _texts(matcher) if _PATTERN.match(text)):
                message = f"{rule.id} takes {spell(text)} for the very text of {name}"
                fix = f"write {name}: {{path: […]}}, or url, host or email, as it is meant"
                yield at(rule, level, "check.literal_pattern", message, fix)


def _texts(matcher: Matcher) -> frozenset[str]:
    if isinstance(matcher, Excluding):
        return _texts(matcher.base) | _texts(matcher.exclude)
    return matcher.texts if isinstance(matcher, Literals) else frozenset()


def empty(policy: Policy) -> Iterator[Finding]:
    """Find a policy without any rule."""
    if not next(iter(policy.every_rule()), None):
        fix = "add rules under tools"
        where = Position(1, 1)
        yield finding(Level.WARNING, "check.empty", policy.file, where, "nothing is granted", fix)


def unmarked(policy: Policy) -> Iterator[Finding]:
    """Find names that are listed as irreversible and that no rule of the file grants."""
    granted = {rule.tool for rule in policy.every_rule() if rule.effect is not Effect.DENY}
    for pattern in policy.trace.irreversible:
        if not any(pattern.overlaps(tool) for tool in granted):
            message = f"{pattern.pattern} is listed as irreversible, and no rule grants such a tool"
            fix = "look for a slip in the name; what another file grants may stand here"
            where = policy.trace.position
            yield finding(Level.WARNING, "check.unmarked", policy.file, where, message, fix)
