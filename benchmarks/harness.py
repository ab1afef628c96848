"""What every benchmark shares: interleaved rounds, medians and spread, one way to print them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from safeconduct import __version__


@dataclass(frozen=True, slots=True)
class Options:
    """How long to measure and how to print."""

    quick: bool
    json: bool

    def rounds(self, whole: int) -> int:
        """Return how many rounds to run: a tenth when quick, at least 20."""
        return max(20, whole // 10) if self.quick else whole


def options(description: str | None) -> Options:
    """Read ``--quick`` and ``--json`` from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    arguments = parser.parse_args()
    return Options(quick=arguments.quick, json=arguments.json)


def interleave(subjects: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each subject once per round, in turn, so that drift hits all alike. Seconds."""
    for subject in subjects.values():
        subject()
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            begun = time.perf_counter()
            subject()
            samples[name].append(time.perf_counter() - begun)
    return samples


def spread(samples: Sequence[float], *, scale: float) -> dict[str, float]:
    """Return median, quartiles and p99, multiplied by ``scale``."""
    ordered = sorted(samples)
    quarters = statistics.quantiles(ordered, n=4)
    return {
        "median": round(statistics.median(ordered) * scale, 3),
        "q1": round(quarters[0] * scale, 3),
        "q3": round(quarters[2] * scale, 3),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * scale, 3),
        "n": len(ordered),
    }


def machine() -> dict[str, object]:
    """Say where and with what this was measured."""
    return {
        "safeconduct": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "root": os.geteuid() == 0,
    }


def finish(
    question: str, figures: Mapping[str, object], details: Mapping[str, object], chosen: Options
) -> None:
    """Print the figures for people, or everything as one JSON object for programs."""
    if chosen.json:
        print(json.dumps({"figures": figures, "details": details, "machine": machine()}))
        return
    print(question)
    for name, value in figures.items():
        print(f"  {name:32} {value}")
    for name, value in details.items():
        print(f"    {name:30} {value}")
    sys.stdout.flush()
