"""A verifier's trust policy: its file read strictly, its quorum, and what never widens trust."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.attestation import Checkpoint, SigningKey, TrustPolicy
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.note import ED25519, Note, VerifierKey, encode_base64, key_id
from safeconduct.attestation.verify.trust import speaks_for
from safeconduct.errors import TraceInvalid

VECTORS = Path(__file__).parents[1] / "vectors" / "trace" / "trust.json"
LOG = SigningKey("example.org/alice", b"\x01" * 32)
WITNESSES = [
    CosigningKey(f"witness.example/w{number}", bytes([number] * 32)) for number in (2, 3, 4)
]
OPERATOR = CosigningKey("example.org/alice/witness", b"\x09" * 32)
HEAD = Checkpoint(origin="example.org/alice/log1", size=7, root=b"\x05" * 32)
TIME = 1_700_000_000


def policy_text(quorum: str, *, extra: str = "") -> str:
    lines = [f"log {LOG.verifier.line}"]
    lines += [
        f"witness w{number} {key.verifier.line} https://w{number}.example/"
        for number, key in enumerate(WITNESSES)
    ]
    lines += [f"witness own {OPERATOR.verifier.line}", extra, f"quorum {quorum}"]
    return "\n".join(lines) + "\n"


def note(*keys: CosigningKey, head: Checkpoint = HEAD, signer: SigningKey = LOG) -> Note:
    text = head.text()
    lines = [key.sign(text, time=TIME).line for key in keys]
    signed = signer.of_log(head.origin).sign(text)
    return Note.parse(f"{text}\n{signed}{''.join(lines)}".encode())


def parse(text: str) -> TrustPolicy:
    return TrustPolicy.parse(text.encode("utf-8", "surrogateescape"))


def test_many_keys_and_many_lines_are_not_tried_with_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A key holder may hand over thousands of times, and fill each head with lines of its name."""
    keys = [VerifierKey(LOG.name, number.to_bytes(32, "big")) for number in range(500)]
    text = HEAD.text()
    stranger = SigningKey(HEAD.origin, b"\x07" * 32).sign(text)
    cosigned = WITNESSES[0].sign(text, time=TIME).line
    signed = LOG.of_log(HEAD.origin).sign(text)
    crowded = Note.parse(f"{text}\n{signed}{stranger * 30}{cosigned * 30}".encode())
    made: list[bytes] = []
    asked: list[str] = []

    def counted(name: str, public: bytes, kind: bytes = ED25519) -> bytes:
        made.append(public)
        return key_id(name, public, kind)

    def speaks(name: str, origin: str) -> bool:
        asked.append(name)
        return speaks_for(name, origin)

    monkeypatch.setattr("safeconduct.attestation.note.key_id", counted)
    monkeypatch.setattr("safeconduct.attestation.verify.trust.speaks_for", speaks)
    verdict = parse(policy_text("w0")).evaluate(crowded, keys=keys)
    assert (verdict.satisfied, verdict.witnessed) == (True, True)
    assert len(made) < 3 * len(keys)
    assert len(asked) < 3 * len(keys)


def test_a_quorum_counts_true_cosignatures_only() -> None:
    policy = parse(policy_text("g", extra="group g 2 w0 w1 w2"))
    assert policy.describe() == "2 of (w0, w1, w2)"
    for count in range(4):
        verdict = policy.evaluate(note(*WITNESSES[:count]))
        assert verdict.log == LOG.verifier.of_log(HEAD.origin)
        assert [one.witness for one in verdict.cosigned] == [f"w{one}" for one in range(count)]
        assert verdict.satisfied is verdict.witnessed is (count >= 2)
    twice = policy.evaluate(note(WITNESSES[0], WITNESSES[0]))
    assert not twice.quorum_met


@given(st.sets(st.integers(0, 5)), st.integers(1, 3), st.integers(1, 2))
def test_groups_of_groups_are_thresholds(present: set[int], k: int, m: int) -> None:
    keys = [CosigningKey(f"w{one}.example", bytes([one + 20] * 32)) for one in range(6)]
    lines = [f"witness w{one} {key.verifier.line}" for one, key in enumerate(keys)]
    lines += [f"group a {k} w0 w1 w2", f"group b {m} w3 w4", "group both all a b w5"]
    policy = parse("\n".join([*lines, "quorum both"]) + "\n")
    expected = len(present & {0, 1, 2}) >= k and len(present & {3, 4}) >= m and 5 in present
    assert policy.reached({f"w{one}" for one in present}) is expected


def test_more_cosignatures_never_reach_less() -> None:
    policy = parse(policy_text("top", extra="group g any w0 w1\ngroup top all g w2"))
    names = ["w0", "w1", "w2", "own", "nobody"]
    for bits in range(32):
        some = {name for at, name in enumerate(names) if bits >> at & 1}
        if policy.reached(some):
            assert all(policy.reached(some | {name}) for name in names)


