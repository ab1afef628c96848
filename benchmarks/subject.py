"""What benchmarks of sandboxes share: an unconfined start, a sandbox, and when all is at rest."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from safeconduct.call import Outcome, Profile, Tier
from safeconduct.runtime.sandbox import cgroup
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.layout import Layout
from safeconduct.runtime.sandbox.machine import Machine
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.overlay import Keeper
from safeconduct.runtime.sandbox.plan import Plan
from safeconduct.runtime.sandbox.pool import AHEAD
from safeconduct.runtime.sandbox.shield import Shield
from safeconduct.runtime.sandbox.survey import survey

TRUE = "/usr/bin/true"
_READ_BYTES = 64 << 10
# At rest means: seen asleep so many times in a row, so long apart.
_LOOKS, _LOOK_SECONDS = 3, 0.001
_NETWORK_SECONDS = 0.005
_REST_SECONDS = 30.0
_LAUNCHER = "safeconduct-lau"  # comm, cut to 15 characters


def spawn(argv: tuple[str, ...] = (TRUE,)) -> bytes:
    """Run a program unconfined as a sandbox would: output captured by pipes, usage waited for."""
    reading, stdout = os.pipe2(os.O_CLOEXEC)
    reading_errors, stderr = os.pipe2(os.O_CLOEXEC)
    actions = [(os.POSIX_SPAWN_DUP2, stdout, 1), (os.POSIX_SPAWN_DUP2, stderr, 2)]
    pid = os.posix_spawn(argv[0], argv, {}, file_actions=actions)
    os.close(stdout)
    os.close(stderr)
    output = b"".join(iter(lambda: os.read(reading, _READ_BYTES), b""))
    while os.read(reading_errors, _READ_BYTES):
        pass
    os.close(reading)
    os.close(reading_errors)
    _, status, _ = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{argv[0]} failed unconfined: {os.waitstatus_to_exitcode(status)}")
    return output


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of the tree of a launcher, as proc(5) shows it."""

    pid: int
    state: str
    children: tuple[Process, ...]

    @property
    def waits(self) -> bool:
        """It is the init of a waiting sandbox: suspended by vfork(2) until its stub executes."""
        return self.state == "D" and [child.state for child in self.children] == ["S"]

    def below(self) -> Iterator[Process]:
        """Yield it and every process below it."""
        yield self
        for child in self.children:
            yield from child.below()


def tree(pid: int) -> Process:
    """Look at a process and all below it. Raises OSError where one vanishes meanwhile."""
    status = Path(f"/proc/{pid}/stat").read_text()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return Process(
        pid=pid,
        state=status[status.rindex(")") + 2],
        children=tuple(tree(int(child)) for child in children),
    )


def launchers() -> list[int]:
    """Return the launchers that this process started."""
    found: list[int] = []
    for task in os.listdir("/proc/self/task"):
        for child in Path(f"/proc/self/task/{task}/children").read_text().split():
            with suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text().strip() == _LAUNCHER:
                    found.append(int(child))
    return found


def waiting() -> int:
    """Return how many sandboxes wait for a program; -1 while anything is being made or undone."""
    found = 0
    try:
        for pid in launchers():
            for process in tree(pid).below():
                if process.waits:
                    found += 1
                elif process.state != "S":
                    return -1
    except OSError:
        return -1
    return found


def rest(least: int = 0, *, networks: bool = False) -> int:
    """Wait until nothing is being made or undone and at least that many sandboxes wait.

    A refill is asked for before a call returns, so whoever makes it is not asleep until it is done.
    ``networks`` waits also for the kernel to remove network namespaces. Returns how many sandboxes
    wait.
    """
    deadline = time.monotonic() + _REST_SECONDS
    looks = found = 0
    while looks < _LOOKS:
        found = waiting()
        looks = looks + 1 if found >= least else 0
        if looks == _LOOKS and networks and _undoing_networks():
            # Whoever looks all the time keeps the kernel from its work.
            looks = 0
            time.sleep(_NETWORK_SECONDS)
        elif looks < _LOOKS:
            time.sleep(_LOOK_SECONDS)
        if time.monotonic() > deadline:
            raise SystemExit(f"The sandboxes did not come to rest ({found} wait).")
    return found


