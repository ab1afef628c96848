"""The rest of the attack matrix: attacks that need more than one log, key or checkpoint.

Each says at which level it is found out, and that it is not below it.
"""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path

import pytest

from safeconduct.attestation import Report, SigningKey, TraceWriter, generate_key, verify_trace
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import Note
from safeconduct.attestation.proofs.evidence import check_file
from safeconduct.attestation.proofs.proof import prove_entry
from safeconduct.attestation.rotation import rotation_body
from safeconduct.attestation.verify.trust import TrustPolicy
from safeconduct.attestation.verify.vouching import Brought
from safeconduct.errors import Exit

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
from .kit import Bench, record_call, write_trace  # noqa: TID251 - the tests' own kit

KEY = generate_key("example.org/alice")
ORIGIN = "example.org/alice/log"
CLOSED: Fields = {"status": "closed"}


def run(number: int, *, calls: int, word: str = "c") -> list[Fields]:
    """Return a closed run of the log: its own session and one with some calls."""
    run_session, session = f"run-{number}", f"s{number}"
    steps = [{**opening(ORIGIN), "session": run_session}]
    steps.append(entry("session.open", session, {"caller": "local", "origin": "sdk"}))
    for at in range(calls):
        steps += call(session, f"{word}{number}.{at}", 10 * at)
    steps.append(entry("session.close", session, CLOSED))
    return [*steps, entry("session.close", run_session, CLOSED)]


def check(trace: Path, **brought: object) -> Report:
    return verify_trace(trace, [KEY.verifier.line], origin=ORIGIN, **brought)  # type: ignore[arg-type]


def note_of(trace: Path) -> bytes:
    return (trace / "checkpoint").read_bytes()


def held(*notes: bytes) -> list[tuple[str, bytes]]:
    return [("kept", note) for note in notes]


def policy(*witnesses: CosigningKey, quorum: int = 1) -> TrustPolicy:
    lines = [f"log {KEY.verifier.line}"]
    lines += [f"witness w{at} {one.verifier.line}" for at, one in enumerate(witnesses)]
    names = " ".join(f"w{at}" for at in range(len(witnesses)))
    lines += [f"group g {quorum} {names}", "quorum g"]
    return TrustPolicy.parse(("\n".join(lines) + "\n").encode())


def cosign(trace: Path, *witnesses: CosigningKey, text: str | None = None) -> None:
    note = note_of(trace)
    lines = [one.sign(text or Note.parse(note).text, time=1_795_280_000).line for one in witnesses]
    (trace / "checkpoint").write_bytes(note + "".join(lines).encode())


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    forge(tmp_path / "trace", chain([*run(1, calls=3), *run(2, calls=3)]), KEY, ORIGIN)
    return tmp_path / "trace"


def codes(report: Report) -> list[str]:
    return [one.code for one in report.findings]


def test_rolled_back_to_an_older_signed_checkpoint(trace: Path) -> None:
    newer = note_of(trace)
    older = chain(run(1, calls=3))
    forge(trace, older, KEY, ORIGIN)
    # L1 sees a valid shorter log, and says that it would not notice.
    report = check(trace)
    assert (report.status, report.level) == (Exit.OK, 1)
    assert any("dropped tail" in line for line in report.not_checked)
    # L2 finds it out.
    report = check(trace, held=held(newer))
    assert (report.status, codes(report)) == (Exit.TAMPERED, ["held.rollback"])
    assert report.level == 0
    # A checkpoint that it does extend is what L2 wants.
    report = check(trace, held=held(note_of(trace)))
    assert (report.status, report.level) == (Exit.OK, 2)


def test_a_longer_log_extends_what_was_held(trace: Path) -> None:
    whole = chain([*run(1, calls=3), *run(2, calls=3)])
    notes: list[bytes] = []
    for size in range(1, len(whole) + 1):
        forge(trace, whole[:size], KEY, ORIGIN)
        notes.append(note_of(trace))
    for note in notes:
        report = check(trace, held=held(note))
        assert (report.status, report.level) == (Exit.OK, 2)
    assert check(trace, held=held(*notes)).level == 2


