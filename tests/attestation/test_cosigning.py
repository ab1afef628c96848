"""A trace that is written while witnesses watch it, and what they notice that no log can show."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

import pytest

from safeconduct.attestation import (
    Report,
    TraceWriter,
    TrustPolicy,
    VerifierKey,
    load_key,
    verify_trace,
)
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import Note
from safeconduct.attestation.reader import read_checkpoint
from safeconduct.attestation.verify.trust import Verdict
from safeconduct.attestation.verify.witnessed import kept_notes, newest_witnessed
from safeconduct.attestation.witness.client import Answered
from safeconduct.attestation.witness.desk import Witness
from safeconduct.attestation.witness.state import WitnessState
from safeconduct.attestation.writing.cosigned import add_lines, store_cosignatures
from safeconduct.errors import Exit, TraceInvalid
from safeconduct.runtime.cosigning import Cosigning
from safeconduct.runtime.witnesses import FORKS, load_trust

from .kit import NAME, Bench, record_call  # noqa: TID251 - the tests' own kit
from .witness_kit import (  # noqa: TID251 - the tests' own kit
    NOW,
    OTHER_WITNESS,
    WITNESS,
    Clock,
    served,
)

OPERATOR = CosigningKey(f"{NAME}/witness", b"\x05" * 32)
_PATIENCE_S = 20.0


@pytest.fixture
def stack() -> Generator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def serve_witness(stack: ExitStack, bench: Bench, key: CosigningKey) -> int:
    state = WitnessState(bench.root / f"state-{key.verifier.id.hex()}")
    stack.callback(state.close)
    logs = [VerifierKey.parse(bench.key_line)]
    return stack.enter_context(served(Witness(key, logs, state)))


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number: int = taken.getsockname()[1]
    return number


def policy_of(bench: Bench, rule: str, *witnesses: tuple[CosigningKey, int]) -> TrustPolicy:
    lines = [f"log {bench.key_line}"]
    for number, (key, port) in enumerate(witnesses):
        lines.append(f"witness w{number} {key.verifier.line} http://127.0.0.1:{port}/")
    names = " ".join(f"w{number}" for number in range(len(witnesses)))
    return TrustPolicy.parse(
        "\n".join([*lines, f"group g {rule} {names}", "quorum g", ""]).encode()
    )


@dataclass
class Run:
    """One run of a writer whose heads are shown to witnesses."""

    writer: TraceWriter
    cosigning: Cosigning
    told: list[str] = field(default_factory=list[str])


@contextmanager
def running(
    bench: Bench,
    policy: TrustPolicy,
    *,
    interval_s: float = 0.05,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[Run]:
    told: list[str] = []
    signer = bench.signer()
    late: list[Cosigning] = []
    with ExitStack() as stack:
        stack.callback(signer.close)
        stack.callback(lambda: late[0].close())
        writer = TraceWriter.open(
            bench.trace,
            signer=signer,
            on_checkpoint=lambda head, note: late[0].noticed(head, note) if late else None,
        )
        stack.callback(writer.close)
        cosigning = Cosigning(
            policy,
            directory=bench.trace,
            origin=writer.origin,
            log_keys=lambda: [signer.key],
            tell=told.append,
            interval_s=interval_s,
            timeout_s=5.0,
            clock=clock,
        )
        late.append(cosigning)
        cosigning.attach_with(writer.add_cosignatures)
        yield Run(writer, cosigning, told)


def wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # the only way to see what a thread has done


def wait_until_witnessed(run: Run, size: int) -> None:
    run.cosigning.ask_soon()
    wait_for(lambda: (head := run.cosigning.witnessed) is not None and head.size >= size)


def judged(bench: Bench, policy: TrustPolicy) -> Verdict:
    with Folder(bench.trace) as folder:
        note, _ = read_checkpoint(folder)
    return policy.evaluate(note, keys=[VerifierKey.parse(bench.key_line)])


def test_every_head_that_stays_is_witnessed(bench: Bench, stack: ExitStack) -> None:
    ports = [serve_witness(stack, bench, key) for key in (WITNESS, OTHER_WITNESS)]
    policy = policy_of(bench, "all", (WITNESS, ports[0]), (OTHER_WITNESS, ports[1]))
    with running(bench, policy) as run:
        session = run.writer.open_session("local", "sdk")
        for number in range(3):
            record_call(run.writer, session, f"c{number}")
            wait_until_witnessed(run, run.writer.checkpoint().size)
        run.writer.close_session(session)
    verdict = judged(bench, policy)
    assert verdict.witnessed
    report = bench.verify()
    assert (report.status, report.size) == (Exit.OK, verdict.head.size)
    assert run.told == []
    with Folder(bench.trace) as folder:
        sizes = [head.size for head, note in kept_notes(folder) if len(note.signatures) == 3]
    assert sizes[0] == verdict.head.size
    # The log can be taken up again with such a head, and goes on to be witnessed.
    with running(bench, policy):
        pass
    assert judged(bench, policy).head.size > verdict.head.size
    assert judged(bench, policy).witnessed
    assert bench.verify().status is Exit.OK


def test_a_witness_that_is_away_lowers_the_level_and_blocks_nothing(
    bench: Bench, stack: ExitStack
) -> None:
    port = serve_witness(stack, bench, WITNESS)
    policy = policy_of(bench, "all", (WITNESS, port), (OTHER_WITNESS, closed_port()))
    began = time.monotonic()
    with running(bench, policy) as run:
        session = run.writer.open_session("local", "sdk")
        record_call(run.writer, session, "c0")
        run.writer.checkpoint()
        wait_for(lambda: any(one.answered for one in run.cosigning.standing()))
    assert time.monotonic() - began < 15
    verdict = judged(bench, policy)
    assert ([one.witness for one in verdict.cosigned], verdict.witnessed) == (["w0"], False)
    assert bench.verify().status is Exit.OK
    assert len(run.told) == 1
    assert "witness w1 did not cosign (unreachable" in run.told[0]


def test_a_witness_of_the_operator_counts_for_nothing(bench: Bench, stack: ExitStack) -> None:
    port = serve_witness(stack, bench, OPERATOR)
    policy = policy_of(bench, "any", (OPERATOR, port))
    with running(bench, policy) as run:
        run.writer.open_session("local", "sdk")
        run.writer.checkpoint()
        with pytest.raises(TraceInvalid) as refused:
            run.cosigning.require()
        assert refused.value.code == "trace.unwitnessed"
        assert [one.operator for one in run.cosigning.standing()] == [True]
    verdict = judged(bench, policy)
    assert verdict.satisfied
    assert not verdict.witnessed


def test_require_waits_for_a_quorum_and_bears_a_short_absence(
    bench: Bench, stack: ExitStack
) -> None:
    clock = Clock()
    with ExitStack() as inner:
        port = serve_witness(inner, bench, WITNESS)
        policy = policy_of(bench, "any", (WITNESS, port))
        run = stack.enter_context(running(bench, policy, interval_s=60, clock=clock))
        session = run.writer.open_session("local", "sdk")
        run.writer.checkpoint()
        run.cosigning.require()
        record_call(run.writer, session, "c0")
        head = run.writer.checkpoint()
        run.cosigning.require(covering=head.size)
        assert run.cosigning.witnessed == head
    # The witness is gone from here on.
    clock.now += 3600
    run.cosigning.require()  # all there is has been witnessed, however long ago
    record_call(run.writer, session, "c1")
    head = run.writer.checkpoint()
    run.cosigning.require()
    with pytest.raises(TraceInvalid, match="not witnessed as the policy requires"):
        run.cosigning.require(covering=head.size)
    clock.now += 181
    with pytest.raises(TraceInvalid) as refused:
        run.cosigning.require()
    assert refused.value.code == "trace.unwitnessed"
    assert "1 of (w0)" in refused.value.message


def test_a_slow_answer_about_an_earlier_head_is_waited_out(bench: Bench, stack: ExitStack) -> None:
    asked, go_on = Event(), Event()

    def slow() -> float:
        asked.set()
        assert go_on.wait(_PATIENCE_S)
        return time.time()

    state = WitnessState(bench.root / "state-slow")
    stack.callback(state.close)
    desk = Witness(WITNESS, [VerifierKey.parse(bench.key_line)], state, clock=slow)
    policy = policy_of(bench, "any", (WITNESS, stack.enter_context(served(desk))))
    with running(bench, policy, interval_s=60) as run:
        run.writer.open_session("local", "sdk")
        run.writer.checkpoint()
        assert asked.wait(_PATIENCE_S)
        run.writer.open_session("local", "sdk")
        head = run.writer.checkpoint()
        with ThreadPoolExecutor(1) as pool:
            required = pool.submit(run.cosigning.require, covering=head.size)
            go_on.set()
            required.result(_PATIENCE_S)
        assert run.cosigning.witnessed == head
    assert judged(bench, policy).witnessed


def test_what_a_witness_says_after_the_end_is_not_stored(bench: Bench, stack: ExitStack) -> None:
    asked, go_on = Event(), Event()

    def slow() -> float:
        asked.set()
        assert go_on.wait(_PATIENCE_S)
        return time.time()

    state = WitnessState(bench.root / "state-slow")
    stack.callback(state.close)
    desk = Witness(WITNESS, [VerifierKey.parse(bench.key_line)], state, clock=slow)
    policy = policy_of(bench, "any", (WITNESS, stack.enter_context(served(desk))))
    with running(bench, policy) as run:
        run.writer.open_session("local", "sdk")
        run.writer.checkpoint()
        assert asked.wait(_PATIENCE_S)
        run.writer.close()
        before = len(run.told)
        run.cosigning.close(0.2)
        asking = [one for one in threading.enumerate() if one.name == "trace-witness"]
        assert not any(one.name == "trace-witnesses" for one in threading.enumerate())
        stored = {path: path.read_bytes() for path in bench.trace.rglob("*") if path.is_file()}
        go_on.set()
        for one in asking:
            one.join(_PATIENCE_S)
            assert not one.is_alive()
        run.cosigning.close()
    after = {path: path.read_bytes() for path in bench.trace.rglob("*") if path.is_file()}
    assert (after == stored, len(run.told)) == (True, before)


def test_where_no_thread_starts_no_witness_is_reached(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(bench, "any", (WITNESS, closed_port()))
    with running(bench, policy, interval_s=60) as run, monkeypatch.context() as broken:

        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        broken.setattr("safeconduct.runtime.cosigning.Thread.start", refuse)
        run.writer.open_session("local", "sdk")
        run.writer.checkpoint()
        with pytest.raises(TraceInvalid, match="no thread could be started") as refused:
            run.cosigning.require()
        assert refused.value.code == "trace.unwitnessed"


def put_back(bench: Bench, copy: Path) -> None:
    """Restore an old copy of trace and signer's memory, as root or a backup could."""
    for name in ("trace", "state"):
        shutil.rmtree(bench.root / name)
        shutil.copytree(copy / name, bench.root / name)


