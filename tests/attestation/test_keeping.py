"""How a trace is kept: group commit for threads and tasks, quota, heartbeats, heads that stay."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeconduct.attestation import Checkpoint, SignerClient, TraceWriter, read_entries, read_opened
from safeconduct.attestation.bodies import spell_body
from safeconduct.attestation.encoding import require_plain, spell
from safeconduct.attestation.entry import require_body
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.journal import JournalTail, journal_path, read_frames
from safeconduct.attestation.note import Note
from safeconduct.attestation.privacy.opened import Opening
from safeconduct.attestation.writing.checkpointing import CHECKPOINT_ENTRIES
from safeconduct.call import Durability, EntryKind, Json
from safeconduct.errors import Exit, TraceInvalid

from .kit import Bench, record_call  # noqa: TID251 - the tests' own kit

_WAIT_S = 20.0


def intend(writer: TraceWriter, session: str, call: str, durability: Durability) -> int:
    return writer.append(
        EntryKind.CALL_INTENT,
        {"call": call, "tool": "t", "caller": "l", "origin": "o"},
        session=session,
        committed={"document": {"tool": "t", "arguments": {}, "workspace": "/"}},
        durability=durability,
    )


def fill(writer: TraceWriter, session: str) -> None:
    for number in range(1000):
        record_call(writer, session, f"c{number}")


def until(happened: Callable[[], bool]) -> None:
    for _ in range(int(_WAIT_S / 0.05)):
        if happened():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it did not happen in time")


def test_tasks_of_one_loop_share_syncs(bench: Bench, signer: SignerClient) -> None:
    syncs: list[int] = []
    real = os.fdatasync
    with TraceWriter.open(bench.trace, signer=signer) as writer, pytest.MonkeyPatch.context() as at:
        session = writer.open_session("local", "sdk")

        def fdatasync(fd: int) -> None:
            syncs.append(fd)
            real(fd)

        at.setattr(os, "fdatasync", fdatasync)

        async def one(number: int) -> int:
            return await writer.append_async(
                EntryKind.CALL_INTENT,
                {"call": f"c{number}", "tool": "t", "caller": "l", "origin": "o"},
                session=session,
                committed={"document": {}},
            )

        async def many() -> list[int]:
            return await asyncio.gather(*(one(number) for number in range(200)))

        indices = asyncio.run(many())
    assert sorted(indices) == list(range(indices[0], indices[0] + 200))
    assert len(syncs) < 60
    assert bench.verify().calls == 200


def test_a_batch_entry_reaches_the_disk_in_time(bench: Bench, signer: SignerClient) -> None:
    reached = threading.Event()
    real = os.fdatasync
    with TraceWriter.open(bench.trace, signer=signer, batch_s=0.005) as writer:
        session = writer.open_session("local", "sdk")
        writer.checkpoint()
        journal = next((bench.trace / "journal").glob("*.wal"))
        with pytest.MonkeyPatch.context() as patch:

            def fdatasync(fd: int) -> None:
                real(fd)
                if os.readlink(f"/proc/self/fd/{fd}") == str(journal):
                    reached.set()

            patch.setattr(os, "fdatasync", fdatasync)
            intend(writer, session, "c", Durability.BATCH)
            assert reached.wait(0.5)  # a checkpoint would come after a second only


def test_a_sync_intent_brings_its_opening_to_the_disk(bench: Bench, signer: SignerClient) -> None:
    with TraceWriter.open(bench.trace, signer=signer) as writer:
        session = writer.open_session("local", "sdk")
        writer.checkpoint()
        intend(writer, session, "c", Durability.SYNC)
        journal = next((bench.trace / "journal").glob("*.wal")).read_bytes()
        assert b'"call":"c"' in journal
        assert b'"field":"document"' in journal


def test_beyond_the_quota_nothing_is_begun_and_everything_may_end(
    bench: Bench, signer: SignerClient
) -> None:
    with TraceWriter.open(bench.trace, signer=signer, quota_bytes=40_000) as writer:
        session = writer.open_session("local", "sdk")
        intend(writer, session, "running", Durability.VOLATILE)
        with pytest.raises(TraceInvalid) as caught:
            fill(writer, session)
        assert caught.value.code == "trace.quota"
        with pytest.raises(TraceInvalid) as caught:
            writer.open_session("local", "sdk")
        assert caught.value.code == "trace.quota"
        done: dict[str, Json] = {"call": "running", "status": "ok"}
        writer.append(EntryKind.CALL_OUTCOME, done, session=session)
    assert bench.verify().status == Exit.OK
    with (
        TraceWriter.open(bench.trace, signer=signer, quota_bytes=40_000) as writer,
        pytest.raises(TraceInvalid) as caught,
    ):
        writer.open_session("local", "sdk")
    assert caught.value.code == "trace.quota"
    with TraceWriter.open(bench.trace, signer=signer, quota_bytes=1 << 20) as writer:
        record_call(writer, writer.open_session("local", "sdk"), "again")
    assert bench.verify().status == Exit.OK


def test_an_idle_log_says_that_it_lives(bench: Bench, signer: SignerClient) -> None:
    with TraceWriter.open(bench.trace, signer=signer, heartbeat_s=0.1) as writer:
        session = writer.open_session("local", "sdk")
        intend(writer, session, "c", Durability.VOLATILE)

        def beats() -> list[dict[str, Json]]:
            return [e.body for _, e in read_entries(bench.trace) if e.kind == "heartbeat"]

        until(lambda: len(beats()) >= 2)
        assert beats()[0] == {"sessions": 1, "calls": 1}
        log = {e.session for _, e in read_entries(bench.trace) if e.kind == "heartbeat"}
        assert log == {writer.session}
    assert bench.verify().status == Exit.OK


def test_a_run_names_its_boot_and_hides_it(bench: Bench, signer: SignerClient) -> None:
    for _ in range(2):
        TraceWriter.open(bench.trace, signer=signer).close()
    boots = {e.body["boot"] for _, e in read_entries(bench.trace) if e.kind == "log.open"}
    assert len(boots) == 1
    raw = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert raw.replace("-", "") not in boots.pop()


def test_only_heads_that_mean_something_stay(bench: Bench, signer: SignerClient) -> None:
    published: list[Checkpoint] = []

    def hear(head: Checkpoint, note: bytes) -> None:
        assert Checkpoint.parse(Note.parse(note).text) == head
        stored = Note.parse((bench.trace / "checkpoint").read_bytes())
        assert Checkpoint.parse(stored.text) == head
        published.append(head)

    with TraceWriter.open(bench.trace, signer=signer, on_checkpoint=hear) as writer:
        session = writer.open_session("local", "sdk")
        for number in range(40):
            record_call(writer, session, f"c{number}")
            writer.checkpoint()
        size = writer.size
    assert len(published) > 40
    kept = sorted(int(path.name) for path in (bench.trace / "checkpoints").iterdir())
    assert kept == [size + 2]  # the run's last head: both sessions are closed in it
    widths = sorted(int(path.name) for path in (bench.trace / "tile/entries/000.p").iterdir())
    assert len(widths) <= 4
    assert bench.verify().status == Exit.OK


def test_a_long_log_is_taken_up_from_its_journal_alone(bench: Bench, signer: SignerClient) -> None:
    """What the writer noted of open sessions spares it reading the log; without it, it reads."""
    writer = TraceWriter.open(bench.trace, signer=signer)
    session = writer.open_session("local", "sdk")
    for number in range(2 * CHECKPOINT_ENTRIES):
        record_call(writer, session, f"c{number}")
    intend(writer, session, "open", Durability.VOLATILE)
    writer.empty_journal()
    intend(writer, session, "later", Durability.VOLATILE)
    writer._health.failure = TraceInvalid("killed", code="x")  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(TraceInvalid):
        writer.close()
    (noted,) = (bench.trace / "journal").glob("*.sessions")
    assert int(noted.stem) > 6 * CHECKPOINT_ENTRIES
    calls = json.loads(noted.read_bytes())[session]["calls"]
    assert list(calls) == ["open"]
    with pytest.MonkeyPatch.context() as patch:
        from safeconduct.attestation.writing import recovery

        patch.delattr(recovery, "stored_entries")  # it may not be read
        TraceWriter.open(bench.trace, signer=signer).close()
    outcomes = [e.body for _, e in read_entries(bench.trace) if e.body.get("status") == "unknown"]
    assert [body["call"] for body in outcomes] == ["open", "later"]
    assert bench.verify().status == Exit.OK
    opened = {index: found for index, _, found in read_opened(bench.trace) if found}
    assert all(isinstance(one, Opening) for found in opened.values() for one in found.values())


def test_nothing_new_stands_behind_what_a_failed_disk_may_have_lost(
    bench: Bench, signer: SignerClient
) -> None:
    """After a write that failed, the kernel may show pages that the disk has not."""
    writer = TraceWriter.open(bench.trace, signer=signer)
    session = writer.open_session("local", "sdk")
    writer.checkpoint()
    intend(writer, session, "old", Durability.VOLATILE)
    writer._health.failure = TraceInvalid("EIO", code="x")  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(TraceInvalid):
        writer.close()
    (left,) = (bench.trace / "journal").glob("*.wal")
    shown = left.read_bytes()
    assert b'"call":"old"' in shown
    writer = TraceWriter.open(bench.trace, signer=signer)
    session = writer.open_session("local", "sdk")
    intend(writer, session, "new", Durability.SYNC)
    writer._health.failure = TraceInvalid("killed", code="x")  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(TraceInvalid):
        writer.close()
    # The power goes: of the old file there is what the disk has.
    if left.exists():
        left.write_bytes(bytes(len(shown)) + left.read_bytes()[len(shown) :])
    TraceWriter.open(bench.trace, signer=signer).close()
    calls = [e.body["call"] for _, e in read_entries(bench.trace) if e.kind == "call.intent"]
    assert calls == ["old", "new"]
    assert bench.verify().status == Exit.OK


def test_a_journal_that_is_empty_is_turned_over_without_harm(
    bench: Bench, signer: SignerClient
) -> None:
    """Two erasures in a row empty it twice: what is recorded next must be found after a crash."""
    writer = TraceWriter.open(bench.trace, signer=signer)
    session = writer.open_session("local", "sdk")
    for _ in range(3):
        writer.empty_journal()
    intend(writer, session, "next", Durability.SYNC)
    writer.sign()
    crashed = bench.root / "crashed"
    shutil.copytree(bench.trace, crashed)
    tail = JournalTail()
    with Folder(crashed) as folder:
        frames = [one.data for one in read_frames(folder, tail) if not one.is_openings]
    assert any(b'"call":"next"' in data for data in frames)
    assert (tail.next_index, tail.dropped_bytes) == (writer.size, 0)
    writer.empty_journal()
    intend(writer, session, "last", Durability.SYNC)
    writer._health.failure = TraceInvalid("killed", code="x")  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(TraceInvalid):
        writer.close()
    TraceWriter.open(bench.trace, signer=signer).close()
    calls = [e.body["call"] for _, e in read_entries(bench.trace) if e.kind == "call.intent"]
    assert calls == ["next", "last"]
    assert bench.verify().status == Exit.OK


def test_the_journal_vectors(tmp_path: Path) -> None:
    vectors = Path(__file__).parents[1] / "vectors" / "trace" / "journal.json"
    for number, case in enumerate(json.loads(vectors.read_text())["cases"]):
        root = tmp_path / str(number)
        (root / "journal").mkdir(parents=True)
        (root / journal_path(0)).write_bytes(bytes.fromhex(case["file"]))
        tail = JournalTail()
        with Folder(root) as folder:
            frames = list(read_frames(folder, tail))
        assert [f.data.decode() for f in frames if not f.is_openings] == case["entries"]
        openings = [{"index": f.index, "lines": f.data.decode()} for f in frames if f.is_openings]
        assert openings == case["openings"], case["name"]
        assert tail.dropped_bytes == case["dropped_bytes"], case["name"]


_names = st.text(max_size=8) | st.sampled_from(["c1", "\x7f", "a\\b", "x" * 201, ""])
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | _names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=6,
)
_bodies = st.fixed_dictionaries(
    {},
    optional={
        name: _names | _values
        for name in (
            *("call", "tool", "caller", "origin", "parent", "effect", "code", "rules", "policy"),
            *("enforcement", "profile", "facts", "status", "usage", "held", "layers", "other"),
        )
    },
)
_KINDS = (EntryKind.CALL_INTENT, EntryKind.CALL_DECISION, EntryKind.CALL_OUTCOME)
_GOOD: dict[str, Json] = {
    "call": "c", "tool": "t", "caller": "l", "origin": "o", "effect": "allow", "code": "k",
    "rules": ["r"], "policy": "p", "enforcement": "object", "status": "ok",
}  # fmt: skip
_NEEDED = {
    EntryKind.CALL_INTENT: ("call", "tool", "caller", "origin"),
    EntryKind.CALL_DECISION: ("call", "effect", "code", "rules", "policy", "enforcement"),
    EntryKind.CALL_OUTCOME: ("call", "status"),
}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(_KINDS), _bodies)
def test_the_quick_way_accepts_what_the_rule_accepts(
    kind: EntryKind, extra: dict[str, Json]
) -> None:
    body = {name: _GOOD[name] for name in _NEEDED[kind]} | extra
    commitments: dict[str, Json] = {"document": {"commitment": "0" * 64}}

    def slow() -> bytes | None:
        try:
            require_plain(body)
            require_body(kind, {**body, **commitments})
            return spell({**body, **commitments})
        except TraceInvalid:
            return None

    def quick() -> bytes | None:
        try:
            return spell_body(kind, body, commitments)
        except TraceInvalid:
            return None

    assert quick() == slow()
