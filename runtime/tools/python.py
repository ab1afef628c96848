"""Step "execute": ``python.run`` and the functions a program registers with ``Runtime.tool``."""

from __future__ import annotations

from safeconduct.call import Engine, Outcome, WorkspaceMode
from safeconduct.errors import Denied, SandboxUnavailable
from safeconduct.runtime.sandbox.python import PythonEngine
from safeconduct.runtime.sandbox.shield import Shields

from .function import Function
from .task import Task


def run(task: Task, engine: PythonEngine, shields: Shields, *, explain: bool = False) -> Outcome:
    """Run ``code`` with ``input`` bound: ``value`` is ``{"result": …}``."""
    arguments = task.document.arguments
    _require_native(task)
    with shields.raised(task.profile, task.hides) as shield:
        return engine.run(
            task.call,
            source=str(arguments["code"]),
            value=arguments.get("input"),
            profile=task.profile,
            workspace=task.document.workspace,
            shield=shield,
            sink=task.sink,
            explain=explain,
        )


def call(
    task: Task, function: Function, engine: PythonEngine, shields: Shields, *, explain: bool = False
) -> Outcome:
    """Run a registered function on the judged arguments: ``value`` is what it returned.

    Raises Denied where the policy runs it in another profile than the function asks for.
    """
    wanted = function.profile
    if wanted is not None and task.profile.name != wanted:
        raise Denied(
            f"{function.name} asks for profile {wanted}; the policy runs it in "
            f"{task.profile.name}.",
            code="python.profile",
            hint=f"Write profile: {wanted} in the rule that grants it.",
        )
    _require_native(task)
    with shields.raised(task.profile, task.hides) as shield:
        return engine.run(
            task.call,
            source=function.source,
            function=function.entry,
            value=dict(task.document.arguments),
            profile=task.profile,
            workspace=task.document.workspace,
            shield=shield,
            sink=task.sink,
            explain=explain,
        )


def _require_native(task: Task) -> None:
    mode = task.profile.workspace
    if mode is WorkspaceMode.SESSION or (mode.overlaid and task.profile.write):
        # Calls of one profile share a zygote, and so would share its overlay; and it would not show
        # what earlier calls of a session changed.
        raise SandboxUnavailable(
            f"{task.document.tool} has no overlay, and {task.profile.name} asks for one.",
            missing="python-overlay",
            hint="Name a profile without write, or with workspace: direct.",
        )
    if task.profile.engine is not Engine.NATIVE:
        raise SandboxUnavailable(
            f"{task.document.tool} needs a native profile, and {task.profile.name} has another.",
            missing="engine:native",
            hint="Name a profile with engine: native in the rule.",
        )
