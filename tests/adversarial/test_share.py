"""A call that computes for long gives way to others, and cannot take that back."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tests.conftest import Box

from safeconduct.call import Limits, Outcome
from safeconduct.runtime.sandbox import share
from safeconduct.runtime.sandbox.cgroup import Cgroups
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.running import Running
from safeconduct.runtime.sandbox.share import Share
from safeconduct.runtime.sandbox.shield import Shield

LIMITS = Limits(wall_ms=3000, pids=32)
# Sessions of their own do not help; neither does asking for the old place.
SPIN = """
import os
for _ in range(2):
    if os.fork() == 0: os.setsid()
for name in ("sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))", "setpriority(0, 0, 0)"):
    try: eval("os." + name)
    except OSError: pass
for name in ("/proc/self/autogroup", "/sys/fs/cgroup/cpu/cpu.idle"):
    try: open(name, "w").write("0")
    except OSError: pass
while True: pass
"""
SLEEP = "import time; time.sleep(1)"


@dataclass
class Way:
    """What was asked for."""

    told: list[str] = field(default_factory=list[str])

    def cpu_us(self) -> int:
        """Nobody asks here."""
        raise AssertionError

    def give(self) -> bool:
        """Note it."""
        self.told.append("give")
        return True

    def recover(self) -> None:
        """Note it."""
        self.told.append("recover")


def test_a_short_call_keeps_its_place() -> None:
    way = Way()
    part = Share(way)
    part.look(1.0, 5_000)
    part.look(9.0, 15_000)
    part.end()
    assert way.told == []


def test_a_long_call_gives_way_and_recovers_where_it_gets_nothing() -> None:
    way = Way()
    part = Share(way)
    part.look(1.0, 30_000)
    part.look(1.01, 31_000)
    assert way.told == ["give"]
    part.look(1.2, 31_000)
    assert way.told == ["give", "recover"]
    part.look(1.3, 60_000)
    part.look(9.0, 7_000_000)  # it goes on, and may have made more
    assert way.told == ["give", "recover", "give", "give"]
    part.end()
    assert way.told[-1] == "recover"


def during(box: Box, code: str, seen: Callable[[Running], bool]) -> tuple[bool, Outcome]:
    """Run a program; tell whether ``seen`` came true while it ran, within a bound."""
    found: list[bool] = []
    threads: list[threading.Thread] = []

    def follow(running: Running) -> None:
        deadline = time.monotonic() + LIMITS.wall_ms / 1000
        while not found and time.monotonic() < deadline:
            with suppress(OSError):
                if seen(running):
                    found.append(True)
            time.sleep(0.005)

    def begun(running: Running) -> None:
        threads.append(threading.Thread(target=follow, args=(running,)))
        threads[0].start()

    outcome = box.sandbox.run(
        "call",
        Program(argv=["python3", "-S", "-c", code], cwd=str(box.workspace)),
        box.profile(LIMITS),
        workspace=str(box.workspace),
        shield=Shield(),
        begun=begun,
    )
    for thread in threads:
        thread.join()
    return bool(found), outcome


def folder_of(running: Running, cgroups: Cgroups) -> Path:
    """Return the cpu cgroup of a call."""
    base = cgroups.bases.get("cpu", cgroups.bases["memory"])
    return base / f"{running.pool.template.name}-{running.waiting.number}"


def idle(running: Running, cgroups: Cgroups, tasks: int) -> bool:
    """Tell whether a call is put last, with so many processes at least."""
    folder = folder_of(running, cgroups)
    if (folder / "cpu.idle").read_text().strip() != "1":
        return False
    return len((folder / "cgroup.procs").read_text().split()) >= tasks


def test_what_spins_goes_behind_everybody(box: Box, cgroups: Cgroups | None) -> None:
    if cgroups is None or not cgroups.shares:
        pytest.skip("needs a delegated cpu controller")
    found, outcome = during(box, SPIN, lambda running: idle(running, cgroups, 5))
    assert found
    assert outcome.limit == "wall"
    assert share.means(cgroups) in outcome.confinement.layers
    assert not during(box, SLEEP, lambda running: idle(running, cgroups, 1))[0]


def nice(running: Running) -> list[int]:
    """Return the nice values that count for the processes below the first one of a sandbox."""
    by_session = share.means(None) == "session-nice"
    found: list[int] = []
    for pid in share.Processes(running.waiting.init, LIMITS.pids).below():
        if by_session:
            words = Path(f"/proc/{pid}/autogroup").read_text().split()
            found.append(int(words[-1]))
        else:
            found.append(os.getpriority(os.PRIO_PROCESS, pid))
    return found


def test_what_spins_goes_behind_where_there_is_no_cpu_cgroup(box: Box, launcher: Launcher) -> None:
    plain = box.without_cgroups(launcher)
    try:

        def low(running: Running) -> bool:
            values = nice(running)
            return len(values) >= 4 and min(values) >= 10

        found, outcome = during(plain, SPIN, low)
        assert found
        assert outcome.limit == "wall"
        assert share.means(None) in outcome.confinement.layers
        assert not during(plain, SLEEP, lambda running: max(nice(running), default=0) > 0)[0]
    finally:
        plain.sandbox.close()


def test_what_a_supervisor_of_high_precedence_starts_has_none(
    box: Box, cgroups: Cgroups | None
) -> None:
    ask = "import os; print(os.sched_getscheduler(0), os.getpriority(0, 0))"
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        pytest.skip("needs the right to be a real-time process")
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -5)
        unconfined = subprocess.run(["python3", "-c", ask], capture_output=True, check=True)
        launcher = Launcher()
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    assert unconfined.stdout.split() == [b"%d" % os.SCHED_RR, b"-5"]
    with (
        closing(launcher),
        closing(NativeSandbox(launcher, tier=box.tier, cgroups=cgroups)) as sandbox,
    ):
        outcome = replace(box, sandbox=sandbox).python(ask)
    assert outcome.stdout.split() == [b"%d" % os.SCHED_OTHER, b"0"]
