"""``safeconduct exec``: run one program as a Call of ``shell.run``."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.call import Json
from safeconduct.errors import Error

from .options import ExplainOption, PolicyOption, TierOption, TraceOption, WorkspaceOption
from .outcome import (
    OutcomeFile,
    Output,
    announce,
    error_code,
    error_json,
    exit_code,
    outcome_json,
    tell_changes,
    tell_refused,
)
from .signals import Termination
from .source import SOURCE_BYTES_MAX, UsageError
from .terminal import tell_error


def execute(
    command: Annotated[list[str], typer.Argument(help="Program and arguments, after --.")],
    policy: PolicyOption = None,
    workspace: WorkspaceOption = None,
    trace: TraceOption = None,
    tier: TierOption = None,
    explain: ExplainOption = False,
    outcome: Annotated[
        Path | None,
        typer.Option("--outcome", help="Write how the call ended to this file, as JSON."),
    ] = None,
) -> int:
    """Judge, confine and record one program; exits with its own code.

    124 a limit, 125 our failure, 126 denied or an unanswered ask, 127 not found, 128+n signal;
    --outcome tells these from a program that exits alike.
    stdin reaches the program only from a file (`< FILE`); a terminal or a pipe does not.
    """
    arguments: dict[str, Json] = {"argv": list(command)}
    if stdin := _redirected():
        arguments["stdin"] = stdin
    written = OutcomeFile(outcome)
    from safeconduct.runtime.supervisor import Runtime  # --help needs none of it

    try:
        with (
            Termination() as termination,
            Runtime.from_policy(
                policy, workspace=workspace, trace=trace, tier=tier, origin="exec", explain=explain
            ) as runtime,
        ):
            announce(runtime, explicit=policy is not None)
            call = runtime.new_call("shell.run", arguments, origin="exec")
            with termination.interrupting():
                result = runtime.perform(call, sink=Output().show)
    except Error as error:
        tell_error(error)
        written.write(error_json(error, error_code(error)))
        return error_code(error)
    # What a session's overlay held is kept when the session ends.
    result = replace(result, changes=(*result.changes, *runtime.kept))
    tell_refused(result)
    tell_changes(result.changes)
    code = exit_code(result)
    written.write(outcome_json(result, code))
    return code


def _redirected() -> str:
    """Return the text of a file that stdin was redirected from; nothing else is read."""
    try:
        status = os.fstat(0)
    except OSError:
        return ""
    if not stat.S_ISREG(status.st_mode):
        return ""
    data = sys.stdin.buffer.read(SOURCE_BYTES_MAX + 1)
    if len(data) > SOURCE_BYTES_MAX:
        raise UsageError(
            f"the file on stdin holds more than {SOURCE_BYTES_MAX} bytes",
            hint="put it into the workspace and name it as an argument",
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            "the file on stdin is not UTF-8",
            hint="put it into the workspace and name it as an argument",
        ) from error
