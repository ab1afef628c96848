"""cgroups: version 1 for real where the machine has it.

Version 2 is only discovered here, on a made tree of plain files; the kernel's own behaviour under
version 2 needs a machine that has it.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from safeconduct.call import Limits
from safeconduct.errors import SandboxFailed
from safeconduct.runtime.sandbox import cgroup
from safeconduct.runtime.sandbox.cgroup import Cgroups


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


def test_version_2_settings_and_accounts(tmp_path: Path) -> None:
    folder = tmp_path / "call"
    folder.mkdir()
    (folder / "cpu.stat").write_text("usage_usec 12345\nuser_usec 1\n")
    (folder / "memory.peak").write_text("4096\n")
    (folder / "memory.events").write_text("low 0\noom_kill 2\n")
    (folder / "pids.events").write_text("max 7\n")
    one = cgroup.Cgroup(version=2, folders={"memory": folder, "pids": folder})
    charge = one.charge()
    assert (charge.cpu_ms, charge.peak_memory_bytes) == (12, 4096)
    assert (charge.oom_kills, charge.refused_forks) == (2, 7)
    assert one.procs == [str(folder / "cgroup.procs")]


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


def test_a_cgroup_is_made_limited_and_removed(real: Cgroups) -> None:
    one = real.make(Limits(memory_bytes=64 << 20, pids=10))
    pids = one.folders["pids"] / "pids.max"
    assert pids.read_text().strip() == "11"
    real.retire(one)
    assert not any(folder.exists() for folder in one.folders.values())


def test_a_refused_limit_leaves_no_cgroup(real: Cgroups) -> None:
    before = [sorted(base.glob("safeconduct-*")) for base in real.bases.values()]
    with pytest.raises(SandboxFailed):
        real.make(Limits(pids=-5))
    assert [sorted(base.glob("safeconduct-*")) for base in real.bases.values()] == before


def test_what_still_lives_in_a_retired_cgroup_is_ended(real: Cgroups) -> None:
    one = real.make(Limits())
    process = subprocess.Popen(["sleep", "60"])
    try:
        for procs in one.procs:
            Path(procs).write_text(str(process.pid))
        real.retire(one)
        assert process.wait(5) == -9
        deadline = time.monotonic() + 5
        while any(folder.exists() for folder in one.folders.values()):
            assert time.monotonic() < deadline
            real.sweep()
    finally:
        process.kill()
        process.wait()
