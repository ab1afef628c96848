"""Programs that try to use up the machine: contained, named, and nothing is left of them.

Each attack first reaches its goal with the one limit raised, in the same sandbox.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.conftest import Box

from safeconduct.call import Limits, Outcome, Tier
from safeconduct.runtime.sandbox.cgroup import Cgroups
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox

# What no attack here reaches. Each test lowers the one limit it is about.
AMPLE = Limits(
    wall_ms=60_000,
    memory_bytes=2 << 30,
    pids=20_000,
    files=4096,
    disk_bytes=2 << 30,
    inodes=1_000_000,
    depth=5000,
)
# How far the supervisor's own memory may move: an allocator's arena, not a bomb.
FLAT_BYTES = 24 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def standing(cgroups: Cgroups | None) -> list[str]:
    """Return the cgroups that this process made and that still exist."""
    bases = set(cgroups.bases.values()) if cgroups else set[Path]()
    return [folder.name for base in bases for folder in base.glob(f"safeconduct-{os.getpid()}-*")]


@pytest.fixture
def box(
    sandbox: NativeSandbox, launcher: Launcher, cgroups: Cgroups | None, workspace: Path
) -> Iterator[Box]:
    """A box that has no sandbox waiting for the next call, so that all that stands was left."""
    with closing(
        NativeSandbox(launcher, tier=sandbox.tier, cgroups=cgroups, ahead=0)
    ) as none_ahead:
        yield Box(none_ahead, workspace)


@pytest.fixture(autouse=True)
def nothing_left(
    box: Box, cgroups: Cgroups | None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Count before and after: memory of the supervisor, processes, cgroups, scratch folders."""
    scratches = Path(tempfile.mkdtemp())
    scratches.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(scratches))
    box.run("true")
    before = resident_bytes()
    yield
    assert resident_bytes() - before < FLAT_BYTES
    assert list(scratches.glob("*/*")) == []
    deadline = time.monotonic() + 10
    while standing(cgroups) or carrying(str(box.workspace)):
        assert time.monotonic() < deadline, (standing(cgroups), carrying(str(box.workspace)))
        time.sleep(0.01)
    box.sandbox.close()
    assert os.listdir(scratches) == []
    scratches.rmdir()


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


def escaped(outcome: Outcome) -> bool:
    return b"ESCAPED" in outcome.stdout


def attack(box: Box, code: str, **limits: int | None) -> Outcome:
    """Run a Python program whose command line names the workspace, to be found again by it."""
    wanted = replace(AMPLE, **limits)
    return box.run("python3", "-S", "-c", code, str(box.workspace), limits=wanted)


def reaches(box: Box, code: str) -> bool:
    """Tell whether the goal is reached without the limit; it need not be held then."""
    return b"ESCAPED" in attack(box, code.replace("time.sleep", "abs")).stdout


def needs(cgroups: Cgroups | None) -> None:
    if cgroups is None:
        pytest.skip("needs a machine that delegates cgroups")


# Goals are reached once and held for a second, so that what is polled has its chance.
HELD = "\nprint('ESCAPED', flush=True)\nimport time; time.sleep(1)"
FORKS = """
import os, signal
made = 0
while made < 200:
    try: pid = os.fork()
    except OSError: continue
    if pid == 0:
        signal.pause()
    made += 1
print("ESCAPED", flush=True)
"""
RSS = "held = bytearray(300 << 20)\nprint('ESCAPED')"
FILES = """
import os
os.chdir(os.environ["HOME"] if {home} else ".")
for number in range({count}):
    with open(f"f{{number}}", "wb") as file: file.write(b"x" * {size})
"""
PIPES = """
import fcntl, os
held = []
for _ in range(60):
    held.append(os.pipe())
    fcntl.fcntl(held[-1][1], 1031, 1 << 20)
    os.set_blocking(held[-1][1], False)
    os.write(held[-1][1], b"x" * (1 << 20))
print("ESCAPED")
"""


@dataclass(frozen=True)
class Bomb:
    """An attack, the limits that stop it and the name it is then reported with."""

    code: str
    limit: str
    limits: dict[str, int | None]


def filling(count: int, size: int, *, home: bool = False) -> str:
    return FILES.format(count=count, size=size, home=home) + HELD


