"""Step "record": what calls have used of their rates and budgets, reserved before they run.

What one call or one session may use is counted in memory. Rates and daily budgets hold across
runtimes: who starts a new one gets no new budget. They are counted in a SQLite file of the
user's state, which no sandbox sees. Whatever goes wrong with it refuses the call.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from safeconduct.call import Bound, Outcome, Per, Unit
from safeconduct.errors import Denied

_DAY_MS = 86_400_000
# LIMIT: slots that one sliding window is counted in. What is used lies in its slot until the
# whole slot has left the window, so a rate is never exceeded, and at most 1/60 too strict.
_SLOTS = 60
# LIMIT: what one call can have used (policies/bounds.py bounds what one may).
_MOST = (1 << 53) - 1
# LIMIT: how long to wait for another runtime that is counting.
_PATIENCE_SECONDS = 5.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS used (
  counter TEXT NOT NULL, slot INTEGER NOT NULL, until_ms INTEGER NOT NULL,
  amount INTEGER NOT NULL, PRIMARY KEY (counter, slot)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS clock (one INTEGER PRIMARY KEY CHECK (one = 1), now_ms INTEGER NOT NULL);
"""
_ADD = """
INSERT INTO used VALUES (?1, ?2, ?3, MAX(0, ?4))
ON CONFLICT (counter, slot) DO UPDATE SET amount = MAX(0, amount + ?4)
"""
_TICK = """
INSERT INTO clock VALUES (1, ?)
ON CONFLICT (one) DO UPDATE SET now_ms = MAX(now_ms, excluded.now_ms) RETURNING now_ms
"""


@dataclass(slots=True)
class Tab:
    """What one call has reserved. It is put right once, when what it used is known."""

    _ledger: Ledger | None = None
    _taken: dict[Bound, int] = field(default_factory=dict[Bound, int])
    _now_ms: int = 0

    def settle(self, outcome: Outcome, used: Mapping[Unit, int] | None = None) -> None:
        """Count what the call used; ``used`` is what its tool itself reported."""
        if not self._taken:
            return
        told = {unit: min(max(0, amount), _MOST) for unit, amount in (used or {}).items()}
        known = {Unit.BYTES: _moved(outcome), **told}
        self._correct({bound: known.get(bound.unit, bound.reserve) for bound in self._taken})

    def release(self) -> None:
        """Give everything back: nothing ran."""
        self._correct(dict.fromkeys(self._taken, 0))

    def _correct(self, used: Mapping[Bound, int]) -> None:
        taken, self._taken = self._taken, {}
        changes = [
            (bound, used[bound] - amount)
            for bound, amount in taken.items()
            if used[bound] != amount
        ]
        if self._ledger is not None and changes:
            self._ledger.correct(changes, self._now_ms)