@pytest.mark.parametrize("size", [1, 2, 5, 14, 21])
def test_forked_with_the_true_key(trace: Path, size: int) -> None:
    whole = chain([*run(1, calls=3), *run(2, calls=3)])
    other = chain([*run(1, calls=3), *run(2, calls=3, word="d")])
    assert whole != other
    alike = next(at for at, pair in enumerate(zip(whole, other, strict=True)) if len({*pair}) > 1)
    forge(trace, whole[:size], KEY, ORIGIN)
    kept = note_of(trace)
    forge(trace, other, KEY, ORIGIN)
    # Nothing in the log shows that its key holder wrote another one.
    assert (check(trace).status, check(trace).level) == (Exit.OK, 1)
    report = check(trace, held=held(kept))
    if size <= alike:
        assert (report.status, report.level) == (Exit.OK, 2)
        return
    assert (report.status, codes(report)) == (Exit.TAMPERED, ["held.fork"])


def test_a_fork_is_not_cosigned_by_the_witness_that_saw_the_other(trace: Path) -> None:
    witness = CosigningKey("witness.example/w", bytes(range(32)))
    cosign(trace, witness)
    asked = policy(witness)
    report = check(trace, policy=asked)
    assert (report.status, report.level) == (Exit.OK, 3)
    # The witness refuses the other history (test_witness.py), so its head has no cosignature.
    forge(trace, chain([*run(1, calls=3), *run(2, calls=3, word="d")]), KEY, ORIGIN)
    assert check(trace).status == Exit.OK
    report = check(trace, policy=asked)
    assert (report.status, codes(report)) == (Exit.UNTRUSTED, ["trust.quorum"])


def test_the_cosignature_of_another_log_or_head(trace: Path) -> None:
    witness = CosigningKey("witness.example/w", bytes(range(32)))
    head = Checkpoint.parse(Note.parse(note_of(trace)).text)
    for text in (
        Checkpoint(origin="example.org/bob/log", size=head.size, root=head.root).text(),
        Checkpoint(origin=ORIGIN, size=head.size - 1, root=head.root).text(),
    ):
        forge(trace, chain([*run(1, calls=3), *run(2, calls=3)]), KEY, ORIGIN)
        cosign(trace, witness, text=text)
        assert check(trace).level == 1  # who does not ask for witnesses does not look at them
        report = check(trace, policy=policy(witness))
        assert (report.status, codes(report)) == (Exit.TAMPERED, ["cosignature.invalid"])


def test_the_operators_own_witness_is_no_witness(trace: Path) -> None:
    own = CosigningKey("witness.example/own", bytes(range(32)))
    cosign(trace, own)
    report = check(trace, policy=policy(own), operators=["w0"])
    assert (report.status, codes(report)) == (Exit.UNTRUSTED, ["trust.quorum"])
    assert report.level == 1  # the log's own signature loses nothing by it
    assert "operator" in report.levels[2].why
    below = CosigningKey("example.org/alice/witness", bytes(range(1, 33)))
    forge(trace, chain(run(1, calls=3)), KEY, ORIGIN)
    cosign(trace, below)
    report = check(trace, policy=policy(below))
    assert (report.status, report.level) == (Exit.UNTRUSTED, 1)


def test_too_few_witnesses(trace: Path) -> None:
    one, two = (CosigningKey(f"w.example/{at}", bytes([at] * 32)) for at in (1, 2))
    cosign(trace, one)
    report = check(trace, policy=policy(one, two, quorum=2))
    assert (report.status, codes(report)) == (Exit.UNTRUSTED, ["trust.quorum"])
    cosign(trace, two)
    assert check(trace, policy=policy(one, two, quorum=2)).level == 3


def test_a_checkpoint_that_nobody_you_trust_signed_is_no_evidence(trace: Path) -> None:
    eve = generate_key("example.org/eve")
    head = Checkpoint(origin=ORIGIN, size=4000, root=bytes(32))
    forged = f"{head.text()}\n{eve.of_log(ORIGIN).sign(head.text())}".encode()
    report = check(trace, held=held(forged))
    assert (report.status, codes(report)) == (Exit.UNTRUSTED, ["held.untrusted"])


