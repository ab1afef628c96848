"""``safeconduct call``: run one Call of any tool that this runtime executes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Annotated

import typer

from safeconduct.call import Json, Outcome
from safeconduct.errors import Error, ToolFailed

from .options import (
    ExplainOption,
    JsonOption,
    ObserveOption,
    PolicyOption,
    RoleOption,
    TierOption,
    TraceOption,
    WorkspaceOption,
)
from .outcome import (
    announce,
    error_code,
    error_json,
    exit_code,
    outcome_json,
    output_json,
    tell_changes,
    tell_refused,
)
from .output import Output
from .signals import Termination
from .source import parse_arguments, parse_source, read_source
from .terminal import print_json, printable, tell, tell_error


def call(
    tool: Annotated[str, typer.Argument(help="Its name, for example fs.read.")],
    arguments: Annotated[
        str,
        typer.Argument(metavar="[JSON|@FILE|-]", help="One JSON object, a file, or - for stdin."),
    ] = "{}",
    policy: PolicyOption = None,
    workspace: WorkspaceOption = None,
    trace: TraceOption = None,
    tier: TierOption = None,
    explain: ExplainOption = False,
    role: RoleOption = None,
    observe: ObserveOption = False,
    as_json: JsonOption = False,
) -> int:
    """Judge, run and record one call of a tool, and print what it returns.

    Exits as exec does: 0 or the program's own code, 124 a limit, 125 our failure or the tool's,
    126 denied or an unanswered ask, 127 not found, 128+n signal.
    """
    given = _arguments(arguments)
    from safeconduct.runtime.supervisor import Runtime  # --help needs none of it

    streams_out = tool == "shell.run" and not as_json
    try:
        with Output() as output, Termination() as termination:
            with Runtime.from_policy(
                policy,
                workspace=workspace,
                trace=trace,
                tier=tier,
                origin="call",
                explain=explain,
                role=role,
                observe=observe,
                tell=tell,
            ) as runtime:
                announce(runtime, explicit=policy is not None)
                made = runtime.new_call(tool, given, origin="call")
                with termination.interrupting():
                    result = runtime.perform(made, sink=output.show if streams_out else None)
            # The Trace is signed by now, however long somebody takes to read.
            with termination.interrupting():
                result = output.deliver(result)
    except Error as error:
        if as_json:
            print_json(error_json(error, error_code(error)))
        tell_error(error)
        if isinstance(error, ToolFailed):
            tell_refused(error)
        return error_code(error)
    # What a session's overlay held is kept when the session ends.
    result = replace(result, changes=(*result.changes, *runtime.kept))
    tell_refused(result)
    tell_changes(result.changes)
    code = exit_code(result)
    if as_json:
        streams = {"stdout": output_json(result.stdout), "stderr": output_json(result.stderr)}
        print_json({**outcome_json(result, code), **streams})
    elif not streams_out:
        _print_value(result)
    return code


def _arguments(given: str) -> dict[str, Json]:
    """Parse the arguments from where they are: the command line, a file or stdin."""
    if given == "-":
        return parse_source("-", read_source("-"), parse_arguments)
    if given.startswith("@"):
        return parse_source(given[1:], read_source(given[1:]), parse_arguments)
    data = given.encode("utf-8", "surrogateescape")
    return parse_source("the arguments", data, parse_arguments)


def _print_value(outcome: Outcome) -> None:
    """Print a result as text: a file as it is, a list line by line, all else as JSON."""
    if outcome.truncated:
        tell("the result is cut at its limit", "raise limits.output of the profile")
    if outcome.stdout or isinstance(outcome.value, str):
        data = outcome.stdout or str(outcome.value).encode()
        with Output() as output:
            output.show("stdout", data)
            output.deliver(outcome)
        if sys.stdout.isatty() and not data.endswith(b"\n"):
            print()
    elif isinstance(outcome.value, list):
        for item in outcome.value:
            print(printable(item) if isinstance(item, str) else json.dumps(item))
    elif outcome.value is not None:
        print(json.dumps(outcome.value))
