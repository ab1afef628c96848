"""Rates and budgets: reserved before a call runs, put right after it, never exceeded by anybody."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeconduct.call import Bound, Outcome, Per, Unit
from safeconduct.errors import Denied, ToolFailed
from safeconduct.runtime.ledger import Ledger, Tab

HOUR_MS = 3_600_000


class Clock:
    """A clock that tests set. Seconds."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def bound(most: int, per: Per, *, reserve: int = 1, unit: Unit = Unit.CALLS) -> Bound:
    window_ms = HOUR_MS if per is Per.WINDOW else None
    return Bound(
        id=f"rule:{unit}:{per}", unit=unit, most=most, per=per, reserve=reserve, window_ms=window_ms
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path / "state" / "budgets.db", scope="/ws", clock=clock)) as made:
        yield made


def run(ledger: Ledger, *bounds: Bound, output: bytes = b"") -> None:
    with ledger.reserved(bounds) as tab:
        tab.settle(Outcome(call="c", stdout=output))


@pytest.mark.parametrize("per", [Per.SESSION, Per.DAY, Per.WINDOW])
def test_what_is_used_up_is_refused_before_the_call(ledger: Ledger, per: Per) -> None:
    for _ in range(3):
        run(ledger, bound(3, per))
    with pytest.raises(Denied) as refused, ledger.reserved([bound(3, per)]):
        pytest.fail("it ran")
    assert refused.value.code == ("limit.rate" if per is Per.WINDOW else "budget.exhausted")


@pytest.mark.parametrize("per", [Per.SESSION, Per.DAY, Per.WINDOW])
def test_all_or_nothing(ledger: Ledger, per: Per) -> None:
    full = Bound(id="full", unit=Unit.CALLS, most=0, per=per, reserve=1, window_ms=HOUR_MS)
    for _ in range(3):
        with pytest.raises(Denied), ledger.reserved([bound(1, per), full]):
            pytest.fail("it ran")
    run(ledger, bound(1, per))


def test_a_call_that_is_denied_uses_nothing(ledger: Ledger) -> None:
    for per in (Per.SESSION, Per.DAY, Per.WINDOW):
        with pytest.raises(Denied, match="no"), ledger.reserved([bound(1, per)]):
            raise Denied("no")
        run(ledger, bound(1, per))


def test_a_call_that_broke_has_used_what_it_reserved(ledger: Ledger) -> None:
    for per in (Per.SESSION, Per.DAY, Per.WINDOW):
        with pytest.raises(ToolFailed), ledger.reserved([bound(1, per)]):
            raise ToolFailed("broke")
        with pytest.raises(Denied), ledger.reserved([bound(1, per)]):
            pytest.fail("it ran")


def test_bytes_are_put_right_afterwards(ledger: Ledger) -> None:
    budget = bound(100, Per.SESSION, reserve=60, unit=Unit.BYTES)
    run(ledger, budget, output=b"x" * 10)
    run(ledger, budget, output=b"x" * 30)
    run(ledger, budget, output=b"x" * 10)
    with pytest.raises(Denied), ledger.reserved([budget]):
        pytest.fail("50 are left, and 60 may be used")


def test_what_a_tool_reports_counts(ledger: Ledger) -> None:
    budget = bound(10, Per.DAY, reserve=4, unit=Unit.TOKENS)
    with ledger.reserved([budget]) as tab:
        tab.settle(Outcome(call="c"), {Unit.TOKENS: 9})
    with pytest.raises(Denied), ledger.reserved([budget]):
        pytest.fail("it ran")


def test_one_call_may_not_reserve_more_than_its_bound(ledger: Ledger) -> None:
    with pytest.raises(Denied), ledger.reserved([bound(3, Per.CALL, reserve=4, unit=Unit.MONEY)]):
        pytest.fail("it ran")