class Ledger:
    """Counts for one session of one workspace. Safe to use from several threads."""

    def __init__(self, file: Path, *, scope: str, clock: Callable[[], float] = time.time) -> None:
        """Open nothing yet. ``scope`` is what daily budgets and rates are counted for."""
        self._file, self._scope, self._clock = file, scope, clock
        self._lock = threading.Lock()
        self._session: Counter[str] = Counter()
        self._kept: sqlite3.Connection | None = None
        self._kept_as: tuple[int, int] | None = None

    @contextmanager
    def reserved(self, bounds: Sequence[Bound]) -> Generator[Tab]:
        """Reserve what a call may use, all of it or nothing.

        Raises Denied ``limit.rate``, ``budget.exhausted`` or ``budget.unavailable`` before the
        call runs. A Denied that leaves the block gives everything back, because nothing ran;
        after any other error what was reserved counts as used.
        """
        tab = self._reserve(bounds) if bounds else Tab()
        try:
            yield tab
        except Denied:
            tab.release()
            raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._kept is not None:
                self._kept.close()
                self._kept = None

    def correct(self, changes: Sequence[tuple[Bound, int]], now_ms: int) -> None:
        """Add what was used beyond, or take off what was not used of, what had been reserved.

        Never raises: the call is over. Where the file cannot be written, what was reserved counts.
        """
        with self._lock:
            for bound, change in changes:
                if bound.per is Per.SESSION:
                    self._session[bound.id] += change
            kept = [(bound, change) for bound, change in changes if _is_kept(bound)]
            if not kept:
                return
            try:
                with self._transaction() as (file, _):
                    for bound, change in kept:
                        self._add(file, bound, change, now_ms)
            except Denied:
                return

    def _reserve(self, bounds: Sequence[Bound]) -> Tab:
        with self._lock:
            for bound in bounds:
                if bound.per is Per.CALL and bound.reserve > bound.most:
                    raise _exhausted(bound)
                if bound.per is Per.SESSION:
                    _refuse_beyond(bound, self._session[bound.id])
            kept = [bound for bound in bounds if _is_kept(bound)]
            now_ms = int(self._clock() * 1000)
            if kept:
                with self._transaction() as (file, now_ms):
                    for bound in kept:
                        _refuse_beyond(bound, self._used(file, bound, now_ms))
                        self._add(file, bound, bound.reserve, now_ms)
            for bound in bounds:
                if bound.per is Per.SESSION:
                    self._session[bound.id] += bound.reserve
        return Tab(self, {bound: bound.reserve for bound in bounds}, now_ms)

    @contextmanager
    def _transaction(self) -> Generator[tuple[sqlite3.Connection, int]]:
        """Be the only one who counts; yields the file and a time that never goes back."""
        try:
            file = self._open()
            file.execute("BEGIN IMMEDIATE")
            try:
                # Whoever sets the clock back gets no second day out of it.
                (now_ms,) = file.execute(_TICK, (int(self._clock() * 1000),)).fetchone()
                yield file, int(now_ms)
            except BaseException:
                file.execute("ROLLBACK")
                raise
            file.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise Denied(
                f"What earlier calls used cannot be read: {error}.",
                code="budget.unavailable",
                hint=f"see whether {self._file} can be written; removing it forgets all counts",
            ) from error

    def _open(self) -> sqlite3.Connection:
        # Whoever removed the file forgot the counts of all, and all go on with one new file.
        if self._kept is not None and self._kept_as != _identity(self._file):
            self._kept.close()
            self._kept = None
        if self._kept is None:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file.touch(mode=0o600)
            kept = sqlite3.connect(
                self._file, timeout=_PATIENCE_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                # A lost count after a power cut is worth less than a disk flush for each call.
                kept.execute("PRAGMA journal_mode = WAL")
                kept.execute("PRAGMA synchronous = OFF")
                kept.executescript(_SCHEMA)
            except BaseException:
                kept.close()
                raise
            self._kept, self._kept_as = kept, _identity(self._file)
        return self._kept

    def _used(self, file: sqlite3.Connection, bound: Bound, now_ms: int) -> int:
        counter = self._counter(bound)
        file.execute("DELETE FROM used WHERE counter = ? AND until_ms <= ?", (counter, now_ms))
        row = file.execute("SELECT SUM(amount) FROM used WHERE counter = ?", (counter,)).fetchone()
        return int(row[0] or 0)

    def _add(self, file: sqlite3.Connection, bound: Bound, amount: int, now_ms: int) -> None:
        slot, until_ms = _slot(bound, now_ms)
        file.execute(_ADD, (self._counter(bound), slot, until_ms, amount))

    def _counter(self, bound: Bound) -> str:
        return f"{self._scope}\n{bound.id}"


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _is_kept(bound: Bound) -> bool:
    return bound.per in (Per.DAY, Per.WINDOW)


def _slot(bound: Bound, now_ms: int) -> tuple[int, int]:
    """Return which slot a moment belongs to, and when that slot has left the window."""
    if bound.per is Per.DAY:
        day = now_ms // _DAY_MS
        return day, (day + 1) * _DAY_MS
    window_ms = bound.window_ms or 1
    width_ms = max(1, window_ms // _SLOTS)
    slot = now_ms // width_ms
    return slot, (slot + 1) * width_ms + window_ms


def _refuse_beyond(bound: Bound, used: int) -> None:
    if used + bound.reserve > bound.most:
        raise _exhausted(bound)


def _exhausted(bound: Bound) -> Denied:
    rate = bound.per is Per.WINDOW
    return Denied(
        f"The {'rate' if rate else 'budget'} of {bound.unit} is used up ({bound.id}).",
        code="limit.rate" if rate else "budget.exhausted",
        hint="wait, or raise it in the policy",
    )


def _moved(outcome: Outcome) -> int:
    """Count the bytes that a call brought back."""
    value = 0 if outcome.value is None else len(msgspec.json.encode(outcome.value))
    return len(outcome.stdout) + len(outcome.stderr) + value