UNNAMED = (
    """
import os
held = []
for _ in range(100):
    held.append(os.open("f", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    os.unlink("f")
    os.write(held[-1], b"x" * (2 << 20))
"""
    + HELD
)
DEEP = """
import os, time
for _ in range(700):
    os.mkdir("d")
    os.chdir("d")
print("ESCAPED", flush=True)
time.sleep(4)  # somebody who removes files meanwhile delays the look at it
"""
SPIN = """
import os, time
for _ in range(3): os.fork()
while time.process_time() < 0.4: pass
print("ESCAPED", flush=True)
"""
ZOMBIES = """
import os
made = 0
while made < 10_000:
    try: pid = os.fork()
    except OSError: continue
    if pid == 0: os._exit(0)
    made += 1
print("ESCAPED")
"""
IN_CGROUP = {
    "fork bomb": Bomb(FORKS, "pids", {"pids": 32}),
    "zombies": Bomb(ZOMBIES, "pids", {"pids": 64}),
    "memory": Bomb(RSS, "memory", {"memory_bytes": 128 << 20}),
    "memory of a child": Bomb(
        f"import subprocess, sys\nsys.stdout.write(subprocess.run(['python3', '-c', {RSS!r}], "
        "check=True, stdout=-1, text=True).stdout)",
        "memory", {"memory_bytes": 128 << 20},
    ),
    "pipe buffers": Bomb(PIPES, "memory", {"memory_bytes": 40 << 20}),
    "unnamed files": Bomb(UNNAMED, "disk", {"disk_bytes": 32 << 20}),
    "cpu of the tree": Bomb(SPIN, "cpu", {"cpu_ms": 1000}),
}  # fmt: skip
ANYWHERE = {
    "disk": Bomb(filling(200, 1 << 20), "disk", {"disk_bytes": 32 << 20}),
    "inodes": Bomb(filling(6000, 0), "inodes", {"inodes": 2000}),
    "depth": Bomb(DEEP, "depth", {"depth": 256}),
    "one file": Bomb("open('big', 'wb').truncate(9 << 20)\n" + HELD, "", {"file_bytes": 8 << 20}),
}


@pytest.mark.parametrize("name", IN_CGROUP)
def test_bombs_in_a_cgroup(box: Box, cgroups: Cgroups | None, name: str) -> None:
    needs(cgroups)
    bomb = IN_CGROUP[name]
    assert reaches(box, bomb.code), name
    remove_made(box)
    outcome = attack(box, bomb.code, **bomb.limits)
    assert outcome.limit == bomb.limit, (outcome.stderr[-500:], outcome.usage)
    assert outcome.usage.wall_ms < AMPLE.wall_ms


@pytest.mark.parametrize("name", ANYWHERE)
def test_bombs_in_a_direct_workspace(box: Box, name: str) -> None:
    bomb = ANYWHERE[name]
    assert reaches(box, bomb.code), name
    remove_made(box)
    outcome = attack(box, bomb.code, **bomb.limits)
    if bomb.limit:
        assert outcome.limit == bomb.limit, (outcome.stderr[-500:], outcome.usage)
    else:  # EFBIG: Python ignores SIGXFSZ, so the program fails by itself
        assert not escaped(outcome)
        assert b"File too large" in outcome.stderr


def test_what_was_nested_too_deep_can_be_removed(box: Box) -> None:
    kept = box.workspace / "there-before" / "inner"
    kept.mkdir(parents=True)
    outcome = attack(box, DEEP.replace("700", "5000"), depth=64)
    assert outcome.limit == "depth"
    deepest = max(str(path).count("/") for path in box.workspace.rglob("*"))
    assert deepest - str(box.workspace).count("/") <= 64 + 1
    assert kept.is_dir()
    shutil.rmtree(box.workspace / "d")  # calls itself for each level


def remove_made(box: Box) -> None:
    """Empty the workspace, at any depth."""
    subprocess.run(["find", str(box.workspace), "-mindepth", "1", "-delete"], check=True)


def test_the_name_of_one_files_limit(box: Box) -> None:
    program = ("dd", "if=/dev/zero", "of=big", "bs=1M", "count=9", "status=none")
    assert box.run(*program, limits=AMPLE).ok
    remove_made(box)
    assert box.run(*program, limits=replace(AMPLE, file_bytes=8 << 20)).limit == "file"
    remove_made(box)
    assert box.run(*program, limits=replace(AMPLE, disk_bytes=8 << 20)).limit == "disk"


def test_memory_as_files_in_the_scratch_folder(box: Box, cgroups: Cgroups | None) -> None:
    needs(cgroups)
    code = filling(300, 1 << 20, home=True)
    assert reaches(box, code)
    outcome = attack(box, code, memory_bytes=128 << 20)
    if box.tier is Tier.FULL:  # a tmpfs, whose pages nothing can be thrown out for
        assert outcome.limit == "memory"
    else:
        assert (outcome.usage.peak_memory_bytes or 0) <= 128 << 20


