"""What an Outcome leaves in the trace: the limit that ended it, and what seccomp refused."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import cast

from tests.attestation.kit import NAME, Bench

from safeconduct.attestation import TraceWriter, write_key
from safeconduct.attestation.reader import read_entries
from safeconduct.call import Call, Document, EntryKind, Outcome, Refused
from safeconduct.errors import Exit
from safeconduct.runtime.record import Recorder

CALL = Call(id="c1", tool="shell.run", arguments={}, session="s")


def body_of(tmp_path: Path, outcome: Outcome) -> dict[str, object]:
    """Record one call with this Outcome in a real trace and read the entry back."""
    bench = Bench(tmp_path, write_key(tmp_path / "alice.key", NAME))
    with (
        closing(bench.signer()) as signer,
        TraceWriter.open(bench.trace, signer=signer) as writer,
    ):
        recorder = Recorder(writer, caller="local", origin="test")
        recorder.intent(CALL, Document(tool="shell.run", arguments={}, workspace="/"))
        recorder.outcome(CALL, outcome)
        recorder.close()
    assert bench.verify().status is Exit.OK
    found = [entry for _, entry in read_entries(bench.trace)]
    (body,) = [dict(entry.body) for entry in found if entry.kind is EntryKind.CALL_OUTCOME]
    return body


def test_what_seccomp_refused_is_recorded_with_its_count(tmp_path: Path) -> None:
    refused = tuple(
        Refused(syscall=name, count=count, remedy="a long line for people")
        for name, count in (("ptrace", 7), ("system call 4294967295", 1))
    )
    body = body_of(tmp_path, Outcome(call="c1", refused=refused))
    assert body["refused"] == [
        {"syscall": "ptrace", "count": 7}, {"syscall": "system call 4294967295", "count": 1},
    ]  # fmt: skip


def test_a_flood_of_names_fits_an_entry(tmp_path: Path) -> None:
    refused = tuple(Refused(syscall=f"call {n}", count=1, remedy="") for n in range(512))
    recorded = body_of(tmp_path, Outcome(call="c1", refused=refused))["refused"]
    assert len(cast("list[object]", recorded)) == 64


def test_the_limit_that_ended_a_call_is_recorded(tmp_path: Path) -> None:
    body = body_of(tmp_path, Outcome(call="c1", limit="inodes"))
    assert (body["status"], body["code"], body["limit"]) == ("limit", "limit.inodes", "inodes")
    assert "refused" not in body
