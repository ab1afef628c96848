"""A session bundle proves that no entry of its session is missing."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from safeconduct.attestation import TraceWriter, write_key
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import Note
from safeconduct.attestation.proofs.bundle import (
    Bundle,
    find_session,
    read_bundle_file,
    write_bundle,
)
from safeconduct.attestation.proofs.evidence import trusted_keys
from safeconduct.attestation.proofs.multiproof import prove_many
from safeconduct.attestation.proofs.proof import StoredTree
from safeconduct.attestation.proofs.search import ends_of_session, entries_of_session
from safeconduct.attestation.reader import read_checkpoint
from safeconduct.attestation.verify.trust import TrustPolicy
from safeconduct.attestation.verify.vouching import Brought
from safeconduct.errors import Exit, TraceInvalid

from .evidence_kit import CALLS, bundle, check, log_session, sessions  # noqa: TID251 - the same
from .kit import NAME, Bench, record_call, write_trace  # noqa: TID251 - the tests' own kit


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


def with_entries(data: bytes, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """Return a bundle whose entry lines were changed, all else as it was."""
    head, proof, note = data.split(b"\n\n", 2)
    first, session, *entries = head.split(b"\n")
    return b"\n\n".join([b"\n".join([first, session, *change(entries)]), proof, note])


def honest_bundle_of(trace: Path, session: str, keep: Callable[[int], bool]) -> bytes:
    """Make a bundle of some of a session's entries with a true proof: what its operator can do."""
    with Folder(trace) as folder:
        kept = [one for at, (one, _) in enumerate(entries_of_session(folder, session)) if keep(at)]
        head = read_checkpoint(folder)[1]
        proof = prove_many(
            [one.index for one in kept], head.size, StoredTree(folder, head.size).node
        )
        note = folder.read("checkpoint", limit=1 << 16)
    lines = [b"safeconduct/bundle@v1", b"session " + session.encode()]
    lines += [b"%d %s" % (one.index, one.data) for one in kept]
    lines += [b"", *(base64.b64encode(one) for one in proof), b"", b""]
    return b"\n".join(lines) + note


def test_a_session_proves_its_own_completeness(trace: Path, trust: Brought) -> None:
    for session in sessions(trace):
        found = check(bundle(trace, session), trust)
        assert (found.status, found.level, found.session) == (Exit.OK, 1, session), found
        assert found.entries == CALLS * 3 + 2
        assert any("none is missing" in one for one in found.shows)
    with Folder(trace) as folder:
        log = log_session(trace)
        assert find_session(folder, log[:8]) == log
    assert check(bundle(trace, log), trust).status is Exit.OK, "the log's own session is one too"
    assert check(bundle(trace, log), Brought()).status is Exit.UNTRUSTED


