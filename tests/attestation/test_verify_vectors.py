"""Vectors that others published: our Ed25519 verdicts and our Merkle proofs agree with all."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from safeconduct.attestation.merkle import verify_consistency, verify_inclusion
from safeconduct.attestation.note import (
    DASH,
    Signature,
    VerifierKey,
    encode_base64,
    parse_signature,
)
from safeconduct.errors import TraceInvalid

VECTORS = Path(__file__).parents[1] / "vectors"
WYCHEPROOF = json.loads((VECTORS / "wycheproof/ed25519_test.json").read_text())
MERKLE = VECTORS / "merkle/testdata"


def test_all_151_verdicts_of_wycheproof() -> None:
    seen = 0
    for group in WYCHEPROOF["testGroups"]:
        key = VerifierKey("example.org/k", bytes.fromhex(group["publicKey"]["pk"]))
        for case in group["tests"]:
            signature = Signature(key.name, key.id, bytes.fromhex(case["sig"]))
            text = bytes.fromhex(case["msg"])
            said = _verifies(key, signature, text)
            assert said == (case["result"] == "valid"), (case["tcId"], case["comment"])
            seen += 1
    assert seen == WYCHEPROOF["numberOfTests"] == 151


class _Text(str):
    """A text whose encoding is what the vector says: not every message is UTF-8."""

    raw = b""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return self.raw


def _verifies(key: VerifierKey, signature: Signature, message: bytes) -> bool:
    text = _Text()
    text.raw = message
    return key.verifies(signature, text)


def test_a_signature_line_carries_no_more_than_one_signature() -> None:
    """Longer and shorter signatures, of which Wycheproof has many, also come in as lines."""
    for group in WYCHEPROOF["testGroups"]:
        key = VerifierKey("example.org/k", bytes.fromhex(group["publicKey"]["pk"]))
        for case in group["tests"]:
            raw = bytes.fromhex(case["sig"])
            line = f"{DASH}{key.name} {encode_base64(key.id + raw)}"
            try:
                parsed = parse_signature(line)
            except TraceInvalid:
                assert not raw
                continue
            assert parsed.signature == raw


def cases(kind: str) -> list[Any]:
    paths = sorted((MERKLE / kind).rglob("*.json"))
    return [pytest.param(path, id=str(path.relative_to(MERKLE))) for path in paths]


def test_the_vectors_are_all_there() -> None:
    assert len(cases("inclusion")) == 98
    assert len(cases("consistency")) == 98


def _hash(text: str | None) -> bytes:
    return base64.b64decode(text or "")


def read(path: Path) -> tuple[dict[str, Any], list[bytes]]:
    case: dict[str, Any] = json.loads(path.read_text())
    hashes: list[str] = case["proof"] or []
    return case, [_hash(one) for one in hashes]


@pytest.mark.parametrize("path", cases("inclusion"))
def test_inclusion_proofs_of_transparency_dev(path: Path) -> None:
    case, proof = read(path)
    held = verify_inclusion(
        _hash(case["leafHash"]), case["leafIdx"], case["treeSize"], proof, _hash(case["root"])
    )
    assert held is not case["wantErr"], case["desc"]


@pytest.mark.parametrize("path", cases("consistency"))
def test_consistency_proofs_of_transparency_dev(path: Path) -> None:
    case, proof = read(path)
    held = verify_consistency(
        case["size1"], _hash(case["root1"]), case["size2"], _hash(case["root2"]), proof
    )
    assert held is not case["wantErr"], case["desc"]
