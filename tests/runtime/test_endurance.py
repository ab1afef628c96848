"""Many calls, in a row and sixteen at a time: nothing is left of them.

`SAFECONDUCT_ENDURANCE=10000` makes it that many calls of each kind; latency over so many is what
`python -m benchmarks.bench_endurance` measures.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Limits, Tier
from safeconduct.errors import ToolFailed
from safeconduct.runtime.sandbox.cgroup import Cgroups
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.pool import AHEAD
from safeconduct.runtime.sandbox.shield import Shield

if TYPE_CHECKING:
    from tests.conftest import Box

CALLS = int(os.environ.get("SAFECONDUCT_ENDURANCE", "500"))
AT_A_TIME = 16
REST_SECONDS = 30.0
# LIMIT: what an allocator may keep of all calls together.
SUPERVISOR_KIB_MAX, NATIVE_KIB_MAX = 4 << 10, 1 << 10
KINDS = ("launcher", "template", "init", "stub")
OWN_SPACES = ("cgroup", "ipc", "mnt", "pid", "user")
SPACES = (*OWN_SPACES, "net", "uts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What there is of this process's launchers and all that they started.

    By kind of process: launcher, template, init, stub. What belongs to a sandbox that waits is left
    out: sixteen threads can ask for some more, which the next calls use up.
    """

    descriptors: Mapping[str, Set[int]]
    mounts: Mapping[str, Set[int]]
    namespaces: Mapping[str, int]
    templates: int
    cgroups: int
    scratch: int
    # Of these there can be more or fewer at any time: pages, and what waits at hand or in a queue.
    waiting: int = field(compare=False)
    # Descriptors of launcher and templates, which keep id mappings: as many as sandboxes ever lived
    # at the same time.
    mappings: int = field(compare=False)
    own_descriptors: int = field(compare=False)
    supervisor_kib: int = field(compare=False)
    native_kib: int = field(compare=False)


def children(pid: int) -> Iterator[int]:
    for task in os.listdir(f"/proc/{pid}/task"):
        yield from map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())


