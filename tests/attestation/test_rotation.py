"""Key rotation: the old key hands over inside the log, and no crash loses a key or forks a tree."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.attestation import (
    TraceWriter,
    VerifierKey,
    generate_key,
    read_entries,
    verify_trace,
    write_key,
)
from safeconduct.attestation.note import Note
from safeconduct.attestation.rotation import (
    entry_body,
    follow_rotation,
    rotation_body,
    statement,
)
from safeconduct.attestation.writing.handover import rotate_key
from safeconduct.errors import TraceInvalid

from .kit import NAME, Bench, record_call  # noqa: TID251 - the tests' own kit
from .rotation_kit import ORIGIN, Log, key_folder  # noqa: TID251

PACKAGE = Path(__file__).parents[2] / "src"


# -- the statement and its rule ---------------------------------------------------------------


def test_a_rotation_is_followed_from_the_old_key_to_the_new() -> None:
    old, new = generate_key(NAME), generate_key(NAME)
    body = rotation_body(ORIGIN, old, new.verifier)
    assert follow_rotation(body, [old.verifier], ORIGIN) == new.verifier
    assert statement(ORIGIN, new.verifier).count("\n") == 3


@pytest.mark.parametrize("field", ["old", "new", "signature"])
def test_any_changed_field_of_a_rotation_is_refused(field: str) -> None:
    old, new, third = generate_key(NAME), generate_key(NAME), generate_key(NAME)
    body: dict[str, object] = dict(rotation_body(ORIGIN, old, new.verifier))
    other = rotation_body(ORIGIN, third, third.verifier)
    for bad in (other[field], str(body[field])[:-4], "", 7, None):
        with pytest.raises(TraceInvalid) as caught:
            follow_rotation({**body, field: bad}, [old.verifier], ORIGIN)
        assert caught.value.code in {"rotation.invalid", "rotation.stranger"}
    with pytest.raises(TraceInvalid) as caught:
        follow_rotation(body, [old.verifier], "example.org/other")
    assert caught.value.code == "rotation.invalid"
    with pytest.raises(TraceInvalid) as caught:
        follow_rotation(body, [third.verifier], ORIGIN)
    assert caught.value.code == "rotation.stranger"


@given(
    st.dictionaries(
        st.sampled_from(["old", "new", "signature", "else"]),
        st.none() | st.integers() | st.text() | st.lists(st.text()),
    )
)
def test_bodies_from_garbage(body: dict[str, object]) -> None:
    with pytest.raises(TraceInvalid) as caught:
        follow_rotation(body, [generate_key(NAME).verifier], ORIGIN)
    assert caught.value.code == "rotation.invalid"


@given(st.binary() | st.text().map(str.encode))
def test_entries_from_garbage_hand_nothing_over(data: bytes) -> None:
    assert entry_body(data) == {}


def test_a_key_does_not_hand_over_to_itself() -> None:
    old = generate_key(NAME)
    with pytest.raises(TraceInvalid) as caught:
        follow_rotation(rotation_body(ORIGIN, old, old.verifier), [old.verifier], ORIGIN)
    assert caught.value.code == "rotation.invalid"


# -- a whole rotation in a real log -----------------------------------------------------------


def test_a_log_goes_on_under_a_new_key_and_the_old_one_is_gone(bench: Bench) -> None:
    private = bench.key.read_text()
    old = VerifierKey.parse(bench.key_line)
    signer = bench.signer()
    with TraceWriter.open(bench.trace, signer=signer) as writer:
        session = writer.open_session("local", "sdk")
        record_call(writer, session, "c1")
        new = rotate_key(writer, signer, bench.trace)
        record_call(writer, session, "c2")
        origin = writer.origin
    signer.close()
    assert new != old
    assert new.name == old.name
    assert key_folder(bench) == ["alice.key", "alice.pub"]
    assert bench.key.read_text() != private
    assert (bench.root / "alice.pub").read_text() == new.line + "\n"
    index, body = rotation_in(bench.trace)
    assert follow_rotation(body, [old], origin) == new
    covering = min(
        int(path.name)
        for path in (bench.trace / "checkpoints").iterdir()
        if path.name.isdecimal() and int(path.name) > index
    )
    note = Note.parse((bench.trace / "checkpoints" / str(covering)).read_bytes())
    of_heads = [key.of_log(origin) for key in (old, new)]
    assert [one.id for one in note.signatures] == [key.id for key in of_heads]
    last = Note.parse((bench.trace / "checkpoint").read_bytes())
    assert [one.id for one in last.signatures] == [of_heads[1].id]
    assert new.verifies(last.signatures[0], last.text)
    again = bench.signer()
    assert again.key == new
    TraceWriter.open(bench.trace, signer=again).close()
    again.close()


def test_a_log_is_handed_over_while_others_record_in_it(bench: Bench) -> None:
    old = VerifierKey.parse(bench.key_line)
    signer = bench.signer()
    failures: list[BaseException] = []
    done = Event()

    def record(writer: TraceWriter, name: str) -> None:
        try:
            session = writer.open_session("local", "sdk")
            number = 0
            while not done.is_set() or number < 20:
                record_call(writer, session, f"{name}{number}")
                number += 1
                if number % 7 == 0:
                    writer.sign()
        except BaseException as error:
            failures.append(error)

    with TraceWriter.open(bench.trace, signer=signer) as writer:
        threads = [Thread(target=record, args=(writer, name)) for name in "ab"]
        for thread in threads:
            thread.start()
        try:
            new = rotate_key(writer, signer, bench.trace)
            newer = rotate_key(writer, signer, bench.trace)
        finally:
            done.set()
            for thread in threads:
                thread.join(60)
    signer.close()
    assert not failures
    assert len({old, new, newer}) == 3
    report = verify_trace(bench.trace, [old.line])
    assert report.level == 1
    assert {one.code for one in report.findings} <= {"call.unknown"}, report.findings


def rotation_in(trace: Path) -> tuple[int, dict[str, object]]:
    found = [(index, entry) for index, entry in read_entries(trace) if entry.kind == "key.rotate"]
    index, entry = found[-1]
    return index, entry.body


def test_nobody_rotates_a_key_that_another_signer_uses(bench: Bench) -> None:
    first, second = bench.signer(), bench.signer()
    with pytest.raises(TraceInvalid) as caught:
        first.rotate(ORIGIN)
    assert caught.value.code == "key.busy"
    second.close()
    body = first.rotate(ORIGIN)
    assert first.rotate(ORIGIN) == body
    # From now on it is the only one: a signer that starts now would go on with the old key.
    with pytest.raises(TraceInvalid) as caught:
        bench.signer()
    assert caught.value.code == "key.busy"
    first.close()


def test_the_old_key_stays_until_the_log_shows_the_rotation(bench: Bench) -> None:
    private = bench.key.read_text()
    log = Log(bench)
    client = bench.signer()
    log.sign(client, b"first")
    with pytest.raises(TraceInvalid) as caught:
        client.finish_rotation(ORIGIN, index=0, entry=b"first", proof=[])
    assert caught.value.code == "signer.refused"
    entry = log.entry(client.rotate(ORIGIN))
    lines = log.sign(client, entry)
    assert lines.count("\n") == 2
    other = log.entry({**client.rotate(ORIGIN), "new": bench.key_line})
    for index, shown, proof in (
        (1, other, [log.leaves[0]]),
        (0, entry, [log.leaves[0]]),
        (1, entry, []),
        (0, b"first", [log.leaves[1]]),
    ):
        with pytest.raises(TraceInvalid) as caught:
            client.finish_rotation(ORIGIN, index=index, entry=shown, proof=proof)
        assert caught.value.code == "signer.refused"
    assert bench.key.read_text() == private
    client.finish_rotation(ORIGIN, index=1, entry=entry, proof=[log.leaves[0]])
    assert bench.key.read_text() != private
    client.close()


def test_an_entry_that_no_verifier_reads_ends_no_key(bench: Bench) -> None:
    for spoil in (b'"v":1,"v":1', b'"v":1 ', b'"v":2', b'"v":1,"x":1'):
        log = Log(bench)
        shutil.rmtree(bench.state, ignore_errors=True)
        private = bench.key.read_text()
        client = bench.signer()
        log.sign(client, b"first")
        entry = log.entry(client.rotate(ORIGIN)).replace(b'"v":1', spoil)
        log.sign(client, entry)
        with pytest.raises(TraceInvalid) as caught:
            client.finish_rotation(ORIGIN, index=1, entry=entry, proof=[log.leaves[0]])
        assert caught.value.code == "signer.refused"
        client.close()
        assert bench.key.read_text() == private


# -- what is not ours -------------------------------------------------------------------------


def test_a_public_line_of_somebody_else_is_left_alone(bench: Bench) -> None:
    public = bench.root / "alice.pub"
    for text in ("notes of mine\n", generate_key("example.org/bob").verifier.line + "\n"):
        public.write_text(text)
        bench.signer().close()
        assert public.read_text() == text
    public.unlink()
    public.symlink_to(bench.root / "elsewhere")
    bench.signer().close()
    assert not (bench.root / "elsewhere").exists()


def test_a_foreign_next_key_is_refused(bench: Bench) -> None:
    write_key(bench.root / "alice.key.next", "example.org/bob")
    with pytest.raises(TraceInvalid) as caught:
        bench.signer()
    assert caught.value.code == "key.invalid"


def test_a_signer_waits_for_one_that_changes_the_key(bench: Bench) -> None:
    holder = os.open(bench.key, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    waiting = subprocess.Popen(
        [sys.executable, "-c", WAIT, str(PACKAGE), str(bench.key)], stdout=subprocess.PIPE
    )
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == b"waiting\n"
    fcntl.flock(holder, fcntl.LOCK_UN)
    os.close(holder)
    assert waiting.stdout.readline() == b"open\n"
    assert waiting.wait(10) == 0
    waiting.stdout.close()


WAIT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from safeconduct.attestation.signing.key_files import KeyFiles
print("waiting", flush=True)
KeyFiles.open(Path(sys.argv[2])).close()
print("open", flush=True)
"""