def test_a_new_runtime_gets_no_new_day_or_rate(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "budgets.db"
    for _ in range(2):
        with closing(Ledger(file, scope="/ws", clock=clock)) as ledger:
            run(ledger, bound(2, Per.DAY), bound(2, Per.WINDOW), bound(1, Per.SESSION))
    with closing(Ledger(file, scope="/ws", clock=clock)) as ledger:
        for per in (Per.DAY, Per.WINDOW):
            with pytest.raises(Denied), ledger.reserved([bound(2, per)]):
                pytest.fail("it ran")
    with closing(Ledger(file, scope="/other", clock=clock)) as other:
        run(other, bound(2, Per.DAY), bound(2, Per.WINDOW))


def test_time_gives_back(ledger: Ledger, clock: Clock) -> None:
    run(ledger, bound(1, Per.WINDOW), bound(1, Per.DAY))
    clock.now += 3600 + 60
    run(ledger, bound(1, Per.WINDOW))
    with pytest.raises(Denied), ledger.reserved([bound(1, Per.DAY)]):
        pytest.fail("it ran")
    clock.now += 86_400
    run(ledger, bound(1, Per.DAY))


def test_a_clock_set_back_gives_nothing(ledger: Ledger, clock: Clock) -> None:
    run(ledger, bound(1, Per.DAY), bound(1, Per.WINDOW))
    clock.now -= 3 * 86_400
    for per in (Per.DAY, Per.WINDOW):
        with pytest.raises(Denied), ledger.reserved([bound(1, per)]):
            pytest.fail("it ran")


@settings(max_examples=60, deadline=None, database=None)
@given(
    steps=st.lists(st.integers(0, HOUR_MS // 3), min_size=1, max_size=40), most=st.integers(1, 5)
)
def test_no_window_ever_holds_more(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], most: int
) -> None:
    clock = Clock()
    ran: list[float] = []
    file = tmp_path_factory.mktemp("rate") / "budgets.db"
    with closing(Ledger(file, scope="/ws", clock=clock)) as ledger:
        for step in steps:
            clock.now += step / 1000
            try:
                run(ledger, bound(most, Per.WINDOW))
            except Denied:
                # It refuses only where the window, with its slots, is full.
                recent = [at for at in ran if clock.now - at <= 3600 * (1 + 1 / 60)]
                assert len(recent) >= most
                continue
            ran.append(clock.now)
            assert len([at for at in ran if clock.now - at < 3600]) <= most


def test_threads_and_processes_share_one_count(tmp_path: Path) -> None:
    file = tmp_path / "budgets.db"
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        counted = pool.starmap(_many, [(file, 40), (file, 40)])
    assert sum(counted) == 50


def _many(file: Path, calls: int) -> int:
    done: list[int] = []
    with closing(Ledger(file, scope="/ws")) as ledger:

        def work() -> None:
            for _ in range(calls // 4):
                try:
                    run(ledger, bound(50, Per.DAY))
                except Denied:
                    continue
                done.append(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return len(done)


def test_a_broken_file_refuses_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "budgets.db"
    file.write_bytes(b"not a database, and longer than a header of one would be" * 10)
    with closing(Ledger(file, scope="/ws")) as ledger:
        with pytest.raises(Denied) as refused, ledger.reserved([bound(1, Per.DAY)]):
            pytest.fail("it ran")
        assert refused.value.code == "budget.unavailable"
        assert str(file) in refused.value.hint
        run(ledger, bound(1, Per.SESSION))


def test_another_that_counts_for_ever_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeconduct.runtime.ledger._PATIENCE_SECONDS", 0.05)
    file = tmp_path / "budgets.db"
    with closing(Ledger(file, scope="/ws")) as ledger:
        run(ledger, bound(9, Per.DAY))
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with closing(Ledger(file, scope="/ws")) as late:
                with pytest.raises(Denied) as refused, late.reserved([bound(9, Per.DAY)]):
                    pytest.fail("it ran")
                assert refused.value.code == "budget.unavailable"
            other.execute("ROLLBACK")
        run(ledger, bound(9, Per.DAY))


def test_the_file_is_the_users_alone_and_small(
    ledger: Ledger, tmp_path: Path, clock: Clock
) -> None:
    file = tmp_path / "state" / "budgets.db"
    for _ in range(500):
        clock.now += 30
        run(ledger, bound(10_000, Per.WINDOW))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with closing(sqlite3.connect(file)) as kept:
        (rows,) = kept.execute("SELECT COUNT(*) FROM used").fetchone()
    assert rows <= 62


def test_without_bounds_there_is_no_file(ledger: Ledger, tmp_path: Path) -> None:
    run(ledger)
    run(ledger, bound(1, Per.SESSION))
    Tab().settle(Outcome(call="c"))
    assert not (tmp_path / "state").exists()


def test_whoever_removes_the_file_starts_one_count_for_all(tmp_path: Path) -> None:
    file = tmp_path / "budgets.db"
    with (
        closing(Ledger(file, scope="/ws")) as first,
        closing(Ledger(file, scope="/ws")) as second,
    ):
        run(first, bound(4, Per.DAY))
        file.unlink()
        ran = 0
        for ledger in (first, second) * 4:
            try:
                run(ledger, bound(4, Per.DAY))
            except Denied:
                continue
            ran += 1
        assert ran <= 4
        file.rename(tmp_path / "moved")
        file.mkdir()
        with pytest.raises(Denied) as refused, first.reserved([bound(4, Per.DAY)]):
            pytest.fail("it ran")
        assert refused.value.code == "budget.unavailable"


@pytest.mark.parametrize("told", [10**30, -(10**30)])
def test_no_report_of_a_tool_breaks_the_count_or_takes_off_of_it(ledger: Ledger, told: int) -> None:
    for per in (Per.DAY, Per.SESSION):
        budget = bound(3, per, unit=Unit.MONEY)
        run(ledger, budget)
        run(ledger, budget)
        with ledger.reserved([budget]) as tab:
            tab.settle(Outcome(call="c"), {Unit.MONEY: told})
        if told < 0:
            run(ledger, budget)
        with pytest.raises(Denied), ledger.reserved([budget]):
            pytest.fail("it ran")


def test_what_is_given_back_to_a_new_file_adds_nothing(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "budgets.db"
    budget = bound(100, Per.DAY, reserve=60, unit=Unit.BYTES)
    with closing(Ledger(file, scope="/ws", clock=clock)) as ledger:
        with ledger.reserved([budget]) as tab:
            ledger.close()
            for left in tmp_path.glob("budgets.db*"):
                left.unlink()
            tab.release()
        with ledger.reserved([budget]), pytest.raises(Denied), ledger.reserved([budget]):
            pytest.fail("it ran")


def test_a_full_disk_refuses_until_there_is_room(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], check=True)
    try:
        with closing(Ledger(disk / "budgets.db", scope="/ws")) as ledger:
            run(ledger, bound(5, Per.DAY))
            with suppress(OSError), open(disk / "fill", "wb", buffering=0) as fill:
                while fill.write(bytes(4096)) == 4096:
                    pass
            for _ in range(20):
                with pytest.raises(Denied) as refused, ledger.reserved([bound(5, Per.DAY)]):
                    pytest.fail("it ran")
                assert refused.value.code == "budget.unavailable"
            (disk / "fill").unlink()
            for _ in range(4):
                run(ledger, bound(5, Per.DAY))
            with pytest.raises(Denied), ledger.reserved([bound(5, Per.DAY)]):
                pytest.fail("it ran")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_who_is_killed_has_used_what_it_reserved(tmp_path: Path) -> None:
    file = tmp_path / "budgets.db"
    process = multiprocessing.get_context("spawn").Process(target=_die, args=(file,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with closing(Ledger(file, scope="/ws")) as ledger:
        run(ledger, bound(2, Per.DAY))
        with pytest.raises(Denied), ledger.reserved([bound(2, Per.DAY)]):
            pytest.fail("it ran")


def _die(file: Path) -> None:
    with Ledger(file, scope="/ws").reserved([bound(2, Per.DAY)]):
        os.kill(os.getpid(), signal.SIGKILL)
