"""``safeconduct trust``: a person pins the digest of a policy that came with a project."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.call import Profile
from safeconduct.errors import Exit, PolicyError
from safeconduct.policies import (
    Found,
    Judged,
    Level,
    Origin,
    Policy,
    Rule,
    TrustStore,
    check_policy,
    describe_bound,
    discover_policy,
    load_policy,
)

from .options import JsonOption
from .places import refuse_inside_sandbox
from .source import UsageError
from .terminal import print_json, print_line, tell

# Nothing is cut: a person agrees to all of it. A policy file is bounded, so this is as well.
# A longer line is written as a list, one pattern on each line.
_LINE_CHARACTERS = 100
_OUTSIDE = "check.outside"
# A policy in this folder is for the folder above it, any other one for where it is run.
_POLICY_FOLDER = ".safeconduct"


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
    Found(path=path, origin=Origin.PROJECT, why="it is to be trusted").refuse_link()
    # The digest is of the very bytes that were compiled and are shown, those of the files that
    # it extends among them: read once.
    policy = load_policy(path)
    trusted = store.is_trusted(path, policy.version)
    if as_json:
        print_json(_json(path, policy, trusted=trusted))
    else:
        _show(path, policy, trusted=trusted)
    if show or trusted:
        return Exit.OK
    if not yes and not _agreed(len(_outside(path, policy))):
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


def _agreed(outside: int) -> bool:
    """Ask on the terminal. Only y is yes. The list may have scrolled away, its length has not."""
    if not sys.stdin.isatty():
        raise UsageError(
            "there is no terminal to ask on", hint="read the file, then run it again with --yes"
        )
    reach = f", with {outside} grants outside the workspace" if outside else ""
    print(f"Trust this policy, as it is now{reach}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline(16).strip().lower() in ("y", "yes")


def _json(path: Path, policy: Judged, *, trusted: bool) -> dict[str, object]:
    return {
        "file": str(path),
        "digest": policy.version,
        "trusted": trusted,
        "workspace": policy.workspace,
        "outside": _outside(path, policy),
        "grants": [_line(part, rule) for part in policy.parts for rule in part.every_rule()],
        "profiles": [
            {"name": name, "engine": profile.engine.value, **_folders(profile)}
            for part in policy.parts
            for name, profile in _profiles(part).items()
        ],
        "servers": {name: list(server.run) for name, server in policy.servers.items()},
        "findings": [one.to_json() for one in check_policy(policy)],
    }


def _show(path: Path, policy: Judged, *, trusted: bool) -> None:
    print_line(f"{path}")
    print_line("  outside the workspace:")
    for text in _outside(path, policy) or ["nothing"]:
        print_line(f"    {text}")
    print_line(f"  digest     {policy.version} ({'trusted' if trusted else 'not trusted'})")
    print_line(f"  workspace  {policy.workspace}")
    print_line("  it says    (what is not granted is denied)")
    for part in reversed(policy.parts):
        _show_part(part, alone=len(policy.parts) == 1)
    for one in check_policy(policy):
        word = "ERROR" if one.level is Level.ERROR else "warning"
        if one.code != _OUTSIDE:
            print_line(f"  {word}    line {one.line}: {one.message}")


def _show_part(part: Policy, *, alone: bool) -> None:
    """Print the rules and profiles of one file; of several, the narrowest comes first."""
    if not alone:
        print_line(f"  {part.file}")
    for rule in part.every_rule():
        _show_rule(part, rule)
    for name, profile in _profiles(part).items():
        print_line(f"  profile {name}  (engine {profile.engine})")
        for verb, folders in _folders(profile).items():
            _show_list(f"    {verb:<5} ", folders)
    for server in part.servers.values():
        _show_list(f"  server {server.name}  ", server.run)


def _show_rule(policy: Policy, rule: Rule) -> None:
    """Print a rule in one line, or with each of its arguments and patterns on one of its own."""
    line = f"    {_line(policy, rule)}"
    if len(line) <= _LINE_CHARACTERS:
        print_line(line)
        return
    print_line(f"    {rule.effect:<5} {rule.tool}{_options(policy, rule)}")
    for name, matcher in (rule.matchers or {}).items():
        text = f"      {_argument(rule, name)} {matcher.describe()}"
        if len(text) <= _LINE_CHARACTERS or not matcher.words:
            print_line(text)
        else:
            _show_list(f"      {_argument(rule, name)} ({matcher.kind}) ", matcher.words)


def _argument(rule: Rule, name: str) -> str:
    return f"{name} (optional)" if name in rule.optional else name


def _show_list(head: str, words: Sequence[str]) -> None:
    line = head + (", ".join(words) or "nothing")
    if len(line) <= _LINE_CHARACTERS:
        print_line(line)
        return
    print_line(head)
    for word in words:
        print_line(f"        {word}")


def _outside(path: Path, policy: Judged) -> list[str]:
    """Return every grant that reaches out of the project, a moved workspace first."""
    folder = Path(os.path.abspath(path)).parent
    project = os.path.realpath(folder.parent if folder.name == _POLICY_FOLDER else Path.cwd())
    found = [one.message for one in check_policy(policy) if one.code == _OUTSIDE]
    if not Path(policy.workspace).is_relative_to(project):
        # All that is granted below $WS then lies elsewhere.
        found.insert(0, f"the workspace itself is {policy.workspace}, not the project's folder")
    return found


def _folders(profile: Profile) -> dict[str, tuple[str, ...]]:
    return {"read": profile.read, "write": profile.write, "hide": profile.hide}


def _profiles(policy: Policy) -> dict[str, Profile]:
    """Return every profile a Call or a server may run in; the default one may be unwritten."""
    return {**policy.profiles, policy.default_profile.name: policy.default_profile}


def _line(policy: Policy, rule: Rule) -> str:
    matchers = rule.matchers
    named = "with any arguments"
    if matchers is not None:
        named = ", ".join(
            f"{_argument(rule, name)} {matcher.describe()}" for name, matcher in matchers.items()
        )
    return f"{rule.effect:<5} {rule.tool} {named}{_options(policy, rule)}"


def _options(policy: Policy, rule: Rule) -> str:
    rest = ", and any other arguments" if rule.rest else ""
    if rule.role is not None:
        rest += f", in role {rule.role}"
    if rule.when is not None:
        rest += f", when {rule.when.text}"
    if rule.bounds:
        rest += f", {', '.join(describe_bound(bound) for bound in rule.bounds)}"
    if rule.tool.startswith("fs.") or rule.effect == "deny":
        return rest
    profile = policy.profile_of(rule)
    return f"{rest}  [profile {profile.name}]"
