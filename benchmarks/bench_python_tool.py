"""How long does a Python function call take in a fresh confined fork, and what does a fork hold?

waiting_p50_ms   a fork is waiting, ready and confined: send the call, get its result, its tree gone
cold_p50_ms      the zygote is warm, the fork is made, confined and joined to a cgroup at call time
private_mb       memory of a waiting fork that it shares with nobody (10**6 bytes, smaps_rollup)
python_start_ms  for comparison: `python -I -c "import json, re"` unconfined, started anew
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from safeconduct.call import Profile, Tier
from safeconduct.runtime.sandbox import cgroup, python
from safeconduct.runtime.sandbox.interpreter import interpreter
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox
from safeconduct.runtime.sandbox.python import PythonEngine
from safeconduct.runtime.sandbox.shield import Shield

from .harness import finish, interleave, options, spread

_IMPORTS = ("json", "re")
_SOURCE = "def double(number):\n    return number * 2"
# How long a fork gets to become ready again between two measured calls.
_PAUSE_SECONDS = 0.02
_BYTES_PER_KIB = 1024


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


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__)
    with ExitStack() as stack:
        workspace = stack.enter_context(tempfile.TemporaryDirectory())
        launcher = Launcher()
        stack.callback(launcher.close)
        groups = cgroup.discover()
        if groups is not None:
            stack.callback(groups.close)
        sandbox = NativeSandbox(launcher, tier=Tier.FULL, cgroups=groups)
        profile = Profile(name="bench", read=(workspace,), imports=_IMPORTS)

        def engine(waiting: int) -> tuple[PythonEngine, Callable[[], object]]:
            made = PythonEngine(sandbox, groups, waiting=waiting)
            stack.callback(made.close)

            def call() -> None:
                done = made.run(
                    "bench", source=_SOURCE, function="double", value={"number": 21},
                    profile=profile, workspace=workspace, shield=Shield(),
                )  # fmt: skip
                if done.value != 42 or done.confinement.layers[-1] != "python-fork":
                    raise SystemExit(f"no fork: {made.why_no_forks}")

            call()
            return made, call

        _, cold = engine(0)
        samples = interleave({"cold": cold, "python_start": plain_start}, chosen.rounds(400))
        _, waiting = engine(python.WAITING)
        taken: list[float] = []
        held: list[int] = []
        for _ in range(chosen.rounds(400)):
            time.sleep(_PAUSE_SECONDS)
            if len(held) < 20:
                held.append(private_bytes(os.getpid()))
            begun = time.perf_counter()
            waiting()
            taken.append(time.perf_counter() - begun)
        samples["waiting"] = taken
    figures: dict[str, object] = {
        "waiting_p50_ms": round(statistics.median(samples["waiting"]) * 1e3, 2),
        "cold_p50_ms": round(statistics.median(samples["cold"]) * 1e3, 2),
        "private_mb": round(statistics.median(held) / 1e6, 3),
        "python_start_ms": round(statistics.median(samples["python_start"]) * 1e3, 2),
        "cgroup": groups is not None,
    }
    details = {f"{name}_ms": spread(times, scale=1e3) for name, times in samples.items()}
    finish(__doc__ or "", figures, details, chosen)


if __name__ == "__main__":
    main()
