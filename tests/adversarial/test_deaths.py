"""Any process of the barrier is killed or stopped, at any moment: nothing is left, calls recover.

The tree is supervisor → launcher → template → init → stub, which becomes the program.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Limits, Outcome
from safeconduct.errors import SandboxFailed
from safeconduct.runtime.sandbox import capture, pool, running
from safeconduct.runtime.sandbox.cgroup import Cgroups
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox
from safeconduct.runtime.sandbox.pool import AHEAD
from safeconduct.runtime.sandbox.scratch import Scratches

if TYPE_CHECKING:
    from tests.conftest import Box

BOUND_SECONDS = 15.0
WALL_MS = 3000
# What dies, by its distance from the launcher.
VICTIMS = ("launcher", "template", "init", "stub")


def until(happened: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + BOUND_SECONDS
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            text = Path(f"/proc/{pid}/task/{task}/children").read_text()
            found += map(int, text.split())
    return found


def below(pid: int, depth: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (process, depth) of ``pid`` and of everything below it."""
    yield pid, depth
    for child in children(pid):
        yield from below(child, depth + 1)


def launchers(of: int) -> list[int]:
    found: list[int] = []
    for pid in children(of):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().startswith("safeconduct-lau"):
                found.append(pid)
    return found


def alive(pids: Sequence[int]) -> list[int]:
    """Return those that are there and no zombies: init or a subreaper collects them in time."""
    found: list[int] = []
    for pid in pids:
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if state not in "ZX":
                found.append(pid)
    return found


def groups(of: int, cgroups: Cgroups | None) -> list[Path]:
    bases = {*cgroups.bases.values()} if cgroups else set[Path]()
    return [folder for base in bases for folder in base.glob(f"safeconduct-{of}-*")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prey:
    """A box with a launcher of its own, which may be killed."""

    box: Box
    launcher: Launcher
    known: frozenset[int]

    def tree(self) -> list[tuple[int, int]]:
        own = [pid for pid in launchers(os.getpid()) if pid not in self.known]
        return [found for pid in own for found in below(pid)]

    def at(self, victim: str) -> list[int]:
        depth = VICTIMS.index(victim)
        return [pid for pid, found in self.tree() if found == depth]

    def call(self, *argv: str) -> Outcome:
        return self.box.run(*argv, limits=Limits(wall_ms=WALL_MS))

    def rest(self) -> None:
        """Wait until as many sandboxes wait as shall."""
        until(lambda: len(self.at("stub")) >= AHEAD, "nothing waits")

    def recovers(self) -> None:
        """See that after at most a few refusals calls run again."""
        for _ in range(2 + AHEAD):
            with suppress(SandboxFailed):
                assert self.call("true").ok
                return
        assert self.call("true").ok


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make private folders where they can be counted, and where every user gets through."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)
        # What a supervisor that was killed had no time to remove, the next one does.
        next_one = Scratches()
        base = Path(next_one.base)
        assert [*Path(folder).glob("safeconduct-*")] == [base]
        next_one.close()
        assert not [*Path(folder).glob("safeconduct-*")]


@pytest.fixture
def prey(
    box: Box, cgroups: Cgroups | None, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Prey]:
    """See in the end that of all that ever lived nothing is left."""
    monkeypatch.setattr(pool, "_TAKE_SECONDS", 2.0)
    for module in (capture, running):
        monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    box.sandbox.close()
    known, before = frozenset(launchers(os.getpid())), groups(os.getpid(), cgroups)
    launcher = Launcher()
    sandbox = NativeSandbox(launcher, tier=box.tier, cgroups=cgroups)
    made = Prey(box=replace(box, sandbox=sandbox), launcher=launcher, known=known)
    try:
        assert made.call("true").ok
        made.rest()
        yield made
    finally:
        tree = [pid for pid, _ in made.tree()]
        sandbox.close()
        launcher.close()
    until(lambda: not alive(tree), f"processes are left: {alive(tree)}")
    if cgroups is not None:
        until(lambda: len(groups(os.getpid(), cgroups)) <= len(before), "cgroups are left")


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_one_dies_while_all_wait(prey: Prey, victim: str, sent: signal.Signals) -> None:
    victims = prey.at(victim)
    doomed = [pid for one in victims for pid, _ in below(one)]
    for pid in victims:
        os.kill(pid, sent)
    if sent == signal.SIGKILL:
        prey.recovers()
    else:
        with suppress(SandboxFailed):
            assert prey.call("true").ok
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(doomed), f"processes are left: {alive(doomed)}")
    prey.recovers()
    assert prey.call("true").ok


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_one_dies_while_a_call_runs(prey: Prey, victim: str, sent: signal.Signals) -> None:
    code = "(setsid sleep 50 &) ; touch started; sleep 51"
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(prey.call, "sh", "-c", code)
        until((prey.box.workspace / "started").exists, "the call did not start")
        pids = [pid for pid, _ in prey.tree()]
        for pid in prey.at(victim):
            with suppress(ProcessLookupError):
                os.kill(pid, sent)
        with suppress(SandboxFailed):
            outcome = call.result(timeout=BOUND_SECONDS * 2)
            assert outcome.signal == signal.SIGKILL or outcome.limit == "wall"
    prey.recovers()
    until(lambda: not [pid for pid in alive(pids) if b"sleep\x005" in command(pid)], "a program")


