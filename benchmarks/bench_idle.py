"""How much memory does a waiting sandbox hold, the kernel's included?

In each round many sandboxes of one template come to wait at once, and the system's memory is looked
at before and after (proc_meminfo(5)). Median of all rounds. Drift, what memory changes by in as
long a time in which nothing is made, stands beside it and is not taken off. Nobody's caches are
dropped. All that the whole system uses is counted: processes, page tables, slabs, namespaces,
mounts, cgroups, sockets; so what others do meanwhile is noise (--shield leaves them little time for
it). Each round has a launcher of its own: what is undone comes back late.

mb_per_idle_sandbox  by what is free, pages that each processor has set aside for itself included,
                     or caches files; every slab counts as used. In 10**6 bytes

MemAvailable is among the details: it takes half of the slabs for free and would flatter us.
"""

from __future__ import annotations

import mmap
import re
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from .harness import Measured, Options, columns, spread
from .subject import bench, rest

_SANDBOXES, _ROUNDS = 200, 11
_QUICK_SANDBOXES, _QUICK_ROUNDS = 100, 3
_BYTES_PER_KIB = 1024
# Freed slabs and cgroups of the round before come back to the kernel that late.
_STEADY_SECONDS, _STEADY_LOOKS, _STEADY_BYTES = 0.1, 4, 256 << 10
_STEADY_LOOKS_MAX = 15


def _memory() -> dict[str, int]:
    """Return how many bytes are free, in both ways to count, and how many are in slabs."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    known = {name: int(told.split()[0]) for name, told in (line.split(":") for line in lines)}
    # Shared memory counts as cache and is none: nothing can take it away.
    cache = known["Buffers"] + known["Cached"] + known["SwapCached"] - known["Shmem"]
    # Free pages on the lists of one processor are not in MemFree, and may be many.
    aside = sum(map(int, re.findall(r"^ +count: +(\d+)$", _zones(), flags=re.MULTILINE)))
    return {
        "free": (known["MemFree"] + cache) * _BYTES_PER_KIB + aside * mmap.PAGESIZE,
        "available": known["MemAvailable"] * _BYTES_PER_KIB,
        "slabs": known["Slab"] * _BYTES_PER_KIB,
    }


def _zones() -> str:
    return Path("/proc/zoneinfo").read_text()


def _steady() -> None:
    """Wait, not for ever, until slabs are no longer given back."""
    least, still = _memory()["slabs"], 0
    for _ in range(_STEADY_LOOKS_MAX):
        time.sleep(_STEADY_SECONDS)
        now = _memory()["slabs"]
        still = still + 1 if now > least - _STEADY_BYTES else 0
        least = min(least, now)
        if still >= _STEADY_LOOKS:
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """Bytes per waiting sandbox, and what the same time without any would have given."""

    used: dict[str, float]
    drift: dict[str, float]
    facts: dict[str, object]


def _round(count: int) -> _Round:
    with bench() as made:
        made.caller(made.sandbox())()
        rest()
        _steady()
        before, begun = _memory(), time.monotonic()
        made.caller(made.sandbox(ahead=count))()
        waiting = rest(count)
        after, taken = _memory(), time.monotonic() - begun
        time.sleep(taken)
        later = _memory()
        return _Round(
            used={name: (before[name] - after[name]) / waiting for name in before},
            drift={name: (after[name] - later[name]) / waiting for name in before},
            facts=made.facts,
        )


def measure(chosen: Options) -> Measured:
    """Measure one column."""
    count, rounds = (_QUICK_SANDBOXES, _QUICK_ROUNDS) if chosen.quick else (_SANDBOXES, _ROUNDS)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    facts = _round(count).facts  # what only the first one leaves in caches is not its own
    found = [_round(count) for _ in range(rounds)]
    details: dict[str, object] = {"sandboxes": count}
    for name in ("free", "available"):
        details[f"{name}_mb"] = spread([one.used[name] for one in found], scale=1e-6)
        details[f"{name}_drift_mb"] = spread([one.drift[name] for one in found], scale=1e-6)
    used = statistics.median(one.used["free"] for one in found)
    figures = {"mb_per_idle_sandbox": round(used / 1e6, 3)}
    return Measured(figures=figures, details=details, facts=facts)


if __name__ == "__main__":
    columns(__doc__, measure)
