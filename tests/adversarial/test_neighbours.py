"""Sandboxes of one template against each other: they share its network and host names, no more.

Started by an ordinary user they also share a host uid, so nothing but the walls keeps them apart.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from safeconduct.call import Limits, Outcome, Tier
from safeconduct.runtime.sandbox.launcher import Launcher

if TYPE_CHECKING:
    from tests.conftest import Box

# Reaches for processes by the numbers that they have on the host. Prints what it got hold of.
REACH = r"""
import ctypes, json, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
reached = []
def reach(what, pid, call):
    try:
        if call() != -1:
            reached.append([what, pid])
    except OSError:
        pass
for pid in {*map(int, sys.argv[1:])} - {os.getpid()}:  # it was one that waited
    reach("see", pid, lambda: os.listdir(f"/proc/{pid}"))
    reach("descriptors", pid, lambda: os.listdir(f"/proc/{pid}/fd"))
    reach("memory", pid, lambda: os.open(f"/proc/{pid}/mem", os.O_RDONLY))
    reach("name", pid, lambda: os.open(f"/proc/{pid}/cmdline", os.O_RDONLY))
    reach("bound", pid, lambda: libc.prlimit(pid, 7, None, (ctypes.c_ulong * 2)()))
    reach("pin", pid, lambda: libc.sched_setaffinity(pid, 8, ctypes.byref(ctypes.c_ulong(1))))
    reach("slow", pid, lambda: libc.setpriority(0, pid, 1))
    reach("attach", pid, lambda: libc.ptrace(16, pid, 0, 0))
    reach("adopt", pid, lambda: libc.setpgid(pid, pid))
    reach("tell", pid, lambda: os.kill(pid, 0))
    reach("end", pid, lambda: os.kill(pid, signal.SIGKILL))
    reach("tell its group", pid, lambda: os.killpg(pid, 0))
    reach("handle", pid, lambda: signal.pidfd_send_signal(os.pidfd_open(pid), 0))
print(json.dumps(reached))
"""
# What belongs to one IPC namespace, and what is in no namespace at all.
LEAVE = """
import ctypes, sys
libc = ctypes.CDLL(None)
key = int(sys.argv[1])
print(libc.shmget(key, 4096, 0o1666), libc.semget(key, 1, 0o1666), libc.msgget(key, 0o1666))
try: open('/dev/shm/left', 'w').close()
except OSError: pass
try: open('/tmp/left', 'w').close()
except OSError: pass
"""
FIND = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
key = int(sys.argv[1])
found = [libc.shmget(key, 0, 0), libc.semget(key, 0, 0), libc.msgget(key, 0)]
print(max(found), os.path.exists('/dev/shm/left'), os.path.exists('/tmp/left'))
"""
HOLD = "touch held; while [ -e held ]; do sleep 0.02; done; echo mine"


def below(pid: int) -> Iterator[int]:
    for task in os.listdir(f"/proc/{pid}/task"):
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
            yield int(child)
            with suppress(FileNotFoundError):
                yield from below(int(child))


def python(box: Box, code: str, *arguments: str) -> Outcome:
    return box.run("python3", "-c", code, *arguments, limits=Limits(wall_ms=20_000))


@contextmanager
def neighbour(box: Box) -> Generator[None]:
    """Have another sandbox of the same plan run a program meanwhile, and end well."""
    held = box.workspace / "held"
    limits = Limits(wall_ms=20_000)
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(box.run, "sh", "-c", HOLD, limits=limits)
        deadline = time.monotonic() + 10
        while not held.exists():
            assert time.monotonic() < deadline, "the neighbour did not start"
            time.sleep(0.01)
        try:
            yield
        finally:
            held.unlink()
    assert call.result().stdout == b"mine\n", "the neighbour was disturbed"


