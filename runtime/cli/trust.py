"""``safeconduct trust``: a person pins the digest of a policy that came with a project."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.errors import Exit, PolicyError
from safeconduct.policies import (
    Level,
    Origin,
    Policy,
    Rule,
    TrustStore,
    check_policy,
    discover_policy,
    load_policy,
)

from .options import JsonOption
from .places import refuse_inside_sandbox
from .source import UsageError
from .terminal import clip, print_json, print_line, printable, tell

# LIMIT: a longer policy is read in an editor, not here.
_RULES_SHOWN = 40
_RULE_CHARACTERS = 300


def trust(
    file: Annotated[
        Path | None, typer.Argument(help="Policy file; without it the project's own.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Show it; change nothing.")] = False,
    revoke: Annotated[bool, typer.Option("--revoke", help="Trust it no longer.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Believe a policy that came with a project, as it is now; a changed file is untrusted again.

    Until then such a policy only narrows your own. Exits with 126 where you say no.
    """
    refuse_inside_sandbox("trust")
    if show and revoke:
        raise UsageError("--show and --revoke exclude each other", hint="give one of them")
    path = file or _project_policy()
    store = TrustStore.of(os.environ)
    if revoke:
        there = store.unpin(path)
        print_line(f"{path}: {'no longer trusted' if there else 'was not trusted'}")
        return Exit.OK
    # The digest is of the very bytes that were compiled and are shown: read once.
    policy = load_policy(path)
    trusted = store.is_trusted(path, policy.version)
    if as_json:
        print_json(_json(path, policy, trusted=trusted))
    else:
        _show(path, policy, trusted=trusted)
    if show or trusted:
        return Exit.OK
    if not yes and not _agreed():
        tell("not trusted", "nothing was changed")
        return Exit.DENIED
    store.pin(path, policy.version)
    tell(f"{path} is trusted as {policy.version}")
    return Exit.OK


def _project_policy() -> Path:
    """Return the project's policy; one that the operator named elsewhere needs no trust."""
    environment = {name: os.environ[name] for name in ("HOME",) if name in os.environ}
    found = discover_policy(start=Path.cwd(), environment=environment)
    if found.origin is not Origin.PROJECT:
        raise PolicyError(
            "no policy came with this project",
            code="policy.not_found",
            hint="name a file, or write one with: safeconduct init",
        )
    return found.path


def _agreed() -> bool:
    """Ask on the terminal. Only y is yes."""
    if not sys.stdin.isatty():
        raise UsageError(
            "there is no terminal to ask on", hint="read the file, then run it again with --yes"
        )
    print("Trust this policy, as it is now? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline(16).strip().lower() in ("y", "yes")


def _json(path: Path, policy: Policy, *, trusted: bool) -> dict[str, object]:
    return {
        "file": str(path),
        "digest": policy.version,
        "trusted": trusted,
        "workspace": policy.workspace,
        "grants": [_line(policy, rule) for rule in _rules(policy)],
        "findings": [one.to_json() for one in check_policy(policy)],
    }


def _show(path: Path, policy: Policy, *, trusted: bool) -> None:
    print_line(f"{path}")
    print_line(f"  digest     {policy.version} ({'trusted' if trusted else 'not trusted'})")
    print_line(f"  workspace  {policy.workspace}")
    print_line("  it says    (what is not granted is denied)")
    rules = _rules(policy)
    for rule in rules[:_RULES_SHOWN]:
        print_line(f"    {clip(_line(policy, rule), _RULE_CHARACTERS)}")
    if len(rules) > _RULES_SHOWN:
        print_line(f"    … and {len(rules) - _RULES_SHOWN} more rules: read the file")
    for one in check_policy(policy):
        word = "ERROR" if one.level is Level.ERROR else "warning"
        print_line(f"  {word}    line {one.line}: {one.message}")


def _rules(policy: Policy) -> list[Rule]:
    return [rule for tool in policy.tools.values() for rule in tool.all]


def _line(policy: Policy, rule: Rule) -> str:
    matchers = rule.matchers
    named = "with any arguments"
    if matchers is not None:
        named = ", ".join(f"{name} {matcher.describe()}" for name, matcher in matchers.items())
    rest = ", and any others" if rule.rest else ""
    where = ""
    if not rule.tool.startswith("fs.") and rule.effect != "deny":
        profile = policy.profile_of(rule)
        where = f"  [profile {profile.name}: writes {', '.join(profile.write) or 'nothing'}]"
    return printable(f"{rule.effect:<5} {rule.tool} {named}{rest}{where}")