def below(pid: int, depth: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (process, depth) of ``pid`` and of everything below it."""
    yield pid, depth
    for child in children(pid):
        yield from below(child, depth + 1)


def memory_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def per_kind(tree: Sequence[tuple[int, int]], count: Callable[[Path], int]) -> dict[str, Set[int]]:
    """Count something of each process; of one kind all are alike."""
    found: dict[str, set[int]] = {}
    for pid, depth in tree:
        found.setdefault(KINDS[depth], set()).add(count(Path(f"/proc/{pid}")))
    return dict(found)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def take_census(cgroups: Cgroups | None, temporary: Path) -> Census:
    launchers = [
        pid
        for pid in children(os.getpid())
        if Path(f"/proc/{pid}/comm").read_text().startswith("safeconduct-lau")
    ]
    tree = [found for pid in launchers for found in below(pid)]
    depths = [KINDS[depth] for _, depth in tree]
    # One that is bound late has neither a stub nor a user namespace yet.
    waiting, stubs = depths.count("init"), depths.count("stub")
    seen = tree if os.geteuid() == 0 else []  # the others may not look into what is not dumpable
    spaces = {
        kind: len({os.readlink(f"/proc/{pid}/ns/{kind}") for pid, _ in seen}) for kind in SPACES
    }
    descriptors = per_kind(seen, lambda path: len(os.listdir(path / "fd")))
    mappings = descriptors.pop("template", set()) | descriptors.pop("launcher", set())
    ours = f"safeconduct-{os.getpid()}-"
    bases = {*cgroups.bases.values()} if cgroups else set[Path]()
    groups = sum(name.startswith(ours) for base in bases for name in os.listdir(base))
    private = sum(len(os.listdir(base)) for base in temporary.glob("safeconduct-*"))
    return Census(
        descriptors=descriptors,
        mappings=sum(mappings),
        mounts=per_kind(seen, lambda path: lines(path / "mountinfo"))
        | {"supervisor": {lines(Path("/proc/self/mountinfo"))}},
        namespaces={
            kind: number - min(number - 1, stubs if kind == "user" else waiting)
            if kind in OWN_SPACES
            else number
            for kind, number in spaces.items()
        },
        templates=depths.count("template"),
        cgroups=groups - waiting * len(bases),
        scratch=private - waiting if private else 0,
        waiting=waiting,
        own_descriptors=len(os.listdir("/proc/self/fd")),
        supervisor_kib=memory_kib(os.getpid()),
        native_kib=sum(memory_kib(pid) for pid, depth in tree if depth < 2),
    )


def at_rest(take: Callable[[], Census], expected: Census | None = None) -> Census:
    """Count once all that calls left to be made or unmade is done: the same five times."""
    deadline = time.monotonic() + REST_SECONDS
    looks, before = 0, expected
    while True:
        try:
            now = take()
        except OSError:
            continue  # something went while it was looked at
        looks = looks + 1 if now == before else 0
        if looks == 5:
            return now
        before = expected or now
        assert time.monotonic() < deadline, f"{now} is not {before}"
        time.sleep(0.02)


def each_kind(box: Box, number: int) -> None:
    """Run one call; among ten are those that leave most: late, failed, with orphans, with input."""
    kind = number % 10
    if kind == 1:
        with pytest.raises(ToolFailed):
            box.run("no-such-program")
    elif kind == 2:
        left = "mkdir /tmp/a 2>/dev/null; (setsid sleep 60 >/dev/null 2>&1 &); exit 3"
        assert box.run("sh", "-c", left).exit_code == 3
    elif kind == 3:
        program = Program(argv=["cat"], cwd=str(box.workspace), stdin=b"x" * 20_000)
        late, workspace = box.tier is Tier.FULL, str(box.workspace)
        outcome = box.sandbox.run(
            "late", program, box.profile(), workspace=workspace, shield=Shield(), late=late
        )
        assert len(outcome.stdout) == 20_000
    elif number % 50 == 4:
        assert box.run("sleep", "60", limits=Limits(wall_ms=20)).limit == "wall"
    else:
        assert box.run("true").ok


@pytest.fixture
def temporary(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make private folders where nobody else does, so that they can be counted."""
    folder = workspace / "temporary"
    folder.mkdir(mode=0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_thousands_of_calls_leave_nothing(
    box: Box, launcher: Launcher, cgroups: Cgroups | None, temporary: Path
) -> None:
    def take() -> Census:
        return take_census(cgroups, temporary)

    def run(number: int) -> None:
        each_kind(used, number)

    def run_share(first: int) -> None:
        for number in range(first, CALLS, AT_A_TIME):
            run(number)

    for number in range(50):  # whatever is started once is started
        each_kind(box, number)
    box.sandbox.close()
    with ThreadPoolExecutor(AT_A_TIME) as threads:
        with closing(NativeSandbox(launcher, tier=box.tier, cgroups=cgroups)) as sandbox:
            used = replace(box, sandbox=sandbox)
            # Every thread has run, and every plan has as many sandboxes as it ever has.
            list(threads.map(run, range(20 * AT_A_TIME)))
            before = at_rest(take)
            for number in range(CALLS):
                run(number)
            at_rest(take, before)
            list(threads.map(run_share, range(AT_A_TIME)))
            after = at_rest(take, before)
        print(f"{box.tier}: before {before}\nafter {after}")
        assert after.waiting <= after.templates * (AHEAD + AT_A_TIME)
        assert after.mappings - before.mappings <= 2 * before.templates * (AHEAD + AT_A_TIME)
        assert after.supervisor_kib - before.supervisor_kib < SUPERVISOR_KIB_MAX
        assert after.native_kib - before.native_kib < NATIVE_KIB_MAX
        closed = at_rest(take)
        with closing(NativeSandbox(launcher, tier=box.tier, cgroups=cgroups)) as sandbox:
            used = replace(box, sandbox=sandbox)
            list(threads.map(run, range(2 * AT_A_TIME)))
        assert at_rest(take, closed).own_descriptors == closed.own_descriptors
    assert closed.scratch == 0
