"""Keys that must not be used are refused; the signer signs growing trees and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct import errors
from safeconduct.attestation import SignerClient, TraceWriter, generate_key, write_key
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import EMPTY_ROOT, leaf_hash, node_hash
from safeconduct.attestation.note import Note, SigningKey, VerifierKey
from safeconduct.attestation.proofs.statement import Statement
from safeconduct.attestation.reader import stored_entries
from safeconduct.attestation.signing import signer as signer_module
from safeconduct.attestation.signing.signer_request import (
    Attest,
    Finish,
    Place,
    Query,
    Request,
    Rotate,
    Sign,
    encode_request,
    parse_request,
    receive,
)
from safeconduct.attestation.signing.signer_state import SignerState, newest_head
from safeconduct.attestation.tiles import TileStore
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


def test_a_key_half_made_when_its_maker_died_is_whole_or_not_there(bench: Bench) -> None:
    """The name it was written under may stay: the next signer takes it away."""
    os.link(bench.key, bench.root / ".alice.key.0123abcd")
    os.link(bench.key, bench.root / "elsewhere")
    assert code(bench, bench.key) == "key.permissions"  # a name of somebody else's counts
    (bench.root / "elsewhere").unlink()
    bench.signer().close()
    assert not (bench.root / ".alice.key.0123abcd").exists()


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


def signed_three(bench: Bench) -> tuple[Path, list[Checkpoint]]:
    """Sign heads of one, two and four entries; return the file of them, and the heads."""
    two = node_hash(A, B)
    heads = [head(1, A), head(2, two), head(4, node_hash(two, two))]
    signer = bench.signer()
    signer.sign(heads[0], old_size=0, proof=[])
    signer.sign(heads[1], old_size=1, proof=[B])
    signer.sign(heads[2], old_size=2, proof=[two])
    signer.close()
    (state,) = bench.state.iterdir()
    assert newest_head(state.read_bytes()) == heads[2]
    return state, heads


def test_damaged_state_refuses_instead_of_starting_over(bench: Bench) -> None:
    state, heads = signed_three(bench)
    whole = state.read_bytes()
    swapped = whole.replace(b"\n4\n", b"\n5\n").replace(b"\n2\n", b"\n3\n")
    for data in (b"garbage", b"", whole[:-1], whole + b" ", bytes(len(whole)), swapped):
        state.write_bytes(data)
        second = bench.signer()
        with pytest.raises(TraceInvalid) as caught:
            second.sign(heads[0], old_size=0, proof=[])
        assert caught.value.code == "signer.state"
        with pytest.raises(TraceInvalid) as caught:
            second.last(ORIGIN)
        assert caught.value.code == "signer.state"
        second.close()


def test_a_write_torn_at_any_byte_leaves_the_head_before_or_the_new_one(bench: Bench) -> None:
    state, heads = signed_three(bench)
    whole = state.read_bytes()
    places = {at: newest_head_at(whole, at) for at in (0, 4096)}
    newer = max(places, key=lambda at: places[at].size)
    assert sorted(one.size for one in places.values()) == [2, 4]
    before = whole[newer : newer + 512].replace(b"4", b"3")
    for torn in range(512):
        mixed = bytearray(whole)
        mixed[newer + torn : newer + 512] = before[torn:]
        assert newest_head(bytes(mixed)) in heads[1:]


def newest_head_at(data: bytes, at: int) -> Checkpoint:
    """Return the head in one slot, by wiping the other."""
    other = 4096 - at
    return newest_head(data[:other] + bytes(512) + data[other + 512 :])


def started(bench: Bench, serve: str, *before: str) -> SignerClient:
    """Start a signer by a command of our own; ``before`` is a program that starts it."""
    code = (
        "import socket, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
        "from safeconduct.attestation.signing.signer_process import serve; "
        f"serve(socket.socket(fileno=0), *map(Path, sys.argv[2:]){serve})"
    )
    package = str(Path(errors.__file__).parents[1])
    paths = [package, str(bench.key), str(bench.state)]
    return SignerClient.start_command([*before, sys.executable, "-I", "-c", code, *paths])


def limited(bench: Bench, file_bytes: str) -> SignerClient:
    """Start a signer whose caller limits the size of files, as ``ulimit -f`` does."""
    if shutil.which("prlimit") is None:
        pytest.skip("needs prlimit(1)")
    return started(bench, "", "prlimit", f"--fsize={file_bytes}")


def test_a_limit_of_the_caller_tears_no_memory(bench: Bench) -> None:
    """A slot cut short, with the signature gone out, once let a second tree of its size pass."""
    first = bench.signer()
    first.sign(head(1, A), old_size=0, proof=[])
    first.close()
    with closing(limited(bench, "100")) as cut:
        for other in (B, leaf_hash(b"c")):
            with pytest.raises(TraceInvalid) as caught:
                cut.sign(head(2, node_hash(A, other)), old_size=1, proof=[other])
            assert caught.value.code == "signer.state"
            assert cut.last(ORIGIN) == head(1, A)
    with closing(limited(bench, "100:unlimited")) as soft:
        soft.sign(head(2, node_hash(A, B)), old_size=1, proof=[B])
    with closing(bench.signer()) as after:
        assert after.last(ORIGIN) == head(2, node_hash(A, B))


def test_an_old_key_cut_short_is_not_called_erased(bench: Bench) -> None:
    old, seen = bench.root / "alice.key.old", bench.root / "seen"
    write_key(old, NAME)
    os.link(old, seen)
    secret = seen.read_bytes()
    with pytest.raises(TraceInvalid) as caught:
        limited(bench, "16")
    assert caught.value.code == "signer.state"
    assert old.exists()
    bench.signer().close()
    assert not old.exists()
    assert len(seen.read_bytes()) == len(secret)
    assert seen.read_bytes()[16:] != secret[16:]


def test_after_an_interrupted_request_no_answer_is_taken_for_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = bench.signer()

    def interrupted(channel: socket.socket) -> bytes | None:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return receive(channel)

    monkeypatch.setattr(signer_module, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.last(ORIGIN)
    with pytest.raises(TraceInvalid) as caught:
        client.sign(head(1, A), old_size=0, proof=[])
    assert caught.value.code == "signer.lost"
    client.close()
    with closing(bench.signer()) as again:
        assert again.last(ORIGIN).size == 0


def test_a_signer_that_does_not_rotate_ends_no_key(bench: Bench) -> None:
    before = bench.key.read_bytes()
    with closing(started(bench, ", rotates=False")) as client:
        with pytest.raises(TraceInvalid) as caught:
            client.rotate(ORIGIN)
        assert (caught.value.code, bool(caught.value.hint)) == ("signer.refused", True)
        with pytest.raises(TraceInvalid) as caught:
            client.finish_rotation(ORIGIN, index=0, entry=b"{}", proof=[])
        assert caught.value.code == "signer.refused"
        client.sign(head(1, A), old_size=0, proof=[])
    assert bench.key.read_bytes() == before
    assert not (bench.root / "alice.key.next").exists()


def test_a_state_of_another_log_is_refused(bench: Bench) -> None:
    state, _ = signed_three(bench)
    second = bench.signer()
    second.sign(Checkpoint(origin="example.org/other", size=1, root=A), old_size=0, proof=[])
    (other,) = [path for path in bench.state.iterdir() if path != state]
    other.write_bytes(state.read_bytes())
    with pytest.raises(TraceInvalid) as caught:
        second.last("example.org/other")
    assert caught.value.code == "signer.state"
    second.close()


def test_the_signer_is_alone_with_its_key(signer: SignerClient) -> None:
    proc = Path(f"/proc/{signer.pid}")
    if os.geteuid() == 0:
        assert (proc / "environ").read_bytes() == b""
        # The channel, /dev/null twice, the key file, whose lock it holds, and the state folder.
        assert len(list((proc / "fd").iterdir())) == 5
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


def test_a_closed_folder_does_not_stop_it_and_a_removed_file_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Landlock alone holds, a program can take away what the signer's folder allows."""
    heads = [Checkpoint(origin="example.org/log", size=n, root=leaf_hash(b"")) for n in (1, 2)]
    state = SignerState(tmp_path / "state")
    state.remember(heads[0])
    assert state.last(heads[0].origin) == heads[0]
    with monkeypatch.context() as closed:

        def refused(*_: object, **__: object) -> int:
            raise PermissionError

        closed.setattr(os, "open", refused)
        state.remember(heads[1])
        assert state.last(heads[0].origin) == heads[1]
    (file,) = (tmp_path / "state").iterdir()
    file.unlink()
    assert state.last(heads[0].origin).size == 0
    state.close()


