"""Ways around the verifier that once worked: each must stay closed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from safeconduct.attestation import Report, SigningKey, generate_key, verify_trace
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import EMPTY_ROOT
from safeconduct.attestation.note import Note
from safeconduct.attestation.rotation import rotation_body
from safeconduct.attestation.verify import bringing
from safeconduct.attestation.verify.bringing import Wish, verify_wish
from safeconduct.attestation.verify.remembered import Memory
from safeconduct.attestation.verify.trust import TrustPolicy
from safeconduct.errors import Exit, TraceInvalid

from .forge import (  # noqa: TID251 - the tests' own kit
    Fields,
    call,
    chain,
    entry,
    forge,
    lay_out,
    opening,
    sign,
)

ORIGIN = "example.org/alice/log"
ALICE = generate_key("example.org/alice")
NEXT = generate_key("example.org/alice-2")
EVE = generate_key("example.com/eve")
WITNESS = CosigningKey("witness.example/w", b"\x01" * 32)
OWN = CosigningKey("example.org/alice/witness", b"\x02" * 32)
TIME = 1_795_280_000


def run(number: int, *, calls: int, word: str = "c") -> list[Fields]:
    """Return one run of the log with one session, not chained yet."""
    name, session = f"run-{number}", f"s{number}"
    steps: list[Fields] = [{**opening(ORIGIN, ALICE.verifier.line), "session": name}]
    steps.append(entry("session.open", session, {"caller": "local", "origin": "sdk"}))
    for at in range(calls):
        steps += call(session, f"{word}{number}.{at}", 10 * at)
    closed: Fields = {"status": "closed"}
    return [*steps, entry("session.close", session, closed), entry("session.close", name, closed)]


def put(trace: Path, *runs: list[Fields], key: SigningKey = ALICE) -> bytes:
    """Write a whole log and return its signed note."""
    forge(trace, chain([step for one in runs for step in one]), key, ORIGIN)
    return (trace / "checkpoint").read_bytes()


def codes(report: Report) -> list[str]:
    return [one.code for one in report.findings]


class Verifier:
    """Somebody who verifies with a memory of their own."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "memory"
        self.memory = Memory(self.folder)

    def verify(self, trace: Path, *keys: SigningKey, **wish: object) -> Report:
        lines = [key.verifier.line for key in keys or (ALICE,)]
        return verify_wish(
            Wish(trace=trace, keys=lines, memory=self.memory, **wish)  # type: ignore[arg-type]
        )


@pytest.fixture
def verifier(tmp_path: Path) -> Verifier:
    return Verifier(tmp_path)


def policy(witness: CosigningKey) -> TrustPolicy:
    lines = f"log {ALICE.verifier.line}\nwitness w1 {witness.verifier.line}\nquorum w1\n"
    return TrustPolicy.parse(lines.encode())


def cosign(trace: Path, *witnesses: CosigningKey, time: int = TIME) -> None:
    note = (trace / "checkpoint").read_bytes()
    lines = [one.sign(Note.parse(note).text, time=time).line for one in witnesses]
    (trace / "checkpoint").write_bytes(note + "".join(lines).encode())


