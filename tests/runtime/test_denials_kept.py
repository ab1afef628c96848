"""What was counted of denials is recorded whatever comes between: a quota, a Ctrl-C, a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest
from tests.attestation.kit import NAME, Bench

from safeconduct.attestation import TraceWriter, read_entries, write_key
from safeconduct.call import (
    Call,
    Decision,
    Document,
    Durability,
    Effect,
    EntryKind,
    Json,
    Outcome,
)
from safeconduct.errors import Denied, Exit, TraceInvalid
from safeconduct.runtime.denials import WRITTEN_OUT, Counted, Denial, Denials
from safeconduct.runtime.record import Recorder

SECRET, OTHER = "/etc/shadow", "ls"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, write_key(tmp_path / "alice.key", NAME))


@pytest.fixture
def writer(bench: Bench) -> Generator[TraceWriter]:
    with (
        closing(bench.signer()) as signer,
        TraceWriter.open(bench.trace, signer=signer, quota_bytes=1 << 18) as writer,
    ):
        yield writer


@pytest.fixture
def recorder(writer: TraceWriter) -> Recorder:
    return Recorder(writer, caller="local", origin="test")


def begin(recorder: Recorder, name: str, effect: Effect, path: str = SECRET) -> Call:
    call = Call(id=name, tool="fs.read", arguments={}, session=recorder.session)
    recorder.intent(call, Document(tool="fs.read", arguments={"path": path}, workspace="/ws"))
    decision = Decision(
        effect=effect, policy="p", code="policy.x", reason="r", durability=Durability.SYNC
    )
    recorder.decision(call, decision)
    return call


def deny(recorder: Recorder, name: str, path: str = SECRET) -> None:
    call = begin(recorder, name, Effect.DENY, path)
    recorder.failure(call, Denied("no", code="policy.x"))


def fill(writer: TraceWriter) -> None:
    """Have another session take what is left of the quota."""
    other = writer.open_session("other", "test")

    def add(number: int) -> None:
        body: dict[str, Json] = {"call": f"f{number}", "tool": "t", "caller": "c", "origin": "o"}
        committed: dict[str, Json | bytes] = {"document": "x" * 12_000}
        writer.append(EntryKind.CALL_INTENT, body, session=other, committed=committed, more=True)

    with pytest.raises(TraceInvalid, match="quota"):
        deque(map(add, range(1000)), maxlen=0)


def recorded(bench: Bench, session: str) -> list[tuple[str, str, int]]:
    return [
        (entry.body["call"], entry.body["status"], entry.body.get("repeats", 1))
        for _, entry in read_entries(bench.trace)
        if entry.kind is EntryKind.CALL_OUTCOME and entry.session == session
    ]


def test_at_the_quota_what_was_counted_and_what_ran_is_recorded(
    bench: Bench, writer: TraceWriter, recorder: Recorder
) -> None:
    ran = begin(recorder, "ran", Effect.ALLOW)
    for number in range(20):
        deny(recorder, f"d{number}")
    fill(writer)
    recorder.outcome(ran, Outcome(call=ran.id, stdout=b"done" * 10_000))
    deny(recorder, "d20")
    recorder.close()
    writer.checkpoint()
    found = recorded(bench, recorder.session)[WRITTEN_OUT:]
    assert found[0][:2] in (("d19", "denied"), ("d18", "denied"))  # or a second went by before
    assert sum(count for name, _, count in found if name != "ran") == 21 - WRITTEN_OUT
    assert ("ran", "ok", 1) in found
    assert bench.verify().status in (Exit.OK, Exit.INCOMPLETE)


def test_at_the_quota_no_new_kind_of_denial_is_counted(
    writer: TraceWriter, recorder: Recorder
) -> None:
    fill(writer)
    size = writer.size
    for number in range(4 * WRITTEN_OUT):
        with pytest.raises(TraceInvalid, match="quota"):
            deny(recorder, f"d{number}")
    assert writer.size == size


def test_a_call_that_the_quota_refused_leaves_nothing_behind(
    writer: TraceWriter, recorder: Recorder
) -> None:
    fill(writer)
    for number in range(10):
        with pytest.raises(TraceInvalid, match="quota"):
            begin(recorder, f"a{number}", Effect.ALLOW)
    assert recorder._open == {}  # pyright: ignore[reportPrivateUsage]


def test_a_session_ends_though_its_last_count_cannot_be_recorded(
    bench: Bench, writer: TraceWriter, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(WRITTEN_OUT + 2):
        deny(recorder, f"d{number}")

    def refuse(*_: object, **__: object) -> int:
        raise TraceInvalid("no", code="trace.too_large")

    with monkeypatch.context() as broken:
        broken.setattr(TraceWriter, "append", refuse)
        with pytest.raises(TraceInvalid, match="no"):
            recorder.close()
    writer.checkpoint()
    kinds = [one.kind for _, one in read_entries(bench.trace) if one.session == recorder.session]
    assert kinds[-1] is EntryKind.SESSION_CLOSE


def test_an_interrupted_record_of_a_count_is_finished(
    bench: Bench, writer: TraceWriter, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(WRITTEN_OUT + 3):
        deny(recorder, f"d{number}")
    real = TraceWriter.append

    def interrupted(
        self: TraceWriter, kind: EntryKind, body: dict[str, Json], **options: object
    ) -> int:
        if kind is EntryKind.CALL_DECISION:
            raise KeyboardInterrupt
        return real(self, kind, body, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(TraceWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recorder.policy_kept("p", Denied("no", code="policy.x"))
    deny(recorder, "later")
    recorder.close()
    writer.checkpoint()
    assert recorded(bench, recorder.session)[WRITTEN_OUT:] == [
        (f"d{WRITTEN_OUT + 2}", "denied", 3), ("later", "denied", 1),
    ]  # fmt: skip
    assert bench.verify().status in (Exit.OK, Exit.INCOMPLETE)


def test_denials_are_counted_as_what_they_are_though_others_come_between() -> None:
    written: list[tuple[Json, int]] = []
    counting = Denials(lambda one: written.append((one.last.judged["path"], one.count)))

    def counted(path: str) -> bool:
        said: dict[str, Json] = {"effect": "deny", "code": "c", "rules": [], "policy": "p"}
        call = Call(id=path, tool="t", arguments={}, session="s")
        return counting.counts(
            Denial(call=call, intent={"call": "x"}, judged={"path": path}, decision=said)
        )

    assert [counted(SECRET) for _ in range(WRITTEN_OUT + 10)].count(True) == 10
    # As from threads of which none has come to its record yet.
    assert [counted(OTHER) for _ in range(WRITTEN_OUT + 1)].count(True) == 1
    assert counting.waiting == 11
    counting.flush()
    assert (written, counting.waiting) == ([(SECRET, 10), (OTHER, 1)], 0)


def test_what_could_not_be_recorded_goes_on_waiting() -> None:
    written: list[int] = []
    refused = [TraceInvalid("later", code="trace.quota")]

    def write(one: Counted) -> None:
        if refused:
            raise refused.pop()
        written.append(one.count)

    counting = Denials(write)
    said: dict[str, Json] = {"effect": "deny", "code": "c", "rules": [], "policy": "p"}
    call = Call(id="c", tool="t", arguments={}, session="s")
    denial = Denial(call=call, intent={"call": "x"}, judged={}, decision=said)
    for _ in range(WRITTEN_OUT + 3):
        counting.counts(denial)
    with pytest.raises(TraceInvalid, match="later"):
        counting.flush()
    assert counting.waiting == 3
    counting.flush()
    assert written == [3]
