"""What `safeconduct policy check` says about a policy that loads: findings, not verdicts.

An error is a policy that does not do what it says; a warning is one that probably grants
more, or less, than its author thinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from safeconduct.call import Json, Profile, WorkspaceMode
from safeconduct.errors import PolicyError
from safeconduct.syscalls import ADDABLE

from .capability import covers
from .globs import Glob, compile_glob
from .load import load_policy
from .match import Argv, PathMatcher, spell
from .rules import Policy, Rule, ToolRules

# Tools of ours that refuse a profile whose writes go to an overlay.
_WITHOUT_OVERLAY: Final = frozenset(["fs.write", "python.run"])
# Programs whose arguments, configuration or input make them run other programs.
RUNS_OTHERS: Final = frozenset(
    [
        "ash",
        "awk",
        "bash",
        "bun",
        "busybox",
        "cargo",
        "csh",
        "dash",
        "deno",
        "docker",
        "ed",
        "emacs",
        "env",
        "find",
        "fish",
        "gawk",
        "gcc",
        "gdb",
        "git",
        "go",
        "gradle",
        "java",
        "just",
        "ksh",
        "less",
        "make",
        "man",
        "more",
        "mvn",
        "nice",
        "node",
        "nohup",
        "npm",
        "npx",
        "nsenter",
        "parallel",
        "perl",
        "php",
        "pip",
        "pip3",
        "pnpm",
        "pytest",
        "python",
        "python3",
        "rsync",
        "ruby",
        "sed",
        "sh",
        "ssh",
        "stdbuf",
        "strace",
        "sudo",
        "su",
        "tar",
        "timeout",
        "tsx",
        "unshare",
        "uv",
        "uvx",
        "vi",
        "vim",
        "watch",
        "xargs",
        "yarn",
        "zsh",
    ]
)


class Level(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing to look at, with its place (from 1; 0 is unknown) and what to do."""

    level: Level
    code: str
    file: str
    line: int
    column: int
    message: str
    fix: str

    def to_json(self) -> dict[str, Json]:
        """Return it as plain JSON."""
        return {
            "level": self.level.value,
            "code": self.code,
            "file": self.file,
            "line": self.line,
            "column": self.column,
            "message": self.message,
            "fix": self.fix,
        }


def check_file(path: Path, *, workspace: Path | None = None) -> tuple[Finding, ...]:
    """Check a file; one that does not load gives the one finding that says why."""
    try:
        policy = load_policy(path, workspace=workspace)
    except PolicyError as error:
        finding = Finding(
            level=Level.ERROR,
            code=error.code,
            file=error.file or str(path),
            line=error.line,
            column=error.column,
            message=error.message,
            fix=error.hint,
        )
        return (finding,)
    return check_policy(policy)


def check_policy(policy: Policy) -> tuple[Finding, ...]:
    """Return what is doubtful about a policy, in the order of its lines."""
    findings: list[Finding] = []
    for name, tool in policy.tools.items():
        findings += _no_overlay(policy, name, tool)
        findings += _swallowed(tool)
        findings += _unreachable(tool)
        findings += _runners(policy, tool)
    findings += _shown(policy)
    findings += _outside(policy)
    findings += _added_calls(policy)
    if not policy.tools:
        fix = "add rules under tools"
        findings.append(
            _finding(Level.WARNING, "check.empty", policy.file, 1, 1, "nothing is granted", fix)
        )
    return tuple(sorted(findings, key=lambda item: (item.line, item.column, item.code)))


def _finding(
    level: Level, code: str, file: str, line: int, column: int, message: str, fix: str
) -> Finding:
    return Finding(
        level=level, code=code, file=file, line=line, column=column, message=message, fix=fix
    )


def _at(rule: Rule, level: Level, code: str, message: str, fix: str) -> Finding:
    where = rule.position
    return _finding(level, code, rule.file, where.line, where.column, message, fix)


def _is_wider(wide: Rule, narrow: Rule) -> bool:
    """Tell whether whatever ``narrow`` grants, ``wide`` restricts, as far as v1 can see."""
    if wide.matchers is None:
        return True
    matchers = narrow.matchers or {}
    return all(
        name in matchers and matchers[name] == matcher for name, matcher in wide.matchers.items()
    )


