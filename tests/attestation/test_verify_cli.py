"""``safeconduct trace verify``: what a person brings on the command line, and the exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from safeconduct.attestation import generate_key
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.note import Note
from safeconduct.errors import Exit

from .forge import call, chain, entry, forge, opening  # noqa: TID251 - the tests' own kit
from .kit import Bench, write_trace  # noqa: TID251 - the tests' own kit


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


@dataclass(frozen=True)
class Desk:
    root: Path

    def verify(self, *words: object) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "safeconduct", "trace", "verify", *map(str, words)],
            cwd=self.root,
            env={**os.environ, "XDG_STATE_HOME": str(self.root / "xdg")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_kept_checkpoint_is_held_against_the_log(desk: Desk, bench: Bench) -> None:
    trace = write_trace(bench, calls=2)
    first = shutil.copy(trace / "checkpoint", desk.root / "first")
    older = shutil.copytree(trace, desk.root / "older")
    write_trace(bench, calls=2)
    words = ["--no-remember", "--key", bench.key_line]
    done = desk.verify(trace, *words, "--checkpoint", first, "--json")
    assert (done.code, done.json["level"]) == (Exit.OK, 2)
    last = shutil.copy(trace / "checkpoint", desk.root / "last")
    done = desk.verify(older, *words, "--checkpoint", last)
    assert (done.code, "held.rollback" in done.out) == (Exit.TAMPERED, True)
    assert "keep this folder and the checkpoint you hold" in done.out
    assert not (desk.root / "xdg").exists()


def test_the_next_verification_remembers(desk: Desk, bench: Bench) -> None:
    trace = write_trace(bench, calls=2)
    older = shutil.copytree(trace, desk.root / "older")
    write_trace(bench, calls=2)
    assert desk.verify(older, "--key", bench.key_line).code == Exit.OK
    assert desk.verify(trace, "--key", bench.key_line, "--json").json["level"] == 2
    assert desk.verify(older, "--key", bench.key_line).code == Exit.TAMPERED


def test_a_policy_of_witnesses(desk: Desk) -> None:
    key, origin = generate_key("example.org/alice"), "example.org/alice/log"
    steps = [opening(origin), entry("session.open", "s1", {"caller": "local", "origin": "sdk"})]
    steps += [*call("s1", "c1"), entry("session.close", "s1", {"status": "closed"})]
    steps.append(entry("session.close", "run-1", {"status": "closed"}))
    trace = desk.root / "trace"
    forge(trace, chain(steps), key, origin)
    witness = CosigningKey("witness.example/w", bytes(range(32)))
    policy = desk.root / "policy"
    policy.write_text(f"log {key.verifier.line}\nwitness w1 {witness.verifier.line}\nquorum w1\n")
    # The policy lists the log's key, so that no other is needed.
    done = desk.verify(trace, "--policy", policy, "--no-remember")
    assert (done.code, "trust.quorum" in done.out) == (Exit.UNTRUSTED, True)
    note = (trace / "checkpoint").read_text()
    line = witness.sign(Note.parse(note.encode()).text, time=1_795_280_000).line
    (trace / "checkpoint").write_text(note + line)
    done = desk.verify(trace, "--policy", policy, "--no-remember", "--json")
    assert (done.code, done.json["level"]) == (Exit.OK, 3)
    done = desk.verify(trace, "--policy", policy, "--operator", "w1", "--no-remember", "--json")
    assert (done.code, done.json["level"]) == (Exit.UNTRUSTED, 1)
    (desk.root / "policy").write_text("quorum nobody\n")
    assert desk.verify(trace, "--policy", policy).code == Exit.USAGE


def test_the_report_for_programs(desk: Desk, bench: Bench) -> None:
    trace = write_trace(bench, calls=3)
    done = desk.verify(trace, "--key", bench.key_line, "--jobs", 1, "--json")
    report = done.json
    assert done.err == ""  # progress is for terminals
    assert (report["verdict"], report["status"], report["integrity"]) == ("OK", 0, "intact")
    assert [one["number"] for one in report["levels"]] == [1, 2, 3, 4, 5]
    assert "not offered by this log" in report["levels"][3]["why"]
    assert (report["calls"], report["findings"], report["unsigned"]) == (3, [], 0)
    assert report["claimed_key_line"] == bench.key_line
    assert any("recorded truthfully" in line for line in report["not_checked"])


@pytest.mark.parametrize(
    "words",
    [
        ["--key", "rubbish"],
        ["--checkpoint", "absent"],
        ["--policy", "absent"],
        ["--trust", "absent"],
        ["--jobs", "0"],
    ],
)
def test_a_wrong_command_line_is_no_verdict(desk: Desk, bench: Bench, words: list[str]) -> None:
    trace = write_trace(bench, calls=1)
    done = desk.verify(trace, *words)
    assert (done.code, done.out) == (Exit.USAGE, "")


def test_the_command_loads_nothing_of_the_runtimes_world() -> None:
    program = (
        "import sys; from safeconduct.runtime.cli import trace_verify; "
        "print([name for name in ('wasmtime', 'pydantic', 'safeconduct.policies', "
        "'safeconduct.attestation.writing.writer') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