def test_putting_everything_back_fools_the_signer_and_not_the_witness(
    bench: Bench, stack: ExitStack
) -> None:
    port = serve_witness(stack, bench, WITNESS)
    policy = policy_of(bench, "any", (WITNESS, port))
    with running(bench, policy) as run:
        record_call(run.writer, run.writer.open_session("local", "sdk"), "c0")
    copy = bench.root / "copy"
    shutil.copytree(bench.trace, copy / "trace")
    shutil.copytree(bench.state, copy / "state")
    with running(bench, policy) as run:
        session = run.writer.open_session("local", "sdk")
        for number in range(40):
            record_call(run.writer, session, f"c{number}")
    longer = judged(bench, policy)
    assert longer.witnessed
    put_back(bench, copy)
    assert bench.verify().status is Exit.OK  # nothing in the log shows it
    with running(bench, policy) as run:
        session = run.writer.open_session("local", "sdk")
        run.writer.checkpoint()
        with pytest.raises(TraceInvalid) as refused:
            run.cosigning.require()
        assert refused.value.code == "trace.unwitnessed"
        assert [one.answered for one in run.cosigning.standing()] == [Answered.AHEAD]
        for number in range(80):  # longer than before, with another history
            record_call(run.writer, session, f"d{number}")
        run.writer.checkpoint()
        with pytest.raises(TraceInvalid):
            run.cosigning.require()
        assert [one.answered for one in run.cosigning.standing()] == [Answered.FORK]
    assert any("another history of this log" in line for line in run.told)
    assert not judged(bench, policy).witnessed
    (evidence,) = (bench.trace / FORKS).iterdir()
    note = Note.parse(evidence.read_bytes())
    assert policy.evaluate(note, keys=[VerifierKey.parse(bench.key_line)]).head == longer.head


