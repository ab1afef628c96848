"""Recording: durable as promised, one writer, refusing after a failure, whole after a crash."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from safeconduct.attestation import SignerClient, TraceWriter, read_entries, read_opened
from safeconduct.attestation.privacy.opened import Missing, Opening
from safeconduct.attestation.privacy.openings import INLINE_BYTES
from safeconduct.attestation.writing.journal_writer import Journal
from safeconduct.call import Durability, EntryKind, Json
from safeconduct.errors import Exit, TraceInvalid

from .kit import Bench, record_call, write_trace  # noqa: TID251 - the tests' own kit

_CHILD = """
import sys
from pathlib import Path
from safeconduct.attestation import SignerClient, TraceWriter
from safeconduct.call import Durability, EntryKind
trace, key, state, limit = sys.argv[1:]
signer = SignerClient.start(Path(key), state=Path(state), forbidden=[Path(trace)])
writer = TraceWriter.open(Path(trace), signer=signer)
session = writer.open_session("local", "sdk")
if int(limit):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
ran = 0
try:
    while ran < 100_000:
        writer.append(
            EntryKind.CALL_INTENT,
            {"call": f"c{ran}", "tool": "t", "caller": "l", "origin": "o"},
            session=session,
            committed={"document": {"tool": "t", "arguments": {}, "workspace": "/"}},
            durability=Durability.SYNC if ran % 7 == 0 else Durability.VOLATILE,
        )
        ran += 1
        print(ran, flush=True)
except Exception as error:
    print(error.code, flush=True)
    try:
        writer.append(EntryKind.POLICY_LOAD, {"policy": "p"}, session=writer.session)
    except Exception as again:
        print(again.code, flush=True)
    try:
        writer.close()
    except Exception as closing:
        print(closing.code, flush=True)
