"""Stock kernels: every check that ran inside a test machine is a test here.

`make test-vm` runs this file by name; its own name keeps it out of `make test`, for it takes
minutes. A machine that did not come up or a check without a result is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from .inside.main import CHECKS
from .inside.registry import NEWER, NO_LANDLOCK, OLDEST
from .machine import KERNELS, Boot, Report, missing, start

BOOTS = {
    # Linux 6.1, the oldest we support: Landlock ABI 2.
    OLDEST: Boot(name=OLDEST, kernel="oldest"),
    # Linux 6.12, the first that carries tier landlock: ABI 6.
    NEWER: Boot(name=NEWER, kernel="newer"),
    NO_LANDLOCK: Boot(name=NO_LANDLOCK, kernel="oldest", append="lsm=lockdown,yama,apparmor"),
}
_ABI = {OLDEST: 2, NEWER: 6, NO_LANDLOCK: 0}
_AT_ONCE = 2
_CONSOLE_CHARACTERS = 4000

CASES = [(boot, name) for name, check in CHECKS.items() for boot in check.boots]
Reports = dict[str, "Future[Report]"]


@pytest.fixture(scope="session")
def reports() -> Iterator[Reports]:
    """Start all machines, two at a time; a test waits for its own."""
    if lacking := missing({boot.kernel for boot in BOOTS.values()}):
        pytest.skip(lacking)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield {
            name: pool.submit(start, boot, KERNELS / "run" / name) for name, boot in BOOTS.items()
        }


@pytest.mark.parametrize("boot", BOOTS)
def test_the_machine_came_up_and_ended(reports: Reports, boot: str) -> None:
    report = reports[boot].result()
    print(f"{boot}: {report.facts}, {report.seconds:.0f} s\n{report.console}")
    assert report.ended, f"it did not end by itself:\n{report.console[-_CONSOLE_CHARACTERS:]}"
    assert report.facts["landlock_abi"] == _ABI[boot]
    assert set(report.details) == {name for at, name in CASES if at == boot}


@pytest.mark.parametrize(("boot", "name"), CASES, ids=lambda value: str(value))
def test_inside(reports: Reports, boot: str, name: str) -> None:
    report = reports[boot].result()
    if name not in report.details:
        pytest.fail(f"there is no result:\n{report.console[-_CONSOLE_CHARACTERS:]}")
    if detail := report.details[name]:
        pytest.fail(detail, pytrace=False)
