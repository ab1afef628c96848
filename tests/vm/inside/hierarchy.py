"""One unified cgroup hierarchy: where room for calls is found, and what the kernel then holds."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safeconduct.call import Held, Outcome
from safeconduct.runtime.sandbox import cgroup

from .cgroups import ROOT
from .desk import execute, layers, policy, put_up, refusal, run
from .registry import STOCK, USER_UID, check

# 20 MB held by each of two processes, long enough to be at one time however slow the machine is;
# the last line tells that one was ended.
_HOLD = "{ head -c 20000000 /dev/zero; sleep 5; } | tail -c 19999999 >/dev/null"
_PAIR = f"{_HOLD} & {_HOLD}; a=$?; wait $!; b=$?; exit $((a | b))"
_FORKS = "i=0; while [ $i -lt 40 ]; do sleep 20 & i=$((i+1)); done; wait"


def own() -> Path:
    """Return the cgroup of this process."""
    (line,) = Path("/proc/self/cgroup").read_text().splitlines()
    return ROOT / line.split(":", 2)[2].lstrip("/")


@check(*STOCK, scopes=("root", "delegated", "service"))
@check(*STOCK, uids=(USER_UID,), scopes=("unmarked", "container"))
def room_is_found() -> None:
    """Wherever a supervisor is started, a call of its own cgroup is bounded."""
    with put_up(policy(require="cgroup: true")) as runtime:
        bomb = run(runtime, "sh", "-c", "tail /dev/zero")
    assert bomb.limit == "memory", bomb
    assert "cgroup-v2" in bomb.confinement.layers, bomb


@check(*STOCK, scopes=("session", "container"))
@check(*STOCK, uids=(USER_UID,), scopes=("delegated", "service"))
def limits_of_a_tree_hold() -> None:
    """Memory and processes are bounded for all processes together, and their use is told."""
    with put_up(policy(require="cgroup: true")) as runtime:
        bomb = run(runtime, "sh", "-c", "tail /dev/zero")
        assert bomb.limit == "memory", bomb
        pair = run(runtime, "sh", "-c", _PAIR)
        assert pair.limit == "memory", pair
        forks = run(runtime, "sh", "-c", _FORKS)
        assert (forks.usage.refused_forks or 0) > 0, forks
        assert not forks.ok, forks
        _accounts(run(runtime, "sh", "-c", "head -c 16000000 /dev/zero | tail -c 15999999 | wc -c"))
        for outcome in (bomb, pair, forks):
            assert "cgroup-v2" in outcome.confinement.layers
            assert outcome.confinement.held["memory"] is Held.TREE
            assert outcome.confinement.held["pids"] is Held.TREE


def _accounts(outcome: Outcome) -> None:
    assert outcome.ok, outcome
    assert outcome.stdout.strip() == b"15999999"
    assert (outcome.usage.cpu_ms or 0) > 0, outcome
    assert 15_000_000 < (outcome.usage.peak_memory_bytes or 0) <= 32 << 20, outcome


@check(*STOCK, scopes=("container",))
@check(*STOCK, uids=(USER_UID,), scopes=("delegated",))
def what_spins_goes_behind() -> None:
    """A call that computes for long is put last, and the trace names by what."""
    with put_up(policy(require="cgroup: true")) as runtime, ThreadPoolExecutor(1) as aside:
        spinning = aside.submit(run, runtime, "sh", "-c", "while [ ! -e stop ]; do :; done")
        idle = _await_call() / "cpu.idle"
        while idle.read_text().strip() != "1":
            time.sleep(0.01)
        Path("stop").touch()
        outcome = spinning.result()
    assert outcome.ok, outcome
    assert "cpu-idle" in outcome.confinement.layers, outcome


@check(*STOCK, uids=(USER_UID,), scopes=("delegated", "service", "container"))
def calls_stay_below_what_was_delegated() -> None:
    """A limit that the operator set on our scope bounds the calls too."""
    scope = own()
    found = cgroup.discover()
    assert found is not None
    assert found.version == 2
    assert set(found.bases.values()) == {scope}
    found.close()
    again = cgroup.discover()
    assert again is not None, "the leaf is found again from inside"
    assert set(again.bases.values()) == {scope}
    again.close()


@check(*STOCK, uids=(USER_UID,), scopes=("delegated", "service"))
def what_runs_beside_the_supervisor_goes_on() -> None:
    """The agent in our scope lives, and another supervisor finds room beside the first."""
    scope = own()
    with subprocess.Popen(["sleep", "100"]) as agent:
        try:
            file = policy(require="cgroup: true")
            with put_up(file) as runtime:
                assert run(runtime, "sh", "-c", "echo one").stdout == b"one\n"
                other = execute(file, "sh", "-c", "echo two")
                assert (other.code, other.out) == (0, "two\n"), other
                assert run(runtime, "sh", "-c", "tail /dev/zero").limit == "memory"
            assert agent.poll() is None
            lines = Path(f"/proc/{agent.pid}/cgroup").read_text()
            assert (ROOT / lines.strip().split(":", 2)[2].lstrip("/")).is_relative_to(scope)
        finally:
            agent.kill()


@check(*STOCK, uids=(USER_UID,), scopes=("session",))
def without_delegation_it_is_said() -> None:
    """A login session of root's: no cgroup, and the run says how limits hold instead."""
    assert cgroup.discover() is None
    with put_up(policy()) as runtime:
        outcome = run(runtime, "sh", "-c", "echo there")
        assert outcome.ok, outcome
        assert outcome.confinement.held["memory"] is Held.PROCESS
        assert not any("cgroup-v" in layer for layer in outcome.confinement.layers)
    error = refusal(policy(require="cgroup: true"))
    assert error.missing == "cgroup"
    assert "Delegate=yes" in error.hint
    layer = layers()["cgroups"]
    assert not layer["available"], layer
    assert layer["get"], layer


@check(*STOCK, scopes=("session",))
@check(*STOCK, uids=(USER_UID,), scopes=("delegated",))
def a_killed_supervisor_leaves_no_process() -> None:
    """SIGKILL in the middle of a call; what is left empty goes with the next supervisor."""
    file = policy(require="cgroup: true")
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(done, 1)
        runtime = put_up(file)
        os.write(done, b"up")
        run(runtime, "sh", "-c", "sleep 50")
        os._exit(0)
    os.close(done)
    assert os.read(ready, 2) == b"up"
    base = _await_call()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _await_gone(base)


def _await_call() -> Path:
    """Wait until a call's cgroup holds its processes; the check's own time bounds it."""
    while True:
        for folder in ROOT.rglob("safeconduct-*-*-*"):
            if len((folder / "cgroup.procs").read_text().split()) >= 2:
                return folder


def _await_gone(folder: Path) -> None:
    """Wait until its template has removed it; what still holds a process cannot be removed."""
    while folder.exists():
        pass
