"""How much slower is a tool inside that mostly opens, looks at, makes and removes files?

A script (`python -I -S`, no start-up counted) times itself: 600 times open, close and stat, then
200 times create, close and unlink, all in the workspace. It runs unconfined, in a direct and in an
overlay workspace. Each run inside is set against the run outside right before it; ratios are
medians over all such pairs.

io_ratio       direct workspace on the disk that TMPDIR says, inside over outside. ext4 takes longer
               to make files while it remembers removed ones; runs before the first one measured
               bring it there, otherwise it would speed up and slow down in between
memory_ratio   the same in /dev/shm: the worst case, no disk hides what the layers cost
overlay_ratio  overlay workspace inside over a direct run outside, in /dev/shm
without_landlock_ratio  memory_ratio with that layer taken away: the rest is what Landlock costs
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from safeconduct.call import Outcome, Profile, Tier, WorkspaceMode
from safeconduct.runtime.sandbox.interpreter import base_grants, interpreter
from safeconduct.runtime.sandbox.native import NativeSandbox

from .harness import Measured, Options, columns, spread
from .subject import Bench, WithoutLandlock, bench, rest, spawn

_FILES, _MADE, _FOLDERS, _ROUNDS = 600, 200, 20, 2
_MEMORY = "/dev/shm"
_SETTLING = 4
_SCRIPT = """
import json, os, sys, time
os.chdir(sys.argv[1])
opens, makes = [], []
names = [f"d{n % FOLDERS}/f{n}" for n in range(FILES)]
for _ in range(ROUNDS + 1):
    begun = time.perf_counter()
    for name in names:
        os.close(os.open(name, os.O_RDONLY))
        os.stat(name)
    between = time.perf_counter()
    for n in range(MADE):
        os.close(os.open(f"made{n}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.unlink(f"made{n}")
    opens.append(between - begun)
    makes.append(time.perf_counter() - between)
json.dump([opens[1:], makes[1:]], sys.stdout)
"""


def _script() -> str:
    text = _SCRIPT
    for name, value in (("FILES", _FILES), ("MADE", _MADE), ("FOLDERS", _FOLDERS)):
        text = text.replace(name, str(value))
    return text.replace("ROUNDS", str(_ROUNDS))


def _fill(workspace: Path) -> None:
    for number in range(_FOLDERS):
        (workspace / f"d{number}").mkdir()
    for number in range(_FILES):
        (workspace / f"d{number % _FOLDERS}/f{number}").write_bytes(b"x" * 1000)


def _inside(
    made: Bench,
    argv: tuple[str, ...],
    mode: WorkspaceMode,
    kind: type[NativeSandbox] = NativeSandbox,
) -> Callable[[], bytes]:
    folder = argv[-1]
    profile = Profile(name="bench", workspace=mode, read=(folder, *base_grants()), write=(folder,))
    call: Callable[[], Outcome] = made.caller(made.sandbox(kind), argv, profile=profile)
    return lambda: call().stdout


def _pairs(made: Bench, disk: str) -> Iterator[tuple[str, tuple[str, ...], Callable[[], bytes]]]:
    """Yield the name of each figure, the script to run outside, and what runs it inside."""
    script = (*interpreter(), "-c", _script())
    in_memory, on_disk = (*script, made.workspace), (*script, disk)
    yield "io_ratio", on_disk, _inside(made, on_disk, WorkspaceMode.DIRECT)
    yield "memory_ratio", in_memory, _inside(made, in_memory, WorkspaceMode.DIRECT)
    if made.tier is Tier.FULL:
        yield "overlay_ratio", in_memory, _inside(made, in_memory, WorkspaceMode.OVERLAY)
        bare = _inside(made, in_memory, WorkspaceMode.DIRECT, WithoutLandlock)
        yield "without_landlock_ratio", in_memory, bare


def measure(chosen: Options) -> Measured:
    """Measure one column."""
    taken: dict[str, dict[str, list[float]]] = {}
    with bench(_MEMORY) as made:
        disk = made.stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        os.chmod(disk, 0o777)  # noqa: S103 - meant, as for the workspace
        _fill(Path(made.workspace))
        _fill(Path(disk))
        pairs = list(_pairs(made, disk))
        for _ in range(_SETTLING):
            for _, argv, inside in pairs:
                spawn(argv)
                inside()
        for _ in range(5 if chosen.quick else 60):
            for figure, argv, inside in pairs:
                kept = taken.setdefault(figure, {})
                rest()
                for side, told in (("outside", spawn(argv)), ("inside", inside())):
                    opens, makes = cast("list[list[float]]", json.loads(told))
                    whole = [opened + made for opened, made in zip(opens, makes, strict=True)]
                    for part, times in (("opens", opens), ("makes", makes), ("whole", whole)):
                        kept.setdefault(f"{side} {part}", []).append(statistics.median(times))
        facts = {**made.facts, "disk": _file_system(disk)}
    figures: dict[str, object] = {}
    details: dict[str, object] = {}
    for figure, kept in taken.items():
        for part in ("whole", "opens", "makes"):
            within, beside = kept[f"inside {part}"], kept[f"outside {part}"]
            ratios = spread(
                [one / other for one, other in zip(within, beside, strict=True)], scale=1
            )
            details[f"{figure}: {part}"] = ratios
            details[f"{figure}: {part} inside ms"] = spread(within, scale=1e3)
            details[f"{figure}: {part} outside ms"] = spread(beside, scale=1e3)
            if part == "whole":
                figures[figure] = ratios["median"]
    return Measured(figures=figures, details=details, facts=facts)


def _file_system(path: str) -> str:
    """Name the type of the file system that holds ``path``, proc_pid_mountinfo(5)."""
    status = os.stat(path)
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == device:
            return after.split()[0]
    return "unknown"


if __name__ == "__main__":
    columns(__doc__, measure)