def test_no_entry_can_be_left_out_even_by_the_operator(trace: Path, trust: Brought) -> None:
    session = sessions(trace)[1]
    count = CALLS * 3 + 2
    assert check(honest_bundle_of(trace, session, lambda at: True), trust).status is Exit.OK
    for missing in range(count - 1):
        data = honest_bundle_of(trace, session, lambda at, gone=missing: at != gone)
        assert check(data, trust).status is Exit.TAMPERED, missing
    # What is cut off at the end is seen as well: the session is not over.
    for left in (count - 1, count // 2, 1):
        found = check(honest_bundle_of(trace, session, lambda at, end=left: at < end), trust)
        assert found.status is Exit.INCOMPLETE
        assert not any("none is missing" in one for one in found.shows)


def test_the_line_that_names_the_session_has_one_spelling(trace: Path, trust: Brought) -> None:
    session = sessions(trace)[0].encode()
    whole = bundle(trace, sessions(trace)[0])
    named = b"\nsession " + session + b"\n"
    for other in (b"", b"Session ", b"session  ", b"session session ", b" session "):
        bad = whole.replace(named, b"\n" + other + session + b"\n", 1)
        assert bad != whole
        assert check(bad, trust).status is Exit.TAMPERED, other


def test_entries_cannot_be_changed_moved_or_exchanged(trace: Path, trust: Brought) -> None:
    one, other = (bundle(trace, session) for session in sessions(trace)[:2])
    lines = other.split(b"\n\n")[0].split(b"\n")[2:]
    changes: dict[str, Callable[[list[bytes]], list[bytes]]] = {
        "edited": lambda had: [had[0], had[1].replace(b"fs.read", b"fs.rean"), *had[2:]],
        "reordered": lambda had: [had[0], had[2], had[1], *had[3:]],
        "duplicated": lambda had: [had[0], had[1], *had[1:]],
        "other place": lambda had: [had[0], had[1].replace(b" ", b"0 ", 1), *had[2:]],
        "other session": lambda had: [*had[:-1], lines[-1]],
        "exchanged": lambda had: lines,
        "spaces": lambda had: [had[0], had[1] + b" ", *had[2:]],
        "none": lambda had: [],
        "goes on": lambda had: [*had, lines[-1]],
    }
    for name, change in changes.items():
        bad = with_entries(one, change)
        assert bad != one, name
        assert check(bad, trust).status is Exit.TAMPERED, name
    head, proof, note = one.split(b"\n\n", 2)
    hashes = proof.split(b"\n")
    for bad_proof in (hashes[:-1], [*hashes, hashes[0]], hashes[::-1], []):
        bad = b"\n\n".join([head, b"\n".join(bad_proof), note])
        assert check(bad, trust).status is Exit.TAMPERED


def test_no_flipped_or_missing_byte_of_a_bundle_verifies(
    bench: Bench, trust: Brought, tmp_path: Path
) -> None:
    small = write_trace(bench, calls=2, trace=tmp_path / "small")
    data = bundle(small, sessions(small)[0])
    for at in range(len(data)):
        bad = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        assert check(bad, trust).status is not Exit.OK, at
    for at in range(len(data)):
        assert check(data[:at], trust).status is not Exit.OK, at


def test_hostile_bundles_end_in_a_verdict(trust: Brought) -> None:
    start = b"safeconduct/bundle@v1\nsession abc\n"
    for bad in (
        b"safeconduct/bundle@v1",
        b"safeconduct/bundle@v1\nsession \x1b]0;owned\x07\n\n\n\n",
        start,
        start + b"0 {}\n\n\n\n",
        start + b"0 " + b"{" * 70_000 + b"\n\n\n\n",
        start + b"99999999999999999999 {}\n",
        start + b"-1 {}\n",
        b"\xff" * 100,
        b"",
    ):
        found = check(bad, trust)
        assert found.status in (Exit.TAMPERED, Exit.TRACE_IO), bad[:60]
        assert "\x1b" not in "".join(found.lines())


def test_a_session_that_is_not_over_is_incomplete(bench: Bench, trust: Brought) -> None:
    directory = bench.root / "running"
    signer = bench.signer()
    try:
        with TraceWriter.open(directory, signer=signer) as writer:
            session = writer.open_session("local", "sdk")
            record_call(writer, session, "c1")
            writer.checkpoint()
            found = check(bundle(directory, session), trust)
            assert (found.status, found.entries) == (Exit.INCOMPLETE, 4)
            with Folder(directory) as folder, pytest.raises(TraceInvalid) as refused:
                ends_of_session(folder, session)
            assert refused.value.code == "session.open"
            writer.close_session(session)
    finally:
        signer.close()
    assert check(bundle(directory, session), trust).status is Exit.OK


def test_a_bundle_of_witnessed_heads_reaches_level_3(bench: Bench, tmp_path: Path) -> None:
    trace = write_trace(bench, calls=2, trace=tmp_path / "witnessed")
    key = CosigningKey("witness.example/w1", bytes(32))
    path = trace / "checkpoint"
    note = path.read_text()
    path.write_text(note + key.sign(Note.parse(note.encode()).text, time=1_790_000_000).line)
    lines = f"log {bench.key_line}\nwitness w1 {key.verifier.line}\nquorum w1\n"
    found = check(
        bundle(trace, sessions(trace)[0]), Brought(policy=TrustPolicy.parse(lines.encode()))
    )
    assert (found.status, found.level, found.witnesses) == (Exit.OK, 3, ("w1",))


def test_sessions_are_found_by_how_they_begin(trace: Path) -> None:
    with Folder(trace) as folder:
        for wrong in ("nothing", "", "Z", '","', "\x1b"):
            with pytest.raises(TraceInvalid) as refused:
                find_session(folder, wrong)
            assert refused.value.code == "bundle.session"
        out = io.BytesIO()
        with pytest.raises(TraceInvalid):
            write_bundle(folder, "0" * 16, out)


def test_a_large_bundle_is_read_line_by_line(trace: Path) -> None:
    class Bounded(io.BytesIO):
        largest = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(-1 if size is None else size)
            Bounded.largest = max(Bounded.largest, len(line))
            return line

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert 0 < size <= 65_537
            return super().read(size)

    read = read_bundle_file(Bounded(bundle(trace, sessions(trace)[0])))
    assert isinstance(read, Bundle)
    assert 0 < Bounded.largest < 2000
