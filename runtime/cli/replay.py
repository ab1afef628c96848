"""``safeconduct replay``: judge the recorded Calls again by another policy. Nothing runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer

from safeconduct.attestation import Opening, read_entries, read_opened
from safeconduct.attestation.replay import ReplayReport, replay_policy
from safeconduct.call import EntryKind
from safeconduct.errors import Exit, TraceInvalid
from safeconduct.policies import Judged, compile_elsewhere, read_policy_file

from .options import JsonOption, TraceArgument
from .places import find_trace, own_vault
from .source import UsageError
from .terminal import print_json, print_line, print_table, tell

# LIMIT: workspaces that are told apart.
_WORKSPACES_MAX = 16


def replay(
    trace: TraceArgument,
    policy: Annotated[Path, typer.Option("--with", help="The policy to judge by.")],
    mode: Annotated[str, typer.Option("--mode", help="Only policy, in this version.")] = "policy",
    workspace: Annotated[
        Path | None,
        typer.Option("--workspace", "-w", help="What $WS stands for (default: as recorded)."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Say which recorded calls another policy would have judged differently.

    Verify the trace first: replay believes its entries. Exits with 0 where every call is judged
    alike, 20 where a decision changes or a call cannot be judged again (its arguments were
    erased), 13 where the trace cannot be read.
    """
    if mode != "policy":
        raise UsageError(
            f"replay mode {mode!r} is not there: this version has only policy",
            hint="replay --mode policy --with FILE TRACE",
        )
    path = find_trace(trace, os.environ)
    try:
        report, version = judge_again(path, policy, workspace)
    except TraceInvalid as error:
        tell(f"{error.message} [{error.code}]", f"safeconduct trace verify {path}")
        return Exit.TRACE_IO
    if as_json:
        print_json({**asdict(report), "clean": report.clean, "policy": version})
    else:
        _print(report)
    return Exit.OK if report.clean else Exit.FINDINGS


def judge_again(trace: Path, policy: Path, workspace: Path | None) -> tuple[ReplayReport, str]:
    """Judge the Calls of a trace by a policy file; return what changed and the policy's version.

    ``workspace`` is what `$WS` stands for, by default as recorded. TraceInvalid where the trace
    has no entries or one cannot be read.
    """
    if next(read_entries(trace), None) is None:
        raise TraceInvalid(f"{trace} has no entries", code="trace.missing")
    judged = _policy(policy, workspace or _recorded_workspace(trace))
    return replay_policy(trace, judged, vault=own_vault(os.environ)), judged.version


def _policy(file: Path, workspace: Path) -> Judged:
    """Compile the policy for a workspace that need not exist on this machine."""
    return compile_elsewhere(read_policy_file(file), workspace=Path(os.path.realpath(workspace)))


def _recorded_workspace(trace: Path) -> Path:
    """Return the one workspace that the recorded calls were for."""
    found: set[str] = set()
    for _, entry, opened in read_opened(trace, vault=own_vault(os.environ)):
        document = opened.get("document")
        if entry.kind is EntryKind.CALL_INTENT and isinstance(document, Opening):
            found |= _workspace(document)
        if len(found) > _WORKSPACES_MAX:
            break
    if len(found) > 1:
        raise UsageError(
            f"the trace has calls of {len(found)} workspaces: {', '.join(sorted(found))}",
            hint="name one with --workspace; calls of the others count as denied",
        )
    return Path(found.pop()) if found else Path.cwd()


def _workspace(document: Opening) -> set[str]:
    try:
        value: object = document.json()
    except TraceInvalid:
        return set()
    if not isinstance(value, dict):
        return set()
    workspace = cast("Mapping[str, object]", value).get("workspace")
    return {workspace} if isinstance(workspace, str) else set()


def _print(report: ReplayReport) -> None:
    if report.changes:
        rows = [
            [
                f"#{one.index}",
                one.tool,
                f"{one.recorded} → {one.new}",
                ", ".join(one.rules),
                one.reason,
            ]
            for one in report.changes
        ]
        print_table(("entry", "tool", "decision", "rules", "reason"), rows)
    for one in report.undecidable:
        print_line(f"#{one.index} {one.tool} undecidable ({one.code}): {one.reason}")
    print_line(
        f"{report.calls} calls: {report.same} judged alike, {len(report.changes)} changed,"
        f" {len(report.undecidable)} undecidable, {report.unjudged} judged by no policy"
    )