def test_the_clock_set_back(trace: Path) -> None:
    """Within a log it shows; a recorder whose clock was wrong all along leaves no mark at all."""
    entries = [*run(1, calls=3), *run(2, calls=3)]
    for number, one in enumerate(entries):
        one["time"] = 1_795_280_000_000 + number
    forge(trace, chain(entries), KEY, ORIGIN)
    assert check(trace).clock_back == -1
    for one in entries[9:]:
        one["time"] = 1_600_000_000_000
    forge(trace, chain(entries), KEY, ORIGIN)
    report = check(trace)
    assert (report.status, report.clock_back) == (Exit.OK, 9)
    assert any("set back before entry 9" in line for line in report.not_checked)
    for one in entries:
        one["time"] = 1_600_000_000_000
    forge(trace, chain(entries), KEY, ORIGIN)
    assert check(trace).clock_back == -1


def test_spliced_tiles(trace: Path, tmp_path: Path) -> None:
    """Bundles and tiles of another log of the same key, whole and consistent in themselves."""
    other = tmp_path / "other"
    many = [*run(1, calls=200), *run(2, calls=3)]
    forge(trace, chain(many), KEY, ORIGIN)
    many[300]["time"] = 7
    forge(other, chain(many), KEY, ORIGIN)
    assert check(trace).status == check(other).status == Exit.OK
    for names in (["tile/entries/001"], ["tile/0/001"], ["tile/entries/001", "tile/0/001"]):
        copy = tmp_path / "copy"
        shutil.copytree(trace, copy)
        for name in names:
            shutil.copy(other / name, copy / name)
        report = check(copy)
        assert report.status == Exit.TAMPERED, names
        shutil.rmtree(copy)
    shutil.rmtree(trace / "tile/1")
    shutil.copytree(other / "tile/1", trace / "tile/1")
    assert codes(check(trace)) == ["tile.hash"]


def test_swapped_sessions_and_duplicates_signed_by_the_key_holder(trace: Path) -> None:
    """What the true key signs must still keep the log's own rules."""
    whole = chain([*run(1, calls=3), *run(2, calls=3)])
    swapped = [data.replace(b'"s1"', b'"s2"') for data in whole]
    for entries, code in (
        (swapped, "chain.previous"),
        ([*whole[:5], whole[4], *whole[5:]], "chain.sequence"),
        ([*whole[:4], *whole[5:]], "chain.sequence"),
        ([*whole[:4], whole[5], whole[4], *whole[6:]], "chain.sequence"),
    ):
        forge(trace, entries, KEY, ORIGIN)
        report = check(trace)
        assert (report.status, report.findings[0].code) == (Exit.TAMPERED, code)


def test_a_forged_proof(trace: Path) -> None:
    brought = Brought(keys=(KEY.verifier,), origin=ORIGIN)
    with Folder(trace) as folder:
        proof, stored = prove_entry(folder, 4)
    good = proof.encode()

    def status(data: bytes, about: bytes) -> Exit:
        return check_file(io.BytesIO(data), brought, entry=about, name="p").status

    assert status(good, stored.data) == Exit.OK
    assert status(good, stored.data.replace(b'"ok"', b'"no"')) != Exit.OK
    for at in range(len(good)):
        forged = bytearray(good)
        forged[at] ^= 1
        assert status(bytes(forged), stored.data) != Exit.OK, at
    # Of another head, signed by a stranger: its own tree holds the changed entry.
    eve = generate_key("example.org/eve")
    entries = chain([*run(1, calls=3), *run(2, calls=3, word="d")])
    head = Checkpoint(origin=ORIGIN, size=len(entries), root=lay_out(trace, entries))
    sign(trace, head, eve)
    with Folder(trace) as folder:
        proof, stored = prove_entry(folder, 4)
    assert status(proof.encode(), stored.data) == Exit.UNTRUSTED


def rotated(trace: Path, new: SigningKey, *, body: Fields | None = None) -> list[bytes]:
    """Forge a log whose key was handed over after its first run; return its entries."""
    steps = [*run(1, calls=3), {**opening(ORIGIN), "session": "run-3"}]
    handed: Fields = body or dict(rotation_body(ORIGIN, KEY, new.verifier))
    steps.append(entry("key.rotate", "run-3", handed))
    steps.append(entry("session.close", "run-3", CLOSED))
    covered = len(steps)
    whole = chain([*steps, *run(2, calls=3)])
    head = Checkpoint(origin=ORIGIN, size=covered, root=lay_out(trace, whole[:covered]))
    sign(trace, head, KEY, new)
    (trace / "checkpoints").mkdir(exist_ok=True)
    shutil.copy(trace / "checkpoint", trace / f"checkpoints/{covered}")
    forge(trace, whole, new, ORIGIN)
    return whole


