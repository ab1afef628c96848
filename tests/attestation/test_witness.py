"""A witness cosigns one history of each log it knows, whatever the log's own key signs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.attestation import Checkpoint, TrustPolicy
from safeconduct.attestation.cosignature import Cosignature, CosigningKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import Note
from safeconduct.attestation.witness.desk import Answer
from safeconduct.attestation.witness.keyfile import load_witness_key, write_witness_key
from safeconduct.attestation.witness.state import WitnessState, origin_hash
from safeconduct.attestation.witness.submission import Submission, encode_submission
from safeconduct.errors import TraceInvalid

from .witness_kit import (  # noqa: TID251 - the tests' own kit
    ALICE,
    NOW,
    STRANGER,
    WITNESS,
    Desk,
    Log,
)

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests" / "vectors" / "trace" / "witness.json"


@pytest.fixture
def log(tmp_path: Path) -> Log:
    log = Log(tmp_path / "log")
    log.grow(5)
    return log


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "state")


def cosigned(answer: Answer, text: str) -> Cosignature:
    assert answer.status == 200, answer
    (line,) = Note.parse(f"{text}\n{answer.body.decode()}".encode()).signatures
    found = WITNESS.verifier.verified(line, text)
    assert found is not None
    return found


def test_a_growing_log_is_cosigned_at_each_step(log: Log, desk: Desk) -> None:
    sizes = [0]
    for growth in (0, 1, 1, 0, 250, 300, 7):
        log.grow(growth)
        answer = desk.add(log.request(sizes[-1]))
        found = cosigned(answer, log.head().text())
        assert found.time == NOW
        sizes.append(log.tiles.size)
    held = desk.witness.checkpoint(origin_hash(log.origin))
    policy = f"log {ALICE.verifier.line}\nwitness w {WITNESS.verifier.line}\nquorum w\n"
    verdict = TrustPolicy.parse(policy.encode()).evaluate(Note.parse(held.body))
    assert verdict.witnessed
    assert verdict.head == log.head()


def test_the_log_key_alone_can_fork_a_log_and_a_witness_stops_it(
    log: Log, desk: Desk, tmp_path: Path
) -> None:
    other = log.fork(tmp_path / "fork")
    log.grow(3, salt="truth")
    other.grow(3, salt="lie")
    # Without a witness both are good: the same key, the same size, two histories.
    for one in (log, other):
        note = Note.parse(one.note())
        assert ALICE.verifier.verifies(note.signatures[0], note.text)
    assert log.head().root != other.head().root
    assert desk.add(log.request(0)).status == 200
    assert desk.add(other.request(0)) == Answer(status=409, body=b"8\n", kind="text/x.tlog.size")
    assert desk.add(other.request(8)).status == 422
    other.grow(4, salt="lie")
    assert desk.add(other.request(8)).status == 422
    for size in (1, 5, 7):
        assert desk.add(other.request(size)).status == 409
    name = origin_hash(log.origin)
    assert desk.witness.checkpoint(name).body.startswith(log.head().text().encode())
    # What the log signed is kept: the fork proves itself, two signed heads of one size.
    kept = desk.witness.evidence(name).body.decode().split()
    assert sorted(one.split("-")[0] for one in kept) == ["fork", "unproven"]
    fork = next(one for one in kept if one.startswith("fork"))
    evidence = desk.witness.evidence(name, fork).body.decode()
    assert evidence.startswith("safeconduct/witness-evidence/v1\nfork\nheld ")
    notes = [f"{part}" for part in evidence.split("example.org/alice\n8\n")[1:]]
    assert len(notes) == 2
    assert notes[0].split("\n")[0] != notes[1].split("\n")[0]


def test_a_log_put_back_to_an_earlier_state_is_not_cosigned(
    log: Log, desk: Desk, tmp_path: Path
) -> None:
    backup = log.fork(tmp_path / "backup")
    log.grow(10)
    assert desk.add(log.request(0)).status == 200
    for old in (0, 5, 15):
        assert desk.add(backup.request(old)).status in (400, 409)
    backup.grow(20, salt="again")
    assert desk.add(backup.request(5)).status == 409
    assert desk.add(backup.request(15)).status == 422
    names = desk.witness.evidence(origin_hash(log.origin)).body.decode().split()
    assert sorted(one.split("-")[0] for one in names) == ["behind", "unproven"]


def test_two_submitters_race_and_one_size_wins(log: Log, desk: Desk) -> None:
    assert desk.add(log.request(0)).status == 200
    log.grow(40)
    sizes = list(range(6, 46))
    random.Random(5).shuffle(sizes)  # noqa: S311 - an order, no secret
    bodies = [log.request(5, size) for size in sizes]
    barrier = Barrier(8)

    def submit(number: int) -> list[int]:
        barrier.wait(10)
        return [desk.add(body).status for body in bodies[number::8]]

    with ThreadPoolExecutor(8) as pool:
        statuses = [status for part in pool.map(submit, range(8)) for status in part]
    assert statuses.count(200) == 1
    assert statuses.count(409) == len(bodies) - 1
    held = Checkpoint.parse(Note.parse(desk.witness.checkpoint(origin_hash(log.origin)).body).text)
    assert desk.add(log.request(held.size)).status == 200


def test_signatures_that_must_not_count(log: Log, desk: Desk, tmp_path: Path) -> None:
    text = log.head().text()
    sent = encode_submission(0, [], log.note(key=STRANGER))
    assert desk.add(sent).status == 403  # same name, another key
    false = ALICE.sign(text + "x\n")
    assert desk.add(encode_submission(0, [], f"{text}\n{false}".encode())).status == 403
    both = f"{text}\n{ALICE.sign(text)}{false}"
    assert desk.add(encode_submission(0, [], both.encode())).status == 403
    unknown = Log(tmp_path / "x", origin="example.org/bob")
    unknown.grow(2)
    assert desk.add(unknown.request(0)).status == 404
    below = Log(tmp_path / "y", origin="example.org/alice/log7")
    below.grow(2)
    assert desk.add(below.request(0)).status == 200
    beside = Log(tmp_path / "z", origin="example.org/alicex")
    assert desk.add(beside.request(0)).status == 404
    with_stranger = f"{text}\n{STRANGER.sign(text)}{ALICE.sign(text)}".encode()
    assert desk.add(encode_submission(0, [], with_stranger)).status == 200
    held = Note.parse(desk.witness.checkpoint(origin_hash(log.origin)).body)
    assert [line.name for line in held.signatures] == [ALICE.name, WITNESS.name]
    assert ALICE.verifier.made(held.signatures[0])  # the stranger's line is not passed on


def test_a_head_of_another_log_cannot_be_replayed(desk: Desk, tmp_path: Path) -> None:
    one = Log(tmp_path / "one", origin="example.org/alice/one")
    two = Log(tmp_path / "two", origin="example.org/alice/two")
    one.grow(4)
    two.grow(4, salt="two")
    line = desk.add(one.request(0)).body.decode()
    assert desk.add(two.request(0)).status == 200
    stolen = Note.parse(f"{two.head().text()}\n{line}".encode()).signatures[0]
    assert WITNESS.verifier.verified(stolen, two.head().text()) is None
    assert WITNESS.verifier.verified(stolen, one.head().text()) is not None
    swapped = one.note().replace(b"alice/one", b"alice/two", 1)
    assert desk.add(encode_submission(4, [], swapped)).status == 403


def test_a_log_that_changed_its_key_goes_on(log: Log, tmp_path: Path) -> None:
    new = STRANGER  # of the same name
    desk = Desk(tmp_path / "state")
    assert desk.add(log.request(0)).status == 200
    log.grow(1)
    text = log.head().text()
    lines = [key.of_log(log.origin).sign(text) for key in (ALICE, new)]
    both = encode_submission(
        5, log.tiles.prove_consistency(5, 6), f"{text}\n{''.join(lines)}".encode()
    )
    desk.keys = (ALICE, new)
    desk.reopen()
    assert desk.add(both).status == 200
    held = Note.parse(desk.witness.checkpoint(origin_hash(log.origin)).body)
    assert len(held.signatures) == 3
    desk.keys = (new,)  # the old line may go once the log has been cosigned again
    desk.reopen()
    log.grow(1)
    assert desk.add(log.request(6)).status == 403
    log.key = new
    assert desk.add(log.request(6)).status == 200


def test_extension_lines_are_cosigned_and_not_believed(log: Log, desk: Desk) -> None:
    note = log.note(extra="an extension\n")
    cosigned(desk.add(encode_submission(0, [], note)), log.head().text() + "an extension\n")


def test_wrong_proofs(log: Log, desk: Desk) -> None:
    assert desk.add(log.request(0)).status == 200
    log.grow(300)
    good = log.tiles.prove_consistency(5, 305)
    assert len(good) > 3
    wrong: list[list[bytes]] = [
        [],
        good[:-1],
        good[1:],
        [*good, good[0]],
        list(reversed(good)),
        [good[0]] * len(good),
        [bytes(32), *good[1:]],
        log.tiles.prove_consistency(4, 305),
        log.tiles.prove_consistency(5, 304),
        [bytes(32)] * 63,
    ]
    for proof in wrong:
        assert desk.add(encode_submission(5, proof, log.note())).status == 422
    assert desk.add(encode_submission(5, [bytes(32)] * 64, log.note())).status == 400
    assert desk.add(encode_submission(5, good, log.note())).status == 200
    assert desk.add(encode_submission(305, [bytes(32)], log.note())).status == 422
    empty = Checkpoint(origin="example.org/alice/empty", size=0, root=bytes(32)).text()
    note = f"{empty}\n{ALICE.of_log('example.org/alice/empty').sign(empty)}".encode()
    assert desk.add(encode_submission(0, [], note)).status == 422


def test_an_empty_log_may_be_cosigned_and_grow(tmp_path: Path, desk: Desk) -> None:
    log = Log(tmp_path / "empty")
    assert desk.add(log.request(0)).status == 200
    assert desk.add(log.request(0)).status == 200
    log.grow(2)
    assert desk.add(encode_submission(0, [bytes(32)], log.note())).status == 422
    assert desk.add(log.request(0)).status == 200


def test_requests_that_are_none(log: Log, desk: Desk) -> None:
    note = log.note().decode()
    hash_line = "A" * 43 + "="
    bad = [
        "",
        "old 0",
        "old 0\n",
        "old 0\n\n",
        note,
        f"\n{note}",
        f"old 0\n{note}",
        f"old  0\n\n{note}",
        f"old 00\n\n{note}",
        f"old -1\n\n{note}",
        f"old 0x0\n\n{note}",
        f"old 0 \n\n{note}",
        f"OLD 0\n\n{note}",
        f"old 9223372036854775808\n\n{note}",
        f"old {'9' * 5000}\n\n{note}",
        f"old 0\r\n\r\n{note}",
        f"old 0\n{hash_line[:-1]}\n\n{note}",
        f"old 0\n{hash_line} \n\n{note}",
        f"old 0\nAAAA\n\n{note}",
        f"old 0\n\u00e9\n\n{note}",
        f"old 6\n\n{note}",
        f"old 0\n\n{note[:-1]}",
        f"old 0\n\n{note}\n",
        f"old 0\n\n{note.replace('5', '05', 1)}",
        f"old 0\n\n\n{note}",
        f"old 0\n\n{note}\x00",
    ]
    for body in bad:
        assert desk.add(body.encode()).status == 400, body[:60]
    assert desk.add(b"x" * 70_000).status == 413
    assert desk.state.count == 0
    for end in range(len(log.request(0))):
        assert desk.add(log.request(0)[:end]).status in (400, 403)
    assert desk.state.count == 0


@given(
    st.binary(max_size=300), st.sampled_from((b"", b"old 5\n", b"old 0\n\n", b"old 0\n\na\n1\n"))
)
def test_any_bytes_are_a_request_or_refused(data: bytes, begin: bytes) -> None:
    code = "witness.request"
    try:
        Submission.parse(begin + data)
    except TraceInvalid as error:
        code = error.code
    assert code == "witness.request"


@given(st.integers(0, 2**63 - 1), st.lists(st.binary(min_size=32, max_size=32), max_size=63))
def test_what_is_encoded_is_read_back(old_size: int, proof: list[bytes]) -> None:
    text = Checkpoint(origin="example.org/alice", size=7, root=bytes(32)).text()
    note = f"{text}\n{ALICE.sign(text)}".encode()
    sent = Submission.parse(encode_submission(old_size, proof, note))
    assert (sent.old_size, list(sent.proof), sent.note) == (old_size, proof, Note.parse(note))


def test_every_flipped_bit_of_a_request_is_refused(log: Log, desk: Desk) -> None:
    assert desk.add(log.request(0)).status == 200
    log.grow(8)
    good = log.request(5)
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        answer = desk.add(bytes(bad))
        assert answer.status in (400, 403, 404, 409, 422), (at, answer)
    assert desk.add(good).status == 200


def test_a_clock_that_went_back_signs_nothing_contradictory(log: Log, desk: Desk) -> None:
    assert desk.add(log.request(0)).status == 200
    log.grow(1)
    desk.clock.now = NOW - 100
    assert cosigned(desk.add(log.request(5)), log.head().text()).time == NOW
    desk.clock.now = NOW - 3600
    log.grow(1)
    assert desk.add(log.request(6)).status == 503
    desk.clock.now = 0
    assert desk.add(log.request(6)).status == 503
    desk.clock.now = NOW + 1
    assert cosigned(desk.add(log.request(6)), log.head().text()).time == NOW + 1


def test_memory_survives_and_belongs_to_one_witness(log: Log, desk: Desk, tmp_path: Path) -> None:
    assert desk.add(log.request(0)).status == 200
    with pytest.raises(TraceInvalid) as refused:
        WitnessState(desk.directory)
    assert refused.value.code == "witness.locked"
    desk.reopen()
    other = Log(tmp_path / "other")
    other.grow(5, salt="lie")
    assert desk.add(other.request(0)).status == 409
    assert desk.add(other.request(5)).status == 422
    desk.directory.chmod(0o777)
    desk.state.close()
    with pytest.raises(TraceInvalid) as refused:
        WitnessState(desk.directory)
    assert refused.value.code == "witness.state"


def test_a_damaged_memory_is_refused_not_forgotten(log: Log, desk: Desk) -> None:
    assert desk.add(log.request(0)).status == 200
    path = desk.directory / origin_hash(log.origin) / "checkpoint"
    whole = path.read_bytes()
    desk.state.close()
    foreign = Checkpoint(origin="example.org/bob", size=5, root=bytes(32)).text()
    unsigned = log.head().text() + "\n" + STRANGER.sign(log.head().text())
    torn = [whole[:end] for end in range(0, len(whole) - 1, 7)]
    flipped = whole.replace(b"5", b"6", 1)
    desk.open()
    log.grow(1)
    for data in [*torn, flipped, f"{foreign}\n{ALICE.sign(foreign)}".encode(), unsigned.encode()]:
        path.write_bytes(data)
        for old in (0, 5):
            answer = desk.add(log.request(old))
            assert (answer.status, b"state cannot be used" in answer.body) == (500, True)
        assert path.read_bytes() == data
    path.write_bytes(whole)
    assert desk.add(log.request(5)).status == 200


def test_a_full_disk_cosigns_nothing(log: Log, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", full)
        assert desk.add(log.request(0)).status == 500
    assert desk.state.count == 0
    assert desk.add(log.request(0)).status == 200


_KILLED = """
import sys
from pathlib import Path
from safeconduct.attestation import SigningKey
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.witness.desk import Witness
from safeconduct.attestation.witness.state import WitnessState
state = WitnessState(Path(sys.argv[1]))
logs = [SigningKey("example.org/alice", b"\\x01" * 32).verifier]
witness = Witness(CosigningKey("witness.example/w1", b"\\x03" * 32), logs, state)
print("ready", flush=True)
while length := sys.stdin.buffer.read(4):
    answer = witness.add_checkpoint(sys.stdin.buffer.read(int.from_bytes(length, "big")))
    print(answer.status, answer.body.decode().split("\\n")[0], flush=True)