def test_forged_entries_with_a_bundle_missing_reach_no_level(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    put(trace, run(1, calls=200))
    steps = run(1, calls=200)
    for step in steps:
        body = step["body"]
        assert isinstance(body, dict)
        if "tool" in body:
            step["body"] = {**body, "tool": "rm.everything"}
    lay_out(trace, chain(steps))
    line = ALICE.verifier.line
    assert codes(verify_trace(trace, [line])) == ["trace.root"]
    # The root cannot be computed any more: then nothing here was held against it.
    shutil.rmtree(trace / "tile/entries/002.p")
    report = verify_trace(trace, [line])
    assert (report.status, codes(report)) == (Exit.INCOMPLETE, ["trace.missing"])
    assert report.level == 0
    assert not any(one.reached for one in report.levels)
    assert "as it was signed" not in "\n".join(report.lines())


def test_a_missing_file_hides_no_rollback_and_wipes_no_memory(
    tmp_path: Path, verifier: Verifier
) -> None:
    whole, old = tmp_path / "whole", tmp_path / "old"
    put(whole, run(1, calls=3), run(2, calls=3))
    put(old, run(1, calls=3))
    assert verifier.verify(whole).level == 1
    bundle = next((old / "tile/entries").rglob("*.p/*"))
    data = bundle.read_bytes()
    bundle.unlink()
    report = verifier.verify(old)
    assert (report.status, codes(report)) == (Exit.TAMPERED, ["trace.missing", "held.rollback"])
    bundle.write_bytes(data)
    assert codes(verifier.verify(old)) == ["held.rollback"]


def test_an_incomplete_copy_is_not_remembered(tmp_path: Path, verifier: Verifier) -> None:
    trace = tmp_path / "trace"
    put(trace, run(1, calls=3))
    next((trace / "tile/entries").rglob("*.p/*")).unlink()
    assert verifier.verify(trace).status == Exit.INCOMPLETE
    assert not verifier.folder.exists()


def test_a_missing_file_hides_no_unmet_quorum(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    put(trace, run(1, calls=3))
    next((trace / "tile/entries").rglob("*.p/*")).unlink()
    report = verify_trace(trace, [], policy=policy(WITNESS))
    assert (report.status, codes(report)) == (Exit.UNTRUSTED, ["trace.missing", "trust.quorum"])


def test_an_outcome_of_an_unknown_call_accuses(tmp_path: Path, verifier: Verifier) -> None:
    trace = tmp_path / "trace"
    note = put(trace, run(1, calls=3), run(2, calls=3))
    assert verifier.verify(trace).level == 1
    steps = run(1, calls=9, word="x")
    steps.insert(2, entry("call.outcome", "s1", {"call": "nope", "status": "ok"}))
    put(trace, steps)
    report = verifier.verify(trace)
    assert (report.status, report.level, codes(report)) == (Exit.TAMPERED, 0, ["call.unknown"])
    (kept,) = verifier.folder.iterdir()
    assert kept.read_bytes() == note


def handed_over(trace: Path, new: SigningKey) -> tuple[list[Fields], int]:
    """Write a log that ALICE handed over; return its steps, and the size that covers it."""
    first = run(1, calls=1)
    turn = entry("key.rotate", "run-1", {**rotation_body(ORIGIN, ALICE, new.verifier)})
    steps = [*first[:-1], turn, first[-1], *run(2, calls=2)]
    cover(trace, steps, len(first), ALICE, new)
    put(trace, steps, key=new)
    return steps, len(first)


def cover(trace: Path, steps: list[Fields], size: int, *keys: SigningKey) -> None:
    """Keep a checkpoint of the first entries, signed by these keys."""
    (trace / "checkpoints").mkdir(parents=True, exist_ok=True)
    root = lay_out(trace, chain(steps)[:size])
    sign(trace, Checkpoint(origin=ORIGIN, size=size, root=root), *keys)
    (trace / "checkpoint").rename(trace / f"checkpoints/{size}")


@pytest.mark.parametrize("kept", [True, False])
def test_a_retired_key_does_not_sign_on(tmp_path: Path, kept: bool) -> None:
    trace = tmp_path / "trace"
    steps, covered = handed_over(trace, NEXT)
    line = ALICE.verifier.line
    assert verify_trace(trace, [line]).signed_by == NEXT.name
    put(trace, steps, run(3, calls=2, word="evil"))
    if not kept:  # the newest head is then what covers the handing over
        (trace / f"checkpoints/{covered}").unlink()
    report = verify_trace(trace, [line])
    assert (report.status, codes(report)) == (Exit.TAMPERED, ["rotation.retired"])


def test_a_key_is_handed_over_once(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    steps, _ = handed_over(trace, NEXT)
    third = run(3, calls=2)
    turn = entry("key.rotate", "run-3", {**rotation_body(ORIGIN, ALICE, EVE.verifier)})
    steps = [*steps, third[0], turn, *third[1:]]
    cover(trace, steps, len(steps) - len(third) + 1, ALICE)
    put(trace, steps, key=EVE)
    report = verify_trace(trace, [ALICE.verifier.line])
    assert (report.status, report.level) == (Exit.TAMPERED, 0)
    assert "rotation.retired" in codes(report)


def test_checkpoints_are_listed_once_for_all_rotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    first, last = run(1, calls=1), generate_key("example.org/alice-3")
    turns = [
        entry("key.rotate", "run-1", {**rotation_body(ORIGIN, old, new.verifier)})
        for old, new in ((ALICE, NEXT), (NEXT, last))
    ]
    steps = [*first[:-1], *turns, first[-1]]
    cover(trace, steps, len(first), ALICE, NEXT)
    cover(trace, steps, len(first) + 1, NEXT, last)
    put(trace, steps, key=last)
    listed: list[str] = []
    names = Folder.names

    def counted(self: Folder, path: str) -> list[str]:
        listed.append(path)
        return list(names(self, path))

    monkeypatch.setattr(Folder, "names", counted)
    assert verify_trace(trace, [ALICE.verifier.line]).rotations == 2
    assert listed.count("checkpoints") == 1


def test_a_stranger_does_not_take_the_place_of_what_is_remembered(
    tmp_path: Path, verifier: Verifier
) -> None:
    alices, old, eves = tmp_path / "alices", tmp_path / "old", tmp_path / "eves"
    put(alices, run(1, calls=3), run(2, calls=3))
    put(old, run(1, calls=3))
    put(eves, run(1, calls=1, word="e"), key=EVE)
    assert verifier.verify(alices).level == 1
    report = verifier.verify(eves, EVE)
    assert report.status == Exit.OK
    assert any("remembered" in line for line in report.not_checked)
    assert any("do not correspond" in line for line in report.not_checked)
    assert codes(verifier.verify(old)) == ["held.rollback"]


def test_of_several_keys_only_those_of_the_log_count(tmp_path: Path, verifier: Verifier) -> None:
    alices, eves = tmp_path / "alices", tmp_path / "eves"
    put(alices, run(1, calls=2))
    put(eves, run(1, calls=2, word="e"), key=EVE)
    report = verifier.verify(eves, ALICE, EVE, origin=ORIGIN)
    assert (report.status, report.level) == (Exit.UNTRUSTED, 0)
    assert codes(report) == ["key.origin"]
    assert EVE.name in report.findings[0].message
    # What was remembered when her key was brought alone accuses nobody later.
    assert verifier.verify(eves, EVE).level == 1
    report = verifier.verify(alices, ALICE, EVE)
    assert (report.status, report.level) == (Exit.OK, 1)
    # Nor does her key count beside a log that the policy lists.
    report = verify_trace(eves, [EVE.verifier.line], policy=policy(WITNESS))
    assert (report.status, report.signed_by) == (Exit.UNTRUSTED, "")


def test_a_listed_log_and_its_rotated_key_may_both_be_brought(tmp_path: Path) -> None:
    """The new key's name does not speak for the origin, and it counts by being handed the log."""
    trace = tmp_path / "trace"
    handed_over(trace, NEXT)
    report = verify_trace(trace, [ALICE.verifier.line, NEXT.verifier.line])
    assert (report.status, report.signed_by) == (Exit.OK, NEXT.name)


def test_the_memory_is_of_the_head_that_is_verified(
    tmp_path: Path, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the folder shows when the memory is looked up, the head read first decides."""
    trace = tmp_path / "trace"
    put(trace, run(1, calls=3), run(2, calls=3))
    assert verifier.verify(trace).level == 1
    true = put(trace, run(1, calls=3))
    # The folder's writer shows another head until the trace is opened for verification.
    (trace / "checkpoint").write_bytes(b"not yet")
    start = bringing.verify_trace

    def opened(*words: object, **brought: object) -> Report:
        (trace / "checkpoint").write_bytes(true)
        return start(*words, **brought)  # type: ignore[arg-type]

    monkeypatch.setattr(bringing, "verify_trace", opened)
    assert codes(verifier.verify(trace)) == ["held.rollback"]


def test_only_a_signed_note_is_remembered(
    tmp_path: Path, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's writer takes the signature away before the verified head is kept."""
    trace = tmp_path / "trace"
    note = put(trace, run(1, calls=3))
    assert verifier.verify(trace).level == 1
    keep = Memory.keep

    def late(self: Memory, where: Path, report: Report) -> bool:
        text = Note.parse(note).text
        (trace / "checkpoint").write_text(f"{text}\n{EVE.of_log(ORIGIN).sign(text)}")
        return keep(self, where, report)

    monkeypatch.setattr(Memory, "keep", late)
    assert verifier.verify(trace).status == Exit.OK
    (kept,) = verifier.folder.iterdir()
    assert kept.read_bytes() == note


def test_of_two_verifications_at_once_the_newer_head_is_remembered(
    tmp_path: Path, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, whole = tmp_path / "old", tmp_path / "whole"
    put(old, run(1, calls=3))
    note = put(whole, run(1, calls=3), run(2, calls=3))
    keep = Memory.keep

    def late(self: Memory, where: Path, report: Report) -> bool:
        monkeypatch.setattr(Memory, "keep", keep)
        assert verifier.verify(whole).level == 1
        return keep(self, where, report)

    monkeypatch.setattr(Memory, "keep", late)
    assert verifier.verify(old).status == Exit.OK
    (kept,) = verifier.folder.iterdir()
    assert kept.read_bytes() == note


def test_the_same_copy_twice_says_that_it_is_the_same(tmp_path: Path, verifier: Verifier) -> None:
    trace = tmp_path / "trace"
    put(trace, run(1, calls=1))
    verifier.verify(trace)
    assert "the same head as last time" in verifier.verify(trace).levels[1].why
    put(trace, run(1, calls=1), run(2, calls=1))
    assert "extends the checkpoint" in verifier.verify(trace).levels[1].why


def test_an_empty_head_that_is_held_is_no_level(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    put(trace, run(1, calls=1))
    text = Checkpoint(origin=ORIGIN, size=0, root=EMPTY_ROOT).text()
    held = f"{text}\n{ALICE.of_log(ORIGIN).sign(text)}".encode()
    report = verify_trace(trace, [ALICE.verifier.line], held=[("kept", held)])
    assert (report.status, report.level) == (Exit.OK, 1)


def test_no_checkpoint_that_was_brought_is_left_out(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "held").write_bytes(put(trace, run(1, calls=1)))
    brought = [tmp_path / "held"] * 64
    keys = [ALICE.verifier.line]
    assert verify_wish(Wish(trace=trace, keys=keys, checkpoints=brought)).level == 2
    with pytest.raises(TraceInvalid) as refused:
        verify_wish(Wish(trace=trace, keys=keys, checkpoints=[*brought, tmp_path / "held"]))
    assert refused.value.code == "brought.invalid"


def test_an_operator_that_no_witness_is_called_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    put(trace, run(1, calls=1))
    lines = f"log {ALICE.verifier.line}\nwitness w1 {WITNESS.verifier.line}\nquorum w1\n"
    (tmp_path / "policy").write_text(lines)
    for name in ("W1", WITNESS.name, "w1 "):
        with pytest.raises(TraceInvalid) as refused:
            verify_wish(Wish(trace=trace, policy=tmp_path / "policy", operators=[name]))
        assert refused.value.code == "brought.invalid"
    with pytest.raises(TraceInvalid):
        verify_wish(Wish(trace=trace, keys=[ALICE.verifier.line], operators=["w1"]))


def test_a_quorum_of_the_operators_own_is_not_met(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    put(trace, run(1, calls=1))
    cosign(trace, OWN)
    report = verify_trace(trace, [], policy=policy(OWN))
    assert (report.status, report.level, codes(report)) == (Exit.UNTRUSTED, 1, ["trust.quorum"])
    assert "operator's own" in report.findings[0].message
    none = TrustPolicy.parse(f"log {ALICE.verifier.line}\nquorum none\n".encode())
    assert verify_trace(trace, [], policy=none).status == Exit.OK


def test_the_newest_cosignature_is_dated(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    put(trace, run(1, calls=1))
    cosign(trace, WITNESS)
    report = verify_trace(trace, [], policy=policy(WITNESS), now=TIME)
    assert report.level == 3
    assert "the newest at 2026-11-21 " in report.levels[2].why
    early = verify_trace(trace, [], policy=policy(WITNESS), now=TIME - 1000)
    assert codes(early) == ["trust.quorum"]
    assert "dated in the future: w1" in early.findings[0].message
    # Any number is a time to a witness, and no reason to fail.
    put(trace, run(1, calls=1))
    cosign(trace, WITNESS, time=(1 << 63) - 1)
    assert verify_trace(trace, [], policy=policy(WITNESS)).level == 3
