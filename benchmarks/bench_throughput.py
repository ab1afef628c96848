"""How many confined programs can be started per second for long, next to posix_spawn?

1 or 16 threads start /usr/bin/true again and again, ours through ``NativeSandbox.run`` with the
pools as they are by default; output, exit status and usage are captured on both sides. Slices of
both take turns. A slice of ours lasts until everything that it left is destroyed and made anew, so
that no work is put off into the next slice.

none_c1, none_c16        starts per second over those of posix_spawn at the same concurrency, with
                         network none (one empty namespace shared by all)
own_net_c1, own_net_c16  the same with a network namespace for every start, never used again
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from safeconduct.call import Tier
from safeconduct.runtime.sandbox.native import NativeSandbox

from .harness import Measured, Options, columns, spread
from .subject import OwnNetwork, bench, rest, spawn

_STARTS, _QUICK_STARTS = 5_000, 320
_SLICE, _QUICK_SLICE = 500, 80
_CONCURRENCIES = (1, 16)


@dataclass(slots=True)
class Sustained:
    """Starts of one subject: how long each took, and the rate of each slice."""

    times: list[float] = field(default_factory=list[float])
    rates: list[float] = field(default_factory=list[float])

    def slice(
        self, subject: Callable[[], object], starts: int, threads: int, *, drained: bool
    ) -> None:
        """Start that many, ``threads`` at a time."""
        left = threading.Semaphore(starts)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while left.acquire(blocking=False):
                    begun = time.perf_counter()
                    subject()
                    self.times.append(time.perf_counter() - begun)
            except BaseException as error:
                failures.append(error)
                raise

        workers = [threading.Thread(target=work) for _ in range(threads)]
        rest(networks=True)
        begun = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if drained:
            rest(networks=True)
        self.rates.append(starts / (time.perf_counter() - begun))
        if failures:
            raise SystemExit("a start failed") from failures[0]


def measure(chosen: Options) -> Measured:
    """Measure one column."""
    starts, each = (_QUICK_STARTS, _QUICK_SLICE) if chosen.quick else (_STARTS, _SLICE)
    figures: dict[str, object] = {}
    details: dict[str, object] = {}
    with bench() as made:
        kinds: dict[str, type[NativeSandbox]] = {"none": NativeSandbox}
        if made.tier is Tier.FULL:
            kinds["own_net"] = OwnNetwork
        callers = {name: made.caller(made.sandbox(kind)) for name, kind in kinds.items()}
        subjects: dict[str, Callable[[], object]] = {"posix_spawn": spawn, **callers}
        for threads in _CONCURRENCIES:
            kept = {name: Sustained() for name in subjects}
            for name, subject in subjects.items():
                Sustained().slice(subject, 2 * threads, threads, drained=name != "posix_spawn")
            for _ in range(starts // each):
                for name, subject in subjects.items():
                    kept[name].slice(subject, each, threads, drained=name != "posix_spawn")
            base = statistics.median(kept["posix_spawn"].rates)
            for name, sustained in kept.items():
                label = f"{name}_c{threads}"
                if name != "posix_spawn":
                    figures[label] = round(statistics.median(sustained.rates) / base, 2)
                details[f"{label}_per_s"] = spread(sustained.rates, scale=1)
                times = spread(sustained.times, scale=1e3)
                details[f"{label}_p50_ms"], details[f"{label}_p99_ms"] = (
                    times["median"], times["p99"],
                )  # fmt: skip
        facts = made.facts
    return Measured(figures=figures, details={**details, "starts": starts}, facts=facts)


if __name__ == "__main__":
    columns(__doc__, measure)
