"""Each process of the native side killed: all below it ends, and the next call runs.

docs/architecture.md lists who ends with whom. The supervisor's own death is a test of the pipeline.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Profile
from safeconduct.errors import SandboxFailed
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.shield import Shield

if TYPE_CHECKING:
    from tests.conftest import Box

SECONDS = 10.0
# It makes a session of its own, so that only the tree, and no group of processes, holds it.
TREE = "setsid -f sleep 60; sleep 60"


def children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def below(pid: int) -> list[int]:
    return [one for child in children(pid) for one in (child, *below(child))]


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def own(box: Box) -> Iterator[tuple[NativeSandbox, Launcher]]:
    """A launcher of this test alone, which it may kill."""
    with (
        closing(Launcher()) as launcher,
        closing(NativeSandbox(launcher, tier=box.tier, cgroups=None)) as sandbox,
    ):
        yield sandbox, launcher


def run(sandbox: NativeSandbox, *argv: str) -> object:
    program = Program(argv=argv, cwd="/usr")
    profile = Profile(name="deaths")
    return sandbox.run("c", program, profile, workspace="/usr", shield=Shield()).exit_code


def natives(launcher: Launcher) -> list[int]:
    """Return the launcher's processes: an ordinary user has one for each tier."""
    return [one.pid for one in launcher._processes.values()]  # pyright: ignore[reportPrivateUsage]


def templates_of(launcher: Launcher) -> list[int]:
    return [template for pid in natives(launcher) for template in children(pid)]


def running_init(template: int) -> int:
    """Return the init of the sandbox whose program runs; of one that waits there is a stub only."""
    return next((one for one in children(template) if len(below(one)) > 1), 0)


@pytest.mark.parametrize("victim", ["launcher", "template", "init"])
def test_what_is_below_ends_too(own: tuple[NativeSandbox, Launcher], victim: str) -> None:
    sandbox, launcher = own
    failures: list[SandboxFailed] = []

    def call() -> None:
        try:
            run(sandbox, "sh", "-c", TREE)
        except SandboxFailed as error:
            failures.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    assert wait(lambda: any(running_init(one) for one in templates_of(launcher)))
    template = next(one for one in templates_of(launcher) if running_init(one))
    native = next(one for one in natives(launcher) if template in children(one))
    pid = {"launcher": native, "template": template, "init": running_init(template)}[victim]
    doomed = [pid, *below(pid)]
    assert len(doomed) >= 3
    os.kill(pid, signal.SIGKILL)
    caller.join(SECONDS)
    assert failures, "the call must fail, and by name"
    assert wait(lambda: not any(alive(one) for one in doomed))
    assert run(sandbox, "true") == 0


def test_waiting_sandboxes_that_died_are_replaced(own: tuple[NativeSandbox, Launcher]) -> None:
    sandbox, launcher = own
    assert run(sandbox, "true") == 0
    for depth in ("init", "stub", "template"):
        assert wait(lambda: len([two for one in natives(launcher) for two in below(one)]) >= 3)
        templates = templates_of(launcher)
        for pid in templates:
            os.kill(pid, signal.SIGSTOP)  # it makes no more of them while they are counted
        pairs = [(one, children(one)) for template in templates for one in children(template)]
        # One that is just being made has no stub yet.
        inits = [init for init, made in pairs if made]
        stubs = [stub for _, made in pairs for stub in made]
        for pid in {"init": inits, "stub": stubs, "template": templates}[depth]:
            os.kill(pid, signal.SIGKILL)
        ended = [*inits, *stubs]
        if depth == "template":
            ended += [*templates, *(init for init, made in pairs if not made)]
        assert wait(lambda ended=ended: not any(alive(one) for one in ended))
        for pid in set(templates).difference(ended):
            os.kill(pid, signal.SIGCONT)
        assert run(sandbox, "true") == 0, depth


def test_a_template_that_dies_as_a_call_begins_is_never_taken_for_success(
    own: tuple[NativeSandbox, Launcher],
) -> None:
    sandbox, launcher = own
    for _ in range(40):
        assert run(sandbox, "true") == 0
        templates = templates_of(launcher)
        doomed = [*templates, *(one for template in templates for one in below(template))]
        for pid in templates:
            os.kill(pid, signal.SIGKILL)
        program = Program(argv=["echo", "ran"], cwd="/usr")
        with suppress(SandboxFailed):
            outcome = sandbox.run(
                "c", program, Profile(name="deaths"), workspace="/usr", shield=Shield()
            )
            assert outcome.stdout == b"ran\n", outcome
        assert wait(lambda doomed=doomed: not any(alive(one) for one in doomed))