def _undoing_networks() -> bool:
    """Tell whether the kernel still removes network namespaces, in the work queue ``netns``."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError), open(f"/proc/{name}/comm", "rb") as comm:
                if comm.read(64).rstrip().endswith(b"+netns"):
                    return True
    return False


class OwnNetwork(NativeSandbox):
    """Every sandbox has a network namespace of its own; none of ours is ever shared again."""

    def plan(
        self,
        profile: Profile,
        layout: Layout,
        ids: Mapping[str, object],
        *,
        explain: bool = False,
    ) -> Plan:
        plan = super().plan(profile, layout, ids, explain=explain)
        return replace(plan, network="own")


class WithoutLandlock(NativeSandbox):
    """One layer less, to see what that layer costs. Nothing but a benchmark does so."""

    def plan(
        self,
        profile: Profile,
        layout: Layout,
        ids: Mapping[str, object],
        *,
        explain: bool = False,
    ) -> Plan:
        plan = super().plan(profile, layout, ids, explain=explain)
        return replace(plan, layers=[layer for layer in plan.layers if layer != "landlock"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A launcher, what this machine gives, and a workspace."""

    launcher: Launcher
    cgroups: cgroup.Cgroups | None
    machine: Machine
    workspace: str
    stack: ExitStack

    @property
    def tier(self) -> Tier:
        """The strongest tier here."""
        return self.machine.choose(None)

    @property
    def facts(self) -> dict[str, object]:
        """What of the machine decides what is measured."""
        missing = {str(tier): why for tier, why in self.machine.tiers.items() if why}
        return {
            "tier": str(self.tier),
            "missing_tiers": missing,
            "landlock_abi": self.machine.landlock_abi,
            "cgroup": None if self.cgroups is None else f"v{self.cgroups.version}",
        }

    def sandbox(
        self,
        kind: type[NativeSandbox] = NativeSandbox,
        *,
        tier: Tier | None = None,
        ahead: int = AHEAD,
    ) -> NativeSandbox:
        """Return a sandbox with pools of its own."""
        shelf = self.stack.enter_context(tempfile.TemporaryDirectory())
        keeper = Keeper(Path(shelf), workspace=self.workspace, protected=())
        made = kind(
            self.launcher, tier=tier or self.tier, cgroups=self.cgroups, ahead=ahead, keeper=keeper
        )
        self.stack.callback(made.close)
        return made

    def caller(
        self,
        sandbox: NativeSandbox,
        argv: Sequence[str] = (TRUE,),
        *,
        profile: Profile | None = None,
        late: bool = False,
    ) -> Callable[[], Outcome]:
        """Return what runs a program in the workspace to its end, and raises where it failed."""
        folder = self.workspace
        chosen = profile or Profile(name="bench", read=(folder,), write=(folder,))
        program = Program(argv=argv, cwd=folder)
        shield = Shield()

        def call() -> Outcome:
            outcome = sandbox.run(
                "bench", program, chosen, workspace=folder, shield=shield, late=late
            )
            if outcome.exit_code != 0:
                raise SystemExit(f"{argv[0]} failed confined: {outcome}")
            return outcome

        return call


@contextmanager
def bench(place: str | None = None) -> Generator[Bench]:
    """Start a launcher and make a workspace, in ``place`` or where TMPDIR says; end both."""
    with ExitStack() as stack:
        workspace = stack.enter_context(
            tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True)
        )
        # Tier landlock started by root has a user id of its own and no mounts: it must get in.
        os.chmod(workspace, 0o777)  # noqa: S103 - meant
        launcher = Launcher()
        stack.callback(launcher.close)
        cgroups = cgroup.discover()
        if cgroups is not None:
            stack.callback(cgroups.close)
        machine = survey(launcher, cgroups)
        yield Bench(
            launcher=launcher, cgroups=cgroups, machine=machine, workspace=workspace, stack=stack
        )
