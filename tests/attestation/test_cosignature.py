"""Cosignatures of type 0x04: spelled as C2SP tlog-cosignature says, true for one text and time."""

from __future__ import annotations

from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.attestation import generate_key
from safeconduct.attestation.cosignature import (
    MAX_TIME,
    Cosignature,
    CosignerKey,
    CosigningKey,
    cosigned_message,
)
from safeconduct.attestation.note import Note, Signature, SigningKey, VerifierKey, decode_base64
from safeconduct.errors import TraceInvalid

NAME = "witness.example.com/w1"
TEXT = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
KEY = CosigningKey(NAME, bytes(range(32)))


def test_the_message_is_the_one_of_the_specification() -> None:
    assert cosigned_message(TEXT, 1679315147) == (
        b"cosignature/v1\ntime 1679315147\nexample.com/behind-the-sofa\n20852163\n"
        b"CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    )


def test_the_specification_s_own_line_is_read() -> None:
    line = (
        "\N{EM DASH} witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWX"
        "EhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
    )
    (signature,) = Note.parse(f"{TEXT}\n{line}".encode()).signatures
    found = Cosignature.parse(signature)
    assert found is not None
    assert (found.name, found.id.hex(), found.time) == (NAME, "8d66cf3f", 1679315147)
    assert found.line == line


def test_what_is_made_is_laid_out_byte_by_byte_and_verifies() -> None:
    made = KEY.sign(TEXT, time=1679315147)
    data = decode_base64(made.line.split(" ")[2][:-1], code="note.invalid")
    assert made.line.startswith(f"\N{EM DASH} {NAME} ")
    public = KEY.verifier.public
    assert data[:4] == sha256(NAME.encode() + b"\n\x04" + public).digest()[:4]
    assert data[4:12] == (1679315147).to_bytes(8, "big")
    assert len(data) == 4 + 8 + 64
    Ed25519PublicKey.from_public_bytes(public).verify(data[12:], cosigned_message(TEXT, 1679315147))
    (line,) = Note.parse(f"{TEXT}\n{made.line}".encode()).signatures
    assert KEY.verifier.verified(line, TEXT) == made


@given(bit=st.integers(0, 8 * 76 - 1))
def test_any_flipped_bit_is_refused(bit: int) -> None:
    made = KEY.sign(TEXT, time=1679315147)
    data = bytearray(made.id + made.time.to_bytes(8, "big") + made.signature)
    data[bit // 8] ^= 1 << bit % 8
    line = Signature(NAME, bytes(data[:4]), bytes(data[4:]))
    assert KEY.verifier.verified(line, TEXT) is None


def test_it_holds_for_its_text_time_name_and_key_alone() -> None:
    made = KEY.sign(TEXT, time=5)
    (line,) = Note.parse(f"{TEXT}\n{made.line}".encode()).signatures
    assert KEY.verifier.verified(line, TEXT.replace("20852163", "20852164")) is None
    other = CosigningKey(NAME, bytes(32)).verifier
    assert not other.made(line)
    assert other.verified(line, TEXT) is None
    renamed = CosignerKey("witness.example.com/w2", KEY.verifier.public)
    assert renamed.verified(line, TEXT) is None
    for data in (line.signature[:-1], line.signature + b"\0", b""):
        assert Cosignature.parse(Signature(NAME, line.id, data)) is None
    late = Signature(NAME, line.id, b"\xff" + line.signature[1:])
    assert Cosignature.parse(late) is None


@pytest.mark.parametrize("time", [-1, MAX_TIME + 1])
def test_a_time_that_is_none_is_not_signed(time: int) -> None:
    with pytest.raises(TraceInvalid) as caught:
        KEY.sign(TEXT, time=time)
    assert caught.value.code == "cosignature.time"


def test_a_log_s_key_is_no_witness_s_and_the_other_way_round() -> None:
    log = generate_key(NAME)
    for line, parse in (
        (log.verifier.line, CosignerKey.parse),
        (log.line, CosigningKey.parse),
        (KEY.verifier.line, VerifierKey.parse),
        (KEY.line, SigningKey.parse),
    ):
        with pytest.raises(TraceInvalid) as caught:
            parse(line)
        assert caught.value.code == "key.invalid"
        secret = line.removeprefix("PRIVATE+KEY+").split("+", 2)[2]  # base64 may hold a "+" too
        assert secret not in str(caught.value)
    twin = CosigningKey(NAME, log.seed).verifier
    assert twin.public == log.verifier.public
    assert twin.id != log.verifier.id
    (signature,) = Note.parse(f"{TEXT}\n{log.sign(TEXT)}".encode()).signatures
    assert twin.verified(signature, TEXT) is None


def test_key_lines_round_trip_and_are_strict() -> None:
    assert CosigningKey.parse(KEY.line) == KEY
    assert CosignerKey.parse(KEY.verifier.line) == KEY.verifier
    assert "seed" not in repr(KEY)
    for line, parse in ((KEY.verifier.line, CosignerKey.parse), (KEY.line, CosigningKey.parse)):
        for bad in (line[:-1], line + "=", line.replace("+", "-", 1), "x" + line, "", line * 20):
            with pytest.raises(TraceInvalid):
                parse(bad)
