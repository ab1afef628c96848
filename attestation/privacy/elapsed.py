"""Step "record": whether so much time has passed as the clock says, before anything is destroyed.

One wrong clock must not erase every session there is. What was recorded in between bears it out.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from safeconduct.attestation.entry import parse_entry
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.reader import read_checkpoint
from safeconduct.attestation.tiles import TILE_WIDTH, bundle_path, read_bundle, split_bundle
from safeconduct.errors import TraceInvalid

DAY_MS: Final = 86_400_000
# LIMIT: for how many days more than it keeps things a machine may stand still before a person is
# asked whether its clock is right. Each run looks after all traces: where there is one at least
# once a year, nobody is ever asked. A clock that failed is mostly off by decades.
MOST_UNUSED_DAYS = 366


def newest_ms(directory: Path) -> int | None:
    """Return the time of a trace's last signed entry, None where it cannot be read."""
    try:
        with Folder(directory) as folder:
            _, head = read_checkpoint(folder)
            number = (head.size - 1) // TILE_WIDTH
            width = head.size - number * TILE_WIDTH
            bundle = read_bundle(folder, number, width)
            *_, (_, data) = split_bundle(bundle, width=width, path=bundle_path(number, width))
        return parse_entry(data).time
    except (TraceInvalid, OSError, ValueError):
        return None


def refuse_jump(seen_ms: Iterable[int], *, since_ms: int, now_ms: int, days: int) -> None:
    """Raise TraceInvalid ``retention.clock`` unless times lead from one to another without a jump.

    A jump is a gap of more than ``days``, for which things are kept, and MOST_UNUSED_DAYS.
    """
    most_ms, reached_ms = (days + MOST_UNUSED_DAYS) * DAY_MS, since_ms
    for time_ms in sorted({time for time in seen_ms if time < now_ms} | {now_ms}):
        if time_ms - reached_ms > most_ms:
            gap_days = (time_ms - reached_ms) // DAY_MS
            raise TraceInvalid(
                f"nothing was recorded for {gap_days} days, as if the clock were wrong",
                code="retention.clock",
                hint=f"if it is right: safeconduct trace erase --older-than {days}d",
            )
        reached_ms = max(reached_ms, time_ms)
