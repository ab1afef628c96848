"""Step "execute": ``shell.run``, a program or a few joined ones in a native sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from safeconduct.call import Engine, Json, Outcome
from safeconduct.errors import SandboxUnavailable
from safeconduct.runtime.sandbox.bounds import narrow
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.shield import Shields

from .shell_script import SHELL, script
from .task import Task


def run(task: Task, sandbox: NativeSandbox, shields: Shields, *, explain: bool = False) -> Outcome:
    """Run ``argv``, or ``commands``, in ``cwd`` with ``stdin``, seeing what the profile shows.

    ``resources`` lowers the profile's limits; it can raise none.
    """
    if task.profile.engine is not Engine.NATIVE:
        raise SandboxUnavailable(
            f"shell.run needs a native profile, and {task.profile.name} has engine: wasm.",
            missing="engine:native",
            hint="Name a profile with engine: native in the rule.",
        )
    arguments = task.document.arguments
    hint = cast("Mapping[str, Json]", arguments.get("resources") or {})
    profile = replace(task.profile, limits=narrow(task.profile.limits, hint))
    program = Program(
        argv=_argv(arguments),
        cwd=str(arguments["cwd"]),
        stdin=str(arguments.get("stdin") or "").encode(),
    )
    with shields.raised(task.profile, task.hides) as shield:
        return sandbox.run(
            task.call,
            program,
            profile,
            workspace=task.document.workspace,
            shield=shield,
            sink=task.sink,
            explain=explain,
        )


def _argv(arguments: Mapping[str, Json]) -> Sequence[str]:
    if "commands" in arguments:
        return (SHELL, "-c", script(cast("Sequence[Json]", arguments["commands"])))
    return cast("Sequence[str]", arguments["argv"])
