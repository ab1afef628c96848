"""A proof of one entry holds with the key or the policy alone, and with nothing else."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeconduct.attestation import TraceWriter, VerifierKey, read_entries, write_key
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import leaf_hash, node_hash, range_hash
from safeconduct.attestation.note import Note
from safeconduct.attestation.proofs.evidence import trusted_keys
from safeconduct.attestation.proofs.multiproof import prove_many, root_of_many
from safeconduct.attestation.proofs.proof import LogProof, prove_entry
from safeconduct.attestation.proofs.search import entries_of_call
from safeconduct.attestation.reader import read_checkpoint
from safeconduct.attestation.signing.key import generate_key
from safeconduct.attestation.verify.trust import TrustPolicy
from safeconduct.attestation.verify.vouching import Brought
from safeconduct.attestation.writing.cosigned import store_cosignatures
from safeconduct.errors import Exit, TraceInvalid
from safeconduct.runtime.cli.app import dispatch

from .evidence_kit import check  # noqa: TID251 - the same
from .kit import NAME, Bench, record_call, write_trace  # noqa: TID251 - the tests' own kit

WITNESS = CosigningKey("witness.example/w1", bytes(range(32)))
COSIGNED_AT = 1_790_000_000


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("proof")
    return Bench(root, write_key(root / "alice.key", NAME))


@pytest.fixture(scope="module")
def trace(bench: Bench) -> Path:
    return write_trace(bench, calls=100, sessions=2)


@pytest.fixture
def trust(bench: Bench) -> Brought:
    return Brought(keys=trusted_keys([bench.key_line]))


def prove(trace: Path, index: int, *, with_entry: bool = False) -> tuple[LogProof, bytes]:
    with Folder(trace) as folder:
        proof, stored = prove_entry(folder, index, with_entry=with_entry)
    return proof, stored.data


def cosign(trace: Path, *keys: CosigningKey) -> None:
    """Add cosignature lines to a trace's newest head."""
    note = (trace / "checkpoint").read_bytes()
    text = Note.parse(note).text
    store_cosignatures(trace, note, [key.sign(text, time=COSIGNED_AT).line for key in keys])


def policy(bench: Bench, *, quorum: str = "w1", key: CosigningKey = WITNESS) -> TrustPolicy:
    lines = [f"log {bench.key_line}", f"witness w1 {key.verifier.line}", f"quorum {quorum}", ""]
    return TrustPolicy.parse("\n".join(lines).encode())


def test_every_entry_can_be_proved(trace: Path, trust: Brought) -> None:
    with Folder(trace) as folder:
        size = read_checkpoint(folder)[1].size
    assert size > 256
    for index in [*range(0, size, 17), 255, 256, size - 1]:
        proof, entry = prove(trace, index)
        assert LogProof.parse(proof.encode()) == proof
        found = check(proof.encode(), trust, entry)
        assert (found.status, found.level, found.index) == (Exit.OK, 1, index), found
    with pytest.raises(TraceInvalid) as refused:
        prove(trace, size)
    assert refused.value.code == "proof.range"


def test_the_proof_may_hold_the_entry(trace: Path, trust: Brought) -> None:
    proof, entry = prove(trace, 5, with_entry=True)
    found = check(proof.encode(), trust)
    assert found.status is Exit.OK
    assert any("entry 5 is call." in one for one in found.shows)
    alone = check(prove(trace, 5)[0].encode(), trust)
    assert alone.status is Exit.OK
    assert any("what the entry says" in one for one in alone.not_checked)
    assert alone.leaf == found.leaf == leaf_hash(entry).hex()


def test_without_a_key_of_ours_nothing_is_trusted(trace: Path, bench: Bench) -> None:
    data = prove(trace, 5)[0].encode()
    stranger = generate_key(NAME).verifier
    for keys in ((), (stranger,)):
        found = check(data, Brought(keys=keys))
        assert (found.status, found.level) == (Exit.UNTRUSTED, 0)
        assert "verify-proof --key" in found.next_step
    other = check(data, Brought(keys=trusted_keys([bench.key_line]), origin="example.org/other"))
    assert (other.status, other.findings[0].code) == (Exit.UNTRUSTED, "trace.origin")


