"""How long does a confined `true` take, next to posix_spawn and bubblewrap?

Every subject runs /usr/bin/true to its end, has its output captured by two pipes and returns exit
status and usage. Ours do it through ``NativeSandbox.run``, the call that the pipeline makes. All
take turns in one run; before each, untimed, everything that earlier ones left to be made or undone
has come to rest. Ratios are medians over the median of posix_spawn.

warm_ratio        a sandbox of this profile waits: workspace bound, cgroup attached (where there is
                  one), program of all layers loaded. Included: take it, tell it the program,
                  execve, capture, exit status and usage, end its tree, close its line. Not
                  included: unmaking its namespaces and cgroup, and making the next one.
late_bound_ratio  a sandbox without folders waits; the workspace is cloned and attached at call time
cold_ratio        nothing waits: the sandbox is made at call time, with user and network namespaces
                  of its own; the template of the profile exists
first_ratio       nothing waits and there is no template: the first call of a profile ever
landlock_ratio    warm, tier landlock
vs_bwrap          how many times faster warm is than `bwrap --unshare-all` with about the same
                  mounts (it has no seccomp, no Landlock, no limits, no accounting)
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

from safeconduct.call import Profile, Tier

from .harness import Measured, Options, columns, interleave, spread
from .subject import TRUE, Bench, OwnNetwork, bench, rest, spawn

_BWRAP = (
    "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib",
    "--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",
    "--unshare-all", "--die-with-parent", "--new-session",
)  # fmt: skip


def _subjects(bench: Bench) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "posix_spawn", spawn
    folder = bench.workspace
    yield "warm", bench.caller(bench.sandbox())
    if bench.tier is Tier.FULL:
        yield "late", bench.caller(bench.sandbox(), late=True)
        yield "cold", bench.caller(bench.sandbox(OwnNetwork, ahead=0))
        if not bench.machine.tiers[Tier.LANDLOCK]:
            yield "landlock", bench.caller(bench.sandbox(tier=Tier.LANDLOCK))
    unused = bench.sandbox(ahead=0)
    numbers = count()

    def first() -> object:
        profile = Profile(name=f"bench-{next(numbers)}", read=(folder,), write=(folder,))
        return bench.caller(unused, profile=profile)()

    yield "first", first
    bwrap = shutil.which("bwrap")
    if bwrap:
        bind = ("--bind", folder, folder, "--chdir", folder)
        yield "bwrap", lambda: spawn((bwrap, *_BWRAP, *bind, TRUE))


def measure(chosen: Options) -> Measured:
    """Measure one column."""
    with bench() as made:
        subjects = dict(_subjects(made))
        samples = interleave(subjects, chosen.rounds(300), before=partial(rest, networks=True))
        facts = made.facts
    medians = {name: statistics.median(times) for name, times in samples.items()}

    def ratio(name: str, to: str = "posix_spawn") -> object:
        return round(medians[name] / medians[to], 2) if name in medians else None

    return Measured(
        figures={
            "warm_ratio": ratio("warm"),
            "late_bound_ratio": ratio("late"),
            "cold_ratio": ratio("cold"),
            "first_ratio": ratio("first"),
            "landlock_ratio": ratio("landlock"),
            "vs_bwrap": ratio("bwrap", "warm") or "bubblewrap is not installed",
        },
        details={f"{name}_ms": spread(times, scale=1e3) for name, times in samples.items()},
        facts=facts,
    )


if __name__ == "__main__":
    columns(__doc__, measure)
