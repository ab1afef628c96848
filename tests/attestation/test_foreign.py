"""Programs that are not ours accept our log, and reject it after one flipped byte."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from safeconduct.attestation import VerifierKey
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.entry import parse_entry
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import leaf_hash
from safeconduct.attestation.note import Note
from safeconduct.attestation.proofs.bundle import write_bundle
from safeconduct.attestation.proofs.proof import LogProof, prove_entry
from safeconduct.attestation.proofs.search import entries_of_call
from safeconduct.attestation.proofs.statement import PAYLOAD_TYPE, Envelope, pre_authentication
from safeconduct.attestation.reader import read_checkpoint, stored_entries
from safeconduct.runtime.cli.trace_statement import sign_statement

from .kit import Bench, write_trace  # noqa: TID251 - the tests' own kit

_GO_PROGRAMS = Path(__file__).parents[1] / "foreign"
_WITNESS = CosigningKey("witness.example/w1", bytes(range(32)))


@pytest.fixture
def trace(bench: Bench) -> Path:
    return write_trace(bench, calls=180, sessions=2)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def log_key(bench: Bench, trace: Path) -> VerifierKey:
    """Return the key under the name that the log's heads carry: its origin."""
    return VerifierKey.parse(bench.key_line).of_log((trace / "origin").read_text().strip())


def prove(trace: Path, index: int) -> tuple[LogProof, bytes]:
    with Folder(trace) as folder:
        proof, stored = prove_entry(folder, index)
    return proof, stored.data


def state(bench: Bench, trace: Path) -> Envelope:
    signer = bench.signer()
    try:
        with Folder(trace) as folder:
            return sign_statement(folder, entries_of_call(folder, "c7"), signer)
    finally:
        signer.close()


def openssl(bench: Bench, folder: Path, message: bytes, signature: bytes) -> None:
    """Have openssl accept a signature, and reject it over the message with one byte flipped."""
    public = Ed25519PublicKey.from_public_bytes(VerifierKey.parse(bench.key_line).public)
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pem").write_bytes(pem)
    (folder / "signature").write_bytes(signature)
    (folder / "message").write_bytes(message)
    command: list[str | Path] = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin"]
    command += ["-inkey", folder / "key.pem", "-sigfile", folder / "signature"]
    command += ["-in", folder / "message"]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout.strip()) == (0, "Signature Verified Successfully")
    flip(folder / "message", len(message) // 2)
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl is not installed"
)


@needs_openssl
def test_openssl_verifies_the_checkpoint(bench: Bench, trace: Path, tmp_path: Path) -> None:
    text, _, line = (trace / "checkpoint").read_text().rpartition("\n\u2014 ")
    openssl(bench, tmp_path, text.encode(), base64.b64decode(line.split()[1])[4:])


@needs_openssl
def test_openssl_verifies_a_statement(bench: Bench, trace: Path, tmp_path: Path) -> None:
    envelope = state(bench, trace)
    signature = envelope.signatures[0].signature
    openssl(bench, tmp_path, pre_authentication(envelope.payload), signature)


def test_securesystemslib_verifies_a_statement(bench: Bench, trace: Path) -> None:
    """The DSSE code of the in-toto and TUF projects, given our file and the public key."""
    dsse: Any = import_module("securesystemslib.dsse")
    signer: Any = import_module("securesystemslib.signer")
    errors: Any = import_module("securesystemslib.exceptions")
    data = json.loads(state(bench, trace).encode())
    hint = data["signatures"][0]["keyid"]
    public = {"public": VerifierKey.parse(bench.key_line).public.hex()}
    key = signer.SSlibKey(hint, "ed25519", "ed25519", public)
    envelope = dsse.Envelope.from_dict(json.loads(json.dumps(data)))
    assert envelope.payload_type == PAYLOAD_TYPE
    assert list(envelope.verify([key], threshold=1)) == [hint]
    statement = json.loads(envelope.payload)
    assert statement["predicate"]["entries"][0]["entry"]["body"]["tool"] == "fs.read"
    for at in range(0, len(envelope.payload), 97):
        payload = bytearray(envelope.payload)
        payload[at] ^= 1
        bad = dsse.Envelope(bytes(payload), envelope.payload_type, envelope.signatures)
        with pytest.raises(errors.VerificationError):
            bad.verify([key], threshold=1)


