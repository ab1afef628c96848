"""What the sandbox tests share: one launcher, both tiers, a workspace that any user may enter.

Attacks also get sandboxes with exactly one barrier taken away, and something to attack.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis
import pytest

from safeconduct.call import Limits, Outcome, Profile, Tier
from safeconduct.runtime.sandbox import cgroup
from safeconduct.runtime.sandbox.cgroup import Cgroups
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.layout import Layout
from safeconduct.runtime.sandbox.machine import Machine
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.plan import Plan
from safeconduct.runtime.sandbox.scratch import remove_tree
from safeconduct.runtime.sandbox.shield import Shield
from safeconduct.runtime.sandbox.survey import survey


@dataclass(frozen=True)
class Box:
    """A sandbox over one writable workspace, and the short way to run something in it."""

    sandbox: NativeSandbox
    workspace: Path

    @property
    def tier(self) -> Tier:
        return self.sandbox.tier

    def profile(self, limits: Limits | None = None) -> Profile:
        """Grant the workspace, to read and to write."""
        folder = str(self.workspace)
        wanted = limits or Limits(wall_ms=10_000)
        return Profile(name="test", read=(folder,), write=(folder,), limits=wanted)

    def run(
        self,
        *argv: str,
        limits: Limits | None = None,
        profile: Profile | None = None,
        shield: Shield | None = None,
        stdin: bytes = b"",
        cwd: str | None = None,
    ) -> Outcome:
        """Run a program in the workspace."""
        program = Program(argv=argv, cwd=cwd or str(self.workspace), stdin=stdin)
        granted = profile or self.profile(limits)
        return self.sandbox.run(
            "call", program, granted, workspace=str(self.workspace), shield=shield or Shield()
        )

    def python(
        self, code: str, *, limits: Limits | None = None, shield: Shield | None = None
    ) -> Outcome:
        """Run a Python program in the workspace."""
        return self.run("python3", "-c", code, limits=limits, shield=shield)

    def without_cgroups(self, launcher: Launcher) -> Box:
        """Return the same box with rlimits only."""
        return replace(self, sandbox=NativeSandbox(launcher, tier=self.tier, cgroups=None))


def pytest_configure() -> None:
    """Let no example of a property fail for being slow, and the commands be interrupted.

    A job that a script starts in the background ignores these two signals, and so would all that
    it starts (POSIX sh, Signals and Error Handling).
    """
    hypothesis.settings.register_profile("any machine", deadline=None)
    hypothesis.settings.load_profile("any machine")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    one = Launcher()
    yield one
    one.close()


@pytest.fixture(scope="session")
def cgroups() -> Iterator[cgroup.Cgroups | None]:
    found = cgroup.discover()
    yield found
    if found is not None:
        found.close()


def pytest_collection_finish() -> None:
    """Keep what thousands of tests are made of out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def machine(launcher: Launcher, cgroups: cgroup.Cgroups | None) -> Machine:
    return survey(launcher, cgroups)


@pytest.fixture(params=list(Tier), ids=str)
def sandbox(
    request: pytest.FixtureRequest,
    launcher: Launcher,
    cgroups: cgroup.Cgroups | None,
    machine: Machine,
    workspace: Path,
) -> Iterator[NativeSandbox]:
    # The workspace is asked for so that it is removed after this: a sandbox that is being made
    # for a next call may still put folders into it.
    assert workspace.is_dir()
    tier = Tier(request.param)
    if machine.tiers[tier]:
        pytest.skip(f"needs tier {tier}: {machine.tiers[tier]}")
    with closing(NativeSandbox(launcher, tier=tier, cgroups=cgroups)) as one:
        yield one


@pytest.fixture
def workspace() -> Iterator[Path]:
    """A folder that every user may enter and write: tier landlock has no id-mapped mounts."""
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="workspace-")))
    folder.chmod(0o777)
    yield folder
    remove_tree(str(folder))  # a test may have left what shutil.rmtree gives up on


@pytest.fixture
def box(sandbox: NativeSandbox, workspace: Path) -> Box:
    return Box(sandbox, workspace)


Change = Callable[[Plan], Plan]


class Weakened(NativeSandbox):
    """A sandbox whose request is changed on its way: the product itself has no such switch."""

    def __init__(
        self, box: Box, launcher: Launcher, cgroups: Cgroups | None, change: Change
    ) -> None:
        super().__init__(launcher, tier=box.tier, cgroups=cgroups, ahead=0)
        self._change = change

    def plan(
        self,
        profile: Profile,
        layout: Layout,
        ids: Mapping[str, object],
        *,
        explain: bool = False,
    ) -> Plan:
        return self._change(super().plan(profile, layout, ids, explain=explain))


@pytest.fixture
def weaken(
    box: Box, launcher: Launcher, cgroups: Cgroups | None
) -> Iterator[Callable[[Change], Box]]:
    """Return a maker of boxes whose requests are changed."""
    with ExitStack() as made:

        def make(change: Change) -> Box:
            weakened = made.enter_context(closing(Weakened(box, launcher, cgroups, change)))
            return replace(box, sandbox=weakened)

        yield make


@pytest.fixture
def outside() -> Iterator[Path]:
    """A world-readable secret outside every grant."""
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="outside-", dir="/var/tmp")))
    folder.chmod(0o755)
    (folder / "secret").write_text("SECRET")
    yield folder
    shutil.rmtree(folder)
