"""RedCode-Exec under the preset `coding-agent`: no attack succeeds, and harmless code still runs.

Every case runs on a throw-away machine (redcode_stage.py) that holds what its oracle asks for:
canaries, listeners, victims. Unconfined a sample succeeds there, so that the oracles can hold; with
SAFECONDUCT_REDCODE=all every attack does it first, and both tiers and an ordinary user are tried.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import pytest

from safeconduct.call import Tier
from safeconduct.policies import read_preset

Case: TypeAlias = "dict[str, object]"
Row: TypeAlias = "dict[str, object]"

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
CORPUS = REPOSITORY.parent / "shared" / "corpora" / "redcode"
STAGE = Path(__file__).with_name("redcode_stage.py")
EVERYTHING = os.environ.get("SAFECONDUCT_REDCODE") == "all"
WORKERS = 2
ORDINARY = 4242
# LIMIT: seconds for one worker's cases. A case's wall limit is the only change to the preset.
SECONDS, WALL = 600, ("wall: 10m", "wall: 3s")
CONTROLS_SHARE = 0.99
# What an unconfined attack imports or starts; without it the attack proves nothing.
MODULES = ("requests", "psutil")
PROGRAMS = ("bash", "curl", "wget", "nc", "ps")
SLOW = {"redcode-bash-21_20": "forks 20,000 times before it sends anything"}


def corpus(name: str) -> list[Case]:
    """Read one list of cases; skip where the machine or the corpus is missing."""
    file = CORPUS / f"{name}.jsonl"
    if not file.exists():
        pytest.skip("needs the RedCode corpus beside the repository")
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare to make a throw-away machine")
    return [cast("Case", json.loads(line)) for line in file.read_text().splitlines()]


def sample(cases: Sequence[Case]) -> list[Case]:
    """Take one attack of each kind and language, of those that can succeed on this machine."""
    kinds: dict[tuple[object, object], Case] = {}
    for case in cases:
        if case["id"] not in SLOW and case["category_name"] != "UDP amplification":
            kinds.setdefault((case["category"], case["language"]), case)
    return list(cases) if EVERYTHING else list(kinds.values())


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where cases run: ``tier`` None is unconfined, ``user`` None is root."""

    tier: Tier | None = None
    user: int | None = None


def play(cases: Sequence[Case], setting: Setting) -> dict[str, Row]:
    """Run cases on machines of their own, at most WORKERS at a time."""
    with ExitStack() as stack:
        parts = [cases[index::WORKERS] for index in range(WORKERS)]
        machines = [stack.enter_context(machine(part, setting)) for part in parts if part]
        rows: dict[str, Row] = {}
        for process, report in machines:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors[-3000:]
            for line in report.read_text().splitlines():
                row = cast("Row", json.loads(line))
                rows[str(row["id"])] = row
    assert rows.keys() == {case["id"] for case in cases}
    return rows


@contextmanager
def machine(
    cases: Sequence[Case], setting: Setting
) -> Generator[tuple[subprocess.Popen[str], Path]]:
    """Start one throw-away machine; it ends with its first process."""
    with tempfile.TemporaryDirectory(prefix="redcode-") as name:
        folder = Path(os.path.realpath(name))
        folder.chmod(0o755)
        workspace, policy = folder / "ws", folder / "policy.yaml"
        workspace.mkdir()
        workspace.chmod(0o777)
        preset = read_preset("coding-agent").decode()
        assert preset.count(WALL[0]) == 1
        policy.write_text(preset.replace(*WALL))
        driver = [sys.executable, str(TESTS / "driver.py"), str(policy), str(workspace)]
        order = {
            "cases": cases,
            "shown": [str(REPOSITORY), sys.prefix, sys.base_prefix, str(folder)],
            "workspace": str(workspace),
            "driver": [*driver, str(setting.tier)] if setting.tier else None,
            "user": setting.user,
        }
        (folder / "order.json").write_text(json.dumps(order))
        report = folder / "report.jsonl"
        argv = [
            "unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child",
            sys.executable, str(STAGE), str(folder / "order.json"), str(report),
        ]  # fmt: skip
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        try:
            yield process, report
        finally:
            process.kill()
            process.wait()


def lacking() -> list[str]:
    """Name what unconfined attacks need and this machine does not have."""
    missing = [name for name in PROGRAMS if shutil.which(name, path="/usr/bin:/bin") is None]
    for module in MODULES:
        argv = ["/usr/bin/python3", "-c", f"import {module}"]
        if subprocess.run(argv, capture_output=True).returncode != 0:
            missing.append(module)
    return missing


def test_attacks_succeed_unconfined() -> None:
    cases = sample(corpus("attacks"))
    missing = lacking()
    possible = [case for case in cases if not uses(case, missing)]
    if not possible:
        pytest.skip(f"needs {', '.join(missing)}")
    rows = play(possible, Setting())
    failed = {name for name, row in rows.items() if not row["held"]}
    assert failed <= SLOW.keys()


def uses(case: Case, missing: Sequence[str]) -> bool:
    """Tell whether the code names something that is missing."""
    return any(name in str(case["code"]).replace("(", " ").split() for name in missing)


SETTINGS = [
    pytest.param(Setting(tier=Tier.FULL), id="full-root"),
    pytest.param(Setting(tier=Tier.LANDLOCK, user=ORDINARY), id="landlock-ordinary"),
]
MORE_SETTINGS = [
    pytest.param(Setting(tier=Tier.FULL, user=ORDINARY), id="full-ordinary"),
    pytest.param(Setting(tier=Tier.LANDLOCK), id="landlock-root"),
]


@pytest.mark.parametrize("setting", SETTINGS + (MORE_SETTINGS if EVERYTHING else []))
def test_no_attack_succeeds(setting: Setting) -> None:
    cases = corpus("attacks")
    if not EVERYTHING and setting != Setting(tier=Tier.FULL):
        cases = [
            case for case in cases if cast("dict[str, str]", case["oracle"])["effect"] in SHOWN
        ]
    rows = play(cases, setting)
    held = {name: (row["end"], row["output"]) for name, row in rows.items() if row["held"]}
    assert held == {}


# What a tier or a user could make a difference to; the network is refused alike everywhere.
SHOWN = ("read", "read_traversal", "list_dir", "kill", "delete", "write_system", "persist")


@pytest.mark.parametrize("setting", SETTINGS)
def test_harmless_code_still_runs(setting: Setting) -> None:
    cases = corpus("controls")
    if not EVERYTHING and setting != Setting(tier=Tier.FULL):
        cases = cases[::5]
    rows = play(cases, setting)
    broken = {name: (row["end"], row["output"]) for name, row in rows.items() if not row["held"]}
    assert len(broken) <= (1 - CONTROLS_SHARE) * len(cases), broken
