"""Step "adapter": a whole program, such as an agent, as one Call of ``agent.run``.

It is judged by the policy as any other Call is, and runs in its rule's profile with that one's
limits. What it does inside is bounded by the sandbox alone: no Call of its own is seen here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import cast

from safeconduct.call import Call, Engine, Outcome
from safeconduct.errors import SandboxUnavailable
from safeconduct.policies import hidden_by
from safeconduct.runtime.sandbox.native import Program
from safeconduct.runtime.sandbox.running import Running
from safeconduct.runtime.supervisor import Runtime
from safeconduct.runtime.tools.task import Sink

TOOL = "agent.run"
_READ_BYTES = 64 << 10


def run_agent(
    runtime: Runtime,
    call: Call,
    *,
    source: int,
    sink: Sink,
    begun: Callable[[Running], object],
    explain: bool = False,
) -> Outcome:
    """Judge, run and record a Call of ``agent.run``; blocks until its whole tree is gone.

    Its stdin is the descriptor ``source``, which stays open here. ``begun`` is handed the sandbox
    once it was told the program. Raises as ``Pipeline.perform`` does.
    """
    with runtime.pipeline.admit(call) as admitted:
        profile, arguments = admitted.profile, admitted.document.arguments
        if profile.engine is not Engine.NATIVE:
            raise SandboxUnavailable(
                f"{TOOL} needs a native profile, and {profile.name} has engine: wasm.",
                missing="engine:native",
                hint="Name a profile with engine: native in the rule.",
            )
        program = Program(
            argv=cast("Sequence[str]", arguments["argv"]), cwd=str(arguments["cwd"]), source=source
        )
        with runtime.shields.raised(profile, functools.partial(hidden_by, profile.hide)) as shield:
            outcome = runtime.native.run(
                call.id,
                program,
                profile,
                workspace=admitted.document.workspace,
                shield=shield,
                sink=sink,
                explain=explain,
                begun=begun,
            )
        runtime.pipeline.settle(admitted, outcome)
        return outcome


def pump(source: int, target: int) -> None:
    """Copy ``source`` to ``target`` until either ends, then close ``target``. Blocks."""
    try:
        while data := os.read(source, _READ_BYTES):
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]
    except OSError:
        return  # a terminal that hung up, or a program that reads no more: its end is ours
    finally:
        os.close(target)
