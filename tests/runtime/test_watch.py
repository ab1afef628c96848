"""The watch: what it ends a call for, and what it does not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from safeconduct.call import Held, Limits, Tier
from safeconduct.runtime.sandbox import bounds
from safeconduct.runtime.sandbox.cgroup import Charge
from safeconduct.runtime.sandbox.channel import Exit
from safeconduct.runtime.sandbox.watch import Watch

SMALL = Limits(disk_bytes=1 << 20, inodes=100, depth=20)


def look(watch: Watch, *, after: float = 0.0, seconds: float = 5.0) -> str | None:
    """Look until a walk is over, as a call that goes on would be looked at."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = watch.check(time.monotonic() + after, output_seen=False)
        if found is not None or watch._walk is None:  # pyright: ignore[reportPrivateUsage]
            return found
    raise AssertionError("the walk did not end")


def fill(folder: Path, size: int) -> None:
    with (folder / f"filled-{size}").open("wb") as file:
        file.write(b"x" * size)
        os.fsync(file.fileno())  # blocks are counted when they are allocated


def test_growth_is_named(tmp_path: Path) -> None:
    watch = Watch(SMALL, [str(tmp_path)])
    fill(tmp_path, 8 << 20)
    assert look(watch, after=10) == "disk"


def test_inodes_and_depth_are_named(tmp_path: Path) -> None:
    watch = Watch(SMALL, [str(tmp_path)])
    for number in range(500):
        (tmp_path / str(number)).touch()
    assert look(watch, after=10) == "inodes"
    deep = tmp_path.joinpath(*["d"] * 30)
    watch = Watch(Limits(depth=20), [str(tmp_path)])
    deep.mkdir(parents=True)
    assert look(watch, after=10) == "depth"


def test_what_was_there_before_counts_for_nothing(tmp_path: Path) -> None:
    tmp_path.joinpath(*["d"] * 30).mkdir(parents=True)
    for number in range(200):
        (tmp_path / str(number)).touch()
    fill(tmp_path, 2 << 20)
    time.sleep(0.05)  # the clock of files ticks
    assert look(Watch(SMALL, [str(tmp_path)]), after=10) is None