def test_a_change_of_key_is_followed_and_a_false_one_is_not(trace: Path) -> None:
    new, eve = generate_key("example.org/alice2"), generate_key("example.org/eve")
    whole = rotated(trace, new)
    report = check(trace)
    assert (report.status, report.level, report.rotations) == (Exit.OK, 1, 1)
    assert report.signed_by == new.name
    # Who brings the newest key needs no change of key.
    newest = verify_trace(trace, [new.verifier.line])
    assert (newest.status, newest.level) == (Exit.OK, 1)
    # Eve's entry, which the old key never signed.
    false: Fields = {**rotation_body(ORIGIN, KEY, new.verifier), "new": eve.verifier.line}
    rotated(trace, eve, body=false)
    assert check(trace).status == Exit.TAMPERED
    # The head that covers it has lost the old key's signature.
    rotated(trace, new)
    path = next((trace / "checkpoints").iterdir())
    head = Checkpoint.parse(Note.parse(path.read_bytes()).text)
    path.write_text(f"{head.text()}\n{new.of_log(ORIGIN).sign(head.text())}")
    report = check(trace)
    assert (report.status, codes(report)) == (Exit.UNTRUSTED, ["rotation.uncovered"])
    # The new key's holder replaces what the old key had signed.
    rotated(trace, new)
    forge(trace, [whole[0].replace(b"process", b"proceed"), *whole[1:]], new, ORIGIN)
    assert check(trace).status == Exit.TAMPERED
    # A false signature in the new key's name, which only the change of key makes a trusted one.
    rotated(trace, new)
    note = Note.parse(note_of(trace))
    false_line = eve.of_log(ORIGIN).sign(note.text).split()[2]
    raw = new.of_log(ORIGIN).verifier.id + base64.b64decode(false_line)[4:]
    line = f"\N{EM DASH} {ORIGIN} {base64.b64encode(raw).decode()}\n"
    (trace / "checkpoint").write_text(f"{note.text}\n{line}")
    report = check(trace)
    assert (report.status, codes(report)) == (Exit.TAMPERED, ["checkpoint.signature"])
    # The old key signs on although it handed over.
    forge(trace, whole, KEY, ORIGIN)
    report = check(trace)
    assert (report.status, codes(report)) == (Exit.TAMPERED, ["rotation.retired"])


def test_a_journal_torn_at_every_byte(bench: Bench) -> None:
    """What is not signed may be torn anywhere: it is counted, and what is signed still holds."""
    signer = bench.signer()
    with TraceWriter.open(bench.trace, signer=signer) as writer:
        session = writer.open_session("local", "sdk")
        writer.checkpoint()
        record_call(writer, session, "c1")
        copy = bench.root / "copy"
        shutil.copytree(bench.trace, copy)
    signer.close()
    journal = max((copy / "journal").glob("*.wal"))
    whole = journal.read_bytes().rstrip(b"\0")  # behind it is room for more
    assert len(whole) > 1000
    counts: list[int] = []
    for length in range(len(whole) + 1):
        journal.write_bytes(whole[:length])
        report = verify_trace(copy, [bench.key_line], jobs=1)
        assert report.status == Exit.INCOMPLETE, length
        assert (report.level, report.integrity) == (1, "intact")
        counts.append(report.unsigned)
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 3)


def test_a_trace_cut_to_its_first_files(bench: Bench) -> None:
    trace = write_trace(bench, calls=100)
    assert bench.verify().status == Exit.OK
    for name in ("tile/entries/001.p", "tile/0/001.p", "tile/1"):
        copy = bench.root / "cut"
        shutil.copytree(trace, copy)
        shutil.rmtree(copy / name)
        report = bench.verify(copy)
        assert (report.status, report.integrity) == (Exit.INCOMPLETE, "unknown"), name
        shutil.rmtree(copy)
