"""Replay in policy mode: what another policy would have said, and what cannot be said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from safeconduct.attestation.replay import replay_policy
from safeconduct.call import Effect
from safeconduct.policies import Policy, parse_policy

from .kit import Bench, write_trace  # noqa: TID251 - the tests' own kit


def policy(allowed: str) -> Policy:
    text = f'version: 1\ntools:\n  fs.read: {{allow: {{path: ["{allowed}"]}}}}\n'
    return parse_policy(text.encode(), name="test.yaml", workspace=Path("/ws"))


@pytest.fixture
def trace(bench: Bench) -> Path:
    return write_trace(bench, calls=4, sessions=2)


def test_the_same_judgement_is_clean(trace: Path) -> None:
    report = replay_policy(trace, policy("$WS/**"))
    assert (report.calls, report.same, report.clean) == (4, 4, True)


def test_a_stricter_policy_lists_what_it_would_have_refused(trace: Path) -> None:
    report = replay_policy(trace, policy("$WS/docs/**"))
    assert (report.calls, report.same, len(report.changes)) == (4, 0, 4)
    change = report.changes[0]
    assert (change.tool, change.recorded, change.new) == ("fs.read", Effect.ALLOW, Effect.DENY)
    assert change.reason
    assert [one.index for one in report.changes] == sorted(one.index for one in report.changes)


def test_erased_and_false_openings_are_undecidable(trace: Path) -> None:
    first, second = sorted((trace / "openings").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes().replace(b"/ws/a", b"/ws/b"))
    report = replay_policy(trace, policy("$WS/**"))
    assert (report.same, report.changes) == (0, [])
    assert {one.code for one in report.undecidable} == {"opening.missing", "opening.false"}
    shutil.rmtree(trace / "openings")
    assert len(replay_policy(trace, policy("$WS/**")).undecidable) == 4
