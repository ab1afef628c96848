"""Repeated identical denials: the first few whole, then one record that says for how many."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from safeconduct.attestation import (
    SignerClient,
    TraceWriter,
    read_entries,
    verify_trace,
    write_key,
)
from safeconduct.call import Call, Decision, Document, Effect, EntryKind
from safeconduct.errors import Denied, Exit
from safeconduct.runtime import denials
from safeconduct.runtime.record import Recorder


def deny(recorder: Recorder, name: str, path: str, effect: Effect = Effect.DENY) -> None:
    call = Call(id=name, tool="fs.read", arguments={"path": path}, session=recorder.session)
    document = Document(tool="fs.read", arguments={"path": path}, workspace="/ws")
    decision = Decision(effect=effect, policy="p", code="policy.no_rule", reason="no")
    recorder.intent(call, document)
    recorder.decision(call, decision)
    recorder.failure(call, Denied("no", code="policy.no_rule"))


def outcomes(trace: Path) -> list[tuple[str, int]]:
    return [
        (entry.body["call"], entry.body.get("repeats", 1))
        for _, entry in read_entries(trace)
        if entry.kind is EntryKind.CALL_OUTCOME
    ]


@pytest.fixture
def key(tmp_path: Path) -> str:
    return write_key(tmp_path / "key", "example.org/alice")


def test_a_loop_of_denials_is_counted(tmp_path: Path, key: str) -> None:
    trace = tmp_path / "trace"
    signer = SignerClient.start(tmp_path / "key", state=tmp_path / "state")
    with TraceWriter.open(trace, signer=signer) as writer:
        recorder = Recorder(writer, caller="local", origin="test")
        for number in range(500):
            deny(recorder, f"a{number}", "/etc/shadow")
        deny(recorder, "b", "/etc/passwd")
        deny(recorder, "again", "/etc/shadow")
        recorder.close()
    signer.close()
    found = outcomes(trace)
    whole, counted = found[: denials.WRITTEN_OUT], found[denials.WRITTEN_OUT : -2]
    assert [call for call, _ in whole] == [f"a{n}" for n in range(denials.WRITTEN_OUT)]
    assert [repeats for _, repeats in whole] == [1] * denials.WRITTEN_OUT
    # One, or more where a second passed meanwhile; the last names the last call.
    assert sum(repeats for _, repeats in counted) == 500 - denials.WRITTEN_OUT
    assert counted[-1][0] == "a499"
    assert len(counted) < 100
    assert found[-2:] == [("b", 1), ("again", 1)]
    report = verify_trace(trace, [key])
    assert (report.status, report.complete) == (Exit.OK, True)


def test_what_was_counted_is_recorded_within_a_second(tmp_path: Path, key: str) -> None:
    trace = tmp_path / "trace"
    signer = SignerClient.start(tmp_path / "key", state=tmp_path / "state")
    with TraceWriter.open(trace, signer=signer) as writer:
        recorder = Recorder(writer, caller="local", origin="test")
        for number in range(denials.WRITTEN_OUT + 3):
            deny(recorder, f"a{number}", "/etc/shadow")
        for _ in range(200):
            if sum(repeats for _, repeats in outcomes(trace)) == denials.WRITTEN_OUT + 3:
                break
            threading.Event().wait(0.05)
        assert outcomes(trace)[-1] == (f"a{denials.WRITTEN_OUT + 2}", 3)
    signer.close()
    assert verify_trace(trace, [key]).status == Exit.OK


def test_only_denials_are_counted(tmp_path: Path, key: str) -> None:
    trace = tmp_path / "trace"
    signer = SignerClient.start(tmp_path / "key", state=tmp_path / "state")
    with TraceWriter.open(trace, signer=signer) as writer:
        recorder = Recorder(writer, caller="local", origin="test")
        for number in range(20):
            deny(recorder, f"a{number}", "/etc/shadow", Effect.ASK)
    signer.close()
    assert len(outcomes(trace)) == 20
    assert verify_trace(trace, [key]).status == Exit.OK