def _no_overlay(policy: Policy, name: str, tool: ToolRules) -> Iterator[Finding]:
    for rule in tool.allow + tool.ask if name in _WITHOUT_OVERLAY else ():
        profile = policy.profile_of(rule)
        if profile.workspace is WorkspaceMode.OVERLAY and (profile.write or name == "fs.write"):
            message = f"{name} has no overlay, so profile {profile.name} refuses every call of it"
            fix = "name a profile with workspace: direct in the rule"
            yield _at(rule, Level.ERROR, "check.no_overlay", message, fix)


def _swallowed(tool: ToolRules) -> Iterator[Finding]:
    for ask in tool.ask:
        for allow in tool.allow:
            if _is_wider(ask, allow):
                message = f"{ask.id} asks whenever {allow.id} allows, so the allow never counts"
                fix = "narrow the ask, or remove the allow"
                yield _at(allow, Level.WARNING, "check.swallowed", message, fix)


def _unreachable(tool: ToolRules) -> Iterator[Finding]:
    for deny in tool.deny:
        for rule in tool.ask + tool.allow:
            if _is_wider(deny, rule):
                message = f"{deny.id} denies all that {rule.id} grants"
                fix = "narrow the deny, or remove this rule"
                yield _at(rule, Level.ERROR, "check.unreachable", message, fix)


def _runners(policy: Policy, tool: ToolRules) -> Iterator[Finding]:
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
            yield _at(rule, Level.WARNING, "check.wide_profile", message, fix)


def _beyond_grants(policy: Policy, profile: Profile) -> str:
    """Say what a program in this profile reaches that no fs rule grants to the agent itself."""
    for verb, tools, folders in (
        ("reads", ("fs.read",), profile.read),
        ("writes", ("fs.write",), profile.write),
    ):
        granted = [
            glob for tool in tools if tool in policy.tools for glob in _granted(policy.tools[tool])
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


def _outside(policy: Policy) -> Iterator[Finding]:
    """Find what is granted outside the workspace, one finding for each path or pattern.

    INVARIANT: `safeconduct trust` shows these first; a person agrees to no other reach.
    """
    level, code = Level.WARNING, "check.outside"
    fix = "narrow it to $WS, or keep it if this is meant"
    for name, profile in policy.profiles.items():
        where = policy.profile_positions[name]
        for verb, folders in (("reads", profile.read), ("writes", profile.write)):
            for folder in folders:
                if covers(policy.workspace, folder):
                    continue
                message = f"profile {name} {verb} {spell(folder)}, which is outside the workspace"
                yield _finding(level, code, policy.file, where.line, where.column, message, fix)
    for tool in policy.tools.values():
        for rule in tool.allow + tool.ask:
            for pattern in _reaching_out(rule, policy.workspace):
                what = "any path" if pattern is None else spell(pattern)
                message = f"{rule.id} lets {rule.tool} reach {what}, which is outside the workspace"
                yield _at(rule, level, code, message, fix)


def _added_calls(policy: Policy) -> Iterator[Finding]:
    """Find what each profile adds to the system calls that every sandbox has."""
    fix = "take it out of syscalls if no program here needs it"
    for name, profile in policy.profiles.items():
        where = policy.profile_positions[name]
        for call in profile.syscalls:
            message = f"profile {name} adds the system call {call}: {ADDABLE[call]}"
            level, code = Level.WARNING, "check.syscall"
            yield _finding(level, code, policy.file, where.line, where.column, message, fix)


def _reaching_out(rule: Rule, workspace: str) -> Iterator[str | None]:
    """Yield each path pattern that leads out of the workspace; None stands for any path."""
    matchers = rule.matchers or {}
    if rule.tool.startswith("fs.") and not isinstance(matchers.get("path"), PathMatcher):
        yield None
    for matcher in matchers.values():
        for pattern in matcher.patterns if isinstance(matcher, PathMatcher) else ():
            if not covers(workspace, compile_glob(pattern, workspace=workspace).anchor):
                yield pattern


def _shown(policy: Policy) -> Iterator[Finding]:
    """Find profiles that show a program what a deny on fs.read keeps from the agent."""
    reads = policy.tools.get("fs.read")
    used = {
        profile.name: profile
        for tool in policy.tools.values()
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
                yield _at(deny, Level.ERROR, "check.shown", message, fix)


def _denied(deny: Rule) -> Iterator[tuple[str, str]]:
    """Yield each denied pattern in its absolute form with the folder it lies in."""
    matcher = (deny.matchers or {}).get("path")
    if not isinstance(matcher, PathMatcher):
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
