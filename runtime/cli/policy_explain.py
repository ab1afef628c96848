"""``safeconduct policy explain``: how one Call is judged and why, for the operator."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.call import Call, Effect, Facts, Profile
from safeconduct.errors import Denied, Exit
from safeconduct.policies import (
    Considered,
    Explanation,
    Judged,
    canonicalize,
    describe_bound,
    explain,
    resolve_policy,
)

from .limits import limit_lines
from .options import JsonOption, PolicyOption, RoleOption, WorkspaceOption
from .places import refuse_inside_sandbox
from .source import UsageError, parse_arguments, parse_source, read_source
from .terminal import clip, print_json, print_line, tell

_VALUE_CHARACTERS = 500


def explain_call(
    call: Annotated[
        str, typer.Argument(metavar="CALL.json|-", help='{"tool": …, "arguments": {…}}')
    ],
    policy: PolicyOption = None,
    workspace: WorkspaceOption = None,
    role: RoleOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show how a call would be judged: effect, rules, profile, and what would change it.

    It is judged as the first call of a session that begins now. Nothing runs, nothing is recorded
    or counted. Exits with 0 where the call is allowed, 20 where it is asked or denied.
    """
    refuse_inside_sandbox("policy explain")
    asked = _parse_call(call, read_source(call))
    resolution = resolve_policy(
        explicit=policy, start=Path.cwd(), environment=os.environ, workspace=workspace
    )
    if policy is None:
        tell(resolution.why)
    judged = resolution.policy.for_role(role)
    facts = Facts(role=role, origin="explain", now_ms=time.time_ns() // 1_000_000)
    try:
        with canonicalize(judged, asked) as canonical:
            explanation = explain(judged, canonical.document, facts)
    except Denied as denied:
        return _show_refusal(asked, denied, judged, as_json=as_json)
    if as_json:
        print_json(explanation.to_json())
    else:
        _show(explanation)
    allowed = explanation.decision.effect is Effect.ALLOW
    return Exit.OK if allowed else Exit.FINDINGS


def _parse_call(name: str, data: bytes) -> Call:
    fields = parse_source(name, data, parse_arguments)
    tool, arguments = fields.get("tool"), fields.get("arguments", {})
    unknown = fields.keys() - {"tool", "arguments"}
    if unknown or not isinstance(tool, str) or not isinstance(arguments, dict):
        raise UsageError(
            f"{name} is not a call", hint='write {"tool": "fs.read", "arguments": {"path": "a"}}'
        )
    return Call(id="explain", tool=tool, arguments=arguments, session="explain", origin="explain")


def _show_refusal(asked: Call, denied: Denied, policy: Judged, *, as_json: bool) -> int:
    """Show a Call that has no canonical form: it is denied before any rule is looked at."""
    if as_json:
        print_json(
            {
                "tool": asked.tool,
                "arguments": asked.arguments,
                "workspace": policy.workspace,
                "effect": "deny",
                "code": denied.code,
                "reason": denied.message,
                "advice": denied.hint,
                "rules": [],
                "enforcement": None,
                "policy": policy.version,
                "profile": None,
                "considered": [],
            }
        )
        return Exit.FINDINGS
    print_line(f"deny {asked.tool} ({denied.code}): {denied.message}")
    print_line("  no rule was considered: the call has no form that could be judged")
    if denied.hint:
        print_line(f"  advice       {denied.hint}")
    return Exit.FINDINGS


def _show(explanation: Explanation) -> None:
    decision, document = explanation.decision, explanation.document
    print_line(f"{decision.effect} {document.tool} ({decision.code}): {decision.reason}")
    for name, value in document.arguments.items():
        print_line(f"  {name:<12} {clip(json.dumps(value), _VALUE_CHARACTERS)}")
    print_line(f"  enforcement  {decision.enforcement}")
    print_line(f"  policy       {decision.policy}")
    if decision.effect is not Effect.DENY:
        signed = ", and signed before it runs" if decision.irreversible else ""
        print_line(f"  recorded     {decision.durability}{signed}")
    for bound in decision.obligations:
        print_line(f"  counts       {describe_bound(bound)} ({bound.id})")
    if decision.advice:
        print_line(f"  advice       {decision.advice}")
    if decision.profile is not None:
        _show_profile(decision.profile)
    if not explanation.considered:
        print_line(f"  no rule speaks of {document.tool}")
    part = ""
    for item in explanation.considered:
        if item.part and item.part != part:
            part = item.part
            print_line(f"  held against {clip(part, _VALUE_CHARACTERS)}")
        decided = item.rule in decision.rules and (item.matched or not part)
        print_line(_considered(item, decided=decided))


def _considered(item: Considered, *, decided: bool) -> str:
    mark = "decided" if decided else "matched" if item.matched else "no"
    return f"  rule {mark:<7} {item.effect:<5} {item.rule} at {item.file}:{item.line}: {item.why}"


def _show_profile(profile: Profile) -> None:
    print_line(f"  profile      {profile.name} ({profile.engine}), no network; it shows:")
    for word, paths in (
        ("read", profile.read),
        ("write", profile.write),
        ("hidden", profile.hide),
        ("imports", profile.imports),
        ("syscalls", profile.syscalls),
    ):
        print_line(f"    {word:<10} {', '.join(paths) or 'nothing'}")
    print_line(f"    workspace  {profile.workspace}")
    print_line(
        "  limits, and what holds them: the whole tree, each process, or a look now and then"
    )
    for line in limit_lines(profile):
        print_line(f"    {line}")
