"""``safeconduct run``: run a whole program, such as an agent, as a Call of ``agent.run``."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated

import typer

from safeconduct.errors import Error

from .options import (
    ExplainOption,
    ObserveOption,
    OutcomeOption,
    PolicyOption,
    RoleOption,
    TierOption,
    TraceOption,
    WorkspaceOption,
)
from .outcome import OutcomeFile, announce, error_code, error_json, tell_end
from .output import Output
from .signals import Forwarding
from .terminal import tell, tell_error

_STDIN = 0


def run(
    command: Annotated[list[str], typer.Argument(help="Program and arguments, after --.")],
    policy: PolicyOption = None,
    workspace: WorkspaceOption = None,
    trace: TraceOption = None,
    tier: TierOption = None,
    explain: ExplainOption = False,
    role: RoleOption = None,
    observe: ObserveOption = False,
    outcome: OutcomeOption = None,
) -> int:
    """Judge, confine and record a whole program as one call; exits with its own code.

    124 a limit, 125 our failure, 126 denied or an unanswered ask, 127 not found, 128+n signal.
    stdin, stdout and stderr pass through as pipes: it has no terminal, whatever ours are. Signals
    are handed on to it; the third that asks it to end kills it.
    """
    with Forwarding() as forwarding, OutcomeFile(outcome) as written:
        # --help needs none of it
        from safeconduct.runtime.adapters.agent import TOOL, pump, run_agent
        from safeconduct.runtime.supervisor import Runtime

        try:
            with Output() as output:
                with (
                    Runtime.from_policy(
                        policy, workspace=workspace, trace=trace, tier=tier, origin="run",
                        explain=explain, role=role, observe=observe, tell=tell,
                    ) as runtime,
                    ExitStack() as held,
                ):  # fmt: skip
                    announce(runtime, explicit=policy is not None)
                    call = runtime.new_call(TOOL, {"argv": list(command)}, origin="run")
                    source, target = os.pipe2(os.O_CLOEXEC)
                    held.callback(os.close, source)
                    # It may wait for a terminal for ever, and then ends with us.
                    threading.Thread(target=pump, args=(_STDIN, target), daemon=True).start()
                    with forwarding.starting():
                        result = run_agent(
                            runtime,
                            call,
                            source=source,
                            sink=output.show,
                            begun=lambda running: forwarding.to(running.channel.forward),
                            explain=explain,
                        )
                cut = result.truncated
                # The Trace is signed by now, however long somebody takes to read.
                with forwarding.finishing():
                    result = output.deliver(result, forced=forwarding.hurries)
        except Error as error:
            tell_error(error)
            written.write(error_json(error, error_code(error)))
            return error_code(error)
        if cut:
            tell("its output was cut at its limit", "raise limits.output of the profile")
        # What a session's overlay held is kept when the session ends.
        return tell_end(replace(result, changes=(*result.changes, *runtime.kept)), written)