def test_states_only_what_lies_in_the_tree_it_signed_last(bench: Bench) -> None:
    signer = bench.signer()
    with TraceWriter.open(bench.trace, signer=signer) as writer:
        session = writer.open_session("local", "sdk")
        first = record_call(writer, session, "c1")
        writer.checkpoint()
        origin = writer.origin
    head = signer.last(origin)
    with Folder(bench.trace) as folder:
        tiles = TileStore.load(folder, head.size)
        entries = [one.data for one in stored_entries(folder, head.size)]
    places = [
        Place(
            index=index, proof=tuple(tiles.prove_inclusion(index, head.size)), entry=entries[index]
        )
        for index in range(first, first + 3)
    ]
    envelope = signer.attest(origin, places)
    assert Statement.parse(envelope.payload).head == head
    assert envelope.signer([signer.key.of_log(origin)]) == signer.key.of_log(origin)
    changed = replace(places[2], entry=places[2].entry.replace(b'"ok"', b'"no"'))
    bad: list[tuple[str, list[Place]]] = [
        (origin, [*places[:2], changed]),  # an entry that the log has not
        (origin, [*places[:2], replace(places[2], index=first)]),  # at another place
        (origin, [*places[:2], replace(places[2], proof=())]),
        ("example.org/other", places),  # a log it never signed
    ]
    for log, wanted in bad:
        with pytest.raises(TraceInvalid) as caught:
            signer.attest(log, wanted)
        assert caught.value.code == "signer.refused"
    for part in (places[:1], places[1:], []):  # no whole call
        with pytest.raises(TraceInvalid) as caught:
            signer.attest(origin, part)
        assert caught.value.code == "statement.invalid"
    assert signer.last(origin) == head
    signer.close()


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


@pytest.mark.parametrize(
    "request_",
    [
        Query(origin=ORIGIN),
        Sign(origin=ORIGIN, old_size=1, new_size=2, root=A, proof=(B,)),
        Rotate(origin=ORIGIN),
        Finish(origin=ORIGIN, index=7, proof=(A, B), entry=b"{}"),
        Attest(origin=ORIGIN, places=(Place(index=1, proof=(A,), entry=b"{}"),) * 2),
    ],
)
def test_request_round_trip(request_: Request) -> None:
    data = encode_request(request_)
    assert parse_request(data) == request_
    for end in range(len(data) - 2):
        try:
            assert parse_request(data[:end]) != request_
        except TraceInvalid:
            continue
