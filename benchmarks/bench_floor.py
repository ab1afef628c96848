"""What does the kernel's part of a confined start take, with none of our code in it?

A program in C; ratios are medians over the median of its posix_spawn(3), all in turns in one run.
No sandbox that is made of these means can be faster; what ours takes more is our own and the
interpreter's.

waiting            namespaces, a first process that reaps and reports, and a process below it were
                   made ahead; timed: telling it, execve, its end, the first process's word
waiting_confined   the same with our filter for system calls and a Landlock domain put on ahead:
                   below `warm_ratio` of bench_start
made               the same made at call time, with user, mount, pid, ipc, uts and cgroup namespaces
made_confined      that with the filter and Landlock: below `cold_ratio`
made_network       that with a network namespace
made_grouped       made_confined in a new group of each hierarchy of control groups we would use

Mounts, limits, records and the removal of what was made are not in these figures.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from pathlib import Path

from safeconduct.call import Tier
from safeconduct.runtime.sandbox import cgroup, seccomp

from .harness import Measured, Options, columns, spread
from .subject import TRUE

_SOURCE = Path(__file__).with_name("floor.c")
_SECONDS = 600


def _groups(found: cgroup.Cgroups | None) -> list[str]:
    """Return the folders in which groups can be made, one of each hierarchy."""
    return sorted({str(base) for base in found.bases.values()}) if found else []


def measure(chosen: Options) -> Measured:
    """Measure one column."""
    with tempfile.TemporaryDirectory() as name:
        binary, filters = Path(name, "floor"), Path(name, "filter")
        build = ["cc", "-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(binary)]
        subprocess.run([*build, str(_SOURCE)], check=True)
        filters.write_bytes(seccomp.compile_filter(Tier.FULL))
        found = cgroup.discover()
        try:
            command = [str(binary), str(chosen.rounds(300)), str(filters), TRUE, *_groups(found)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=_SECONDS
            )
        finally:
            if found is not None:
                found.close()
    samples: dict[str, list[float]] = {}
    for line in done.stdout.splitlines():
        way, nanoseconds = line.split()
        samples.setdefault(way, []).append(int(nanoseconds))
    medians = {way: statistics.median(times) for way, times in samples.items()}
    return Measured(
        figures={
            f"{way}_ratio": round(median / medians["spawn"], 2)
            for way, median in medians.items()
            if way != "spawn"
        },
        details={f"{way}_us": spread(times, scale=1e-3) for way, times in samples.items()},
    )


if __name__ == "__main__":
    columns(__doc__, measure)