def command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.mark.parametrize("victim", VICTIMS)
def test_one_dies_again_and_again_while_pools_fill(prey: Prey, victim: str) -> None:
    stop, ended, refused = threading.Event(), 0, 0
    doomed: list[int] = []

    def kill() -> None:
        while not stop.wait(0.03):
            for pid in prey.at(victim)[:2]:
                doomed.extend(one for one, _ in below(pid))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()

    def call(_: int) -> bool:
        try:
            return prey.call("true").signal is None
        except SandboxFailed:
            return False

    try:
        with ThreadPoolExecutor(4) as threads:
            for well in threads.map(call, range(60)):
                ended, refused = ended + well, refused + (not well)
    finally:
        stop.set()
        killer.join()
    assert ended + refused == 60
    until(lambda: not alive(doomed), f"processes are left: {alive(doomed)}")
    prey.recovers()
    assert prey.call("true").ok


SUPERVISOR = """
import sys, threading, time
from safeconduct.call import Limits, Profile, Tier
from safeconduct.errors import SandboxFailed
from safeconduct.runtime.sandbox import cgroup
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.shield import Shield
tier, folder = Tier(sys.argv[1]), sys.argv[2]
box = NativeSandbox(Launcher(), tier=tier, cgroups=cgroup.discover())
profile = Profile(name="p", read=(folder,), write=(folder,), limits=Limits(wall_ms=60_000))
def call(*argv):
    box.run("c", Program(argv=argv, cwd=folder), profile, workspace=folder, shield=Shield())
def again():
    while True:
        call("true")
call("true")
long = ("sh", "-c", "(setsid sleep 50 &); sleep 51")
threading.Thread(target=call, args=long, daemon=True).start()
threading.Thread(target=again, daemon=True).start()
while True:
    call("touch", "started")
    time.sleep(0.1)
"""


@pytest.fixture
def supervisor(
    box: Box, cgroups: Cgroups | None, temporary: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Start another supervisor, which calls, fills its pools and has a long call running."""
    box.sandbox.close()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    argv = [sys.executable, "-c", SUPERVISOR, str(box.tier), str(box.workspace)]
    started = box.workspace / "started"
    with subprocess.Popen(argv, env=environment, stderr=subprocess.DEVNULL) as one:
        try:
            until(started.exists, "the supervisor did not start")
            yield one
        finally:
            with suppress(ProcessLookupError):
                one.send_signal(signal.SIGCONT)
            one.kill()


ORDERS = [*permutations(("supervisor", "launcher", "template"), 2), ("supervisor",)]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("first", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_supervisor_dies(
    supervisor: subprocess.Popen[bytes],
    cgroups: Cgroups | None,
    order: Sequence[str],
    first: signal.Signals,
) -> None:
    """The first is killed, or stopped and killed after the second."""
    tree = [*below(supervisor.pid)]
    names = ("supervisor", *VICTIMS)
    named = {name: [pid for pid, depth in tree if depth == names.index(name)] for name in names}
    for name, sent in zip(order, (first, signal.SIGKILL), strict=False):
        for pid in named[name]:
            with suppress(ProcessLookupError):
                os.kill(pid, sent)
    supervisor.kill()
    for pid in named[order[0]]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    pids = [pid for pid, _ in tree]
    until(lambda: not alive(pids), f"left: {[command(pid) for pid in alive(pids)]}")
    left = groups(supervisor.pid, cgroups)
    if order == ("supervisor",) and first == signal.SIGKILL and cgroups is not None:
        until(lambda: not groups(supervisor.pid, cgroups), "cgroups are left")
    for folder in left:  # of templates that were killed: the next supervisor removes them
        until(lambda folder=folder: _removed(folder), f"{folder} is busy")


def _removed(folder: Path) -> bool:
    with suppress(OSError):  # a process that is not collected yet is still in it
        folder.rmdir()
    return not folder.exists()


def test_a_fork_of_the_supervisor_keeps_nothing_alive(prey: Prey) -> None:
    """A child that was forked without exec holds copies of every socket."""
    held, hold = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if not child:
        os.close(hold)
        os.read(held, 1)
        os._exit(0)
    try:
        assert prey.call("true").ok
        before = [pid for pid, _ in prey.tree()]
        made = [pid for pid, depth in prey.tree() if depth]
        prey.box.sandbox.close()
        until(lambda: not alive(made), "sandboxes outlive their pools")
        begun = time.monotonic()
        prey.launcher.close()
        assert time.monotonic() - begun < 4, "the launcher had to be killed"
        assert not alive(before)
    finally:
        os.close(held)
        os.close(hold)
        os.waitpid(child, 0)


def test_a_fork_can_neither_use_nor_end_the_sandboxes(prey: Prey) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def in_child() -> None:
        try:
            prey.call("true")
            results.put("ran")
        except SandboxFailed as error:
            results.put(error.step)
        prey.box.sandbox.close()
        prey.launcher.close()

    child = context.Process(target=in_child)
    child.start()
    assert results.get() == "pool"
    child.join(BOUND_SECONDS)
    assert child.exitcode == 0
    before = prey.at("template")
    assert prey.call("true").ok
    assert prey.at("template") == before, "the fork ended what was not its own"


def test_threads_and_tasks_that_give_up_leave_nothing(prey: Prey) -> None:
    async def give_up() -> None:
        tasks = [asyncio.to_thread(prey.call, "sleep", "0.1") for _ in range(8)]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*tasks), 0.05)

    asyncio.run(give_up())
    until(lambda: len(prey.at("init")) <= AHEAD + 8, "sandboxes are left")
    assert prey.call("true").ok
