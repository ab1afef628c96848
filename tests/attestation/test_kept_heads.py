"""Signed heads that lie in a trace besides its newest one: each must be a head of this tree."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from safeconduct.attestation import Report, SigningKey, generate_key, verify_trace
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import EMPTY_ROOT
from safeconduct.attestation.note import MAX_SIGNATURES, Note
from safeconduct.attestation.verify.kept import compare_kept
from safeconduct.errors import Exit

from .forge import Fields, call, chain, entry, forge, opening  # noqa: TID251 - the tests' own kit
from .kit import Bench, write_trace  # noqa: TID251 - the tests' own kit

ORIGIN = "example.org/alice/log"
ALICE = generate_key("example.org/alice")
EVE = generate_key("example.com/eve")
CLOSED: Fields = {"status": "closed"}


def run(number: int, *, calls: int, word: str = "c") -> list[Fields]:
    """Return one run of the log with one session, not chained yet."""
    name, session = f"run-{number}", f"s{number}"
    steps = [{**opening(ORIGIN), "session": name}]
    steps.append(entry("session.open", session, {"caller": "local", "origin": "sdk"}))
    for at in range(calls):
        steps += call(session, f"{word}{number}.{at}", 10 * at)
    return [*steps, entry("session.close", session, CLOSED), entry("session.close", name, CLOSED)]


def note(size: int, root: bytes, key: SigningKey = ALICE, origin: str = ORIGIN) -> bytes:
    text = Checkpoint(origin=origin, size=size, root=root).text()
    return f"{text}\n{key.of_log(origin).sign(text)}".encode()


def keep(trace: Path, name: str, data: bytes) -> None:
    path = trace / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def check(trace: Path) -> Report:
    return verify_trace(trace, [ALICE.verifier.line], origin=ORIGIN, jobs=1)


def codes(report: Report) -> list[str]:
    return [one.code for one in report.findings]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    forge(tmp_path / "trace", chain([*run(1, calls=90), *run(2, calls=3)]), ALICE, ORIGIN)
    return tmp_path / "trace"


def test_an_older_head_of_the_folder_put_in_the_place_of_the_newest(bench: Bench) -> None:
    """The cheapest rollback: everything it takes lies in the folder."""
    trace = write_trace(bench, calls=3)
    older = (trace / "checkpoint").read_bytes()
    write_trace(bench, calls=3)
    newer = int((trace / "checkpoint").read_text().split("\n")[1])
    assert bench.verify().status == Exit.OK
    (trace / "checkpoint").write_bytes(older)
    report = bench.verify()
    assert (report.status, codes(report)) == (Exit.INCOMPLETE, ["head.newer"])
    assert (report.integrity, report.complete, report.level) == ("intact", False, 1)
    assert f"checkpoints/{newer} is a signed head of {newer} entries" in report.findings[0].message
    # Whoever takes that one away too leaves a valid shorter log: only L2 finds it out.
    (trace / f"checkpoints/{newer}").unlink()
    assert bench.verify().status == Exit.OK


@pytest.mark.parametrize("name", ["checkpoints/{}", "anchors/forks/" + "0" * 32])
@pytest.mark.parametrize("size", [1, 7, 256, 257, 274])
def test_a_fork_that_the_folder_itself_proves(
    trace: Path, tmp_path: Path, name: str, size: int
) -> None:
    whole = chain([*run(1, calls=90), *run(2, calls=3)])
    assert len(whole) >= size
    honest = forge(tmp_path / "same", whole[:size], ALICE, ORIGIN)
    keep(trace, name.format(size), note(size, honest.root))
    assert check(trace).status == Exit.OK
    keep(trace, name.format(size), note(size, hashlib.sha256(b"another tree").digest()))
    report = check(trace)
    assert (report.status, codes(report)) == (Exit.TAMPERED, ["head.fork"])
    assert (report.integrity, report.level) == ("intact", 0)
    assert name.format(size) in report.findings[0].message
    assert any("prove the fork" in step for step in report.next_steps)


def test_an_empty_tree_is_the_beginning_of_every_log(trace: Path) -> None:
    keep(trace, "checkpoints/0", note(0, EMPTY_ROOT))
    assert check(trace).status == Exit.OK
    keep(trace, "checkpoints/0", note(0, bytes(32)))
    assert codes(check(trace)) == ["head.fork"]


def test_a_false_signature_of_the_log_on_a_kept_head(trace: Path) -> None:
    good = note(7, bytes(32))
    line = Note.parse(good).signatures[0]
    false = base64.b64encode(line.id + line.signature[:-1] + b"\0").decode()
    text = Note.parse(good).text
    keep(trace, "checkpoints/7", f"{text}\n\N{EM DASH} {ORIGIN} {false}\n".encode())
    report = check(trace)
    assert (report.status, codes(report)) == (Exit.TAMPERED, ["checkpoint.signature"])
    assert "checkpoints/7" in report.findings[0].message


def test_what_no_trusted_key_signed_says_nothing(trace: Path) -> None:
    for number, data in enumerate(
        (
            note(4000, bytes(32), EVE),
            note(7, bytes(32), EVE),
            note(7, bytes(32), origin="example.org/alice/other"),
            b"",
            b"no note\n",
            note(7, bytes(32))[:-20],
        )
    ):
        keep(trace, f"anchors/forks/{number:032x}", data)
        keep(trace, f"checkpoints/{number + 1}", data)
        assert check(trace).status == Exit.OK, data


def test_each_kind_is_told_once(trace: Path) -> None:
    for size in range(1, 400):
        keep(trace, f"checkpoints/{size}", note(size, bytes(32)))
    report = check(trace)
    assert report.status == Exit.TAMPERED
    assert sorted(codes(report)) == ["head.fork", "head.newer"]


def test_a_newer_head_is_told_where_files_are_missing_too(trace: Path) -> None:
    keep(trace, "checkpoints/900", note(900, bytes(32)))
    shutil.rmtree(trace / "tile/1")
    report = check(trace)
    assert report.status == Exit.INCOMPLETE
    assert codes(report)[-1] == "head.newer"
    size = report.size
    keep(trace, f"checkpoints/{size}", note(size, bytes(32)))
    assert "head.fork" in codes(check(trace))


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_a_folder(path: Path) -> None:
    path.symlink_to("/etc")


@pytest.mark.parametrize("place", ["checkpoints", "anchors", "anchors/forks", "checkpoints/7"])
@pytest.mark.parametrize("make", [os.mkfifo, link_to_a_device, link_to_a_folder])
def test_hostile_names_end_in_a_report(
    trace: Path, place: str, make: Callable[[Path], None]
) -> None:
    (trace / place).parent.mkdir(exist_ok=True)
    make(trace / place)
    report = check(trace)
    assert report.status in (Exit.OK, Exit.TAMPERED)
    assert (report.status == Exit.OK) == (place == "checkpoints/7")


def test_a_log_of_more_runs_than_names_are_read_at_once(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run leaves a head: many of them are no fault, and the newest are looked at."""
    monkeypatch.setattr("safeconduct.attestation.folder.MAX_NAMES", 5)
    size = check(trace).size
    for number in range(20):
        keep(trace, f"checkpoints/{size - 1 - number}", b"")
    assert check(trace).status == Exit.OK
    keep(trace, f"checkpoints/{size + 1}", note(size + 1, bytes(32)))
    assert codes(check(trace)) == ["head.newer"]


def test_many_heads_with_many_lines_are_no_work_without_end(trace: Path) -> None:
    text = Checkpoint(origin=ORIGIN, size=7, root=bytes(32)).text()
    lines = EVE.of_log(ORIGIN).sign(text) * MAX_SIGNATURES
    for number in range(300):
        keep(trace, f"anchors/forks/{number:032x}", f"{text}\n{lines}".encode())
    assert check(trace).status == Exit.OK


def test_a_head_that_came_while_the_log_was_read_says_nothing(trace: Path, tmp_path: Path) -> None:
    forge(tmp_path / "before", chain(run(1, calls=90)), ALICE, ORIGIN)
    before = (tmp_path / "before/checkpoint").read_bytes()
    head = Checkpoint.parse(Note.parse(before).text)
    newest = (trace / "checkpoint").read_bytes()
    keep(trace, f"checkpoints/{Checkpoint.parse(Note.parse(newest).text).size}", newest)

    def told() -> list[str]:
        found: list[str] = []
        with Folder(trace) as folder:
            compare_kept(folder, head, [ALICE.verifier], lambda error, _: found.append(error.code))
        return found

    assert told() == []
    keep(trace, "checkpoint", before)
    assert told() == ["head.newer"]
