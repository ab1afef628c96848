"""What the checks share: a user with a home on a real file system, a project, the product."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeconduct.call import Outcome, Tier
from safeconduct.errors import SandboxUnavailable
from safeconduct.runtime.cli import run as run_command
from safeconduct.runtime.supervisor import Runtime

# An ext4 disk of the machine's own; the root is an overlay, which no kernel id-maps.
HOMES = Path("/mnt")
POLICY = """\
version: 1
{require}
profiles:
  base: {{read: ["$WS/**"], write: ["$WS/**"], limits: {{wall: 60s, memory: 32MiB, pids: 16}}}}
tools:
  shell.run: {{allow: {{argv: [sh, ...]}}}}
"""
_SECONDS = 120
_LANDLOCK_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION, landlock_create_ruleset(2)
_NR_LANDLOCK_CREATE_RULESET = 444


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One finished command."""

    code: int
    out: str
    err: str
    outcome: Any = None

    @property
    def json(self) -> Any:  # noqa: ANN401 - a parse boundary
        """What it printed."""
        return json.loads(self.out)


def become(uid: int) -> None:
    """Turn this process into a user with an empty home that holds ``project``."""
    home = HOMES / f"home-{os.getpid()}"
    project = home / "project"
    project.mkdir(parents=True)
    for folder in (home, project):
        os.chown(folder, uid, uid)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    kept = {name: os.environ[name] for name in ("PATH", "LANG")}
    os.environ.clear()
    os.environ.update(kept, HOME=str(home), TMPDIR=str(home), XDG_STATE_HOME=f"{home}/state")
    os.environ["XDG_CONFIG_HOME"] = f"{home}/config"
    os.chdir(project)


def policy(*, require: str = "") -> Path:
    """Write a policy beside the project."""
    file = Path.cwd().parent / "policy.yaml"
    line = f"require: {{{require}}}" if require else ""
    file.write_text(POLICY.format(require=line))
    return file


def put_up(file: Path, *, workspace: Path | None = None, tier: Tier | None = None) -> Runtime:
    """Put up a runtime over the project."""
    return Runtime.from_policy(file, workspace=workspace or Path.cwd(), tier=tier)


def refusal(file: Path, *, tier: Tier | None = None) -> SandboxUnavailable:
    """Return why no runtime comes up over the project."""
    try:
        put_up(file, tier=tier).close()
    except SandboxUnavailable as error:
        return error
    raise AssertionError("a runtime came up")


def run(runtime: Runtime, *argv: str) -> Outcome:
    """Run one program as a call."""
    return runtime.perform(runtime.new_call("shell.run", {"argv": list(argv)}))


def command(*arguments: str | Path) -> Done:
    """Run the command line to its end: as a fork, for emulated a fresh interpreter takes long."""
    home = Path.cwd().parent
    child = os.fork()
    if child == 0:
        _be_command(home, [str(argument) for argument in arguments])
    _, status = os.waitpid(child, 0)
    out, err = (home / "out").read_text(), (home / "err").read_text()
    return Done(code=os.waitstatus_to_exitcode(status), out=out, err=err)


def _be_command(home: Path, arguments: list[str]) -> None:
    """Do what ``python -m safeconduct`` does, in this process, and end it."""
    code = 1
    try:
        for number, name in enumerate(("out", "err"), start=1):
            file = os.open(home / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, number)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
        code = run_command(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def process(*arguments: str | Path) -> Done:
    """Run the command line as a process of its own, as a person does."""
    done = subprocess.run(
        [sys.executable, "-B", "-m", "safeconduct", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_SECONDS,
        check=False,
    )
    return Done(code=done.returncode, out=done.stdout.decode(), err=done.stderr.decode())


def execute(
    file: Path,
    *argv: str,
    options: tuple[str, ...] = (),
    by: Callable[..., Done] = command,
) -> Done:
    """Run ``safeconduct exec`` and read how it says that the call ended."""
    told = Path.cwd().parent / "outcome.json"
    done = by("exec", "--policy", file, "--outcome", told, *options, "--", *argv)
    outcome = json.loads(told.read_text() or "null") if told.exists() else None
    return Done(code=done.code, out=done.out, err=done.err, outcome=outcome)


def landlock_abi() -> int:
    """Ask the kernel itself; 0 where Landlock is absent or disabled."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(_NR_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    return max(0, int(found))


def layers() -> dict[str, Any]:
    """Return what ``doctor`` says of each layer, by its name."""
    return {layer["name"]: layer for layer in command("doctor", "--json").json["layers"]}
