"""Keys that must not be used are refused; the signer signs growing trees and nothing else."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.attestation import SignerClient, TraceWriter, generate_key, write_key
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.merkle import EMPTY_ROOT, leaf_hash, node_hash
from safeconduct.attestation.note import Note, SigningKey, VerifierKey
from safeconduct.attestation.signer import Request, encode_request, parse_request
from safeconduct.errors import TraceInvalid

from .kit import NAME, Bench, record_call  # noqa: TID251 - the tests' own kit

A, B = leaf_hash(b"a"), leaf_hash(b"b")
ORIGIN = "example.org/log"


def head(size: int, root: bytes) -> Checkpoint:
    return Checkpoint(origin=ORIGIN, size=size, root=root)


def code(bench: Bench, key: Path, *forbidden: Path) -> str:
    with pytest.raises(TraceInvalid) as caught:
        SignerClient.start(key, state=bench.state, forbidden=forbidden)
    assert caught.value.hint
    return caught.value.code


def test_a_key_others_can_read_is_refused(bench: Bench) -> None:
    bench.key.chmod(0o644)
    assert code(bench, bench.key) == "key.permissions"
    bench.key.chmod(0o640)
    assert code(bench, bench.key) == "key.permissions"


def test_a_key_that_is_no_plain_file_of_its_own_is_refused(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bench.key)
    assert code(bench, tmp_path / "link") == "key.permissions"
    os.mkfifo(tmp_path / "fifo", 0o600)
    assert code(bench, tmp_path / "fifo") == "key.permissions"
    os.link(bench.key, tmp_path / "second")
    assert code(bench, bench.key) == "key.permissions"
    assert code(bench, tmp_path / "nowhere") == "key.missing"


def test_a_key_or_state_inside_the_workspace_is_refused(bench: Bench, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    (workspace / "deep").mkdir(parents=True)
    write_key(workspace / "deep" / "key", NAME)
    (tmp_path / "alias").symlink_to(workspace)
    assert code(bench, tmp_path / "alias" / "deep" / "key", workspace) == "key.permissions"
    with pytest.raises(TraceInvalid) as caught:
        SignerClient.start(bench.key, state=workspace / "state", forbidden=[workspace])
    assert caught.value.code == "key.permissions"


def test_a_key_is_never_overwritten(bench: Bench) -> None:
    with pytest.raises(TraceInvalid) as caught:
        write_key(bench.key, NAME)
    assert caught.value.code == "key.exists"
    assert bench.key.stat().st_mode & 0o777 == 0o600


def test_key_lines_round_trip_and_are_strict() -> None:
    key = generate_key(NAME)
    assert SigningKey.parse(key.line) == key
    assert VerifierKey.parse(key.verifier.line) == key.verifier
    line = key.verifier.line
    for bad in (line[:-1], line + "=", line.replace("+", "-", 1), "x" + line, "", line * 20):
        with pytest.raises(TraceInvalid):
            VerifierKey.parse(bad)
    assert "seed" not in repr(key)


def test_signs_only_what_extends_what_it_signed(signer: SignerClient) -> None:
    two = node_hash(A, B)
    line = signer.sign(head(1, A), old_size=0, proof=[])
    note = Note.parse(f"{head(1, A).text()}\n{line}".encode())
    assert signer.key.verifies(note.signatures[0], note.text)
    signer.sign(head(1, A), old_size=1, proof=[])  # the same head again is harmless
    refused: list[tuple[Checkpoint, int, list[bytes]]] = [
        (head(1, B), 1, []),  # another tree of the same size
        (head(2, two), 0, []),  # as if nothing had been signed
        (head(2, two), 1, []),  # no proof
        (head(2, two), 1, [A]),  # a wrong proof
        (head(0, EMPTY_ROOT), 1, []),  # a smaller tree
    ]
    for wanted, old_size, proof in refused:
        with pytest.raises(TraceInvalid) as caught:
            signer.sign(wanted, old_size=old_size, proof=proof)
        assert caught.value.code == "signer.refused"
    signer.sign(head(2, two), old_size=1, proof=[B])
    assert signer.last(ORIGIN) == head(2, two)
    assert signer.last("example.org/other").size == 0


def test_what_it_signed_outlives_the_process(bench: Bench) -> None:
    first = bench.signer()
    first.sign(head(1, A), old_size=0, proof=[])
    os.kill(first.pid, signal.SIGKILL)
    first.close()
    second = bench.signer()
    with pytest.raises(TraceInvalid) as caught:
        second.sign(head(1, B), old_size=1, proof=[])
    assert caught.value.code == "signer.refused"
    second.close()


def test_damaged_state_refuses_instead_of_starting_over(bench: Bench) -> None:
    first = bench.signer()
    first.sign(head(1, A), old_size=0, proof=[])
    first.close()
    (state,) = [path for path in bench.state.iterdir()]
    state.write_text("garbage")
    second = bench.signer()
    with pytest.raises(TraceInvalid) as caught:
        second.sign(head(1, A), old_size=0, proof=[])
    assert caught.value.code == "signer.state"
    second.close()


def test_the_signer_is_alone_with_its_key(signer: SignerClient) -> None:
    proc = Path(f"/proc/{signer.pid}")
    if os.geteuid() == 0:
        assert (proc / "environ").read_bytes() == b""
        assert len(list((proc / "fd").iterdir())) == 3
    else:  # a non-dumpable process hides these from its own user
        with pytest.raises(PermissionError):
            (proc / "environ").read_bytes()
    assert (proc / "stat").stat().st_uid == 0  # non-dumpable: /proc/<pid> belongs to root
    assert os.getsid(signer.pid) == signer.pid


def test_it_ends_with_its_channel(bench: Bench) -> None:
    client = bench.signer()
    client.close()
    assert not Path(f"/proc/{client.pid}").exists()


def test_killed_signer_stops_the_writer_and_close_returns(bench: Bench) -> None:
    signer = bench.signer()
    writer = TraceWriter.open(bench.trace, signer=signer)
    session = writer.open_session("local", "sdk")
    record_call(writer, session, "c1")
    os.kill(signer.pid, signal.SIGKILL)
    with pytest.raises(TraceInvalid) as caught:
        writer.checkpoint()
    assert caught.value.code == "signer.lost"
    with pytest.raises(TraceInvalid) as caught:
        record_call(writer, session, "c2")
    assert caught.value.code == "signer.lost"
    with pytest.raises(TraceInvalid):
        writer.close()
    signer.close()
    again = bench.signer()
    TraceWriter.open(bench.trace, signer=again).close()
    again.close()
    report = bench.verify()
    assert (report.status, report.recoveries, report.calls) == (0, 1, 1)


@given(st.binary(max_size=300))
def test_requests_from_garbage(data: bytes) -> None:
    try:
        request = parse_request(data)
    except TraceInvalid:
        return
    assert encode_request(request) == data


@given(st.binary(max_size=400))
def test_notes_from_garbage(data: bytes) -> None:
    for raw in (data, b"example.org/log\n1\n" + data, b"t\n\n\xe2\x80\x94 n " + data + b"\n"):
        try:
            note = Note.parse(raw)
            Checkpoint.parse(note.text)
        except TraceInvalid:
            continue


def test_request_round_trip() -> None:
    request = Request(origin=ORIGIN, old_size=1, new_size=2, root=A, proof=(B,))
    assert parse_request(encode_request(request)) == request
