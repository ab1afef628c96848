"""Programs that are not ours accept our log, and reject it after one flipped byte."""

from __future__ import annotations

import base64
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from safeconduct.attestation import VerifierKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.reader import read_checkpoint, stored_entries

from .kit import Bench, write_trace  # noqa: TID251 - the tests' own kit

_GO_PROGRAM = Path(__file__).parents[1] / "foreign" / "sumdb"


@pytest.fixture
def trace(bench: Bench) -> Path:
    return write_trace(bench, calls=180, sessions=2)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_the_checkpoint(bench: Bench, trace: Path, tmp_path: Path) -> None:
    text, _, line = (trace / "checkpoint").read_text().rpartition("\n\u2014 ")
    signature = base64.b64decode(line.split()[1])[4:]
    public = Ed25519PublicKey.from_public_bytes(VerifierKey.parse(bench.key_line).public)
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(pem)
    (tmp_path / "signature").write_bytes(signature)
    (tmp_path / "text").write_text(text)
    command: list[str | Path] = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin"]
    command += ["-inkey", tmp_path / "key.pem", "-sigfile", tmp_path / "signature"]
    command += ["-in", tmp_path / "text"]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout.strip()) == (0, "Signature Verified Successfully")
    flip(tmp_path / "text", len(text) // 2)
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_pymerkle_has_the_same_root_and_accepts_an_inclusion(trace: Path) -> None:
    with Folder(trace) as folder:
        _, head = read_checkpoint(folder)
        entries = [stored.data for stored in stored_entries(folder, head.size)]
    pymerkle: Any = import_module("pymerkle")  # it has no types
    tree = pymerkle.InmemoryTree(algorithm="sha256")
    for entry in entries:
        tree.append_entry(entry)
    assert tree.get_root() == head.root
    proof = tree.prove_inclusion(5, head.size)
    pymerkle.verify_inclusion(tree.get_leaf(5), head.root, proof)
    other = pymerkle.InmemoryTree(algorithm="sha256")
    for entry in [entries[0][:-1] + b" ", *entries[1:]]:
        other.append_entry(entry)
    assert other.get_root() != head.root


@pytest.fixture(scope="module")
def sumdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("go") is None:
        pytest.skip("go is not installed")
    program = tmp_path_factory.mktemp("go") / "sumdb"
    built = subprocess.run(
        ["go", "build", "-o", program, "."],
        cwd=_GO_PROGRAM,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if built.returncode and "dial" in built.stderr:
        pytest.skip("the Go modules cannot be fetched here")
    assert built.returncode == 0, built.stderr
    return program


def test_gos_sumdb_proves_every_entry(bench: Bench, trace: Path, sumdb: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [sumdb, trace, bench.key_line]
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
