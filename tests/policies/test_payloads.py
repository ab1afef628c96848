"""Hostile payloads end in a typed refusal or exact handling, within 1 s and 256 MB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from . import hostile

PAYLOADS = Path(__file__).resolve().parents[2].parent / "shared" / "corpora" / "probes" / "payloads"
RUNNER = Path(__file__).with_name("payload_runner.py")
CLASSES = frozenset({"path", "url", "name", "policy", "json"})
# Processor time, so that another's load is not counted.
SECONDS_MAX = 1.0
# LIMIT: seconds for all payloads of one run.
PATIENCE = 300
Payload = tuple[str, str, bytes]


@pytest.fixture
def planted(workspace: Path) -> Path:
    folder = workspace / "ws"
    folder.mkdir()
    (folder / "a").mkdir()
    (folder / "link").symlink_to("/etc")
    (folder / "abs").symlink_to("/etc")
    (folder / "up").symlink_to("../..")
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nothing")
    os.mkfifo(folder / "fifo")
    return workspace


def run(payloads: Iterable[Payload], workspace: Path) -> dict[str, dict[str, Any]]:
    """Judge the payloads in the runner; return what it says of each by name."""
    listed = list(payloads)
    lines = [
        json.dumps({"class": kind, "name": name, "hex": data.hex()}) for kind, name, data in listed
    ]
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(workspace)],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(listed)
    return {answer["name"]: answer for answer in answers}


def refuse_wrong(answers: dict[str, dict[str, Any]]) -> None:
    wrong = {
        name: answer["said"]
        for name, answer in answers.items()
        if not answer["said"] or any(said.startswith("wrong") for said in answer["said"])
    }
    slow = {
        name: answer["seconds"]
        for name, answer in answers.items()
        if answer["seconds"] > SECONDS_MAX
    }
    assert (wrong, slow) == ({}, {})


def given() -> list[Payload]:
    if not PAYLOADS.is_dir():
        pytest.skip(f"the payloads are not beside the repository: {PAYLOADS.name}")
    rows = [line.split("\t") for line in (PAYLOADS / "INDEX.tsv").read_text().splitlines()]
    found = [(kind, name, PAYLOADS / name) for name, kind, _ in rows if kind in CLASSES]
    return [(kind, name, path.read_bytes()) for kind, name, path in found if path.is_file()]


def test_the_given_payloads(planted: Path) -> None:
    payloads = given()
    assert len(payloads) >= 40
    answers = run(payloads, planted)
    refuse_wrong(answers)
    for kind, name, _ in payloads:
        said = answers[name]["said"]
        # Nothing of these is granted, and none of these files is a policy.
        if kind in ("url", "name", "policy"):
            assert not any(one in ("loaded", "allowed") for one in said), (name, said)
            assert not any(one.endswith(" allowed") for one in said), (name, said)


def test_made_payloads_of_the_same_classes(planted: Path) -> None:
    made = [(kind, f"{kind}-{at}", data) for at, (kind, data) in enumerate(hostile.everything())]
    refuse_wrong(run(made, planted))


def test_changed_payloads(planted: Path) -> None:
    random = Random(20261121)  # noqa: S311 - the same draws in every run
    seeds = [(kind, data) for kind, data in hostile.everything() if len(data) < 5000]
    if PAYLOADS.is_dir():
        seeds += [(kind, data) for kind, _, data in given() if len(data) < 5000]
    changed = [
        (kind, f"{kind}-{at}", hostile.mutated(hostile.mutated(data, random), random))
        for at, (kind, data) in enumerate(random.choices(seeds, k=600))
    ]
    refuse_wrong(run(changed, planted))