def test_sigstore_verifies_checkpoint_and_inclusion(bench: Bench, trace: Path) -> None:
    """sigstore-python's own check of a Rekor entry: signed note, root and audit path."""
    merkle: Any = import_module("sigstore._internal.merkle")
    checkpoints: Any = import_module("sigstore._internal.rekor.checkpoint")
    trust: Any = import_module("sigstore._internal.trust")
    models: Any = import_module("sigstore.models")
    common: Any = import_module("sigstore_models.common.v1")
    errors: Any = import_module("sigstore.errors")
    log = log_key(bench, trace)
    der = Ed25519PublicKey.from_public_bytes(log.public).public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    details = common.PublicKeyDetails.PKIX_ED25519
    ring = trust.Keyring([common.PublicKey(raw_bytes=base64.b64encode(der), key_details=details)])

    def check(proof: LogProof, entry: bytes) -> None:
        text = Note.parse(proof.checkpoint).text.split("\n")
        inclusion = SimpleNamespace(
            log_index=proof.index,
            tree_size=int(text[1]),
            root_hash=base64.b64decode(text[2]),
            hashes=list(proof.hashes),
            checkpoint=SimpleNamespace(envelope=proof.checkpoint.decode()),
        )
        inner = SimpleNamespace(
            inclusion_proof=inclusion,
            canonicalized_body=entry,
            log_id=SimpleNamespace(key_id=log.id),
        )
        found = models.TransparencyLogEntry(inner)
        checkpoints.verify_checkpoint(ring, found)
        merkle.verify_merkle_inclusion(found)

    for index in (0, 5, 255, 256, 500):
        proof, entry = prove(trace, index)
        check(proof, entry)
        with pytest.raises(errors.VerificationError):
            check(proof, entry[:-1] + b" ")
        flipped = bytearray(proof.checkpoint)
        flipped[len(log.name) + 8] ^= 1
        with pytest.raises((errors.VerificationError, ValueError)):
            check(LogProof.parse(proof.encode()[: -len(flipped)] + bytes(flipped)), entry)


def test_pymerkle_has_the_same_root_and_accepts_an_inclusion(trace: Path) -> None:
    with Folder(trace) as folder:
        _, head = read_checkpoint(folder)
        entries = [stored.data for stored in stored_entries(folder, head.size)]
    pymerkle: Any = import_module("pymerkle")  # it has no types
    tree = pymerkle.InmemoryTree(algorithm="sha256")
    for entry in entries:
        tree.append_entry(entry)
    assert tree.get_root() == head.root
    for index in (0, 5, 256, head.size - 1):
        ours, entry = prove(trace, index)
        # Its own proof names the sides of the path; ours leaves them to arithmetic (RFC 9162).
        shape = tree.prove_inclusion(index + 1, head.size).serialize()
        leaf = leaf_hash(entry)
        path = [one.hex() for one in (leaf, *ours.hashes)]
        proof = pymerkle.InclusionProof.deserialize({**shape, "path": path})
        pymerkle.verify_inclusion(leaf, head.root, proof, index=index + 1, size=head.size)
        path[-1] = leaf.hex()
        bad = pymerkle.InclusionProof.deserialize({**shape, "path": path})
        with pytest.raises(pymerkle.InvalidProof):
            pymerkle.verify_inclusion(leaf, head.root, bad)
        with pytest.raises(pymerkle.InvalidProof):
            pymerkle.verify_inclusion(leaf_hash(entry[:-1] + b" "), head.root, proof)
    other = pymerkle.InmemoryTree(algorithm="sha256")
    for entry in [entries[0][:-1] + b" ", *entries[1:]]:
        other.append_entry(entry)
    assert other.get_root() != head.root


