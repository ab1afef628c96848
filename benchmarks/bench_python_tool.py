"""How long does a Python function call take in a fresh confined fork, and what does a fork hold?

waiting_p50_ms   a fork is waiting, ready and confined: send the call, get its result, its tree gone
cold_p50_ms      the zygote is warm, the fork is made, confined and joined to a cgroup at call time
private_mb       memory of a waiting fork that it shares with nobody (10**6 bytes, smaps_rollup)
python_start_ms  for comparison: `python -I -S -c "import json, re"` unconfined, started anew

Before each call, untimed, the forks that shall wait have been made and are at rest.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from safeconduct.call import Profile, Tier
from safeconduct.runtime.sandbox import python
from safeconduct.runtime.sandbox.interpreter import interpreter
from safeconduct.runtime.sandbox.python import PythonEngine
from safeconduct.runtime.sandbox.shield import Shield

from .harness import Measured, Options, columns, interleave, spread
from .subject import bench, rest

_IMPORTS = ("json", "re")
_SOURCE = "def double(number):\n    return number * 2"
_BYTES_PER_KIB = 1024
_FIGURES = ("waiting_p50_ms", "cold_p50_ms", "private_mb", "python_start_ms")


def plain_start() -> None:
    """Start an interpreter and import what the profile imports."""
    subprocess.run([*interpreter(), "-c", "import json, re"], check=True)


def processes_below(pid: int) -> Iterator[int]:
    """Yield every process below ``pid``."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        children = Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
        for child in map(int, children):
            yield child
            yield from processes_below(child)


def private_bytes(launcher: int) -> int:
    """Return the memory that the one waiting fork shares with nobody.

    It is the process with the most process id numbers: one for each nested namespace.
    """

    def depth(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(len(line.split()) for line in lines if line.startswith("NSpid"))

    fork = max(processes_below(launcher), key=depth)
    lines = Path(f"/proc/{fork}/smaps_rollup").read_text().splitlines()
    private = [line.split()[1] for line in lines if line.startswith(("Private_", "SwapPss"))]
    return sum(map(int, private)) * _BYTES_PER_KIB


def measure(chosen: Options) -> Measured:
    """Measure one column."""
    held: list[int] = []
    with bench() as made:
        if made.tier is not Tier.FULL:
            why = f"python tools are forked in tier full only: {made.machine.tiers[Tier.FULL]}"
            return Measured(figures=dict.fromkeys(_FIGURES, why), details={}, facts=made.facts)
        sandbox = made.sandbox()
        profile = Profile(name="bench", read=(made.workspace,), imports=_IMPORTS)

        def engine(waiting: int) -> Callable[[], object]:
            engine = PythonEngine(sandbox, made.cgroups, waiting=waiting)
            made.stack.callback(engine.close)

            def call() -> None:
                done = engine.run(
                    "bench", source=_SOURCE, function="double", value={"number": 21},
                    profile=profile, workspace=made.workspace, shield=Shield(),
                )  # fmt: skip
                if done.value != 42 or done.confinement.layers[-1] != "python-fork":
                    raise SystemExit(f"no fork: {engine.why_no_forks}")

            call()
            return call

        cold = engine(0)
        rounds = chosen.rounds(400)
        samples = interleave({"cold": cold, "python_start": plain_start}, rounds, before=rest)
        waiting = engine(python.WAITING)
        for _ in range(20):
            rest()
            held.append(private_bytes(os.getpid()))
        samples |= interleave({"waiting": waiting}, rounds, before=rest)
        facts = made.facts
    medians = {name: round(statistics.median(times) * 1e3, 2) for name, times in samples.items()}
    figures: dict[str, object] = {
        "waiting_p50_ms": medians["waiting"],
        "cold_p50_ms": medians["cold"],
        "private_mb": round(statistics.median(held) / 1e6, 3),
        "python_start_ms": medians["python_start"],
    }
    details = {f"{name}_ms": spread(times, scale=1e3) for name, times in samples.items()}
    return Measured(figures=figures, details=details, facts=facts)


if __name__ == "__main__":
    columns(__doc__, measure)