"""


def start_child(bench: Bench, *, limit: int = 0) -> subprocess.Popen[str]:
    source = str(Path(__file__).parents[2] / "src")
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, bench.trace, bench.key, bench.state, str(limit)],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": source, "PATH": os.environ["PATH"]},
    )


def reopen(bench: Bench) -> None:
    signer = bench.signer()
    try:
        TraceWriter.open(bench.trace, signer=signer).close()
    finally:
        signer.close()


def kinds(trace: Path) -> list[str]:
    return [entry.kind.value for _, entry in read_entries(trace)]


def test_a_recorded_call_verifies_and_opens_again(bench: Bench, signer: SignerClient) -> None:
    large = os.urandom(INLINE_BYTES + 1)
    with TraceWriter.open(bench.trace, signer=signer) as writer:
        session = writer.open_session("alice", "sdk", workspace="ws1")
        intent = record_call(writer, session, "c1", path="/ws/é")
        writer.append(
            EntryKind.CALL_INTENT,
            {"call": "c2", "tool": "t", "caller": "l", "origin": "o"},
            session=session,
            committed={"document": {"tool": "t", "arguments": {"x": 0.5}, "workspace": "/"}},
            durability=Durability.SYNC,
        )
        writer.append(
            EntryKind.CALL_OUTCOME,
            {"call": "c2", "status": "ok"},
            session=session,
            committed={"stdout": large, "stderr": b"\x1b[31m\n"},
        )
        writer.close_session(session)
    report = bench.verify()
    assert (report.status, report.level, report.calls, report.complete) == (Exit.OK, 1, 2, True)
    opened = {index: found for index, _, found in read_opened(bench.trace)}
    document = opened[intent]["document"]
    assert isinstance(document, Opening)
    assert document.json()["arguments"] == {"path": "/ws/é"}
    stdout = opened[intent + 4]["stdout"]
    assert isinstance(stdout, Opening)
    assert stdout.data == large
    in_clear = b"".join(
        path.read_bytes() for path in bench.trace.glob("tile/entries/**/*") if path.is_file()
    )
    assert "/ws/é".encode() not in in_clear
    for private in ("openings", "blobs", "journal"):
        assert (bench.trace / private).stat().st_mode & 0o077 == 0
    assert b"safeconduct trace verify" in (bench.trace / "README").read_bytes()


def test_openings_can_be_erased_and_false_ones_are_reported(bench: Bench) -> None:
    trace = write_trace(bench, calls=2)
    (openings,) = (trace / "openings").iterdir()
    lines = openings.read_text().splitlines()
    forged = json.loads(lines[0])
    forged["value"] = forged["value"].replace("/ws/a", "/ws/b")
    openings.write_text("\n".join([json.dumps(forged), "garbage", *lines[5:]]) + "\n")
    found = [opening for _, _, openings in read_opened(trace) for opening in openings.values()]
    codes = [one.code for one in found if isinstance(one, Missing)]
    assert codes[0] == "opening.false"
    assert set(codes[1:]) == {"opening.missing"}
    shutil.rmtree(trace / "openings")
    assert bench.verify().status == Exit.OK


def test_a_second_writer_is_refused(bench: Bench, signer: SignerClient) -> None:
    with TraceWriter.open(bench.trace, signer=signer):
        with pytest.raises(TraceInvalid) as caught:
            TraceWriter.open(bench.trace, signer=signer)
        assert caught.value.code == "trace.locked"
    TraceWriter.open(bench.trace, signer=signer).close()


def test_foreign_folders_other_logs_and_other_keys_are_refused(
    bench: Bench, signer: SignerClient, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(TraceInvalid) as caught:
        TraceWriter.open(tmp_path / "home", signer=signer)
    assert caught.value.code == "trace.foreign"
    write_trace(bench, calls=1)
    with pytest.raises(TraceInvalid) as caught:
        TraceWriter.open(bench.trace, origin="example.org/other", signer=signer)
    assert caught.value.code == "trace.origin"
    from safeconduct.attestation import write_key

    write_key(tmp_path / "eve.key", "example.org/eve")
    eve = SignerClient.start(tmp_path / "eve.key", state=tmp_path / "eve")
    with pytest.raises(TraceInvalid) as caught:
        TraceWriter.open(bench.trace, signer=eve)
    assert caught.value.code == "trace.key"
    eve.close()


def in_a_fork(work: Callable[[], list[str]]) -> list[str]:
    """Return the words that ``work`` gives in a fork of this process."""
    ours, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(theirs, " ".join(work()).encode())
        except BaseException as error:
            os.write(theirs, f"raised {error!r}".encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        words = answer.read().split()
    os.waitpid(pid, 0)
    return words


def test_a_fork_records_nothing_and_disturbs_nothing(bench: Bench, signer: SignerClient) -> None:
    with TraceWriter.open(bench.trace, signer=signer) as writer:
        session = writer.open_session("local", "sdk")
        record_call(writer, session, "c1")

        def work() -> list[str]:
            codes: list[str] = []
            for attempt in (
                lambda: record_call(writer, session, "forked"),
                lambda: writer.open_session("local", "sdk"),
                writer.checkpoint,
                lambda: signer.last(writer.origin),
            ):
                try:
                    attempt()
                except TraceInvalid as error:
                    codes.append(error.code)
            writer.close_session(session)
            writer.close()
            signer.close()
            return codes

        assert in_a_fork(work) == ["trace.forked"] * 3 + ["signer.forked"]
        with pytest.raises(TraceInvalid) as caught:  # the lock is still ours
            TraceWriter.open(bench.trace, signer=signer)
        assert caught.value.code == "trace.locked"
        record_call(writer, session, "c2")
        writer.close_session(session)
    report = bench.verify()
    assert (report.status, report.calls, report.sessions) == (Exit.OK, 2, 1)


def test_a_fork_does_not_wait_for_a_lock_that_was_held(bench: Bench, signer: SignerClient) -> None:
    with TraceWriter.open(bench.trace, signer=signer) as writer:

        def work() -> list[str]:
            try:
                writer.open_session("local", "sdk")
            except TraceInvalid as error:
                writer.close()
                return [error.code]
            return []

        with writer._lock:  # pyright: ignore[reportPrivateUsage]
            assert in_a_fork(work) == ["trace.forked"]


def test_what_may_not_be_recorded_is_refused_alone(bench: Bench, signer: SignerClient) -> None:
    with TraceWriter.open(bench.trace, signer=signer) as writer:
        session = writer.open_session("local", "sdk")
        bad: list[tuple[EntryKind, dict[str, Json], str]] = [
            (EntryKind.CALL_OUTCOME, {"call": "c", "status": "ok"}, "call.unknown"),
            (EntryKind.CALL_INTENT, {"call": "c"}, "trace.body"),
            (EntryKind.SESSION_CLOSE, {"status": "closed"}, "trace.body"),
            (EntryKind.POLICY_LOAD, {"policy": "two\nlines"}, "trace.body"),
            (EntryKind.POLICY_LOAD, {"policy": "p", "note": 0.5}, "trace.encoding"),
            (EntryKind.POLICY_LOAD, {"policy": "p", "note": "x" * 70_000}, "trace.too_large"),
        ]
        for kind, body, code in bad:
            with pytest.raises(TraceInvalid) as caught:
                writer.append(kind, body, session=session)
            assert caught.value.code == code
        with pytest.raises(TraceInvalid) as caught:
            writer.append(EntryKind.POLICY_LOAD, {"policy": "p"}, session="nobody")
        assert caught.value.code == "chain.start"
        record_call(writer, session, "c1")
    assert bench.verify().status == Exit.OK


def test_checkpoints_by_count_cover_full_tiles_and_drop_partials(bench: Bench) -> None:
    trace = write_trace(bench, calls=300, sessions=3)
    assert (trace / "tile/entries/000").exists()
    assert not (trace / "tile/entries/000.p").exists()
    assert (trace / "tile/0/002").stat().st_size == 256 * 32
    assert list((trace / "journal").glob("*.wal")) == []
    report = bench.verify()
    assert (report.status, report.sessions, report.calls) == (Exit.OK, 3, 300)
    write_trace(bench, calls=5)
    assert bench.verify().calls == 305


def test_a_second_of_activity_is_signed_without_being_asked(
    bench: Bench, signer: SignerClient
) -> None:
    with TraceWriter.open(bench.trace, signer=signer) as writer:
        session = writer.open_session("local", "sdk")
        record_call(writer, session, "c1")
        for _ in range(100):
            if bench.verify().size == writer.size:
                break
            threading.Event().wait(0.1)
        report = bench.verify()
    assert (report.size, report.unsigned) == (5, 0)
    assert report.status == Exit.INCOMPLETE  # both sessions are open: the log is being written


def test_threads_share_one_log(bench: Bench, signer: SignerClient) -> None:
    failures: list[BaseException] = []

    def work(writer: TraceWriter, name: int) -> None:
        try:
            session = writer.open_session("local", "sdk")
            for number in range(40):
                writer.append(
                    EntryKind.CALL_INTENT,
                    {"call": f"c{number}", "tool": "t", "caller": "l", "origin": str(name)},
                    session=session,
                    committed={"document": {}},
                    durability=Durability.SYNC,
                )
            writer.close_session(session)
        except BaseException as error:
            failures.append(error)

    with TraceWriter.open(bench.trace, signer=signer) as writer:
        threads = [threading.Thread(target=work, args=(writer, name)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failures == []
    report = bench.verify()
    assert (report.status, report.calls, report.sessions) == (Exit.OK, 320, 8)


def test_disk_full_poisons_the_writer_and_signs_nothing_torn(bench: Bench) -> None:
    child = start_child(bench, limit=60_000)
    output, _ = child.communicate(timeout=60)
    *acknowledged, first, again, closing = output.split()
    assert (first, again, closing) == ("trace.write_failed",) * 3
    signed = bench.verify().size
    reopen(bench)
    report = bench.verify()
    assert report.status == Exit.OK
    assert report.calls in (len(acknowledged), len(acknowledged) + 1)
    assert report.size > signed


def test_a_failing_sync_is_never_retried(
    bench: Bench, signer: SignerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = TraceWriter.open(bench.trace, signer=signer)
    session = writer.open_session("local", "sdk")

    def fail(self: Journal, index: int) -> None:
        from safeconduct.attestation.journal import write_failed

        raise write_failed(OSError(5, "Input/output error"))

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "sync", fail)
        with pytest.raises(TraceInvalid) as caught:
            writer.append(
                EntryKind.CALL_INTENT,
                {"call": "c", "tool": "t", "caller": "l", "origin": "o"},
                session=session,
                committed={"document": {}},
                durability=Durability.SYNC,
            )
    assert caught.value.code == "trace.write_failed"
    for attempt in (writer.checkpoint, lambda: record_call(writer, session, "d"), writer.close):
        with pytest.raises(TraceInvalid):
            attempt()


@pytest.mark.parametrize("rounds", range(5))
def test_killed_writer_loses_nothing_acknowledged(bench: Bench, rounds: int) -> None:
    child = start_child(bench)
    assert child.stdout is not None
    last = 0
    for _ in range(50 + 60 * rounds):
        last = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read().split("\n")[:-1]
    child.wait(30)
    child.stdout.close()
    last = int(rest[-1]) if rest else last
    before = bench.verify()
    assert before.status in (Exit.INCOMPLETE, Exit.OK)
    assert "trace.root" not in {one.code for one in before.findings}
    reopen(bench)
    report = bench.verify()
    assert (report.status, report.recoveries) == (Exit.OK, 1)
    assert report.calls in (last, last + 1)
    outcomes = [e for _, e in read_entries(bench.trace) if e.kind is EntryKind.CALL_OUTCOME]
    assert {entry.body["status"] for entry in outcomes} == {"unknown"}
    assert len(outcomes) == report.calls


def crashed(bench: Bench) -> Path:
    """Return a copy of a trace as a killed writer leaves it: entries 0-1 signed, four more not."""
    signer = bench.signer()
    with TraceWriter.open(bench.trace, signer=signer) as writer:
        session = writer.open_session("local", "sdk")
        writer.checkpoint()
        record_call(writer, session, "c1")
        copy = bench.root / "crashed"
        shutil.copytree(bench.trace, copy, symlinks=True)
        state = bench.root / "state-then"
        shutil.copytree(bench.state, state)
    signer.close()
    shutil.rmtree(bench.state)
    state.rename(bench.state)
    return copy


@pytest.mark.parametrize("room", [False, True], ids=["grown", "room set aside"])
def test_journal_torn_at_every_byte_recovers(bench: Bench, room: bool) -> None:
    copy = crashed(bench)
    (wal,) = (copy / "journal").glob("*.wal")
    aside = wal.stat().st_size
    whole = wal.read_bytes().rstrip(b"\0")
    assert aside > len(whole)
    signer = bench.signer()
    state_then = bench.root / "state-kept"
    shutil.copytree(bench.state, state_then)
    ends, entry_ends = {0}, {0}
    at = 0
    while at < len(whole):
        length = int.from_bytes(whole[at : at + 4], "big")
        at += 12 + (length & ~(1 << 31))
        ends.add(at)
        if not length >> 31:  # else it is the openings of the entry before
            entry_ends.add(at)
    signed_bytes = sorted(entry_ends)[2]
    step = max(1, (len(whole) - signed_bytes) // 120)
    offsets = {*range(signed_bytes, len(whole), step), *(end - 1 for end in ends), *ends}
    for cut in sorted(offset for offset in offsets if offset >= signed_bytes):
        shutil.rmtree(bench.trace)
        shutil.copytree(copy, bench.trace)
        shutil.rmtree(bench.state)
        shutil.copytree(state_then, bench.state)
        torn = whole[max(end for end in ends if end <= cut) : cut]
        data = whole[:cut].ljust(aside if room else 0, b"\0")
        (bench.trace / "journal" / wal.name).write_bytes(data)
        TraceWriter.open(bench.trace, signer=signer).close()
        report = bench.verify()
        kept = sum(end <= cut for end in entry_ends) - 1
        assert (report.status, report.recoveries) == (Exit.OK, 1), cut
        recovered = next(e for _, e in read_entries(bench.trace) if e.kind == "log.recovered")
        dropped = torn.rstrip(b"\0") if room else torn
        assert recovered.body["dropped_bytes"] == len(dropped)
        assert recovered.body["dropped_sha256"] == sha256(dropped).hexdigest()
        assert kinds(bench.trace)[:kept] == kinds(copy)[:kept]
        found = [one for _, _, openings in read_opened(bench.trace) for one in openings.values()]
        assert not [one for one in found if getattr(one, "code", "") == "opening.false"]
    signer.close()


def test_a_journal_torn_inside_what_was_signed_is_not_continued(bench: Bench) -> None:
    copy = crashed(bench)
    (wal,) = (copy / "journal").glob("*.wal")
    wal.write_bytes(wal.read_bytes()[:10])
    signer = bench.signer()
    with pytest.raises(TraceInvalid) as caught:
        TraceWriter.open(copy, signer=signer)
    assert caught.value.code == "trace.corrupt"
    signer.close()


def test_a_rolled_back_trace_is_not_continued(bench: Bench, signer: SignerClient) -> None:
    write_trace(bench, calls=1)
    shutil.copytree(bench.trace, bench.root / "old")
    write_trace(bench, calls=1)
    with pytest.raises(TraceInvalid) as caught:
        TraceWriter.open(bench.root / "old", signer=signer)
    assert caught.value.code == "trace.rollback"
