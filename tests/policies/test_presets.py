"""Presets and the policies of examples/: they check clean, and their tests notice every change."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import pytest

from safeconduct.call import Bound
from safeconduct.errors import PolicyError
from safeconduct.policies import PRESETS, PolicyFile, check_file, load_policy, read_policy_file
from safeconduct.policies.checks.cases import beside, read_cases
from safeconduct.policies.checks.testing import run_cases
from safeconduct.policies.preset import read_preset, read_preset_tests

from .mutants import UNCHANGED, mutants

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "policies" / "presets"
EXAMPLES = ROOT / "examples" / "policies"
NAMES = ("filesystem-server", "python-repository", "support-desk", "wasm-python", "web-research")
FILES = [
    *(pytest.param(FOLDER / f"{name}.yaml", id=f"preset-{name}") for name in PRESETS),
    *(pytest.param(EXAMPLES / name / "policy.yaml", id=name) for name in NAMES),
]
# What `policy check` warns of and the README of the example explains: (code, what it says).
WARNINGS = {
    "python-repository": {
        ("check.wide_profile", "profile install writes $WS/.venv"),
        ("check.wide_profile", "profile commit writes $WS/.git"),
        ("check.wide_profile", "profile rewind writes $WS,"),
    }
}


# Mutants that grant nothing more, because the role that is narrowed refuses the same.
NO_CHANGE = {"support-desk": {"rest: any in roles.agent.shop.refund.allow"}}
# What no test of a policy can see: what programs may write, and what is counted.
WRITES = {
    "coding-agent": {"$WS"},
    "data-analysis": {"$WS/out"},
    "mcp-filesystem": {"$WS"},
    "filesystem-server": {"$WS/docs/drafts"},
    "python-repository": {"$WS", "$WS/src", "$WS/tests", "$WS/.venv", "$WS/.git"},
    "support-desk": {"$WS/mail/outbox", "$WS/shop"},
}
BOUNDS = {
    "customer-support": {
        "mail-inside": {"60 calls in 1h"},
        "mail-outside": {"20 calls in 1h"},
        "refund": {"20 calls in 24h"},
        "refund-more": {"20 calls in 24h"},
    },
    "data-analysis": {"compute": {"500 calls/day"}},
    "preset-web-research": {
        "browse": {"30 calls in 60s", "300 calls in 1h", f"{500 << 20} bytes/day"},
    },
    "support-desk": {
        "mail-inside": {"60 calls in 1h"},
        "mail-outside": {"20 calls in 1h", "100 calls in 24h"},
        "find-orders": {"120 calls in 1h"},
        "refund": {"50 calls in 24h"},
        "refund-more": {"10 calls in 24h"},
        "agent-sends": {"10 calls in 1h"},
        "agent-refunds": {"10 calls in 24h"},
    },
    "wasm-python": {"module": {"1000 calls/session"}, "python": {"1000 calls/session"}},
    "web-research": {
        "browse": {
            "30 calls in 60s",
            "300 calls in 1h",
            "1000 calls/day",
            f"{500 << 20} bytes/day, {2 << 20} each",
        },
    },
}
_WINDOWS = {60_000: "60s", 3_600_000: "1h", 86_400_000: "24h"}


def test_every_file_is_looked_at() -> None:
    presets = {f"{name}.{suffix}" for name in PRESETS for suffix in ("yaml", "test.yaml")}
    assert {path.name for path in FOLDER.iterdir()} == presets
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir()} == set(NAMES)
    for name in NAMES:
        files = {path.name for path in (EXAMPLES / name).iterdir()}
        assert files == {"policy.yaml", "policy.test.yaml", "README.md"}


@pytest.mark.parametrize("page", sorted(EXAMPLES.rglob("*.md")), ids=lambda page: page.parent.name)
def test_the_pages_say_what_they_must(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    if page.parent != EXAMPLES:
        for part in ("**Who attacks.**", "## What holds", "## What does not", "## How to test it"):
            assert part in text
    for _, warned in WARNINGS.get(page.parent.name, ()):
        assert f"`{warned.split()[1]}`" in text


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_package_data(name: str) -> None:
    assert read_preset(name) == (FOLDER / f"{name}.yaml").read_bytes()
    assert read_preset_tests(name) == (FOLDER / f"{name}.test.yaml").read_bytes()
    with pytest.raises(PolicyError, match="there is no preset"):
        read_preset_tests(f"../{name}")


def test_the_command_line_offers_all_of_them(tmp_path: Path) -> None:
    listed = _run("init", "--list").splitlines()
    assert [line.split()[0] for line in listed] == list(PRESETS)
    assert all(purpose in line for line, purpose in zip(listed, PRESETS.values(), strict=True))
    _run("init", "--preset", "web-research", str(tmp_path))
    folder = tmp_path / ".safeconduct"
    assert (folder / "policy.yaml").read_bytes() == read_preset("web-research")
    assert (folder / "policy.test.yaml").read_bytes() == read_preset_tests("web-research")
    assert "no findings" in _run("policy", "test", str(folder / "policy.yaml"))
    (folder / "policy.yaml").unlink()
    (folder / "policy.test.yaml").write_text("[]")
    _run("init", str(tmp_path))
    assert (folder / "policy.test.yaml").read_text() == "[]"
    assert "no findings" in _run("policy", "test", str(EXAMPLES / "support-desk" / "policy.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_policy_can_extend_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "narrow.yaml").write_text(f"version: 1\nextends: preset:{name}\n")
    narrow = load_policy(tmp_path / "narrow.yaml", workspace=tmp_path)
    assert narrow.parts[0].file == f"preset:{name}"


def _run(*words: str) -> str:
    argv = [sys.executable, "-m", "safeconduct", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("path", FILES)
def test_check_says_only_what_is_known(path: Path, tmp_path: Path) -> None:
    workspace = os.path.realpath(tmp_path)
    found = check_file(path, workspace=Path(workspace))
    known = WARNINGS.get(path.parent.name, set())
    for one in found:
        said = one.message.replace(workspace, "$WS")
        assert any(code == one.code and text in said for code, text in known), said
        assert one.level == "warning"
    assert len(found) == len(known)


@pytest.mark.parametrize("path", FILES)
def test_its_tests_pass_and_see_every_grant_both_ways(path: Path) -> None:
    report = run_cases(read_policy_file(path), read_cases(beside(path)))
    assert [one.message for one in report.findings] == []


@pytest.mark.parametrize("path", FILES)
def test_its_tests_notice_every_change(path: Path) -> None:
    cases = read_cases(beside(path))
    unnoticed: list[str] = []
    count = 0
    same = NO_CHANGE.get(path.parent.name, set())
    for mutant in mutants(path.read_bytes()):
        file = PolicyFile(path=path, data=mutant.data, owner_uid=0, mode=0o644)
        try:
            report = run_cases(file, cases)
        except PolicyError:
            continue  # it does not load, so nobody is ever judged by it
        count += 1
        if not report.failures:
            unnoticed.append(mutant.what)
    assert count > 6
    assert set(unnoticed) == {UNCHANGED} | same


@pytest.mark.parametrize("path", FILES)
def test_programs_write_where_it_is_known_and_reach_no_network(path: Path, tmp_path: Path) -> None:
    workspace = os.path.realpath(tmp_path)
    policy = load_policy(path, workspace=Path(workspace))
    folders = [folder for one in policy.profiles.values() for folder in one.write]
    assert {folder.replace(workspace, "$WS") for folder in folders} == _known(WRITES, path, set())
    (part,) = policy.parts
    for rule in part.every_rule():
        profile = part.profile_of(rule)
        assert all(folder.startswith(workspace) for folder in profile.read + profile.write)


@pytest.mark.parametrize("path", FILES)
def test_what_is_counted(path: Path, tmp_path: Path) -> None:
    (part,) = load_policy(path, workspace=tmp_path).parts
    counted = {
        rule.id: {_said(bound) for bound in rule.bounds}
        for rule in part.every_rule()
        if rule.bounds
    }
    assert counted == _known(BOUNDS, path, {})


def _said(bound: Bound) -> str:
    if bound.window_ms is not None:
        return f"{bound.most} {bound.unit} in {_WINDOWS[bound.window_ms]}"
    each = f", {bound.reserve} each" if bound.reserve > 1 else ""
    return f"{bound.most} {bound.unit}/{bound.per}{each}"


def _known(table: Mapping[str, T], path: Path, otherwise: T) -> T:
    """Look a policy up; a preset that has the name of an example is `preset-NAME`."""
    preset = path.parent == FOLDER
    name = path.stem if preset else path.parent.name
    return table.get(f"preset-{name}" if preset and name in NAMES else name, otherwise)
