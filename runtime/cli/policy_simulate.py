"""``safeconduct policy simulate``: what a policy would have said to the calls of a trace."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.attestation.replay import Change, ReplayReport
from safeconduct.errors import Exit, TraceInvalid
from safeconduct.policies import discover_policy

from .options import JsonOption, PolicyOption, TraceArgument
from .places import find_trace
from .replay import judge_again
from .terminal import clip, print_json, print_line, tell

_INDEXES_SHOWN = 8
_ADVICE_CHARACTERS = 500


def simulate(
    trace: TraceArgument,
    policy: PolicyOption = None,
    workspace: Annotated[
        Path | None,
        typer.Option("--workspace", "-w", help="What $WS stands for (default: as recorded)."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Say what would have been judged differently, in groups: what is new, why, and which calls.

    Without --policy it is the one that counts here. Nothing runs. Verify the trace first: its
    entries are believed. Exits with 0 where every call is judged alike, 20 where one is not or
    cannot be judged, 13 where the trace cannot be read.
    """
    path = find_trace(trace, os.environ)
    if policy is None:
        found = discover_policy(start=Path.cwd(), environment=os.environ)
        policy = found.path
        tell(f"judging by {policy}: {found.why}")
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


def _print(report: ReplayReport) -> None:
    groups: dict[tuple[str, str, str, str], list[Change]] = defaultdict(list)
    for one in report.changes:
        groups[(one.recorded, one.new, one.tool, one.reason)].append(one)
    for (recorded, new, tool, reason), changes in groups.items():
        indexes = ", ".join(f"#{one.index}" for one in changes[:_INDEXES_SHOWN])
        more = f" and {len(changes) - _INDEXES_SHOWN} more" if len(changes) > _INDEXES_SHOWN else ""
        print_line(f"{recorded} → {new} {tool}: {reason}")
        print_line(f"  {len(changes)} calls: {indexes}{more}")
        if advice := changes[0].advice:
            print_line(f"  advice: {clip(advice, _ADVICE_CHARACTERS)}")
    for shift in report.shifts:
        print_line(f"#{shift.index} {shift.tool}: profile {shift.recorded} → {shift.new}")
    for left in report.undecidable:
        print_line(f"#{left.index} {left.tool} undecidable ({left.code}): {left.reason}")
    print_line(
        f"{report.calls} calls: {report.same} judged alike ({len(report.shifts)} of them in another"
        f" profile), {len(report.changes)} changed, {len(report.undecidable)} undecidable,"
        f" {report.unjudged} judged by no policy"
    )