Build = Callable[[str], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile one of the Go programs in tests/foreign."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed")
    folder = tmp_path_factory.mktemp("go")

    def compile_program(name: str) -> Path:
        program = folder / name
        built = subprocess.run(
            ["go", "build", "-o", program, "."],
            cwd=_GO_PROGRAMS / name,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if built.returncode and "dial" in built.stderr:
            pytest.skip("the Go modules cannot be fetched here")
        assert built.returncode == 0, built.stderr
        return program

    return compile_program


def test_gos_sumdb_proves_every_entry(bench: Bench, trace: Path, build: Build) -> None:
    sumdb = build("sumdb")

    def run() -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [sumdb, trace, log_key(bench, trace).line]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    size = int((trace / "checkpoint").read_text().split("\n")[1])
    assert size > 512
    good = run()
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith(f"{size} entries of example.org/alice/")
    for path in ("tile/entries/001", "tile/0/000", "checkpoint", f"tile/0/002.p/{size - 512}"):
        flip(trace / path, 40)
        assert run().returncode == 1, path
        flip(trace / path, 40)
    assert run().returncode == 0


def test_go_verifies_a_proof_and_its_cosignature(
    bench: Bench, trace: Path, build: Build, tmp_path: Path
) -> None:
    """golang.org/x/mod's note and tlog, and transparency-dev's cosignatures, on a .tlog-proof."""
    program = build("proof")
    note = (trace / "checkpoint").read_text()
    line = _WITNESS.sign(Note.parse(note.encode()).text, time=1_790_000_000).line
    (trace / "checkpoint").write_text(note + line)
    proof, entry = prove(trace, 300)
    file, beside = tmp_path / "p.tlog-proof", tmp_path / "p.entry"
    beside.write_bytes(entry)

    def run(data: bytes, *keys: str) -> int:
        file.write_bytes(data)
        command: list[str | Path] = [program, file, beside, *keys]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode

    data = proof.encode()
    log, witness = log_key(bench, trace).line, _WITNESS.verifier.line
    assert run(data, log, witness) == 0
    stranger = CosigningKey("witness.example/w1", bytes(32)).verifier.line
    assert run(data, log, stranger) == 1
    extra = data.index(b"index ")
    for at in range(extra, len(data), 5):
        if data[at + 1 : at + 2] == b"=":
            continue  # Go's decoder passes over the last bits before a padding; ours does not
        bad = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        assert run(bad, log, witness) == 1, at
    beside.write_bytes(entry[:-1] + b" ")
    assert run(data, log, witness) == 1


def test_a_second_implementation_reads_a_bundle(
    bench: Bench, trace: Path, build: Build, tmp_path: Path
) -> None:
    """A Go program written from docs/trace-format.md alone: chain, common proof, signed head."""
    program = build("bundle")
    file, out = tmp_path / "session.bundle", io.BytesIO()
    with Folder(trace) as folder:
        calls = entries_of_call(folder, "c7")
        write_bundle(folder, parse_entry(calls[0].data).session, out)
    data = out.getvalue()

    def run(bad: bytes) -> subprocess.CompletedProcess[str]:
        file.write_bytes(bad)
        command: list[str | Path] = [program, file, log_key(bench, trace).line]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    good = run(data)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.endswith("none is missing\n")
    for at in range(0, len(data) - 60, len(data) // 60):
        assert run(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]).returncode == 1, at
    lines = data.split(b"\n")
    for at in (2, 10, data.split(b"\n\n")[0].count(b"\n")):
        assert run(b"\n".join(lines[:at] + lines[at + 1 :])).returncode == 1, at
