"""Findings about reach: what is granted beyond the workspace, and what programs see beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from safeconduct.call import Profile
from safeconduct.policies.binding import Rule, ToolRules
from safeconduct.policies.capability import covers
from safeconduct.policies.globs import Glob, compile_glob
from safeconduct.policies.match import Argv, Matcher, PathMatcher, spell
from safeconduct.policies.match_text import Excluding
from safeconduct.policies.rules import Policy
from safeconduct.syscalls import ADDABLE

from .findings import Finding, Level, at, finding
from .programs import RUNS_OTHERS

_OUTSIDE: Final = "check.outside"
_OUTSIDE_FIX: Final = "narrow it to $WS, or keep it if this is meant"


def runners(policy: Policy, tool: ToolRules) -> Iterator[Finding]:
    """Find programs that can run others in a profile wider than what the agent may do itself."""
    for rule in tool.allow + tool.ask:
        for matcher in (rule.matchers or {}).values():
            if not isinstance(matcher, Argv) or not matcher.rest:
                continue
            names = matcher.programs
            known = sorted(name for name in names if name.rpartition("/")[2] in RUNS_OTHERS)
            profile = policy.profile_of(rule)
            if not known and names:
                continue
            what = known[0] if known else "this argv"
            wider = _beyond_grants(policy, profile)
            if not wider:
                continue
            message = f"{what} can run other programs, and profile {profile.name} {wider}"
            fix = "give the rule a narrower profile: argv is no boundary, the profile is"
            yield at(rule, Level.WARNING, "check.wide_profile", message, fix)


def _beyond_grants(policy: Policy, profile: Profile) -> str:
    """Say what a program in this profile reaches that no fs rule grants to the agent itself."""
    for verb, tools, folders in (
        ("reads", ("fs.read",), profile.read),
        ("writes", ("fs.write",), profile.write),
    ):
        granted = [
            glob
            for tool in tools
            if (rules := policy.rules_of(tool)) is not None
            for glob in _granted(rules)
        ]
        for folder in folders:
            if not any(covers(item, folder) for item in granted):
                return f"{verb} {folder}, which no {tools[0]} rule grants whole"
    return ""


def _granted(tool: ToolRules) -> Iterator[str]:
    for rule in tool.allow + tool.ask:
        if rule.matchers is None:
            yield "/"
        for matcher in (rule.matchers or {}).values():
            if isinstance(matcher, PathMatcher):
                yield from (folder.rstrip("/") or "/" for folder in matcher.folders)
                yield from matcher.exact


def folders_outside(policy: Policy) -> Iterator[Finding]:
    """Find what profiles show outside the workspace, one finding for each folder.

    INVARIANT: `safeconduct trust` shows these first, with what `reach_of_rules` finds; a person
    agrees to no other reach.
    """
    for name, profile in policy.profiles.items():
        where = policy.profile_positions[name]
        for verb, folders in (("reads", profile.read), ("writes", profile.write)):
            for folder in folders:
                if covers(policy.workspace, folder):
                    continue
                message = f"profile {name} {verb} {spell(folder)}, which is outside the workspace"
                yield finding(Level.WARNING, _OUTSIDE, policy.file, where, message, _OUTSIDE_FIX)


def reach_of_rules(policy: Policy) -> Iterator[Finding]:
    """Find grants of paths outside the workspace, one finding for each pattern."""
    for _, tool in policy.each():
        for rule in tool.allow + tool.ask:
            for pattern in _reaching_out(rule, policy.workspace):
                what = "any path" if pattern is None else spell(pattern)
                message = f"{rule.id} lets {rule.tool} reach {what}, which is outside the workspace"
                yield at(rule, Level.WARNING, _OUTSIDE, message, _OUTSIDE_FIX)


def added_calls(policy: Policy) -> Iterator[Finding]:
    """Find what each profile adds to the system calls that every sandbox has."""
    fix = "take it out of syscalls if no program here needs it"
    for name, profile in policy.profiles.items():
        where = policy.profile_positions[name]
        for call in profile.syscalls:
            message = f"profile {name} adds the system call {call}: {ADDABLE[call]}"
            level, code = Level.WARNING, "check.syscall"
            yield finding(level, code, policy.file, where, message, fix)


def _reaching_out(rule: Rule, workspace: str) -> Iterator[str | None]:
    """Yield each path pattern that leads out of the workspace; None stands for any path."""
    matchers = rule.matchers or {}
    if rule.tool.startswith("fs.") and _paths(matchers.get("path")) is None:
        yield None
    for matcher in matchers.values():
        paths = _paths(matcher)
        for pattern in paths.patterns if paths else ():
            if not covers(workspace, compile_glob(pattern, workspace=workspace).anchor):
                yield pattern


def _paths(matcher: Matcher | None) -> PathMatcher | None:
    """Return the path patterns of a matcher; what stands after `not` only takes away."""
    found = matcher.base if isinstance(matcher, Excluding) else matcher
    return found if isinstance(found, PathMatcher) else None


def shown(policy: Policy) -> Iterator[Finding]:
    """Find profiles that show a program what a deny on fs.read keeps from the agent."""
    reads = policy.rules_of("fs.read")
    used = {
        profile.name: profile
        for _, tool in policy.each()
        for rule in tool.allow + tool.ask
        if not rule.tool.startswith("fs.") and (profile := policy.profile_of(rule))
    }
    for deny in reads.deny if reads else ():
        for pattern, anchor in _denied(deny):
            for profile in used.values():
                if not _shows(profile, pattern, anchor):
                    continue
                message = f"profile {profile.name} shows programs what {deny.id} hides: {pattern}"
                fix = f'add "{pattern}" to hide in profile {profile.name}'
                yield at(deny, Level.ERROR, "check.shown", message, fix)


def _denied(deny: Rule) -> Iterator[tuple[str, str]]:
    """Yield each denied pattern in its absolute form with the folder it lies in."""
    matcher = _paths((deny.matchers or {}).get("path"))
    if matcher is None:
        return
    for folder in matcher.folders:
        yield folder.rstrip("/") + "/**", folder.rstrip("/") or "/"
    for path in matcher.exact:
        if path + "/" not in matcher.folders:
            yield path, path
    for glob in matcher.globs:
        yield "/" + "/".join(glob.components), glob.anchor


def _shows(profile: Profile, pattern: str, anchor: str) -> bool:
    if any(_hides_pattern(hide, pattern) for hide in profile.hide):
        return False
    return any(covers(folder, anchor) or covers(anchor, folder) for folder in profile.read)


def _hides_pattern(hide: str, pattern: str) -> bool:
    """Tell whether ``hide`` surely takes away all that ``pattern`` matches."""
    if hide == pattern or f"{hide}/**" == pattern:
        return True
    folder = Glob(hide, tuple(hide[1:].split("/"))).folder
    return folder is not None and covers(folder, pattern)
