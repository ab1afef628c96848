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
from dataclasses import dataclass, field
from typing import cast

from safeconduct import __version__

from . import rootless

# The lowest real-time priority is above everything that is not real-time, sched(7).
_PRIORITY = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How long to measure, as whom, and how to print.

    ``alone`` leaves the rootless column out; ``as_user`` and ``python`` say who measures it and
    with which interpreter.
    """

    quick: bool = False
    json: bool = False
    shield: bool = False
    alone: bool = False
    as_user: str | None = None
    python: str | None = None

    def rounds(self, whole: int) -> int:
        """Return how many rounds to run: a tenth when quick, at least 20."""
        return max(20, whole // 10) if self.quick else whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one user measured: the figures asked for, what they come from, facts of the machine."""

    figures: Mapping[str, object]
    details: Mapping[str, object]
    facts: Mapping[str, object] = field(default_factory=dict[str, object])


def options(description: str | None, *, columns: bool = False) -> Options:
    """Read the command line. ``columns`` adds what a benchmark of sandboxes is asked."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    if columns:
        parser.add_argument(
            "--shield",
            action="store_true",
            help="run all subjects under SCHED_FIFO, on a machine that others work on (root only)",
        )
        parser.add_argument("--alone", action="store_true", help="no rootless column beside root's")
        parser.add_argument("--as-user", metavar="NAME", help="who measures the rootless column")
        parser.add_argument("--python", metavar="PATH", help="an interpreter which that user runs")
    return Options(**vars(parser.parse_args()))


def interleave(
    subjects: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time each subject once per round, in turn, so that drift hits all alike. Seconds.

    ``before`` is called ahead of each and is not timed.
    """
    for subject in subjects.values():
        before()
        subject()
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            before()
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
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def finish(
    question: str, figures: Mapping[str, object], details: Mapping[str, object], chosen: Options
) -> None:
    """Print the figures for people, or everything as one JSON object for programs."""
    document = {**figures, "details": details, "machine": machine()}
    _print(question, document, chosen)


def columns(
    question: str | None, measure: Callable[[Options], Measured], *, shieldable: bool = True
) -> None:
    """Measure as whoever calls; when that is root, measure once more as an ordinary user; print.

    The rootless column is the same benchmark in a process of its own. Where it cannot be measured
    the reason stands in its place.
    """
    chosen = options(question, columns=True)
    if chosen.shield and not shieldable:
        raise SystemExit("Here --shield would let a hostile program starve the whole machine.")
    if chosen.shield:
        _shield()
    measured = measure(chosen)
    document: dict[str, object] = {
        **measured.figures,
        "details": measured.details,
        "machine": {**machine(), **measured.facts, "shield": chosen.shield},
    }
    if os.geteuid() == 0 and not chosen.alone:
        flags = [f"--{name}" for name in ("quick", "shield") if getattr(chosen, name)]
        document["rootless"] = rootless.column(flags, chosen.as_user, chosen.python)
    _print(question or "", document, chosen)


def _shield() -> None:
    """Let nobody else's work in between. Every process started later inherits it."""
    if os.sched_getscheduler(0) == os.SCHED_FIFO:
        return
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    except PermissionError as error:
        raise SystemExit("--shield needs the right to real-time scheduling: be root.") from error


def _print(question: str, document: Mapping[str, object], chosen: Options) -> None:
    if chosen.json:
        print(json.dumps(document))
        return
    print(question)
    rows, other = _rows(document), document.get("rootless")
    if not isinstance(other, Mapping):
        for name, value in rows.items():
            print(f"  {name:34} {value!s:>12}")
        if other is not None:
            print(f"  no rootless column: {other}")
        _print_details("", document)
    else:
        rootless = cast("Mapping[str, object]", other)
        beside = _rows(rootless)
        print(f"  {'':34} {'root':>12} {'rootless':>12}")
        for name in dict.fromkeys([*rows, *beside]):
            print(f"  {name:34} {rows.get(name)!s:>12} {beside.get(name)!s:>12}")
        _print_details("root: ", document)
        _print_details("rootless: ", rootless)
    sys.stdout.flush()


def _rows(document: Mapping[str, object]) -> dict[str, object]:
    """Return the figures alone."""
    beside = ("details", "machine", "rootless")
    return {name: value for name, value in document.items() if name not in beside}


def _print_details(title: str, document: Mapping[str, object]) -> None:
    for part in ("details", "machine"):
        for name, value in cast("Mapping[str, object]", document[part]).items():
            told = value
            if isinstance(value, Mapping):
                told = "  ".join(f"{k} {v}" for k, v in cast("Mapping[str, object]", value).items())
            print(f"    {title + name:38} {told}")
