"""What ``setup`` changes on a machine: the file and the commands of a step, there and back."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from safeconduct.errors import Error

from .setup_steps import State, Step, is_ours


class Change(Protocol):
    """Changes one step of a machine and says each thing that it changed."""

    def __call__(self, step: Step, root: Path, *, real: bool) -> list[str]:
        """Do it below ``root``; run commands only where that is the ``real`` machine."""
        ...


# LIMIT: seconds for one command.
_SECONDS = 60
# As root nothing is taken from the PATH of whoever called sudo.
_SEARCH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def perform(step: Step, root: Path, *, real: bool) -> list[str]:
    """Do a step that is needed; say each thing that was changed.

    Where one of its commands fails, or is interrupted, the file is put back as it was.
    """
    if step.state is not State.NEEDED:
        return []
    path = root / step.file.lstrip("/")
    if os.path.lexists(path) and not is_ours(root, step.file):
        raise Error(
            f"{path} is there and was not written by setup.",
            code="setup.foreign_file",
            hint=f"move it away, or add this to it yourself: {step.name}",
        )
    before = path.read_text() if os.path.lexists(path) else None
    _write(path, step.text)
    try:
        return [f"wrote {path}", *_run(step.apply, real=real)]
    except BaseException:
        # A file without its command would pass for done.
        if before is None:
            _remove(path)
        else:
            _write(path, before)
        raise


def take_back(step: Step, root: Path, *, real: bool) -> list[str]:
    """Remove the file of a step and what it did; say each thing. Only a file of ours is touched."""
    if not step.file or not is_ours(root, step.file):
        return []
    path = root / step.file.lstrip("/")
    # apparmor_parser reads the profile it takes out; systemd and sysctl need the file gone.
    before = [command for command in step.undo if step.file in command]
    after = [command for command in step.undo if step.file not in command]
    done = _run(before, real=real)
    _remove(path)
    return [*done, f"removed {path}", *_run(after, real=real)]


def _remove(path: Path) -> None:
    path.unlink()
    if path.parent.name.endswith(".service.d") and not any(path.parent.iterdir()):
        path.parent.rmdir()


def _write(path: Path, text: str) -> None:
    """Put a whole file into its place at once, mode 0644, through no link."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fd, made = tempfile.mkstemp(prefix=".safeconduct-", dir=path.parent)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        os.rename(made, path)
    except BaseException:
        os.unlink(made)
        raise


def _run(commands: Sequence[Sequence[str]], *, real: bool) -> list[str]:
    """Run commands on the real machine; elsewhere only say which."""
    said: list[str] = []
    for command in commands:
        if not real:
            said.append(f"would run {shlex.join(command)}")
            continue
        program = shutil.which(command[0], path=_SEARCH)
        if program is None:
            raise _failed(command, "there is no such program")
        try:
            done = subprocess.run(
                [program, *command[1:]],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_SECONDS,
                env={"PATH": _SEARCH, "LC_ALL": "C.UTF-8"},
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _failed(command, "it did not end in time") from error
        if done.returncode != 0:
            text = done.stderr.decode(errors="replace").strip()
            raise _failed(command, text or f"exit code {done.returncode}")
        said.append(f"ran {shlex.join(command)}")
    return said


def _failed(command: Sequence[str], why: str) -> Error:
    return Error(
        f"{shlex.join(command)} failed: {why}",
        code="setup.command",
        hint="the file is as it was before; what ran before it may still count",
    )
