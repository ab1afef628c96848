"""Do calls get slower, or the supervisor and the launcher larger, over ten thousand of them?

The same warm call again and again: first one after the other, then sixteen at a time. posix_spawn
of the same program takes a turn before each of the first and of the last thousand, so that a
machine that got slower meanwhile is not taken for a drift of ours.

drift             median of the last thousand over median of the first thousand
drift_spawn       the same of posix_spawn, in the same rounds
drift_c16         median of the last thousand over median of the first thousand, 16 at a time
supervisor_kib    by how much this process grew, between those two thousands
native_kib        by how much launcher and templates grew
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .harness import Measured, Options, columns, spread
from .subject import bench, launchers, rest, spawn, tree

_CALLS, _EDGE, _AT_A_TIME = 10_000, 1_000, 16


def _timed(subject: Callable[[], object]) -> float:
    begun = time.perf_counter()
    subject()
    return time.perf_counter() - begun


def _edge(call: Callable[[], object], count: int) -> tuple[list[float], list[float]]:
    """Time calls in turn with posix_spawn."""
    calls: list[float] = []
    spawns: list[float] = []
    for _ in range(count):
        spawns.append(_timed(spawn))
        calls.append(_timed(call))
    return calls, spawns


def _together(call: Callable[[], object], count: int) -> list[float]:
    """Time calls of sixteen threads, in the order in which they ended."""
    ended: list[tuple[float, float]] = []

    def work(_: int) -> None:
        for _ in range(count // _AT_A_TIME):
            took = _timed(call)
            ended.append((time.perf_counter(), took))

    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        list(threads.map(work, range(_AT_A_TIME)))
    return [took for _, took in sorted(ended)]


def _resident_kib(pids: Sequence[int]) -> int:
    status = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def _native_kib() -> int:
    """Return what launchers and templates hold, at rest."""
    rest()
    trees = [tree(pid) for pid in launchers()]
    return _resident_kib([p.pid for top in trees for p in (top, *top.children)])


def _drift(first: Sequence[float], last: Sequence[float]) -> float:
    return round(statistics.median(last) / statistics.median(first), 3)


def measure(chosen: Options) -> Measured:
    """Measure one column."""
    calls, edge = chosen.rounds(_CALLS), chosen.rounds(_EDGE)
    with bench() as made:
        call = made.caller(made.sandbox())
        _edge(call, edge // 10)  # whatever is done once is done
        first, first_spawns = _edge(call, edge)
        supervisor, native = _resident_kib([os.getpid()]), _native_kib()
        for _ in range(calls - 2 * edge):
            call()
        last, last_spawns = _edge(call, edge)
        grown = _resident_kib([os.getpid()]) - supervisor, _native_kib() - native
        together = _together(call, calls)
        facts = made.facts
    return Measured(
        figures={
            "drift": _drift(first, last),
            "drift_spawn": _drift(first_spawns, last_spawns),
            "drift_c16": _drift(together[:edge], together[-edge:]),
            "supervisor_kib": grown[0],
            "native_kib": grown[1],
        },
        details={
            name: spread(times, scale=1e3)
            for name, times in (
                ("first_ms", first),
                ("last_ms", last),
                ("first_spawn_ms", first_spawns),
                ("last_spawn_ms", last_spawns),
                ("first_c16_ms", together[:edge]),
                ("last_c16_ms", together[-edge:]),
            )
        },
        facts={**facts, "calls": calls},
    )


if __name__ == "__main__":
    columns(__doc__, measure)