def test_no_flipped_byte_of_a_proof_verifies(trace: Path, trust: Brought) -> None:
    proof, entry = prove(trace, 70)
    data = proof.encode()
    for at in range(len(data)):
        bad = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        assert check(bad, trust, entry).status is not Exit.OK, at
    for at in range(len(data)):
        assert check(data[:at], trust, entry).status is not Exit.OK, at
    for at in range(0, len(entry), 7):
        other = entry[:at] + bytes([entry[at] ^ 1]) + entry[at + 1 :]
        assert check(data, trust, other).status is Exit.TAMPERED, at


def test_a_proof_has_no_second_spelling(trace: Path, trust: Brought) -> None:
    """tlog-proof, "Format": without extra data the line is omitted, and there is one at most."""
    proof, entry = prove(trace, 70)
    data = replace(proof, leaf=None).encode()
    assert check(data, trust, entry).status is Exit.OK
    first, index = b"c2sp.org/tlog-proof@v1\n", b"index 70\n"
    for bad in (
        data.replace(index, b"extra \n" + index),
        data.replace(index, b"extra\n" + index),
        data.replace(index, index + b"extra AA==\n"),
        data.replace(index, b"index 070\n"),
        data.replace(index, b"index 70 \n"),
        data.replace(index, index + index),
        data.replace(index, index + b"\n"),
        data.replace(first, first + b"\n"),
        data + b"\n",
        data.replace(b"\n", b"\r\n"),
    ):
        assert bad != data
        assert check(bad, trust, entry).status is not Exit.OK, bad[:80]


def test_a_proof_is_of_one_entry_at_one_place(trace: Path, trust: Brought, bench: Bench) -> None:
    proof, entry = prove(trace, 70)
    other, stranger = prove(trace, 71)
    forged = [
        replace(proof, index=71),
        replace(proof, index=70 + 512),
        replace(proof, hashes=proof.hashes[:-1]),
        replace(proof, hashes=(*proof.hashes, bytes(32))),
        replace(proof, hashes=other.hashes),
        replace(proof, hashes=tuple(reversed(proof.hashes))),
    ]
    for one in forged:
        assert check(one.encode(), trust, entry).status is Exit.TAMPERED, one.index
    assert check(proof.encode(), trust, stranger).findings[0].code == "proof.entry"
    # An inner node is no leaf: what two leaves hash to is not an entry (RFC 6962 §2.1).
    node = node_hash(leaf_hash(entry), leaf_hash(stranger))
    short = replace(proof, index=35, hashes=proof.hashes[1:], leaf=node)
    assert check(short.encode(), trust).status is Exit.TAMPERED
    # The head of another log of the same key.
    elsewhere = write_trace(bench, calls=100, trace=bench.root / "elsewhere")
    swapped = replace(proof, checkpoint=(elsewhere / "checkpoint").read_bytes())
    assert check(swapped.encode(), trust, entry).status is Exit.TAMPERED


def test_a_policy_of_witnesses_decides_the_level(bench: Bench, trust: Brought) -> None:
    trace = write_trace(bench, calls=3, trace=bench.root / "witnessed")
    alone = prove(trace, 4)[0].encode()
    wanted = Brought(policy=policy(bench), now=COSIGNED_AT)
    found = check(alone, wanted)
    assert (found.status, found.findings[0].code) == (Exit.UNTRUSTED, "trust.quorum")
    assert check(alone, Brought(policy=policy(bench, quorum="none"))).level == 1
    before = (trace / "checkpoint").read_bytes()
    cosign(trace, WITNESS)
    data = prove(trace, 4)[0].encode()
    found = check(data, wanted)
    assert (found.status, found.level, found.witnesses) == (Exit.OK, 3, ("w1",))
    assert check(data, trust).level == 1, "a witness nobody named counts for nothing"
    text = Note.parse(before).text
    forged = WITNESS.sign(text.replace("\n", "/x\n", 1), time=COSIGNED_AT).line
    bad = data.replace(WITNESS.sign(text, time=COSIGNED_AT).line.encode(), forged.encode())
    assert bad != data
    assert check(bad, wanted).findings[0].code == "cosignature.invalid"
    own = CosigningKey(f"{NAME}/witness", bytes(32))
    (trace / "checkpoint").write_bytes(before)
    cosign(trace, own)
    found = check(prove(trace, 4)[0].encode(), Brought(policy=policy(bench, key=own)))
    assert found.status is Exit.UNTRUSTED, "the operator's own witness is none"
    assert found.findings[0].code == "trust.quorum"