def test_memory_as_page_cache(box: Box, cgroups: Cgroups | None) -> None:
    needs(cgroups)
    code = filling(300, 1 << 20)
    before = attack(box, code)
    assert (before.usage.peak_memory_bytes or 0) > 250 << 20
    remove_made(box)
    outcome = attack(box, code, memory_bytes=64 << 20)
    # It is written out and thrown out: the program only becomes slower.
    assert outcome.ok
    assert (outcome.usage.peak_memory_bytes or 0) <= 64 << 20


def test_the_scratch_folder_holds_so_many_bytes(box: Box) -> None:
    code = filling(100, 1 << 20, home=True)
    assert reaches(box, code)
    outcome = attack(box, code, disk_bytes=32 << 20)
    assert outcome.limit == "disk", (outcome.stderr[-500:], outcome.usage)
    if box.tier is Tier.FULL:
        assert b"No space left" in outcome.stderr


def test_the_scratch_folder_holds_so_many_files(box: Box) -> None:
    code = filling(6000, 0, home=True)
    assert reaches(box, code)
    outcome = attack(box, code, inodes=2000)
    assert outcome.limit == "inodes", (outcome.stderr[-500:], outcome.usage)
    if box.tier is Tier.FULL:
        assert b"No space left" in outcome.stderr


def test_a_gibibyte_to_stdout(box: Box) -> None:
    code = "import os\nfor _ in range({}): os.write(1, b'x' * (1 << 20))"
    assert len(attack(box, code.format(8), output_bytes=8 << 20).stdout) == 8 << 20
    before = resident_bytes()
    outcome = attack(box, code.format(1024), output_bytes=1 << 20)
    assert (len(outcome.stdout), outcome.truncated, outcome.ok) == (1 << 20, True, True)
    assert resident_bytes() - before < FLAT_BYTES


DAEMON = """
import os, signal, sys
for sign in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT): signal.signal(sign, signal.SIG_IGN)
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
os.close(1)
signal.pause()
"""


def is_daemon(pid: int) -> bool:
    """Tell whether it has forked twice: it leads no session, and its session is not ours."""
    try:
        return os.getsid(pid) not in (pid, os.getsid(0))
    except ProcessLookupError:
        return False


def test_a_daemon_dies_with_the_call(box: Box) -> None:
    marker = str(box.workspace)
    subprocess.run([sys.executable, "-S", "-c", DAEMON, marker], check=True)
    deadline = time.monotonic() + 5
    while not (alive := [pid for pid in carrying(marker) if is_daemon(int(pid))]):
        assert time.monotonic() < deadline
    for pid in alive:
        os.kill(int(pid), 9)
    assert attack(box, DAEMON).ok
    assert not carrying(marker)


STOPPED = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
DEAF = "import signal\nfor n in (1, 2, 3, 15): signal.signal(n, 1)\nwhile True: signal.pause()"


@pytest.mark.parametrize("code", [STOPPED, DEAF], ids=["stopped", "deaf"])
def test_a_program_that_never_ends_by_itself(box: Box, cgroups: Cgroups | None, code: str) -> None:
    outcome = attack(box, code, wall_ms=1500)
    assert outcome.limit == "wall"
    needs(cgroups)
    outcome = attack(box, code, wall_ms=10_000, idle_ms=300)
    assert outcome.limit == "idle"
    assert outcome.usage.wall_ms < 5000


@pytest.mark.parametrize(
    "code",
    [
        "import time\nfor _ in range(9): print('on', flush=True); time.sleep(0.1)",
        "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass",
    ],
    ids=["printing", "computing"],
)
def test_a_program_that_works_is_not_idle(box: Box, cgroups: Cgroups | None, code: str) -> None:
    needs(cgroups)
    assert attack(box, code, idle_ms=500).ok


MANY = """
import os, signal
try:
    while True: os.fork() or signal.pause()
except OSError: pass
"""


def test_a_limit_that_was_met_and_survived_is_only_in_the_usage(
    box: Box, cgroups: Cgroups | None
) -> None:
    needs(cgroups)
    outcome = attack(box, MANY, pids=8)
    assert outcome.ok
    assert outcome.usage.refused_forks
    assert outcome.usage.peak_pids == 8
    code = f"import subprocess; print(subprocess.run(['python3', '-c', {RSS!r}]).returncode)"
    outcome = attack(box, code, memory_bytes=128 << 20)
    assert (outcome.ok, outcome.stdout, outcome.usage.oom_kills) == (True, b"-9\n", 1)


def test_what_others_write_ends_no_call(box: Box) -> None:
    code = "import sys; sys.stdin.read() or __import__('time').sleep(0.8); print('done')"
    beside = subprocess.Popen(
        ["dd", "if=/dev/zero", f"of={box.workspace}-beside", "bs=1M", "count=100", "status=none"]
    )
    try:
        assert attack(box, code, disk_bytes=16 << 20).ok
    finally:
        beside.wait()
        os.unlink(f"{box.workspace}-beside")
