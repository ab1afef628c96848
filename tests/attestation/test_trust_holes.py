"""Ways in which a key that was given up, an id used twice or a name not one's own once passed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest

from safeconduct.attestation import Report, SigningKey, TraceWriter, generate_key, verify_trace
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import VerifierKey
from safeconduct.attestation.proofs.bundle import write_bundle
from safeconduct.attestation.proofs.search import ends_of_session
from safeconduct.attestation.proofs.statement import Statement
from safeconduct.attestation.rotation import entry_body, rotation_body
from safeconduct.attestation.verify import join
from safeconduct.attestation.verify.bringing import Wish, verify_wish
from safeconduct.attestation.verify.remembered import Memory
from safeconduct.attestation.verify.trust import TrustPolicy
from safeconduct.errors import Exit, TraceInvalid
from safeconduct.runtime.cli import witness as command

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
from .kit import Bench, record_call  # noqa: TID251

ORIGIN = "example.org/alice/log"
OLD = generate_key("example.org/alice")
NEW = generate_key("example.org/alice-2")
CLOSED: Fields = {"status": "closed"}
TURN = entry("key.rotate", "run-1", {**rotation_body(ORIGIN, OLD, NEW.verifier)})


def begun(session: str) -> Fields:
    return entry("session.open", session, {"caller": "local", "origin": "sdk"})


def ended(session: str) -> Fields:
    return entry("session.close", session, CLOSED)


def codes(report: Report) -> list[str]:
    return [one.code for one in report.findings]


def cover(trace: Path, entries: Sequence[bytes], *keys: SigningKey) -> None:
    """Keep a checkpoint of these entries, signed by these keys."""
    (trace / "checkpoints").mkdir(parents=True, exist_ok=True)
    size = len(entries)
    sign(trace, Checkpoint(origin=ORIGIN, size=size, root=lay_out(trace, entries)), *keys)
    (trace / "checkpoint").rename(trace / f"checkpoints/{size}")


def turned(trace: Path, *turns: Fields, key: SigningKey) -> None:
    """Write a log with these changes of key whose newest head one key signed."""
    steps = [opening(ORIGIN, OLD.verifier.line), *turns, ended("run-1")]
    entries = chain(steps)
    cover(trace, entries[:-1], OLD, NEW)
    forge(trace, entries, key, ORIGIN)


# -- a key is its public half -----------------------------------------------------------------

NAMED, ALIAS = OLD.verifier.line, OLD.verifier.of_log(ORIGIN).line


@pytest.mark.parametrize(
    ("keys", "listed"),
    [([NAMED], ""), ([ALIAS], ""), ([NAMED, ALIAS], ""), ([], ALIAS), ([NAMED], ALIAS)],
    ids=["named", "alias", "both", "policy", "named and policy"],
)
def test_a_retired_key_does_not_sign_on_under_another_name(
    tmp_path: Path, keys: list[str], listed: str
) -> None:
    policy = TrustPolicy.parse(f"log {listed}\nquorum none\n".encode()) if listed else None
    turned(tmp_path / "evil", TURN, key=OLD)
    report = verify_trace(tmp_path / "evil", keys, policy=policy, jobs=1)
    assert (report.status, codes(report)) == (Exit.TAMPERED, ["rotation.retired"])
    turned(tmp_path / "good", TURN, key=NEW)
    report = verify_trace(tmp_path / "good", keys, policy=policy, jobs=1)
    assert (report.status, report.signed_by, report.rotations) == (Exit.OK, NEW.name, 1)


def test_a_key_does_not_hand_over_to_itself_under_another_name(tmp_path: Path) -> None:
    same = rotation_body(ORIGIN, OLD, VerifierKey("example.org/else", OLD.verifier.public))
    turned(tmp_path / "trace", entry("key.rotate", "run-1", {**same}), key=OLD)
    assert codes(verify_trace(tmp_path / "trace", [NAMED])) == ["rotation.invalid"]


# -- no change of key is passed over ------------------------------------------------------------


def test_a_change_of_key_among_too_many_or_too_large_is_told(tmp_path: Path) -> None:
    stranger = generate_key("example.org/carol")
    others = [entry("key.rotate", "run-1", {**rotation_body(ORIGIN, stranger, NEW.verifier)})] * 64
    turned(tmp_path / "many", *others, TURN, key=OLD)
    report = verify_trace(tmp_path / "many", [NAMED])
    assert (report.status, codes(report)) == (Exit.TAMPERED, ["rotation.limit"])
    assert report.findings[0].index == 65
    body: Fields = {**rotation_body(ORIGIN, OLD, NEW.verifier), "pad": "x" * 9000}
    turned(tmp_path / "large", entry("key.rotate", "run-1", body), key=OLD)
    report = verify_trace(tmp_path / "large", [NAMED])
    assert (report.status, codes(report)) == (Exit.TAMPERED, ["rotation.limit"])


def test_a_padded_change_of_key_ends_none() -> None:
    body = rotation_body(ORIGIN, OLD, NEW.verifier)
    start = opening(ORIGIN, NAMED)
    assert entry_body(chain([start, TURN])[1]) == body
    for pad in ("x", "x" * 9000):
        turn = entry("key.rotate", "run-1", {**body, "pad": pad})
        assert entry_body(chain([start, turn])[1]) != body


# -- the memory goes across a change of key -----------------------------------------------------


def test_a_copy_from_before_a_change_of_key_is_a_rollback(tmp_path: Path) -> None:
    turned(tmp_path / "new", TURN, key=NEW)
    forge(tmp_path / "old", chain([opening(ORIGIN, NAMED)]), OLD, ORIGIN)
    memory = Memory(tmp_path / "memory")

    def seen(name: str) -> Report:
        return verify_wish(Wish(trace=tmp_path / name, keys=[NAMED], memory=memory, jobs=1))

    assert seen("new").carried_from == (NAMED,)
    report = seen("old")
    assert (report.status, codes(report)) == (Exit.TAMPERED, ["held.rollback", "session.open"])
    assert seen("new").level == 2
    # A note whose signer is not the one it names is no memory.
    for file in (tmp_path / "memory").iterdir():
        file.write_bytes(file.read_bytes().replace(NEW.verifier.line.encode(), NAMED.encode()))
    assert codes(seen("old")) == ["session.open"]


# -- no id is used twice ------------------------------------------------------------------------


def reused(*, session: str = "s2", name: str = "c2", apart: int = 0) -> list[bytes]:
    """Return a log with a second session and a second call, and others between them."""
    steps = [opening(ORIGIN, NAMED), begun("s1"), *call("s1", "c1")]
    for number in range(apart):
        steps += call("s1", f"x{number}")
    steps += [*call("s1", name), ended("s1"), begun(session), *call(session, "c1"), ended(session)]
    return chain([*steps, ended("run-1")])


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("apart", [0, 6000])  # in one bundle; in two ranges, joined
def test_an_id_is_used_once(tmp_path: Path, apart: int, jobs: int) -> None:
    for code, entries in (
        ("", reused(apart=apart)),
        ("call.twice", reused(name="c1", apart=apart)),
        ("chain.twice", reused(session="s1", apart=apart)),
    ):
        forge(tmp_path / "trace", entries, OLD, ORIGIN)
        report = verify_trace(tmp_path / "trace", [NAMED], jobs=jobs)
        assert codes(report) == ([code] if code else [])
        assert report.status is (Exit.TAMPERED if code else Exit.OK)


def test_ids_beyond_those_that_are_known_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(tmp_path / "trace", reused(apart=6000), OLD, ORIGIN)
    assert not any(
        "used twice" in said for said in verify_trace(tmp_path / "trace", [NAMED]).not_checked
    )
    monkeypatch.setattr(join, "MAX_KNOWN", 100)
    report = verify_trace(tmp_path / "trace", [NAMED])
    assert report.status is Exit.OK
    assert any("used twice" in said for said in report.not_checked)


def test_the_writer_uses_no_id_twice(bench: Bench) -> None:
    signer = bench.signer()
    with TraceWriter.open(bench.trace, signer=signer) as writer:
        session = writer.open_session("local", "sdk")
        record_call(writer, session, "c1")
        with pytest.raises(TraceInvalid) as caught:
            record_call(writer, session, "c1")
        assert caught.value.code == "call.twice"
        record_call(writer, session, "c2")
        writer.close_session(session)
    signer.close()
    assert bench.verify().status is Exit.OK


def test_one_of_two_sessions_of_an_id_is_not_handed_on(tmp_path: Path) -> None:
    forge(tmp_path / "trace", reused(session="s1"), OLD, ORIGIN)
    with Folder(tmp_path / "trace") as folder:
        for taken in (lambda: write_bundle(folder, "s1", io.BytesIO()),
                      lambda: ends_of_session(folder, "s1")):  # fmt: skip
            with pytest.raises(TraceInvalid) as caught:
                taken()
            assert caught.value.code == "chain.twice"


def test_a_statement_of_two_uses_of_an_id_is_refused_or_says_so() -> None:
    first, second = call("s1", "c1"), call("s1", "c1")
    entries = chain([opening(ORIGIN, NAMED), begun("s1"), *first, *second])
    head = Checkpoint(origin=ORIGIN, size=len(entries), root=b"\x01" * 32)
    whole = Statement.about(head, [(at, entries[at]) for at in (2, 3, 4)])
    assert whole.unbroken
    assert not Statement.about(head, [(at, entries[at]) for at in (2, 6, 7)]).unbroken
    other = chain([opening(ORIGIN, NAMED), begun("s1"), *call("s1", "c1", 90)])
    with pytest.raises(TraceInvalid) as caught:
        Statement.about(head, [(2, other[2]), (3, entries[3]), (4, entries[4])])
    assert caught.value.code == "statement.invalid"


# -- the log says which one it is ---------------------------------------------------------------


def test_a_run_of_another_log_accuses(tmp_path: Path) -> None:
    other = opening("example.org/bob/other", NAMED)
    first = [opening(ORIGIN, NAMED), ended("run-1")]
    for steps in ([other, ended("run-1")], [*first, {**other, "session": "b"}, ended("b")]):
        forge(tmp_path / "trace", chain(steps), OLD, ORIGIN)
        report = verify_trace(tmp_path / "trace", [NAMED])
        assert (report.status, codes(report)) == (Exit.TAMPERED, ["log.origin"])
    forge(tmp_path / "trace", chain([begun("s1"), ended("s1")]), OLD, ORIGIN)
    assert codes(verify_trace(tmp_path / "trace", [NAMED])) == ["chain.start"]


# -- who counts as a witness, and what is told of a broken log ----------------------------------


def test_an_operators_witness_is_not_hidden_by_a_short_name_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    (tmp_path / "log.pub").write_text(NAMED + "\n")
    shortened = VerifierKey("example.org", OLD.verifier.public)
    hidden = CosigningKey("example.org/independent", b"\x05" * 32)
    for line in (OLD.verifier, shortened):
        with pytest.raises(TraceInvalid) as caught:
            command._refuse_hidden_operator(hidden, [line], tmp_path / "w.key")  # pyright: ignore[reportPrivateUsage]
        assert caught.value.code == "witness.operator"
        plain = CosigningKey("example.org/alice/witness", b"\x05" * 32)
        command._refuse_hidden_operator(plain, [line], tmp_path / "w.key")  # pyright: ignore[reportPrivateUsage]


def test_what_is_told_of_a_broken_log_does_not_hang_on_the_workers(tmp_path: Path) -> None:
    erased: Fields = {"session": "s", "what": "openings", "by": "operator"}
    steps = [opening(ORIGIN, NAMED), *[entry("redaction", "run-1", erased)] * 70_000]
    entries = chain([*steps, ended("run-1")])
    entries[5] = entries[5].replace(b'"v":1', b'"v":2')
    forge(tmp_path / "trace", entries, OLD, ORIGIN)
    told = {verify_trace(tmp_path / "trace", [NAMED], jobs=jobs).redactions for jobs in (1, 3)}
    assert told == {4}