def test_what_grows_elsewhere_counts_for_nothing(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    (mine / "link").symlink_to(other)
    (mine / "up").symlink_to("..")
    watch = Watch(SMALL, [str(mine)])
    fill(other, 8 << 20)
    for number in range(500):
        (other / str(number)).touch()
    assert look(watch, after=10) is None


def test_a_hard_link_counts_once(tmp_path: Path) -> None:
    watch = Watch(SMALL, [str(tmp_path)])
    fill(tmp_path, 900 << 10)
    for number in range(20):
        os.link(tmp_path / f"filled-{900 << 10}", tmp_path / str(number))
    fill(tmp_path.parent, 4 << 20)  # so that the file system says that there is something to find
    assert look(watch, after=10) is None
    (tmp_path.parent / f"filled-{4 << 20}").unlink()


def test_roots_may_vanish_be_files_or_lie_in_one_another(tmp_path: Path) -> None:
    inner, gone, single = tmp_path / "inner", tmp_path / "gone", tmp_path / "single"
    inner.mkdir()
    gone.mkdir()
    single.write_bytes(b"")
    watch = Watch(SMALL, [str(path) for path in (tmp_path, inner, gone, single)])
    gone.rmdir()
    assert look(watch, after=10) is None
    before = len(os.listdir("/proc/self/fd"))
    fill(inner, 8 << 20)
    assert look(watch, after=20) == "disk"
    assert Watch(SMALL, [str(gone)]).check(time.monotonic() + 10, output_seen=False) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_unfinished_walk_gives_its_descriptors_back(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / str(number)).touch()
    before = len(os.listdir("/proc/self/fd"))
    watch = Watch(Limits(), [str(tmp_path)])
    watch.check(time.monotonic() + 10, output_seen=False)
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_accounts_are_named() -> None:
    now = time.monotonic()
    charged = {"cpu": Charge(cpu_us=2_000_000), "pids": Charge(cpu_us=0, refused_forks=5000)}
    for name, charge in charged.items():
        watch = Watch(Limits(cpu_ms=2000), [], lambda charge=charge: charge)
        assert watch.check(now, output_seen=True) == name
    assert Watch(Limits(), [], Charge).check(now + 99, output_seen=False) is None


def test_idle_is_neither_printing_nor_computing() -> None:
    used = [0]
    watch = Watch(Limits(idle_ms=1000), [], lambda: Charge(cpu_us=used[0]))
    now = time.monotonic()
    assert watch.check(now + 0.9, output_seen=False) is None
    assert watch.check(now + 1.1, output_seen=True) is None
    assert watch.check(now + 2.0, output_seen=False) is None
    used[0] += 50_000
    assert watch.check(now + 2.3, output_seen=False) is None
    used[0] += 5_000  # waking up now and then is no work
    assert watch.check(now + 3.4, output_seen=False) == "idle"


def end(code: int | None = 0, sign: int | None = None, *, wall: bool = False) -> Exit:
    return Exit(code=code, signal=sign, wall_limit=wall, wall_us=1, cpu_us=1, peak_rss_kib=1)


@pytest.mark.parametrize(
    ("ended", "charge", "extra", "name"),
    [
        (end(), Charge(oom_kills=1, refused_forks=3), {"full": "disk"}, None),
        (end(1), Charge(oom_kills=1, refused_forks=3), {"full": "disk"}, "memory"),
        (end(1), Charge(refused_forks=3), {"full": "inodes"}, "inodes"),
        (end(1), Charge(refused_forks=3), {}, "pids"),
        (end(1), Charge(), {}, None),
        (end(None, 9), Charge(oom_kills=1), {}, "memory"),
        (end(None, 9), Charge(), {}, None),
        (end(None, 24), Charge(), {}, "cpu"),
        (end(None, 25), Charge(), {}, "disk"),
        (end(None, None, wall=True), Charge(oom_kills=1), {}, "wall"),
        (end(None, None), Charge(), {"polled": "idle"}, "idle"),
    ],
)
def test_the_limit_that_ended_a_call(
    ended: Exit, charge: Charge, extra: dict[str, str], name: str | None
) -> None:
    found = bounds.limit_of(
        ended, charge, Limits(), polled=extra.get("polled"), full=extra.get("full")
    )
    assert found == name


@pytest.mark.parametrize(
    ("code", "sign", "cpu_us", "name"),
    [
        (None, 9, 993_000, "cpu"),  # ticks of the clock are not quite what was used
        (None, 9, 100_000, None),  # somebody else's signal
        (137, None, 760_000, "cpu"),  # a shell of its command
        (1, None, 993_000, "cpu"),  # whoever waited for such a child
        (1, None, 500_000, None),
        (0, None, 993_000, None),
    ],
)
def test_processor_time_that_was_used_up_is_named(
    code: int | None, sign: int | None, cpu_us: int, name: str | None
) -> None:
    ended = Exit(code=code, signal=sign, wall_limit=False, wall_us=1, cpu_us=cpu_us, peak_rss_kib=1)
    assert bounds.limit_of(ended, Charge(), Limits(cpu_ms=1000)) == name


def test_a_shell_tells_of_a_file_that_was_too_large() -> None:
    assert bounds.limit_of(end(128 + 25), Charge(), Limits()) == "disk"
    assert bounds.limit_of(end(128 + 25), Charge(), Limits(file_bytes=1)) == "file"


def test_in_a_cgroup_the_exact_account_comes_first() -> None:
    def seconds(*, in_cgroup: bool) -> object:
        bounds_of = bounds.rlimits(Limits(cpu_ms=1500), Tier.FULL, in_cgroup=in_cgroup)
        return next(one["value"] for one in bounds_of if one["name"] == "cpu")

    assert (seconds(in_cgroup=False), seconds(in_cgroup=True)) == (2, 3)


def test_what_a_call_says_it_needs_only_lowers() -> None:
    limits = Limits(wall_ms=1000, cpu_ms=None, memory_bytes=1 << 20, pids=5)
    hint = {"wall": "500ms", "cpu": "700ms", "memory": "9999999B", "pids": "3"}
    narrowed = bounds.narrow(limits, hint)
    assert (narrowed.wall_ms, narrowed.cpu_ms) == (500, 700)
    assert (narrowed.memory_bytes, narrowed.pids) == (1 << 20, 3)
    assert bounds.narrow(limits, {}) == limits


def test_how_limits_hold_is_told() -> None:
    best = bounds.held(Limits(idle_ms=1), Tier.FULL, in_cgroup=True, direct=False)
    assert {best[name] for name in ("memory", "pids", "disk", "inodes", "wall")} == {Held.TREE}
    assert (best["cpu"], best["idle"]) == (Held.POLLED, Held.POLLED)
    direct = bounds.held(Limits(), Tier.FULL, in_cgroup=True, direct=True)
    assert (direct["disk"], direct["inodes"], direct["depth"]) == (Held.POLLED,) * 3
    server = bounds.held(Limits(idle_ms=1), Tier.FULL, in_cgroup=True, direct=True, watched=False)
    assert Held.POLLED not in server.values()
    assert (server["cpu"], server["disk"], server["idle"]) == (
        Held.PROCESS,
        Held.PROCESS,
        Held.NONE,
    )
    least = bounds.held(Limits(idle_ms=1), Tier.LANDLOCK, in_cgroup=False, direct=False)
    assert (least["memory"], least["pids"], least["cpu"]) == (Held.PROCESS,) * 3
    assert (least["disk"], least["idle"]) == (Held.POLLED, Held.NONE)
