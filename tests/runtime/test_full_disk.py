"""A disk that takes no more: the kernel refuses the journal's write, and the call does not run.

RLIMIT_FSIZE stands for the full disk: the same write(2) fails, for any user, with no mount.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from safeconduct.attestation import read_entries
from safeconduct.call import EntryKind

PROGRAM = """
import os, resource, sys
from safeconduct import Runtime, TraceInvalid

folder = sys.argv[1]
environment = {"HOME": folder, "XDG_STATE_HOME": folder + "/state"}
policy = folder + "/policy.yaml"
runtime = Runtime.from_policy(policy, workspace=folder + "/ws", environment=environment)
runtime.call("fs.write", path="before.txt", content="x")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
for number in range(2000):
    try:
        runtime.call("fs.write", path=f"file-{number}.txt", content="x")
    except TraceInvalid as error:
        print(error.code, number, os.path.exists(f"{folder}/ws/file-{number}.txt"))
        break
try:
    runtime.call("fs.write", path="after.txt", content="x")
except TraceInvalid as error:
    print(error.code, os.path.exists(folder + "/ws/after.txt"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    runtime.close()
except TraceInvalid as error:
    print("close", error.code)
"""


def fill(folder: Path, limit_bytes: int) -> tuple[bool, int, int]:
    """Return whether the first refused call ran, and how many calls ran and were intended."""
    (folder / "ws").mkdir(parents=True)
    policy = 'version: 1\ntools:\n  fs.write: {allow: {path: ["$WS/**"]}}\n'
    (folder / "policy.yaml").write_text(policy)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(limit_bytes)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    refused, after, *closed = done.stdout.splitlines()
    code, number, exists = refused.split()
    assert code == "trace.write_failed"
    assert int(number) > 0
    assert after == "trace.write_failed False"
    assert closed == ["close trace.write_failed"]
    (origin,) = folder.glob("state/**/origin")
    kinds = [entry.kind for _, entry in read_entries(origin.parent)]
    return (
        exists == "True",
        len(list((folder / "ws").iterdir())),
        kinds.count(EntryKind.CALL_INTENT),
    )


def test_a_call_that_cannot_be_recorded_does_not_run(tmp_path: Path) -> None:
    """Where the disk is full only for an outcome, the call has run: its intent is there."""
    ran_first: list[bool] = []
    for step in range(4):
        first, ran, intended = fill(tmp_path / str(step), (16 << 10) + 600 * step)
        assert ran <= intended
        ran_first.append(first)
    assert False in ran_first
