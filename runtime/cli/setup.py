"""``safeconduct setup``: the privileged steps this machine needs to give more; root may do them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.errors import Error, Exit
from safeconduct.runtime.sandbox.executable import launcher_path

from .options import JsonOption
from .places import refuse_inside_sandbox
from .setup_apply import Change, perform, take_back
from .setup_signer import signer_step
from .setup_steps import State, Step, steps
from .source import UsageError
from .terminal import print_json, print_line, tell

_VERSION = 1


def setup(
    apply: Annotated[bool, typer.Option("--apply", help="Do it. Needs root.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take it back. Needs root.")] = False,
    as_json: JsonOption = False,
    root: Annotated[
        Path, typer.Option("--root", hidden=True, help="Below this folder; no command is run.")
    ] = Path("/"),
) -> int:
    """Show the one privileged step that gives more here: files and commands. Changes nothing.

    --apply does it, again without effect where it is done; --undo takes it back. Neither touches
    a file that setup did not write. Exits with 0, or 125 where a step could not be done.
    """
    refuse_inside_sandbox("setup")
    if apply and undo:
        raise UsageError("--apply and --undo exclude each other", hint="give one of them")
    root = Path(os.path.abspath(root))
    real = root == Path("/")
    if (apply or undo) and real and os.geteuid() != 0:
        raise Error("This needs root.", code="setup.root", hint=f"run it as: {_sudo(undo)}")
    found = _steps(root)
    changed: list[str] = []
    if apply or undo:
        changed = _change(found, perform if apply else take_back, root, real=real)
        found = _steps(root)
    if as_json:
        shown = [_json(step) for step in found]
        print_json({"version": _VERSION, "changed": changed, "steps": shown})
    elif apply or undo:
        for line in changed or ["nothing to change"]:
            print_line(line)
    else:
        _show(found)
    return Exit.OK


def _steps(root: Path) -> list[Step]:
    return [*steps(root, Path(os.path.realpath(launcher_path()))), signer_step(root)]


def _change(found: Sequence[Step], change: Change, root: Path, *, real: bool) -> list[str]:
    """Change all steps and say how. Where one fails, what was changed before it is told."""
    changed: list[str] = []
    try:
        for step in found:
            changed += change(step, root, real=real)
    except BaseException:
        for line in changed:
            tell(f"done before that: {line}")
        raise
    return changed


def _sudo(undo: bool) -> str:
    # sudo has a PATH of its own, so the interpreter is named.
    option = "--undo" if undo else "--apply"
    return shlex.join(["sudo", sys.executable, "-I", "-m", "safeconduct", "setup", option])


def _json(step: Step) -> dict[str, object]:
    return {
        "name": step.name,
        "state": str(step.state),
        "why": step.why,
        "file": step.file,
        "text": step.text,
        "commands": [list(command) for command in step.apply],
        "undo": [list(command) for command in step.undo],
        "warning": step.warning,
    }


def _show(found: Sequence[Step]) -> None:
    needed = [step for step in found if step.state is State.NEEDED]
    if needed:
        tell(f"{len(needed)} step to do, with root", f"all of it: {_sudo(undo=False)}")
    else:
        tell("there is no privileged step that would give more here", "see: safeconduct doctor")
    for step in found:
        print_line(f"{step.name}: {step.state}: {step.why}")
        if step.state is not State.NEEDED:
            continue
        print_line(f"  write {step.file}:")
        for line in step.text.splitlines():
            print_line(f"    {line}".rstrip())
        for command in step.apply:
            print_line(f"  then run: {shlex.join(command)}")
        if step.warning:
            print_line(f"  note: {step.warning}")
