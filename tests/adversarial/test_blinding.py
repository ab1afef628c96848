"""A program reaches for what watches it: the init that counts its time, the limit that is polled,
the memory that keeps its output. Each attack first works without the one barrier it is about.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Limits, Outcome, Tier
from safeconduct.errors import SandboxFailed
from safeconduct.runtime.adapters.frames import Frames, TooLong
from safeconduct.runtime.cli import output
from safeconduct.runtime.sandbox import capture, running
from safeconduct.runtime.sandbox.native import Program
from safeconduct.runtime.sandbox.plan import Plan
from safeconduct.runtime.sandbox.running import Running
from safeconduct.runtime.sandbox.shield import Shield

if TYPE_CHECKING:
    from tests.conftest import Box, Change

    Weaken = Callable[[Change], Box]

BOUND_SECONDS = 15.0
# As C calls them: what libc passes on unseen.
REACH = """
import ctypes, errno, json, os
libc, init = ctypes.CDLL(None, use_errno=True), os.getppid()
word = (ctypes.c_ulong * 2)(64, 64)
def told(call, *arguments):
    ctypes.set_errno(0)
    return 0 if getattr(libc, call)(*arguments) != -1 else ctypes.get_errno()
def reach(pid):
    return [
        told("prlimit", pid, 7, word, None),  # RLIMIT_NOFILE
        told("sched_setscheduler", pid, 5, (ctypes.c_int * 1)(0)),  # SCHED_IDLE
        told("sched_setparam", pid, (ctypes.c_int * 1)(0)),
        told("sched_setaffinity", pid, 8, (ctypes.c_ulong * 1)(1)),
        told("setpriority", 0, pid, 19),
    ]
"""
BLIND = """
import os, resource, signal
resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))
held, hold = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.close(hold)
        os.read(held, 1)  # until nobody holds the other end: an orphan whose death wakes the init
    os._exit(0)
os.wait()
os.close(hold)
while True: signal.pause()
"""
FALLOCATE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for number in range(16):
    fd = os.open(f"f{number}", os.O_CREAT | os.O_RDWR)
    if libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(8 << 20)) != 0:
        print(ctypes.get_errno())
        break
else:
    print(sum(os.stat(f"f{number}").st_blocks for number in range(16)) * 512)
os.posix_fallocate(fd, 0, 1 << 20)
print(os.fstat(fd).st_size)
"""
# pipe(2) O_DIRECT: each write is a packet of its own, and so is each read.
PACKETS = """
import fcntl, os
fcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT)
for _ in range({count}): os.write(1, b"ab")
"""
PIECES = 100_000
# What is kept of two bytes: themselves, twice or thrice while they are copied.
KEPT_BYTES_MAX = PIECES * 2 * 4 + (1 << 20)


def without_seccomp(plan: Plan) -> Plan:
    return replace(plan, layers=[layer for layer in plan.layers if layer != "seccomp"])


def carrying(marker: str) -> list[str]:
    """Return the processes, other than this one, whose command line holds ``marker``."""
    found: list[str] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def await_none(marker: str) -> None:
    deadline = time.monotonic() + BOUND_SECONDS
    while found := carrying(marker):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def test_the_init_cannot_be_changed(box: Box, weaken: Weaken) -> None:
    code = REACH + "print(json.dumps(reach(init)))"
    assert weaken(without_seccomp).python(code).stdout == b"[0, 0, 0, 0, 0]\n"
    refused = errno.EPERM if box.tier is Tier.FULL else errno.ENOSYS
    assert box.python(code).stdout == f"{[refused] * 5}\n".encode()


def test_the_users_processes_cannot_be_slowed_at_once(box: Box) -> None:
    code = "import os; os.setpriority(os.PRIO_USER, 0, 19)"
    assert b"OSError" in box.python(code).stderr or b"PermissionError" in box.python(code).stderr