"""


def test_kill_9_never_loses_a_head_that_was_cosigned(tmp_path: Path) -> None:
    """Killed at a random moment, what it answered last is what it remembers, or something newer."""
    log, state = Log(tmp_path / "log"), tmp_path / "state"
    dice = random.Random(7)  # noqa: S311 - moments, no secret
    held = 0
    for _ in range(int(os.environ.get("SAFECONDUCT_KILL_ROUNDS", "6"))):
        process = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(state)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        for _ in range(dice.randrange(4)):
            log.grow(dice.randrange(1, 9))
            body = log.request(held)
            process.stdin.write(len(body).to_bytes(4, "big") + body)
            process.stdin.flush()
            assert process.stdout.readline().startswith(b"200 ")
            held = log.tiles.size
        log.grow(1)
        body = log.request(held)
        process.stdin.write(len(body).to_bytes(4, "big") + body)
        process.stdin.flush()
        time.sleep(dice.random() / 200)  # killed while it judges this one, or before, or after
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdin.close()
        process.stdout.close()
        desk = Desk(state)
        kept = desk.state.held(log.origin)
        size = kept.head.size if kept else 0
        assert size in (held, log.tiles.size)
        assert kept is None or kept.head.root == log.tiles.root_at(size)
        held = size
        desk.state.close()


def test_a_key_file_is_private_and_of_a_witness(tmp_path: Path) -> None:
    path = tmp_path / "w.key"
    key = write_witness_key(path, "witness.example/w1")
    assert load_witness_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(TraceInvalid, match="exists already"):
        write_witness_key(path, "witness.example/w1")
    path.chmod(0o640)
    with pytest.raises(TraceInvalid, match="others can read it"):
        load_witness_key(path)
    path.chmod(0o600)
    path.write_text(ALICE.line + "\n")
    with pytest.raises(TraceInvalid) as refused:
        load_witness_key(path)
    assert refused.value.code == "key.invalid"
    assert ALICE.line[-20:] not in str(refused.value)


def test_vectors_of_requests(tmp_path: Path) -> None:
    """Requests in turn to one witness, as another implementation could be asked them."""
    vectors = json.loads(VECTORS.read_text())
    desk = Desk(tmp_path / "state")
    desk.keys = (ALICE,)
    assert vectors["log"] == ALICE.verifier.line
    assert CosigningKey.parse(vectors["witness"]) == WITNESS
    for step in vectors["steps"]:
        desk.clock.now = step["time"]
        answer = desk.add(step["request"].encode())
        assert answer.status == step["status"], step["name"]
        if step["status"] in (200, 409):
            assert answer.body.decode() == step["answer"], step["name"]
