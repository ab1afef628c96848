"""A statement says what the log's entries say, and the signer signs no other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from safeconduct.attestation import VerifierKey, write_key
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import prove_inclusion
from safeconduct.attestation.proofs.evidence import trusted_keys
from safeconduct.attestation.proofs.export import copy_public, fresh_folder
from safeconduct.attestation.proofs.proof import StoredTree
from safeconduct.attestation.proofs.search import ends_of_session, entries_of_call
from safeconduct.attestation.proofs.statement import Statement, pre_authentication
from safeconduct.attestation.reader import read_checkpoint
from safeconduct.attestation.signing.key import load_key
from safeconduct.attestation.signing.signer_request import Place
from safeconduct.attestation.verify.vouching import Brought
from safeconduct.errors import Exit, TraceInvalid
from safeconduct.runtime.cli.trace_statement import sign_statement

from .evidence_kit import CALLS, check, sessions, state  # noqa: TID251 - the same
from .kit import NAME, Bench, write_trace  # noqa: TID251 - the tests' own kit


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("bundle")
    return Bench(root, write_key(root / "alice.key", NAME))


@pytest.fixture(scope="module")
def trace(bench: Bench) -> Path:
    return write_trace(bench, calls=CALLS * 3, sessions=3)


@pytest.fixture
def trust(bench: Bench) -> Brought:
    return Brought(keys=trusted_keys([bench.key_line]))


def test_a_statement_about_a_call(trace: Path, bench: Bench, trust: Brought) -> None:
    envelope = state(trace, bench)
    found = check(envelope.encode(), trust)
    assert (found.status, found.level, found.entries) == (Exit.OK, 1, 3)
    payload = json.loads(envelope.payload)
    assert payload["_type"] == "https://in-toto.io/Statement/v1"
    kinds = [one["entry"]["kind"] for one in payload["predicate"]["entries"]]
    assert kinds == ["call.intent", "call.decision", "call.outcome"]
    assert Statement.parse(envelope.payload).payload() == envelope.payload
    assert check(envelope.encode(), Brought()).status is Exit.UNTRUSTED


def test_a_statement_about_a_session(trace: Path, bench: Bench, trust: Brought) -> None:
    session = sessions(trace)[2]
    signer = bench.signer()
    try:
        with Folder(trace) as folder:
            envelope = sign_statement(folder, ends_of_session(folder, session), signer)
    finally:
        signer.close()
    found = check(envelope.encode(), trust)
    assert (found.status, found.session, found.entries) == (Exit.OK, session, 2)


def test_an_envelope_reads_alike_for_everybody(trace: Path, bench: Bench, trust: Brought) -> None:
    """Of a name that stands twice one reader takes the first, another one the last."""
    data = state(trace, bench).encode()
    for name, other in (
        (b'"payload":', b'"e30="'),
        (b'"payloadType":', b'"text/plain"'),
        (b'"signatures":', b"[]"),
        (b'"sig":', b'"AA=="'),
        (b'"keyid":', b'"x"'),
    ):
        assert data.count(name) == 1
        spelled = name.replace(b"p", b"\\u0070").replace(b"s", b"\\u0073").replace(b"k", b"\\u006b")
        for twice in (name, spelled):
            bad = data.replace(name, twice + other + b"," + name)
            assert json.loads(bad).keys() == json.loads(data).keys()
            assert check(bad, trust).status is Exit.TAMPERED, bad[-200:]
    # DSSE lets an envelope hold more than is known.
    assert check(data[:-1] + b',"more":{"more":[1.5]}}', trust).status is Exit.OK
    deep = b',"more":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert check(data[:-1] + deep, trust).status is Exit.TAMPERED


def test_no_changed_statement_is_believed(trace: Path, bench: Bench, trust: Brought) -> None:
    envelope = state(trace, bench)
    data = envelope.encode()
    for at in range(0, len(data), 3):
        bad = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        assert check(bad, trust).status is not Exit.OK, at
    # Whoever holds the key could still not say anything else in this form.
    key = load_key(bench.key)
    payload = json.loads(envelope.payload)
    for change in ("subject", "predicate", "predicateType", "_type"):
        other = json.loads(envelope.payload)
        match change:
            case "subject":
                other["subject"][0]["digest"]["sha256"] = "0" * 64
            case "predicate":
                other["predicate"]["entries"][2]["entry"]["body"]["status"] = "failed"
            case _:
                other[change] = "https://example.org/other"
        assert other != payload
        spelled = json.dumps(other, separators=(",", ":")).encode()
        with pytest.raises(TraceInvalid) as refused:
            Statement.parse(spelled)
        assert refused.value.code == "statement.invalid"
    assert key.verifier.line == bench.key_line


@pytest.mark.parametrize("indices", [[3], [2, 5], [2, 3], [5, 4, 3], [1, 2, 3, 4], []])
def test_a_statement_tells_one_whole_story(trace: Path, indices: Sequence[int]) -> None:
    with Folder(trace) as folder:
        head = read_checkpoint(folder)[1]
        tree = StoredTree(folder, head.size)
        entries = [(index, tree.entry(index).data) for index in indices]
    with pytest.raises(TraceInvalid) as refused:
        Statement.about(head, entries)
    assert refused.value.code == "statement.invalid"


def test_the_signer_states_nothing_about_another_log(
    trace: Path, bench: Bench, tmp_path: Path
) -> None:
    root = tmp_path / "other"
    root.mkdir()
    stranger = Bench(root, write_key(root / "alice.key", NAME))
    with pytest.raises(TraceInvalid) as refused:
        state(trace, stranger)
    assert refused.value.code == "statement.head"
    with fresh_folder(tmp_path / "copy") as target, Folder(trace) as folder:
        copy_public(folder, target)
    path = next((tmp_path / "copy" / "tile" / "0").rglob("*.p")) / "*"
    tile = next(path.parent.iterdir())
    data = bytearray(tile.read_bytes())
    data[40] ^= 1
    tile.write_bytes(data)
    with pytest.raises(TraceInvalid) as refused:
        state(tmp_path / "copy", bench)
    assert refused.value.code == "statement.head"


def test_the_signer_states_only_what_its_tree_holds(trace: Path, bench: Bench) -> None:
    """Asked directly, as a supervisor that somebody took over could ask it."""
    with Folder(trace) as folder:
        head = read_checkpoint(folder)[1]
        tree = StoredTree(folder, head.size)
        call = entries_of_call(folder, "c7")
        true = [
            Place(
                index=one.index,
                entry=one.data,
                proof=tuple(prove_inclusion(one.index, head.size, tree.node)),
            )
            for one in call
        ]
    lie = replace(true[2], entry=true[2].entry.replace(b'"status":"ok"', b'"status":"failed"'))
    assert lie != true[2]
    requests: dict[str, tuple[str, str, Sequence[Place]]] = {
        "a lie": (head.origin, "signer.refused", [*true[:2], lie]),
        "another place": (head.origin, "signer.refused", [*true[:2], replace(true[2], index=0)]),
        "no proof": (head.origin, "signer.refused", [*true[:2], replace(true[2], proof=())]),
        "another log": ("example.org/alice/other", "signer.refused", true),
        "half a call": (head.origin, "statement.invalid", true[:2]),
        "nothing": (head.origin, "statement.invalid", []),
        "twice": (head.origin, "statement.invalid", [*true, true[2]]),
    }
    signer = bench.signer()
    try:
        assert signer.last(head.origin) == head
        for name, (origin, code, places) in requests.items():
            with pytest.raises(TraceInvalid) as refused:
                signer.attest(origin, places)
            assert refused.value.code == code, name
        made = signer.attest(head.origin, true)
        assert made.signer([VerifierKey.parse(bench.key_line).of_log(head.origin)]) is not None
        assert made == state(trace, bench)
    finally:
        signer.close()


def test_the_signed_bytes_are_no_checkpoint(trace: Path, bench: Bench) -> None:
    """A DSSE signature begins with a word and a space; no origin has one."""
    signed = pre_authentication(state(trace, bench).payload)
    assert signed.startswith(b"DSSEv1 28 application/vnd.in-toto+json ")
    assert b"\n" not in signed
