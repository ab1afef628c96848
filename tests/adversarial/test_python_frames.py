"""Attack the supervisor by what a zygote tells of a fork, as a module that it imports could."""

from __future__ import annotations

import json

import pytest

from safeconduct.errors import SandboxFailed
from safeconduct.runtime.sandbox.python_frames import fate

ENDED = {"type": "ended", "code": 0, "signal": None, "cpu_us": 1000, "peak_rss_kib": 4096}


def test_what_a_zygote_tells_is_taken() -> None:
    assert fate(json.dumps(ENDED).encode()) == fate(json.dumps({**ENDED, "code": 0}).encode())
    assert fate(b'{"type":"unable","step":"mount","errno":13}')


@pytest.mark.parametrize(
    "lie",
    [
        {"code": 256}, {"code": -1}, {"signal": 0}, {"signal": 65}, {"signal": -9},
        {"cpu_us": -1}, {"cpu_us": 1 << 53}, {"peak_rss_kib": 1 << 44}, {"peak_rss_kib": 1e300},
        {"cpu_us": True}, {"more": 1}, {"type": "unable", "errno": 1 << 40},
    ],
)  # fmt: skip
def test_no_number_comes_in_that_a_trace_cannot_hold(lie: dict[str, object]) -> None:
    """A call that ran, and whose outcome cannot be encoded, would have no end in the trace."""
    with pytest.raises(SandboxFailed):
        fate(json.dumps({**ENDED, **lie}).encode())


def test_depth_breaks_nothing() -> None:
    with pytest.raises(SandboxFailed):
        fate(b'{"type":"ended","x":' + b"[" * 60_000)