def test_the_head_that_most_witnesses_cosigned_is_proved(bench: Bench) -> None:
    trace = bench.root / "heads"
    signer = bench.signer()
    try:
        with TraceWriter.open(trace, signer=signer) as writer:
            session = writer.open_session("local", "sdk")
            record_call(writer, session, "c1")
            writer.checkpoint()
            note = (trace / "checkpoint").read_bytes()
            writer.close_session(session)
    finally:
        signer.close()
    newest = (trace / "checkpoint").read_bytes()
    earlier, size = (Checkpoint.parse(Note.parse(one).text).size for one in (note, newest))
    assert earlier < size
    line = WITNESS.sign(Note.parse(note).text, time=COSIGNED_AT).line
    (trace / "checkpoints" / str(earlier)).write_bytes(note + line.encode())
    wanted = Brought(policy=policy(bench), now=COSIGNED_AT)
    found = check(prove(trace, earlier - 1)[0].encode(), wanted)
    assert (found.status, found.size, found.level) == (Exit.OK, earlier, 3)
    last, _ = prove(trace, size - 1)
    assert last.checkpoint == newest, "only a head that covers the entry will do"


def test_a_proof_in_ten_million_entries_is_small(trace: Path, bench: Bench) -> None:
    """24 hashes, one witness, names of a usual length: what bench_verify measures on a real log."""
    proof, _ = prove(trace, 5)
    head = Note.parse(proof.checkpoint).text.split("\n")
    head[1] = "10000000"
    text = "\n".join(head)
    lines = proof.checkpoint.decode().rpartition("\n\n")[2]
    cosigned = f"{text}\n{lines}{WITNESS.sign(text, time=COSIGNED_AT).line}".encode()
    large = replace(proof, index=9_999_999, hashes=(bytes(32),) * 24, checkpoint=cosigned)
    assert len(large.encode()) <= 1600
    assert LogProof.parse(large.encode()).hashes == large.hashes


def node(level: int, index: int) -> bytes:
    """Return a subtree of the tree whose entries are 0, 1, 2 …"""
    if level == 0:
        return leaf_hash(b"%d" % index)
    return node_hash(node(level - 1, 2 * index), node(level - 1, 2 * index + 1))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 31, 64, 77])
