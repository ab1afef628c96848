"""A clock that is wrong must not have retention destroy what is there."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import pytest

from safeconduct.attestation.privacy.elapsed import DAY_MS, MOST_UNUSED_DAYS, newest_ms, refuse_jump
from safeconduct.attestation.privacy.erasure import erase_closed_before, keep_retention
from safeconduct.attestation.writing.appending import Clock
from safeconduct.errors import TraceInvalid

from .kit import Bench, record_call  # noqa: TID251 - the tests' own kit
from .test_erase import open_writer, vault_of  # noqa: TID251 - the tests' own kit

RETAIN_DAYS = 90


def record(bench: Bench, now_ms: int) -> str:
    """Record a session at a time, and let its opening file be of then."""
    clock = Clock(wall_ns=partial(int, now_ms * 1_000_000))
    with open_writer(bench, vault_of(bench), clock=clock) as writer:
        session = writer.open_session("local", "sdk")
        record_call(writer, session, "c")
        writer.close_session(session)
    os.utime(bench.trace / "openings" / f"{session}.jsonl", (now_ms / 1000, now_ms / 1000))
    return session


def test_a_clock_that_jumped_erases_nothing_however_often(bench: Bench) -> None:
    now_ms = time.time_ns() // 1_000_000
    wrong_ms = now_ms + 173 * 365 * DAY_MS
    sessions = [record(bench, now_ms)]
    clock = Clock(wall_ns=partial(int, wrong_ms * 1_000_000))
    for _ in range(2):  # what the first run records with that clock must not help the second
        with open_writer(bench, vault_of(bench), clock=clock) as writer:
            with pytest.raises(TraceInvalid) as refused:
                keep_retention(writer, days=RETAIN_DAYS, now_ms=wrong_ms)
            assert refused.value.code == "retention.clock"
            assert all(writer.openings.holds(one) for one in sessions)
    # Right again, retention goes on; and who asks for it by name is not asked back.
    with open_writer(bench, vault_of(bench)) as writer:
        assert keep_retention(writer, days=RETAIN_DAYS, now_ms=now_ms) == []
        later_ms = now_ms + (RETAIN_DAYS + 1) * DAY_MS
        done = keep_retention(writer, days=RETAIN_DAYS, now_ms=later_ms)
        assert [one.session for one in done] == sessions


def test_who_asks_by_hand_is_not_refused(bench: Bench) -> None:
    now_ms = time.time_ns() // 1_000_000
    session = record(bench, now_ms)
    with open_writer(bench, vault_of(bench)) as writer:
        done = erase_closed_before(writer, now_ms + 173 * 365 * DAY_MS, by="operator")
        assert [one.session for one in done] == [session]


def test_other_traces_bear_out_that_time_went_by(bench: Bench) -> None:
    now_ms = time.time_ns() // 1_000_000
    long_ago_ms = now_ms - 1500 * DAY_MS
    session = record(bench, long_ago_ms)
    assert newest_ms(bench.trace) == long_ago_ms
    with open_writer(bench, vault_of(bench)) as writer:
        with pytest.raises(TraceInvalid, match="as if the clock were wrong"):
            keep_retention(writer, days=RETAIN_DAYS, now_ms=now_ms)
        between = [long_ago_ms + days * DAY_MS for days in range(0, 1500, 400)]
        done = keep_retention(writer, days=RETAIN_DAYS, now_ms=now_ms, seen_ms=lambda: between)
        assert [one.session for one in done] == [session]


def test_a_jump_is_told_from_a_pause_to_the_day(tmp_path: Path) -> None:
    most_ms = (RETAIN_DAYS + MOST_UNUSED_DAYS) * DAY_MS
    refuse_jump([], since_ms=0, now_ms=most_ms, days=RETAIN_DAYS)
    with pytest.raises(TraceInvalid, match="clock"):
        refuse_jump([5], since_ms=0, now_ms=most_ms + DAY_MS, days=RETAIN_DAYS)
    refuse_jump([most_ms, 9 * most_ms], since_ms=0, now_ms=2 * most_ms, days=RETAIN_DAYS)
    assert newest_ms(tmp_path) is None