def test_what_is_the_programs_own_can_be_changed(box: Box) -> None:
    code = REACH + "print(json.dumps(reach(0)))"
    assert box.python(code).stdout == b"[0, 0, 0, 0, 0]\n"
    if box.tier is Tier.FULL:
        assert box.python(code.replace("reach(0)", "reach(os.getpid())")).stdout[:2] == b"[0"
        scripts = "taskset -p 1 $$ && renice -n 5 -p $$ && nice -n 7 true && prlimit --nofile=60:60"
        assert box.run("sh", "-ec", f"{scripts} true && renice -n 6 -g 0").ok


def test_an_init_that_cannot_watch_ends_its_tree(box: Box, weaken: Weaken) -> None:
    marker = str(box.workspace)
    began = time.monotonic()
    with pytest.raises(SandboxFailed):
        weaken(without_seccomp).run("python3", "-c", BLIND, marker, limits=Limits(wall_ms=60_000))
    assert time.monotonic() - began < 30
    await_none(marker)
    outcome = box.run("python3", "-c", BLIND, marker)
    assert outcome.exit_code == 1, outcome


def test_an_init_that_does_not_listen_is_killed(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (capture, running):
        monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    marker = str(box.workspace)

    def stop(one: Running) -> None:
        signal.pidfd_send_signal(one.waiting.init, signal.SIGSTOP)

    with pytest.raises(SandboxFailed) as failure:
        box.sandbox.run(
            "call",
            Program(argv=["sh", "-c", "sleep 50; true", marker], cwd=marker),
            box.profile(Limits(wall_ms=300)),
            workspace=marker,
            shield=Shield(),
            begun=stop,
        )
    # It is never said that nothing is left where nobody can tell.
    full = box.tier is Tier.FULL
    assert failure.value.step == ("wall" if full else "close")
    assert bool(failure.value.hint) is not full
    await_none(marker)
    assert box.run("true").ok


def test_no_disk_is_taken_in_one_call(box: Box, weaken: Weaken) -> None:
    def attack(of: Box) -> list[bytes]:
        limits = Limits(wall_ms=20_000, disk_bytes=1 << 30)
        return of.run("python3", "-c", FALLOCATE, limits=limits).stdout.split()

    taken, size = attack(weaken(without_seccomp))
    if taken == str(errno.EOPNOTSUPP).encode():
        pytest.skip("needs a file system that knows fallocate(2)")
    assert int(taken) == 16 * 8 << 20
    for file in box.workspace.iterdir():
        file.unlink()
    told, size = attack(box)
    assert int(told) == errno.EOPNOTSUPP
    assert int(size) == 1 << 20  # posix_fallocate(3) writes instead


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_tiny_pieces_of_output_are_kept_as_bytes(box: Box) -> None:
    box.run("true")
    ended: list[Outcome] = []
    code = PACKETS.format(count=PIECES)
    limits = Limits(wall_ms=60_000, output_bytes=1 << 20)
    peak = peak_bytes(lambda: ended.append(box.run("python3", "-c", code, limits=limits)))
    assert ended[0].stdout == b"ab" * PIECES
    assert peak < KEPT_BYTES_MAX


def test_tiny_pieces_of_a_frame_are_kept_as_bytes() -> None:
    frames = Frames(PIECES * 2)
    found: list[bytes | TooLong] = []
    ab = bytearray(b"ab")  # each piece is an object of its own, as from read(2)

    def feed() -> None:
        for _ in range(PIECES):
            found.extend(frames.feed(bytes(ab)))

    assert peak_bytes(feed) < KEPT_BYTES_MAX
    assert [*frames.feed(b"\n")] == [b"ab" * PIECES + b"\n"]
    assert found == []


def test_tiny_pieces_that_nobody_reads_are_kept_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as read, os.fdopen(writer, "w") as target:
        monkeypatch.setattr(sys, "stdout", target)
        told = output.Output()

        def show() -> None:
            told.show("stdout", b"x" * (1 << 20))  # more than a pipe holds
            for number in range(PIECES):
                told.show("stdout", b"%02d" % (number % 100))

        assert peak_bytes(show) < KEPT_BYTES_MAX + (1 << 20)
        wanted = b"x" * (1 << 20) + b"".join(b"%02d" % (number % 100) for number in range(PIECES))
        assert read.read(len(wanted)) == wanted
        monkeypatch.undo()
