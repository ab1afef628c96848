"""``safeconduct exec``: run one program as a Call of ``shell.run``."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import replace
from typing import Annotated

import typer

from safeconduct.call import Json
from safeconduct.errors import Error

from .options import (
    ExplainOption,
    OutcomeOption,
    PolicyOption,
    TierOption,
    TraceOption,
    WorkspaceOption,
)
from .outcome import (
    OutcomeFile,
    announce,
    error_code,
    error_json,
    tell_end,
)
from .output import Output
from .signals import Termination
from .source import SOURCE_BYTES_MAX, UsageError
from .terminal import tell, tell_error


def execute(
    command: Annotated[list[str], typer.Argument(help="Program and arguments, after --.")],
    policy: PolicyOption = None,
    workspace: WorkspaceOption = None,
    trace: TraceOption = None,
    tier: TierOption = None,
    explain: ExplainOption = False,
    outcome: OutcomeOption = None,
) -> int:
    """Judge, confine and record one program; exits with its own code.

    124 a limit, 125 our failure, 126 denied or an unanswered ask, 127 not found, 128+n signal;
    --outcome tells these from a program that exits alike.
    stdin reaches the program only from a file (`< FILE`); a terminal or a pipe does not.
    """
    arguments: dict[str, Json] = {"argv": list(command)}
    if stdin := _redirected():
        arguments["stdin"] = stdin
    from safeconduct.runtime.supervisor import Runtime  # --help needs none of it

    with OutcomeFile(outcome) as written:
        try:
            with Output() as output, Termination() as termination:
                with Runtime.from_policy(
                    policy,
                    workspace=workspace,
                    trace=trace,
                    tier=tier,
                    origin="exec",
                    explain=explain,
                    tell=tell,
                ) as runtime:
                    announce(runtime, explicit=policy is not None)
                    call = runtime.new_call("shell.run", arguments, origin="exec")
                    with termination.interrupting():
                        result = runtime.perform(call, sink=output.show)
                # The Trace is signed by now, however long somebody takes to read.
                with termination.interrupting():
                    result = output.deliver(result)
        except Error as error:
            tell_error(error)
            written.write(error_json(error, error_code(error)))
            return error_code(error)
        # What a session's overlay held is kept when the session ends.
        return tell_end(replace(result, changes=(*result.changes, *runtime.kept)), written)


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