def test_one_proof_for_many(size: int) -> None:
    root = range_hash(0, size, node)
    chance = random.Random(size)  # noqa: S311 - a test's choice
    for count in {1, 2, size // 2, size} - {0}:
        indices = sorted(chance.sample(range(size), min(count, size)))
        chosen = [node(0, index) for index in indices]
        proof = prove_many(indices, size, node)
        assert root_of_many(indices, chosen, size, proof) == root
        assert root_of_many(indices, chosen, size, [*proof, root]) != root
        assert root_of_many(indices, [bytes(32), *chosen[1:]], size, proof) != root
        assert root_of_many([*indices, size], [*chosen, root], size, proof) is None
        assert root_of_many(indices[::-1], chosen, size, proof) != root or len(indices) == 1
        if proof:
            assert root_of_many(indices, chosen, size, proof[:-1]) != root
    with pytest.raises(ValueError, match="proof of nothing"):
        prove_many([], size, node)


def test_one_hash_stands_once() -> None:
    """Neighbours share their path: far fewer hashes than one proof for each."""
    assert len(prove_many(list(range(64, 128)), 256, node)) == 2
    assert len(prove_many(list(range(256)), 256, node)) == 0


def test_the_verbs(
    trace: Path, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = next(entry.body["call"] for _, entry in read_entries(trace) if "call" in entry.body)
    target = tmp_path / "p.tlog-proof"
    assert dispatch(["trace", "prove", str(trace), "--call", call, "-o", str(target)]) == Exit.OK
    assert (tmp_path / "p.entry").exists()
    capsys.readouterr()
    words = ["trace", "verify-proof", str(target)]
    assert dispatch(words) == Exit.UNTRUSTED
    assert f"verify-proof --key 'NAME+HASH+BASE64' {target}" in capsys.readouterr().out
    assert dispatch([*words, "--key", bench.key_line]) == Exit.OK
    assert "call.outcome of session" in capsys.readouterr().out
    assert dispatch([*words, "--key", bench.key_line, "--json"]) == Exit.OK
    told = json.loads(capsys.readouterr().out)
    with Folder(trace) as folder:
        assert told["index"] == entries_of_call(folder, call)[-1].index
    assert (told["status"], told["verdict"], told["level"]) == (0, "OK", 1)
    file = tmp_path / "policy"
    file.write_text(f"log {bench.key_line}\nquorum none\n")
    assert dispatch([*words, "--policy", str(file)]) == Exit.OK
    (tmp_path / "p.entry").write_bytes(b"{}")
    assert dispatch([*words, "--key", bench.key_line]) == Exit.TAMPERED
    assert dispatch(["trace", "verify-proof", str(file)]) == Exit.TRACE_IO
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path / "absent", tmp_path / "pipe", Path("/dev/zero"), trace):
        assert dispatch(["trace", "verify-proof", str(wrong)]) == Exit.TRACE_IO


def test_the_key_may_stand_under_the_logs_own_name(trace: Path, bench: Bench) -> None:
    """A key line brought under the origin, as tlog-policy writes it, is the same key."""
    data = prove(trace, 3)[0].encode()
    origin = (trace / "origin").read_text().strip()
    named = VerifierKey.parse(bench.key_line).of_log(origin)
    assert check(data, Brought(keys=(named,))).status is Exit.OK


EVIDENCE = Path(__file__).parents[1] / "vectors" / "trace" / "evidence"
CASES = json.loads((EVIDENCE / "evidence.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_vectors(case: dict[str, Any]) -> None:
    data = (EVIDENCE / case["file"]).read_bytes()
    if "replace" in case:
        at, text = case["replace"]
        data = data[:at] + text.encode() + data[at + len(text) :]
    if "cut" in case:
        at, count = case["cut"]
        data = data[:at] + data[at + count :]
    keys = trusted_keys([(EVIDENCE / "log.pub").read_text()]) if case.get("key") else ()
    named = TrustPolicy.parse((EVIDENCE / "policy").read_bytes()) if case.get("policy") else None
    entry = (EVIDENCE / case["entry"]).read_bytes() if "entry" in case else None
    found = check(data, Brought(keys=keys, policy=named), entry)
    assert (found.status, found.level) == (case["exit"], case["level"]), found


_FILES = [case["file"] for case in CASES]


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(set(_FILES))),
    edits=st.lists(
        st.tuples(st.integers(0, 20_000), st.integers(0, 40), st.binary(max_size=12)), max_size=4
    ),
)
def test_hostile_files_end_in_a_verdict(name: str, edits: list[tuple[int, int, bytes]]) -> None:
    """Whatever is cut out of and put into a file, nothing but a verdict comes of it."""
    good = data = (EVIDENCE / name).read_bytes()
    for at, cut, put in edits:
        place = at % (len(data) + 1)
        data = data[:place] + put + data[place + cut :]
    keys = trusted_keys([(EVIDENCE / "log.pub").read_text()])
    found = check(data, Brought(keys=keys))
    if data == good:
        assert found.status is Exit.OK
    elif found.status is Exit.OK:
        # Only what nobody signed may differ: the witness's line, whose key was not brought, the
        # spaces of an envelope, the hint beside its signature.
        assert name.endswith((".json", ".bundle", ".tlog-proof"))
        assert found.signed_by == "example.org/vectors"
    assert all(line.isprintable() for line in found.lines())


def test_checking_a_proof_loads_no_runtime(tmp_path: Path) -> None:
    code = (
        "import sys; from safeconduct.runtime.cli import run; "
        f"run(['trace', 'verify-proof', {str(EVIDENCE / 'entry.tlog-proof')!r}]); "
        "print([name for name in ('wasmtime', 'pyseccomp', 'rich', 'safeconduct.policies', "
        "'safeconduct.runtime.supervisor', 'safeconduct.runtime.sandbox') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith("NOT TRUSTED: proof of example.org/vectors/")
    assert done.stdout.endswith("\n[]\n")
