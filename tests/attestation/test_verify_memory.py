"""What the verifier remembers, and what people bring: only their own files, and only what fits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from safeconduct.attestation import generate_key, reader, verify_trace, write_key
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.verify import bringing
from safeconduct.attestation.verify.bringing import Wish, verify_wish
from safeconduct.attestation.verify.remembered import Memory, memory_folder
from safeconduct.errors import Exit, TraceInvalid

from .forge import chain, entry, forge, opening  # noqa: TID251 - the tests' own kit
from .kit import Bench, write_trace  # noqa: TID251 - the tests' own kit

ROOT = Path(__file__).parents[2]


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "state/verified")


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "state/verified").glob("*"))


def test_what_was_verified_is_remembered(bench: Bench, memory: Memory, tmp_path: Path) -> None:
    trace = write_trace(bench, calls=2)
    wish = Wish(trace=trace, keys=[bench.key_line], memory=memory)
    assert verify_wish(wish).level == 1
    (file,) = kept(tmp_path)
    assert file.read_bytes() == (trace / "checkpoint").read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert verify_wish(wish).level == 2
    older = Path(shutil.copytree(trace, tmp_path / "older"))
    write_trace(bench, calls=2)
    assert verify_wish(wish).level == 2
    newest = file.read_bytes()
    report = verify_wish(Wish(trace=older, keys=[bench.key_line], memory=memory))
    assert (report.status, report.findings[0].code) == (Exit.TAMPERED, "held.rollback")
    # An older copy does not take the newer one's place.
    assert file.read_bytes() == newest


def test_what_nobody_vouches_for_is_not_remembered(
    bench: Bench, memory: Memory, tmp_path: Path
) -> None:
    trace = write_trace(bench, calls=1)
    stranger = write_key(tmp_path / "stranger", "example.org/stranger")
    for keys in ([], [stranger]):
        report = verify_wish(Wish(trace=trace, keys=keys, memory=memory))
        assert report.status == Exit.UNTRUSTED
    (trace / "tile/0").rename(trace / "tile/gone")
    assert verify_wish(Wish(trace=trace, keys=[bench.key_line], memory=memory)).level < 2
    assert all("stranger" not in file.read_text() for file in kept(tmp_path))


def test_a_stranger_cannot_poison_the_memory_of_a_log(
    bench: Bench, memory: Memory, tmp_path: Path
) -> None:
    """A longer log of the same name, trusted once under another key, says nothing about this."""
    trace = write_trace(bench, calls=1)
    origin = (trace / "origin").read_text().strip()
    eve = generate_key("example.org/eve")
    steps = [opening(origin)]
    steps += [entry("heartbeat", "run-1", {"sessions": 0, "calls": at}) for at in range(100)]
    steps.append(entry("session.close", "run-1", {"status": "closed"}))
    forge(tmp_path / "eves", chain(steps), eve, origin)
    poisoned = verify_wish(Wish(trace=tmp_path / "eves", keys=[eve.verifier.line], memory=memory))
    assert poisoned.level == 1
    report = verify_wish(Wish(trace=trace, keys=[bench.key_line], memory=memory))
    assert (report.status, report.level) == (Exit.OK, 1)


@pytest.mark.parametrize("bad", [b"", b"rubbish", b"\xff" * 100, b"x" * 100_000])
def test_a_damaged_memory_is_none(bench: Bench, memory: Memory, tmp_path: Path, bad: bytes) -> None:
    trace = write_trace(bench, calls=1)
    wish = Wish(trace=trace, keys=[bench.key_line], memory=memory)
    assert verify_wish(wish).level == 1
    (file,) = kept(tmp_path)
    file.write_bytes(bad)
    assert verify_wish(wish).level == 1
    assert verify_wish(wish).level == 2  # it was written anew
    # Its own signature flipped: as good as none, and no accusation.
    note = file.read_text()
    file.write_text(note[:-8] + ("AAAAAA=" if note[-8:-1] != "AAAAAA=" else "BBBBBA=") + "\n")
    assert verify_wish(wish).status == Exit.OK


def test_a_memory_that_cannot_be_written_changes_no_verdict(bench: Bench, tmp_path: Path) -> None:
    trace = write_trace(bench, calls=1)
    (tmp_path / "file").write_text("")
    wish = Wish(trace=trace, keys=[bench.key_line], memory=Memory(tmp_path / "file/below"))
    assert verify_wish(wish).status == Exit.OK


def test_the_memory_lies_in_the_state_folder() -> None:
    assert memory_folder({"XDG_STATE_HOME": "/s"}) == Path("/s/safeconduct/verified")
    assert memory_folder({"HOME": "/h"}) == Path("/h/.local/state/safeconduct/verified")
    assert memory_folder({"HOME": "/h", "XDG_STATE_HOME": "relative"}).is_relative_to("/h")


@pytest.mark.parametrize("what", ["policy", "checkpoints", "trust", "keys"])
def test_nothing_that_came_with_the_log_is_brought(bench: Bench, tmp_path: Path, what: str) -> None:
    trace = write_trace(bench, calls=1)
    inside = trace / "brought"
    inside.mkdir()
    (inside / "a.pub").write_text(bench.key_line)
    way_in = tmp_path / "way-in"
    way_in.symlink_to(inside)
    for place in (inside, way_in):
        file = place / "a.pub"
        wish = {
            "policy": Wish(trace=trace, policy=file),
            "checkpoints": Wish(trace=trace, checkpoints=[file]),
            "trust": Wish(trace=trace, trust=place),
            "keys": Wish(trace=trace, keys=[str(file)]),
        }[what]
        with pytest.raises(TraceInvalid) as caught:
            verify_wish(wish)
        assert caught.value.code == "brought.invalid"


def test_odd_files_are_not_brought(bench: Bench, tmp_path: Path) -> None:
    trace = write_trace(bench, calls=1)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    for odd in ("fifo", "huge", "absent", "state"):
        with pytest.raises(TraceInvalid) as caught:
            verify_wish(Wish(trace=trace, checkpoints=[tmp_path / odd]))
        assert caught.value.code == "brought.invalid"


def test_openings_are_counted_however_they_are_cut(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = write_trace(bench, calls=30)
    assert bench.verify().replayable == 30
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr(reader, "_CHUNK_BYTES", size)
        assert bench.verify().replayable == 30
    # A file without lines and end is neither read into memory nor to its end.
    monkeypatch.undo()
    monkeypatch.setattr(reader, "_MAX_COUNTED_BYTES", 8 << 20)
    (trace / "openings/zz.jsonl").write_bytes(bytes(8 << 20))
    report = bench.verify()
    assert (report.status, report.replayable, report.openings_cut) == (Exit.OK, 30, True)


def test_a_held_note_that_is_none_is_told(bench: Bench, tmp_path: Path) -> None:
    trace = write_trace(bench, calls=1)
    for bad in (b"", b"x\n\n", Checkpoint(origin="a", size=1, root=bytes(32)).text().encode()):
        report = verify_trace(trace, [bench.key_line], held=[("kept", bad)])
        assert report.status != Exit.OK
        assert report.findings


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bringing, "_TOLD_EVERY_S", 0)
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = bringing.ProgressLine()
        progress(256, 70_000)
        progress.clear()
        assert b"256 of 70,000 entries" in os.read(ours, 1000)
    os.close(ours)
    with (tmp_path / "piped").open("w") as piped:
        monkeypatch.setattr(sys, "stderr", piped)
        progress = bringing.ProgressLine()
        progress(256, 70_000)
        progress.clear()
    assert (tmp_path / "piped").read_text() == ""


def test_the_big_log_of_the_benchmark_is_a_log(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from benchmarks.trace_load import write_log; "
        "print(write_log(Path(sys.argv[1]), int(sys.argv[2])))"
    )
    for entries in (100, 3000):
        trace = tmp_path / str(entries)
        trace.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", program, trace, str(entries)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        report = verify_trace(trace, [done.stdout.strip()])
        assert (report.status, report.complete) == (Exit.OK, True)
        assert entries - 3 <= report.size <= entries
        assert report.calls > entries // 4
