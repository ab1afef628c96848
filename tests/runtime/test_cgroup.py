"""cgroups: version 1 for real where the machine has it.

Version 2 is only discovered here, on a made tree of plain files; the kernel's own behaviour under
version 2 needs a machine that has it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from safeconduct.call import Limits
from safeconduct.errors import SandboxFailed
from safeconduct.runtime.sandbox import cgroup
from safeconduct.runtime.sandbox.accounts import Accounts, Charge
from safeconduct.runtime.sandbox.cgroup import Cgroup, Cgroups


def made_v2(root: Path, own: str, handed_down: dict[str, str]) -> tuple[Path, Path]:
    """Make what /proc/self and /sys/fs/cgroup look like under version 2."""
    proc, base = root / "proc", root / "cgroup"
    proc.mkdir()
    (proc / "cgroup").write_text(f"0::{own}\n")
    for folder in (base / own.lstrip("/"), *(base / own.lstrip("/")).parents):
        if not folder.is_relative_to(base):
            break
        folder.mkdir(parents=True, exist_ok=True)
        name = "/" + str(folder.relative_to(base)).lstrip(".")
        (folder / "cgroup.subtree_control").write_text(handed_down.get(name, ""))
        (folder / "cgroup.procs").write_text("")
    return proc, base


def test_version_2_takes_the_nearest_folder_that_hands_both_down(tmp_path: Path) -> None:
    handed = {"/": "cpu memory pids", "/user": "memory pids", "/user/app": "memory"}
    proc, base = made_v2(tmp_path, "/user/app/run", handed)
    found = cgroup.discover(proc, base)
    assert found is not None
    assert (found.version, found.bases["memory"]) == (2, base / "user")


def test_version_2_without_controllers_is_none(tmp_path: Path) -> None:
    proc, base = made_v2(tmp_path, "/user/app", {"/": "cpu io"})
    assert cgroup.discover(proc, base) is None
    assert cgroup.discover(tmp_path / "missing", base) is None


ACCOUNTS_V2 = {
    "cpu.stat": "usage_usec 12345\nuser_usec 1\nnr_throttled 3\nthrottled_usec 7000\n",
    "memory.peak": "4096\n",
    "memory.events": "low 0\noom 1\noom_kill 2\n",
    "pids.events": "max 7\n",
    "pids.peak": "5\n",
    "io.stat": "8:0 rbytes=4096 wbytes=100 rios=1 wios=1\n8:16 rbytes=1 wbytes=2\n\n",
}
CHARGED = Charge(
    cpu_us=12345, throttled_us=7000, peak_memory_bytes=4096, oom_kills=2, peak_pids=4,
    refused_forks=7, read_bytes=4097, written_bytes=102,
)  # fmt: skip


def opened(version: int, folder: Path, *controllers: str) -> Accounts:
    """Open the accounts of a folder that stands for every controller."""
    accounts, handle = Accounts(), os.open(folder, os.O_RDONLY)
    accounts.open(version, dict.fromkeys(controllers, handle), set())
    os.close(handle)
    return accounts


def test_version_2_accounts(tmp_path: Path) -> None:
    for name, text in ACCOUNTS_V2.items():
        (tmp_path / name).write_text(text)
    accounts = opened(2, tmp_path, "memory", "pids")
    assert accounts.read() == CHARGED
    accounts.close()
    assert accounts.read() == Charge()


def test_version_1_accounts_where_every_controller_is_joined(tmp_path: Path) -> None:
    for name, text in {
        "cpuacct.usage": "12345999\n",
        "cpu.stat": "nr_periods 1\nthrottled_time 7000999\n",
        "memory.max_usage_in_bytes": "4096\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        "pids.events": "max 7\n",
        "pids.peak": "5\n",
        "blkio.throttle.io_service_bytes": "8:0 Read 4097\n8:0 Write 102\nTotal 4199\n",
    }.items():
        (tmp_path / name).write_text(text)
    accounts = opened(1, tmp_path, "memory", "pids", "cpuacct", "cpu", "blkio")
    assert accounts.read() == CHARGED
    accounts.close()


@pytest.mark.parametrize("text", ["", "garbage\n", "max x\n"])
def test_an_account_that_cannot_be_read_is_not_kept(tmp_path: Path, text: str) -> None:
    for name in ACCOUNTS_V2:
        (tmp_path / name).write_text(text)
    accounts = opened(2, tmp_path, "memory", "pids")
    assert accounts.read().refused_forks is None
    assert accounts.read().peak_memory_bytes is None
    accounts.close()


def test_a_cgroup_that_is_being_removed_has_no_accounts(cgroups: Cgroups | None) -> None:
    if cgroups is None:
        pytest.skip("no cgroups here")
    folder = cgroups.bases["memory"] / f"safeconduct-{os.getpid()}-race-1"
    done = threading.Event()

    def make_and_remove() -> None:
        while not done.is_set():
            with suppress(FileExistsError):
                folder.mkdir()
            folder.rmdir()

    def look() -> int:
        gone = 0
        for _ in range(20_000):
            accounts = Accounts()
            try:
                handle = os.open(folder, os.O_PATH)
            except FileNotFoundError:
                continue
            try:  # ENOENT and ENODEV, the kernel says both at such a moment
                accounts.open(cgroups.version, {"memory": handle}, set())
                gone += accounts.read().peak_memory_bytes is None
            finally:
                accounts.close()
                os.close(handle)
        return gone

    with ThreadPoolExecutor(1) as threads:
        remover = threads.submit(make_and_remove)
        try:
            assert look() > 0
        finally:
            done.set()
            remover.result()


def test_what_was_abandoned_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    old, new = tmp_path / f"safeconduct-{dead}-aa-1", tmp_path / f"safeconduct-{dead}-aa-2"
    mine, other = tmp_path / f"safeconduct-{os.getpid()}-aa-1", tmp_path / "somebody"
    for folder in (old, new, mine, other):
        folder.mkdir()
        if folder is not new:
            os.utime(folder, (0, 0))
    cgroup.remove_abandoned({"memory": tmp_path, "pids": tmp_path})
    assert sorted(tmp_path.iterdir()) == sorted([new, mine, other])


@pytest.fixture
def real(cgroups: Cgroups | None) -> Cgroups:
    if cgroups is None:
        pytest.skip("needs a machine that delegates cgroups")
    return cgroups


def standing(one: Cgroup) -> bool:
    return any(folder.exists() for folder in one.folders.values())


def gone(one: Cgroup) -> bool:
    """Wait, within a bound, until the sweeper has removed it."""
    deadline = time.monotonic() + 5
    while standing(one):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def inside(one: Cgroup, *argv: str) -> subprocess.Popen[bytes]:
    """Start a program in the cgroup: the shell joins, then becomes it."""
    join = "; ".join(f"echo 0 > {file}" for file in one.joins)
    return subprocess.Popen(["sh", "-c", f'{join}; exec "$@"', "sh", *argv], stderr=-3)


def test_a_cgroup_is_made_limited_and_removed(real: Cgroups) -> None:
    one = real.make(Limits(memory_bytes=64 << 20, pids=10))
    pids = one.folders["pids"] / "pids.max"
    assert pids.read_text().strip() == "11"
    real.narrow(one, Limits(memory_bytes=32 << 20, pids=5))
    assert pids.read_text().strip() == "6"
    real.retire(one)
    assert gone(one)


def test_a_refused_limit_leaves_no_cgroup(real: Cgroups) -> None:
    before = [sorted(base.glob("safeconduct-*")) for base in real.bases.values()]
    with pytest.raises(SandboxFailed):
        real.make(Limits(pids=-5))
    deadline = time.monotonic() + 5
    while [sorted(base.glob("safeconduct-*")) for base in real.bases.values()] != before:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_still_lives_in_a_retired_cgroup_is_ended(real: Cgroups) -> None:
    one = real.make(Limits())
    process = inside(one, "sleep", "60")
    try:
        deadline = time.monotonic() + 5
        while process.pid not in one.members():
            assert time.monotonic() < deadline
        real.retire(one)
        assert process.wait(5) == -9
        assert gone(one)
    finally:
        process.kill()
        process.wait()


def test_accounts_are_read_while_it_runs_and_after(real: Cgroups) -> None:
    one = real.make(Limits(memory_bytes=64 << 20, pids=8))
    work = "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done"
    code = f"{work}; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 0.1 & done; wait"
    process = inside(one, "sh", "-c", code)
    process.communicate()
    charge = one.charge()
    assert charge.cpu_us
    assert charge.cpu_us > 1000
    assert charge.refused_forks
    assert charge.peak_pids == 8
    assert charge.oom_kills == 0
    assert charge.peak_memory_bytes
    real.retire(one)
    assert gone(one)


def test_a_child_that_is_ended_for_memory_is_counted(real: Cgroups) -> None:
    one = real.make(Limits(memory_bytes=64 << 20))
    process = inside(one, "sh", "-c", "python3 -c 'bytearray(200 << 20)'; exit 3")
    process.communicate()
    assert process.returncode == 3
    assert one.charge().oom_kills == 1
    real.retire(one)


def test_many_are_made_from_threads_and_none_is_left(real: Cgroups) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def use(_: int) -> Cgroup:
        one = real.make(Limits())
        assert one.charge().refused_forks == 0
        real.retire(one)
        return one

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(use, range(200)))
    assert all(gone(one) for one in made)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_retiring_does_not_wait_for_the_kernel(real: Cgroups) -> None:
    one = real.make(Limits())
    process = inside(one, "sleep", "60")
    real.retire(one)
    assert standing(one) or process.poll() is None
    assert gone(one)
    process.wait()


def test_what_has_joined_only_a_part_of_it_is_ended_too(real: Cgroups) -> None:
    one = real.make(Limits())
    for file in one.joins:
        join = f"echo 0 > {file}; echo in; exec sleep 60"
        with subprocess.Popen(["sh", "-c", join], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"in\n"
            one.kill()
            assert process.wait(5) == -signal.SIGKILL
    real.retire(one)
    assert gone(one)


def test_close_removes_what_was_never_retired() -> None:
    found = cgroup.discover()
    if found is None:
        pytest.skip("needs a machine that delegates cgroups")
    made = [found.make(Limits()) for _ in range(3)]
    child = os.fork()
    if child == 0:
        found.close()  # a copy in a fork must leave the parent's alone
        os._exit(0)
    os.waitpid(child, 0)
    assert all(standing(one) for one in made)
    found.close()
    assert not any(standing(one) for one in made)