def test_a_fork_of_the_process_asks_nobody(bench: Bench, stack: ExitStack) -> None:
    port = serve_witness(stack, bench, WITNESS)
    policy = policy_of(bench, "any", (WITNESS, port))
    with running(bench, policy) as run:
        pid = os.fork()
        if pid == 0:
            began = time.monotonic()
            run.cosigning.close()
            os._exit(0 if time.monotonic() - began < 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        run.writer.open_session("local", "sdk")
    assert judged(bench, policy).witnessed


def test_lines_are_added_to_the_head_they_cover_and_no_other(bench: Bench) -> None:
    with running(bench, policy_of(bench, "any", (WITNESS, closed_port()))) as run:
        run.writer.open_session("local", "sdk")
        old = run.writer.checkpoint()
        note = (bench.trace / "checkpoint").read_bytes()
        with pytest.raises(TraceInvalid) as refused:
            store_cosignatures(bench.trace, note, [])
        assert refused.value.code == "trace.locked"
        run.writer.open_session("local", "sdk")
        new = run.writer.checkpoint()
        run.writer.add_cosignatures(note, [WITNESS.sign(old.text(), time=7).line])
        assert (bench.trace / "checkpoint").read_text().count("\u2014") == 1
        assert (bench.trace / f"checkpoints/{old.size}").read_text().count("\u2014") == 2
    assert new.size > old.size
    policy = policy_of(bench, "any", (WITNESS, 1))
    with Folder(bench.trace) as folder:
        _, head = read_checkpoint(folder)
        keys = [VerifierKey.parse(bench.key_line)]
        verdict = newest_witnessed(folder, policy, head, keys=keys)
        assert verdict is not None
        assert verdict.head == old
        assert newest_witnessed(folder, policy, head, operators={"w0"}) is None
    last = (bench.trace / "checkpoint").read_bytes()
    text = Note.parse(last).text
    for when in (8, 9):  # the newer one takes the older one's place
        store_cosignatures(bench.trace, last, [WITNESS.sign(text, time=when).line])
    found = Note.parse((bench.trace / "checkpoint").read_bytes())
    assert [one.name for one in found.signatures][1:] == [WITNESS.name]
    made = WITNESS.verifier.verified(found.signatures[1], text)
    assert made is not None
    assert made.time == 9
    for bad in ("", "no line\n", "\u2014 x\n", "\n\n"):
        with pytest.raises(TraceInvalid):
            add_lines(last, [bad])


def test_a_long_run_keeps_the_newest_cosigned_heads_alone(bench: Bench) -> None:
    with running(bench, policy_of(bench, "any", (WITNESS, closed_port()))) as run:
        sizes: list[int] = []
        for number in range(20):
            run.writer.open_session("local", "sdk")
            head = run.writer.checkpoint(keep=number == 1)
            note = (bench.trace / "checkpoint").read_bytes()
            run.writer.add_cosignatures(note, [WITNESS.sign(head.text(), time=7).line])
            sizes.append(head.size)
        kept = sorted(int(path.name) for path in (bench.trace / "checkpoints").iterdir())
        assert [size for size in kept if size in sizes] == [sizes[1], *sizes[-16:]]


def test_verify_tells_how_far_a_log_is_witnessed(bench: Bench, stack: ExitStack) -> None:
    port = serve_witness(stack, bench, WITNESS)
    policy = policy_of(bench, "any", (WITNESS, port))

    def verified() -> Report:
        return verify_trace(bench.trace, [bench.key_line], policy=policy)

    with running(bench, policy) as run:
        record_call(run.writer, run.writer.open_session("local", "sdk"), "c0")
    first = verified()
    assert (first.status, first.level) == (Exit.OK, 3)
    head = judged(bench, policy).head
    with running(bench, policy_of(bench, "any", (OTHER_WITNESS, closed_port()))) as run:
        record_call(run.writer, run.writer.open_session("local", "sdk"), "c1")
    later = verified()
    assert (later.status, later.level) == (Exit.INCOMPLETE, 1)
    (finding,) = later.findings
    assert finding.code == "trust.tail"
    assert f"the {head.size} before them are" in finding.message
    # A witnessed head of another history is proof of a fork, whoever put it there.
    other = replace(head, root=bytes(32))
    key = load_key(bench.key).of_log(head.origin)
    cosigned = WITNESS.sign(other.text(), time=NOW).line
    forged = f"{other.text()}\n{key.sign(other.text())}{cosigned}"
    (bench.trace / f"checkpoints/{head.size}").write_text(forged)
    assert (verified().status, verified().findings[0].code) == (Exit.TAMPERED, "trust.fork")
    (bench.trace / f"checkpoints/{head.size}").unlink()
    assert (verified().status, verified().findings[0].code) == (Exit.UNTRUSTED, "trust.quorum")


def test_a_trust_policy_that_cannot_be_asked_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "trust"
    for text in ("quorum none\n", f"witness w {WITNESS.verifier.line}\nquorum w\n", "nonsense\n"):
        file.write_text(text)
        with pytest.raises(TraceInvalid) as refused:
            load_trust(file)
        assert refused.value.code == "trust.invalid"
    with pytest.raises(TraceInvalid, match="cannot be read"):
        load_trust(tmp_path / "missing")
    file.write_text(f"witness w {WITNESS.verifier.line} https://w.example/\nquorum w\n")
    assert load_trust(file).quorum == "w"