def test_the_operators_own_witness_never_makes_a_log_witnessed() -> None:
    policy = parse(policy_text("g", extra="group g 2 w0 own"))
    verdict = policy.evaluate(note(WITNESSES[0], OPERATOR))
    assert verdict.satisfied
    assert not verdict.witnessed
    assert [one.operator for one in verdict.cosigned] == [False, True]
    named = policy.evaluate(note(WITNESSES[0], OPERATOR), operators={"w0"})
    assert [one.operator for one in named.cosigned] == [True, True]
    same_key = CosigningKey("elsewhere.example", LOG.seed)
    text = f"log {LOG.verifier.line}\nwitness w {same_key.verifier.line}\nquorum w\n"
    verdict = parse(text).evaluate(note(same_key))
    assert verdict.satisfied
    assert not verdict.witnessed


def test_no_witness_at_all_is_no_witnessed_log() -> None:
    verdict = parse(policy_text("none")).evaluate(note())
    assert verdict.satisfied
    assert not verdict.witnessed


def test_a_cosignature_of_another_log_is_worth_nothing() -> None:
    other = Checkpoint(origin="example.org/bob/log1", size=HEAD.size, root=HEAD.root)
    stolen = WITNESSES[0].sign(other.text(), time=TIME).line
    whole = f"{HEAD.text()}\n{LOG.of_log(HEAD.origin).sign(HEAD.text())}{stolen}".encode()
    with pytest.raises(TraceInvalid) as refused:
        parse(policy_text("w0")).evaluate(Note.parse(whole))
    assert refused.value.code == "cosignature.invalid"
    # Its own log's note is fine, but that log is not the policy's.
    bob = SigningKey("example.org/bob", b"\x07" * 32)
    verdict = parse(policy_text("w0")).evaluate(note(WITNESSES[0], head=other, signer=bob))
    assert (verdict.log, verdict.satisfied) == (None, False)
    assert not verdict.witnessed


def test_a_log_key_speaks_only_for_origins_below_its_name() -> None:
    policy = parse(policy_text("w0"))
    for origin, good in (
        ("example.org/alice", True),
        ("example.org/alice/x/y", True),
        ("example.org/alicex", False),
        ("example.org", False),
    ):
        head = Checkpoint(origin=origin, size=1, root=HEAD.root)
        assert (policy.evaluate(note(WITNESSES[0], head=head)).log is not None) is good, origin
    head = Checkpoint(origin="elsewhere.example", size=1, root=HEAD.root)
    verdict = policy.evaluate(note(WITNESSES[0], head=head), keys=[LOG.verifier])
    assert verdict.satisfied  # a key brought beside the file is for whatever log is looked at


def test_a_time_in_the_future_does_not_count() -> None:
    policy = parse(policy_text("w0"))
    verdict = policy.evaluate(note(WITNESSES[0]), now=TIME - 3600)
    assert (verdict.ahead, verdict.cosigned, verdict.satisfied) == (("w0",), (), False)
    assert policy.evaluate(note(WITNESSES[0]), now=TIME - 60).satisfied


def test_one_flipped_bit_of_any_trusted_line_refuses_the_note() -> None:
    policy = parse(policy_text("w0"))
    good = note(WITNESSES[0])
    for number in range(len(good.signatures)):
        line = good.signatures[number]
        bad = bytearray(line.signature)
        bad[-1] ^= 1
        lines = list(good.signatures)
        lines[number] = type(line)(line.name, line.id, bytes(bad))
        with pytest.raises(TraceInvalid):
            policy.evaluate(Note(good.text, tuple(lines)))
    longer = type(good.signatures[1])(
        good.signatures[1].name, good.signatures[1].id, good.signatures[1].signature + b"\0"
    )
    with pytest.raises(TraceInvalid):
        policy.evaluate(Note(good.text, (good.signatures[0], longer)))


def test_a_witness_of_a_kind_that_cannot_be_checked_never_counts() -> None:
    name, kind, public = "w.example/pq", b"\x06", os.urandom(1312)
    line = f"{name}+{key_id(name, public, kind).hex()}+{encode_base64(kind + public)}"
    policy = parse(f"log {LOG.verifier.line}\nwitness pq {line}\nquorum pq\n")
    assert policy.unsupported == ("pq",)
    assert not policy.evaluate(note()).satisfied


def test_vectors_of_policy_files() -> None:
    vectors = json.loads(VECTORS.read_text())
    assert len(vectors["valid"]) >= 10
    assert len(vectors["invalid"]) >= 40
    for vector in vectors["valid"]:
        policy = TrustPolicy.parse(bytes.fromhex(vector["hex"]))
        for names in vector["reached"]:
            assert policy.reached(names), (vector["name"], names)
        for names in vector["not_reached"]:
            assert not policy.reached(names), (vector["name"], names)
    for vector in vectors["invalid"]:
        with pytest.raises(TraceInvalid) as refused:
            TrustPolicy.parse(bytes.fromhex(vector["hex"]))
        assert refused.value.code == "trust.invalid", vector["name"]
        assert vector["says"] in refused.value.message, vector["name"]


@given(st.binary(max_size=400))
def test_any_bytes_are_a_policy_or_refused(data: bytes) -> None:
    code = "trust.invalid"
    try:
        quorum = TrustPolicy.parse(data).quorum
    except TraceInvalid as error:
        quorum, code = "", error.code
    assert quorum or code == "trust.invalid"


def test_every_prefix_of_a_policy_is_refused() -> None:
    whole = policy_text("g", extra="group g 2 w0 w1 w2").encode()
    for end in range(len(whole)):
        with pytest.raises(TraceInvalid):
            TrustPolicy.parse(whole[:end])
