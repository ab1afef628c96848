"""Ways around the checks of files, inputs and witnesses that once worked: each stays closed."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from safeconduct.attestation import Checkpoint, SigningKey, generate_key
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import Note
from safeconduct.attestation.proofs.bundle import FIRST_LINE
from safeconduct.attestation.proofs.evidence import check_file
from safeconduct.attestation.proofs.handed_on import Handed, check_handed
from safeconduct.attestation.proofs.proof import prove_entry
from safeconduct.attestation.proofs.statement import (
    Envelope,
    EnvelopeSignature,
    Statement,
    key_hint,
    pre_authentication,
)
from safeconduct.attestation.verify.trust import TrustPolicy
from safeconduct.attestation.verify.vouching import Brought
from safeconduct.errors import Exit, TraceInvalid

from .evidence_kit import check  # noqa: TID251 - the tests' own kit
from .forge import (  # noqa: TID251 - the tests' own kit
    Fields,
    call,
    chain,
    entry,
    forge,
    lay_out,
    opening,
)
from .witness_kit import Desk, Log  # noqa: TID251 - the tests' own kit

ORIGIN = "example.org/alice/log"
ALICE = generate_key("example.org/alice")
EVE = generate_key("example.com/eve")
WITNESS = CosigningKey("witness.example/w", b"\x01" * 32)
OWN = CosigningKey("example.org/alice/witness", b"\x02" * 32)
TIME = 1_795_280_000


def twice() -> list[bytes]:
    """Return a log in which one call id is used twice: denied first, and then allowed."""
    denied, allowed = call("s1", "c1"), call("s1", "c1")
    denied[1]["body"] = {**_body(denied[1]), "effect": "deny"}
    denied[2]["body"] = {**_body(denied[2]), "status": "denied"}
    allowed[0]["body"] = {**_body(allowed[0]), "tool": "harmless"}
    closed: Fields = {"status": "closed"}
    begin = [opening(ORIGIN), entry("session.open", "s1", {"caller": "local", "origin": "sdk"})]
    end = [entry("session.close", "s1", closed), entry("session.close", "run-1", closed)]
    return chain([*begin, *denied, *allowed, *end])


def _body(step: Fields) -> Fields:
    return cast(Fields, step["body"])


def written(trace: Path, *cosigners: CosigningKey, key: SigningKey = ALICE) -> bytes:
    """Write a log with its cosignatures and return a proof of its entry 3."""
    forge(trace, twice(), key, ORIGIN)
    note = (trace / "checkpoint").read_bytes()
    lines = [one.sign(Note.parse(note).text, time=TIME).line for one in cosigners]
    (trace / "checkpoint").write_bytes(note + "".join(lines).encode())
    with Folder(trace) as folder:
        return prove_entry(folder, 3)[0].encode()


def policy(witness: CosigningKey) -> TrustPolicy:
    lines = f"log {ALICE.verifier.line}\nwitness w1 {witness.verifier.line}\nquorum w1\n"
    return TrustPolicy.parse(lines.encode())


@pytest.mark.parametrize(
    "indices", [(2, 7), (2, 3, 4, 5, 6, 7), (2, 3, 6, 7), (2, 4), (2, 3, 4, 6, 7), (2, 4, 7)]
)
def test_a_statement_mixes_no_calls_and_leaves_out_no_decision(
    tmp_path: Path, indices: Sequence[int]
) -> None:
    entries = twice()
    head = Checkpoint(origin=ORIGIN, size=len(entries), root=lay_out(tmp_path, entries))
    Statement.about(head, [(at, entries[at]) for at in (2, 3, 4)])
    Statement.about(head, [(at, entries[at]) for at in (5, 6, 7)])
    with pytest.raises(TraceInvalid) as refused:
        Statement.about(head, [(at, entries[at]) for at in indices])
    assert refused.value.code == "statement.invalid"


def test_what_a_statement_leaves_open_is_said(tmp_path: Path) -> None:
    entries = twice()
    head = Checkpoint(origin=ORIGIN, size=len(entries), root=lay_out(tmp_path, entries))
    payload = Statement.about(head, [(at, entries[at]) for at in (2, 3, 4)]).payload()
    key = ALICE.of_log(ORIGIN)
    signature = key.sign_bytes(pre_authentication(payload))
    signed = EnvelopeSignature(keyid=key_hint(key.verifier), signature=signature)
    data = Envelope(payload=payload, signatures=(signed,)).encode()
    found = check(data, Brought(keys=(ALICE.verifier,)))
    assert found.status is Exit.OK
    assert any("other entries" in line for line in found.not_checked)
    # Of several keys only one of the log's name counts, here as everywhere.
    eves = EVE.of_log(ORIGIN)
    signature = eves.sign_bytes(pre_authentication(payload))
    signed = EnvelopeSignature(keyid=key_hint(eves.verifier), signature=signature)
    data = Envelope(payload=payload, signatures=(signed,)).encode()
    found = check(data, Brought(keys=(ALICE.verifier, EVE.verifier)))
    assert (found.status, found.findings[0].code) == (Exit.UNTRUSTED, "key.origin")


def test_a_proof_under_a_key_of_another_log_is_not_trusted(tmp_path: Path) -> None:
    data = written(tmp_path / "trace", key=EVE)
    assert check(data, Brought(keys=(EVE.verifier,))).status is Exit.OK
    found = check(data, Brought(keys=(ALICE.verifier, EVE.verifier)))
    assert (found.status, found.level) == (Exit.UNTRUSTED, 0)
    assert found.findings[0].code == "key.origin"


def test_a_quorum_of_the_operators_own_does_not_make_a_proof_trusted(tmp_path: Path) -> None:
    found = check(written(tmp_path / "own", OWN), Brought(policy=policy(OWN)))
    assert (found.status, found.findings[0].code) == (Exit.UNTRUSTED, "trust.quorum")
    found = check(written(tmp_path / "other", WITNESS), Brought(policy=policy(WITNESS)))
    assert (found.status, found.level, found.newest) == (Exit.OK, 3, TIME)
    assert "2026-11-21" in "\n".join(found.lines())


def test_an_unmet_quorum_hides_no_false_proof(tmp_path: Path) -> None:
    data = written(tmp_path / "trace")
    first = data.index(b"\n", data.index(b"index")) + 1
    bad = data[:first] + (b"B" if data[first : first + 1] == b"A" else b"A") + data[first + 1 :]
    found = check(bad, Brought(policy=policy(WITNESS)))
    assert found.status is Exit.TAMPERED


def test_an_operator_that_no_witness_is_called_is_refused(tmp_path: Path) -> None:
    (tmp_path / "proof.tlog-proof").write_bytes(written(tmp_path / "trace", WITNESS))
    lines = f"log {ALICE.verifier.line}\nwitness w1 {WITNESS.verifier.line}\nquorum w1\n"
    (tmp_path / "policy").write_text(lines)
    file, asked = tmp_path / "proof.tlog-proof", tmp_path / "policy"
    assert check_handed(Handed(file=file, policy=asked)).level == 3
    with pytest.raises(TraceInvalid) as refused:
        check_handed(Handed(file=file, policy=asked, operators=["W1"]))
    assert refused.value.code == "brought.invalid"


def test_a_bundle_of_long_lines_costs_no_memory(tmp_path: Path) -> None:
    first = chain([entry("session.open", "s1", {"caller": "local", "origin": "sdk"})])[0]
    hostile = tmp_path / "bundle"
    with hostile.open("wb") as out:
        out.write(FIRST_LINE.encode().rstrip(b"\n") + b"\nsession s1\n1 " + first + b"\n\n")
        for _ in range(500):
            out.write(b"A" * 65_000 + b"\n")
        out.write(b"\nx\n\n\xe2\x80\x94 a AAAAAAAA\n")
    with hostile.open("rb") as stream:
        tracemalloc.start()
        try:
            found = check_file(stream, Brought())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (found.status, found.findings[0].code) == (Exit.TAMPERED, "bundle.invalid")
    assert peak < 8 << 20


def test_a_witness_that_forgot_a_log_it_has_evidence_of_stays_silent(tmp_path: Path) -> None:
    desk, log = Desk(tmp_path / "state"), Log(tmp_path / "log")
    log.grow(5)
    assert desk.add(log.request(0)).status == 200
    other = log.fork(tmp_path / "other")
    log.grow(2, salt="a")
    assert desk.add(log.request(5)).status == 200
    other.grow(2, salt="b")
    assert desk.add(other.request(5)).status == 409
    (held,) = (tmp_path / "state").glob("*/checkpoint")
    held.unlink()
    assert desk.add(other.request(0)).status == 500
    desk.state.close()


_VERIFIER = [sys.executable, "-m", "safeconduct.attestation.verify.main", "--no-remember"]


def verifier(*words: str, user: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*user, *_VERIFIER, *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_overlong_words_are_usage_errors(tmp_path: Path) -> None:
    written(tmp_path / "trace")
    trace, line = str(tmp_path / "trace"), ALICE.verifier.line
    for words in (
        ["--key", "x" * 300, trace],
        ["--key", line, "x" * 5000],
        ["--key", line, "--checkpoint", "x" * 5000, trace],
        ["--key", line, "--entry", "x" * 5000, str(tmp_path / "trace/checkpoint")],
    ):
        done = verifier(*words)
        assert done.returncode == Exit.USAGE, done.stderr
        assert "Traceback" not in done.stderr


def test_a_path_that_may_not_be_looked_at_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """stat(2) answers EACCES below a folder that may not be searched; as root it never does."""
    from safeconduct.attestation.verify import main as verify_main

    def refused(path: Path, **_: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    written(tmp_path / "trace")
    monkeypatch.setattr(Path, "stat", refused)
    monkeypatch.setattr("os.lstat", refused)
    for words in (
        ["--key", ALICE.verifier.line, str(tmp_path / "locked/in")],
        ["--key", str(tmp_path / "locked/k.pub"), str(tmp_path / "trace")],
        ["--trust", str(tmp_path / "locked"), str(tmp_path / "trace")],
    ):
        assert verify_main.main(["--no-remember", *words]) == Exit.USAGE
    assert "Traceback" not in capsys.readouterr().err
