"""The published vectors of keys: rotations, cosignatures, key files under a passphrase."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safeconduct.attestation.cosignature import CosignerKey, CosigningKey, cosigned_message
from safeconduct.attestation.note import Note, SigningKey, VerifierKey
from safeconduct.attestation.rotation import follow_rotation, rotation_body, statement
from safeconduct.attestation.signing.protected_key import unprotect
from safeconduct.errors import TraceInvalid

VECTORS = Path(__file__).parents[1] / "vectors" / "trace"


def read(name: str) -> Any:  # noqa: ANN401 - a parse boundary
    return json.loads((VECTORS / f"{name}.json").read_text())


def test_rotations() -> None:
    vectors = read("rotation")
    for case in vectors["cases"]:
        trusted = [VerifierKey.parse(case["trusted"])]
        try:
            found = follow_rotation(case["body"], trusted, case["origin"]).line
        except TraceInvalid as error:
            found = error.code
        assert found == case["result"], case["name"]
    old, new, _ = [SigningKey.parse(line) for line in vectors["private_keys_of_these_vectors"]]
    first = vectors["cases"][0]
    assert statement(first["origin"], new.verifier) == vectors["statement"]
    assert rotation_body(first["origin"], old, new.verifier) == first["body"]


def test_cosignatures() -> None:
    vectors = read("cosignature")
    key, text = CosignerKey.parse(vectors["key"]), vectors["text"]
    for case in vectors["cases"]:
        (line,) = Note.parse(f"{text}\n{case['line']}".encode()).signatures
        found = key.verified(line, text)
        assert (found and found.time) == case["time"], case["name"]
    good = vectors["cases"][0]
    assert cosigned_message(text, good["time"]).decode() == vectors["message"]
    private = CosigningKey.parse(vectors["private_key_of_these_vectors"])
    assert private.sign(text, time=good["time"]).line == good["line"]


def test_key_files_under_a_passphrase() -> None:
    for case in read("protected-key")["cases"]:
        secret = case["passphrase"].encode()
        if case["key"] is None:
            with pytest.raises(TraceInvalid):
                unprotect(case["file"], secret)
        else:
            assert unprotect(case["file"], secret).line == case["key"], case["name"]
