"""Faults around a native sandbox: nothing leaks, nothing is left, the next call runs."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Tier
from safeconduct.errors import SandboxFailed, ToolFailed
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox
from safeconduct.runtime.sandbox.pool import AHEAD

if TYPE_CHECKING:
    from tests.conftest import Box


def processes(marker: str) -> list[int]:
    """Return the processes whose command line holds ``marker``."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def gone(marker: str, seconds: float = 5.0) -> bool:
    """Wait, within a bound, until no process carries ``marker``."""
    deadline = time.monotonic() + seconds
    while processes(marker):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def temporary(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make private folders where nobody else does, so that they can be counted."""
    folder = workspace / "temporary"
    folder.mkdir(mode=0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def held(launcher: Launcher, temporary: Path, box: Box) -> tuple[int, list[str], list[str]]:
    """List what calls could leak: our descriptors, the launcher's, private folders."""
    theirs = f"/proc/{launcher.pid}/fd"
    # The launcher is not dumpable: only root may look at its descriptors.
    launchers = os.listdir(theirs) if os.geteuid() == 0 else []
    private = [name for base in temporary.glob("safeconduct-*") for name in os.listdir(base)]
    # Folders of sandboxes that wait are theirs, and empty.
    used = [path for path in private if any(os.scandir(_below(temporary, path)))]
    # The next sandbox may be at hand, with its channel, the pipes of its output and a pidfd.
    pools = box.sandbox._stock.pools._pools.values()  # pyright: ignore[reportPrivateUsage]
    at_hand = sum(len(pool._at_hand) for pool in pools)  # pyright: ignore[reportPrivateUsage]
    return len(os.listdir("/proc/self/fd")) - 4 * at_hand, launchers, used


def _below(temporary: Path, name: str) -> Path:
    return next(base / name for base in temporary.glob("safeconduct-*") if (base / name).exists())


def descendants(pid: int) -> int:
    """Count the processes below ``pid``: templates, inits, stubs, programs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return sum(1 + descendants(int(child)) for child in children)


def settled(launcher: Launcher, count: int) -> bool:
    """Wait a bounded time until so many processes are left."""
    deadline = time.monotonic() + 5
    while _started(launcher) != count and time.monotonic() < deadline:
        time.sleep(0.01)
    return _started(launcher) == count


def _started(launcher: Launcher) -> int:
    return sum(descendants(pid) for pid in launcher.pids)


def test_good_and_failed_calls_leak_nothing(box: Box, launcher: Launcher, temporary: Path) -> None:
    def each_kind() -> None:
        box.run("true")
        with pytest.raises(ToolFailed):
            box.run("no-such-program")
        with pytest.raises(SandboxFailed):
            box.run("true", cwd=f"{box.workspace}/missing")

    each_kind()
    before = held(launcher, temporary, box)
    # One template; two sandboxes wait in it, an init and a stub each.
    assert settled(launcher, 1 + 2 * AHEAD)
    for _ in range(20):
        each_kind()
    assert held(launcher, temporary, box) == before
    assert settled(launcher, 1 + 2 * AHEAD)


@contextmanager
def descriptors(spare: int) -> Generator[None]:
    bounds = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + spare, bounds[1])
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, bounds)


def test_running_out_of_descriptors_fails_cleanly(
    box: Box, launcher: Launcher, temporary: Path
) -> None:
    box.run("true")
    before, failures = held(launcher, temporary, box), 0
    for spare in range(-1, 12):
        try:
            with descriptors(spare):
                box.run("true")
        except SandboxFailed:
            failures += 1
    assert failures >= 3
    assert box.run("true").ok
    assert held(launcher, temporary, box) == before


def test_a_private_folder_made_hostile_is_removed(
    box: Box, launcher: Launcher, temporary: Path
) -> None:
    box.run("true")
    before = held(launcher, temporary, box)
    code = (
        "cd ~; mkdir -p a/b/c; chmod 000 a/b a; ln -s / root; mkfifo pipe; chmod 000 ~ || true;"
        "i=0; while [ $i -lt 300 ]; do mkdir d$i 2>/dev/null && cd d$i || break; i=$((i+1)); done"
    )
    box.run("sh", "-c", code)
    assert held(launcher, temporary, box) == before


def test_a_lower_limit_of_the_supervisor_stays(machine_tier: Tier) -> None:
    code = f"""
from safeconduct.call import Profile, Tier
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.shield import Shield
launcher = Launcher()
box = NativeSandbox(launcher, tier=Tier({str(machine_tier)!r}), cgroups=None)
program = Program(argv=["sh", "-c", "ulimit -Hn"], cwd="/usr")
print(box.run("c", program, Profile(name="p"), workspace="/usr", shield=Shield()).stdout.decode())
launcher.close()
"""
    command = f"ulimit -n 300; exec {sys.executable} -c '{code.replace(chr(39), chr(34))}'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["300"], done.stderr


@pytest.fixture
def machine_tier(sandbox: NativeSandbox) -> Tier:
    return sandbox.tier


def test_a_launcher_killed_mid_call_leaves_nothing(box: Box) -> None:
    marker = f"killed-{os.getpid()}-{box.tier}"
    launcher = Launcher()
    sandbox = NativeSandbox(launcher, tier=box.tier, cgroups=None)

    def kill_once_it_runs() -> None:
        deadline = time.monotonic() + 5
        while not processes(marker) and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in launcher.pids:
            os.kill(pid, 9)

    killer = threading.Thread(target=kill_once_it_runs)
    killer.start()
    doomed = replace(box, sandbox=sandbox)
    with pytest.raises(SandboxFailed):
        doomed.run("sh", "-c", f"setsid -f sh -c 'sleep 60; : {marker}'; sleep 60; : {marker}")
    killer.join()
    assert gone(marker)
    # It is started again: the next call recovers.
    assert doomed.run("true").ok
    sandbox.close()
    launcher.close()
    assert box.run("true").ok