def test_what_reaches_processes_works_outside() -> None:
    with subprocess.Popen(["sleep", "60"]) as prey:
        argv = [sys.executable, "-c", REACH, str(prey.pid)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
        assert {"end", "see", "bound", "name", "pin", "slow"} <= {
            what for what, _ in json.loads(done.stdout)
        }
        assert prey.wait(timeout=10) == -signal.SIGKILL


def test_no_process_of_a_neighbour_can_be_reached(box: Box, launcher: Launcher) -> None:
    """Neither one that runs nor one that waits, neither the template nor the supervisor."""
    assert box.run("true", limits=Limits(wall_ms=20_000)).ok
    with neighbour(box):
        others = [os.getpid(), launcher.pid, *below(os.getpid())]
        outcome = python(box, REACH, *(str(pid) for pid in others))
        assert outcome.exit_code == 0, outcome.stderr
        reached = cast("list[list[object]]", json.loads(outcome.stdout))
        # Numbers in its own pid namespace can be the same; there they are its own processes. In
        # tier landlock a handle on any process can be had, and nothing can be done with it.
        ours = {1, 2, 3}
        assert [one for one in reached if one[1] not in ours] == []
        assert all(Path(f"/proc/{pid}").exists() for pid in others[:2])


def test_a_program_is_given_three_descriptors_and_no_more(box: Box) -> None:
    code = """
import fcntl
def is_open(fd):
    try: fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError: return False
    return True
print([fd for fd in range(70_000) if is_open(fd)])
"""
    assert python(box, code).stdout == b"[0, 1, 2]\n"


def test_what_one_leaves_in_memory_another_does_not_find(box: Box) -> None:
    key = str(0x5AFE_0000 + os.getpid())
    outside = [sys.executable, "-c", LEAVE, key]
    left = subprocess.run(outside, capture_output=True, text=True, timeout=30, check=True)
    try:
        assert "-1" not in left.stdout, "without walls it can be left"
        found = subprocess.run([sys.executable, "-c", FIND, key], capture_output=True, timeout=30)
        assert not found.stdout.startswith(b"-1"), "without walls it is found"
        assert python(box, FIND, key).stdout.split()[0] == b"-1"
    finally:
        for kind, number in zip(("-m", "-s", "-q"), left.stdout.split(), strict=True):
            subprocess.run(["ipcrm", kind, number], check=True)
        for path in ("/dev/shm/left", "/tmp/left"):
            Path(path).unlink(missing_ok=True)
    with neighbour(box):
        python(box, LEAVE, key)
        assert python(box, FIND, key).stdout == b"-1 False False\n"


def test_neighbours_share_two_namespaces_of_the_template(box: Box) -> None:
    if box.tier is not Tier.FULL:
        pytest.skip("tier landlock has no namespaces")
    names = sorted(os.listdir("/proc/self/ns"))
    here = [os.readlink(f"/proc/self/ns/{name}") for name in names]
    code = f"""
import os, sys, time
print(*[os.readlink('/proc/self/ns/' + name) for name in {names}])
open(sys.argv[1], "w").close()
while not os.path.exists(sys.argv[2]): time.sleep(0.01)  # a number is used again once it is free
"""
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(python, box, code, *pair) for pair in (("a", "b"), ("b", "a"))]
        one, other = (call.result().stdout.decode().split() for call in calls)
    same = same_as(names, one, other)
    assert same == {"net", "time", "time_for_children", "uts"}
    assert same_as(names, one, here) == {"time", "time_for_children"}


def same_as(names: Sequence[str], one: Sequence[str], other: Sequence[str]) -> set[str]:
    return {name for name, a, b in zip(names, one, other, strict=True) if a == b}


UNDER_WAY = """
import errno, os, resource, socket
from safeconduct.runtime.sandbox.channel import send_fds
if os.geteuid() == 0:
    os.setgroups([])
    os.setresuid(64_018, 64_018, 64_018)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1024))
kept = []
try:
    for _ in range(9):  # what another program of this user may do as well
        kept.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        socket.send_fds(kept[-1][0], [b"x"], [0] * 20)
except OSError as error:
    print(errno.errorcode[error.errno])
send_fds(kept[-1][0], b"x", [0])
data, given, _, _ = socket.recv_fds(kept[-1][1], 1, 1)
print(data, len(given), resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_descriptors_under_way_in_one_keep_no_other_from_being_started() -> None:
    """An ordinary user's programs have one count for all of them, unix(7)."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER_WAY], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.split("\n")[:2] == ["ETOOMANYREFS", "b'x' 1 (64, 1024)"], done.stderr
