"""The attack matrix, carried out on real files: what verification says to each.

What only a checkpoint held elsewhere can show (a rollback) is stated by a test too.
"""

from __future__ import annotations

import base64
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from safeconduct.attestation import TraceWriter, generate_key, read_entries, verify_trace
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import leaf_hash
from safeconduct.attestation.note import SigningKey
from safeconduct.attestation.tiles import TileStore, join_bundle, split_bundle
from safeconduct.errors import Exit, TraceInvalid

from .kit import Bench, write_trace  # noqa: TID251 - the tests' own kit

Edit = Callable[[list[bytes]], object]


def newest_bundle(trace: Path) -> tuple[Path, list[bytes]]:
    size = int((trace / "checkpoint").read_text().split("\n")[1])
    path = trace / f"tile/entries/000.p/{size}"
    entries = [data for _, data in split_bundle(path.read_bytes(), width=size, path="")]
    return path, entries


def swap_sessions(entries: list[bytes]) -> None:
    entries[1], entries[2] = entries[2], entries[1]


EDITS: dict[str, Edit] = {
    "edit": lambda entries: entries.__setitem__(4, entries[4].replace(b"allow", b"deny!")),
    "delete": lambda entries: entries.pop(4),
    "insert": lambda entries: entries.insert(4, entries[3]),
    "reorder": lambda entries: entries.insert(4, entries.pop(5)),
    "swap sessions": swap_sessions,
    "truncate": lambda entries: entries.pop(),
}


@pytest.fixture
def trace(bench: Bench) -> Path:
    return write_trace(bench, calls=6, sessions=2)


@pytest.mark.parametrize("name", EDITS)
def test_edited_entries_are_named(bench: Bench, trace: Path, name: str) -> None:
    path, entries = newest_bundle(trace)
    EDITS[name](entries)
    path.write_bytes(join_bundle(entries))
    report = bench.verify()
    assert report.status == Exit.TAMPERED
    first = report.findings[0]
    expected = {"swap sessions": 1, "truncate": len(entries)}.get(name, 4)
    assert first.index == expected
    assert first.offset >= 0
    assert first.path.startswith("tile/entries/000.p/")


def rebuild(trace: Path, entries: list[bytes]) -> TileStore:
    """Write a self-consistent tree over other entries, as a careful forger would."""
    shutil.rmtree(trace / "tile")
    folder = Folder(trace)
    tiles = TileStore(folder)
    tiles.append([(entry, leaf_hash(entry)) for entry in entries])
    tiles.flush()
    return tiles


@pytest.mark.parametrize("name", EDITS)
def test_a_consistent_forgery_still_misses_the_root(bench: Bench, trace: Path, name: str) -> None:
    _, entries = newest_bundle(trace)
    size = len(entries)
    EDITS[name](entries)
    while len(entries) < size:
        entries.append(entries[-1])
    rebuild(trace, entries[:size])
    report = bench.verify()
    assert report.status == Exit.TAMPERED


def sign(trace: Path, key: SigningKey, head: Checkpoint) -> None:
    (trace / "checkpoint").write_text(f"{head.text()}\n{key.of_log(head.origin).sign(head.text())}")


def test_a_strangers_signature_is_no_trust(bench: Bench, trace: Path) -> None:
    _, entries = newest_bundle(trace)
    tiles = rebuild(trace, entries)
    origin = (trace / "origin").read_text().strip()
    head = Checkpoint(origin=origin, size=tiles.size, root=tiles.root())
    stranger = generate_key("example.org/eve")
    sign(trace, stranger, head)
    report = bench.verify()
    assert (report.status, report.level) == (Exit.UNTRUSTED, 0)
    assert report.claimed_keys == (f"{origin}+{stranger.verifier.of_log(origin).id.hex()}",)
    # The same name does not help, nor does the key line inside the folder.
    sign(trace, generate_key("example.org/alice"), head)
    (trace / "key.pub").write_text(stranger.verifier.line)
    (trace / "README").write_text(stranger.verifier.line)
    assert bench.verify().status == Exit.UNTRUSTED
    assert verify_trace(trace, []).status == Exit.UNTRUSTED


def test_a_false_signature_in_the_right_name_is_tampering(bench: Bench, trace: Path) -> None:
    note = (trace / "checkpoint").read_text()
    head, _, line = note.rpartition("\u2014 ")
    name, encoded = line.split()
    raw = bytearray(base64.b64decode(encoded))
    raw[10] ^= 1
    (trace / "checkpoint").write_text(f"{head}\u2014 {name} {base64.b64encode(raw).decode()}\n")
    assert bench.verify().status == Exit.TAMPERED


def test_a_rollback_is_not_seen_at_l1_and_the_report_says_so(bench: Bench, trace: Path) -> None:
    old = bench.root / "old"
    shutil.copytree(trace, old)
    write_trace(bench, calls=6)
    report = bench.verify(old)
    assert (report.status, report.level) == (Exit.OK, 1)
    assert report.size < bench.verify().size
    assert any("dropped tail" in line for line in report.not_checked)


def test_a_checkpoint_put_back_alone_is_a_valid_older_log(bench: Bench, trace: Path) -> None:
    signer = bench.signer()
    with TraceWriter.open(trace, signer=signer) as writer:
        writer.checkpoint()
        older = (trace / "checkpoint").read_bytes()
        writer.open_session("local", "sdk")
    signer.close()
    newest = (trace / "checkpoint").read_bytes()
    (trace / "checkpoint").write_bytes(older)
    report = bench.verify()
    assert report.status == Exit.INCOMPLETE  # the run's own close is cut off with the tail
    assert any("its end was cut off" in one.message for one in report.findings)
    (trace / "checkpoint").write_bytes(newest)
    assert bench.verify().status == Exit.OK


def test_another_log_of_the_same_key_is_seen_when_the_origin_is_pinned(
    bench: Bench, trace: Path
) -> None:
    other = write_trace(bench, calls=1, trace=bench.root / "other")
    assert bench.verify(other).status == Exit.OK
    origin = (trace / "origin").read_text().strip()
    pinned = verify_trace(other, [bench.key_line], origin=origin)
    assert pinned.status == Exit.UNTRUSTED
    # Tiles of one log under the checkpoint of another.
    shutil.rmtree(trace / "tile")
    shutil.copytree(other / "tile", trace / "tile")
    assert bench.verify(trace).status in (Exit.TAMPERED, Exit.INCOMPLETE)


def test_missing_files_are_incomplete(bench: Bench, trace: Path) -> None:
    path, _ = newest_bundle(trace)
    path.unlink()
    report = bench.verify()
    assert (report.status, report.integrity) == (Exit.INCOMPLETE, "unknown")
    (trace / "checkpoint").unlink()
    assert bench.verify().status == Exit.INCOMPLETE
    assert bench.verify(bench.root / "nowhere").status == Exit.TRACE_IO


def test_any_flipped_bit_breaks_verification(bench: Bench) -> None:
    trace = write_trace(bench, calls=100)
    size = int((trace / "checkpoint").read_text().split("\n")[1])
    vital = [trace / "checkpoint", trace / "tile/entries/000", trace / "tile/0/000"]
    vital += [trace / f"tile/{kind}/001.p/{size - 256}" for kind in ("entries", "0")]
    vital += [trace / "tile/1/000.p/1"]
    chance = random.Random(7)  # noqa: S311 - a fixed choice
    for path in vital:
        whole = path.read_bytes()
        offsets = chance.sample(range(len(whole)), min(len(whole), 24))
        for offset in [0, len(whole) - 1, *offsets]:
            flipped = bytearray(whole)
            flipped[offset] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            report = bench.verify()
            assert report.status in (Exit.TAMPERED, Exit.UNTRUSTED), (path, offset)
            assert report.level == 0
        path.write_bytes(whole)
    assert bench.verify().status == Exit.OK


def test_flips_elsewhere_never_crash_nor_change_a_signed_entry(bench: Bench, trace: Path) -> None:
    entries = [entry for _, entry in read_entries(trace)]
    chance = random.Random(8)  # noqa: S311 - a fixed choice
    for path in sorted(path for path in trace.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for _ in range(3 if whole else 0):
            flipped = bytearray(whole)
            flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            report = bench.verify()
            assert isinstance(report.status, Exit)
            if report.status == Exit.OK:
                assert [entry for _, entry in read_entries(trace)] == entries
        path.write_bytes(whole)


def link_out(path: Path) -> None:
    os.symlink("/etc/passwd", path)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    os.symlink("/dev/zero", path)


@pytest.mark.parametrize("make", [link_out, fifo, huge, folder, device])
@pytest.mark.parametrize("place", ["checkpoint", "bundle", "tile", "journal"])
def test_hostile_folders_end_in_a_report(
    bench: Bench, trace: Path, make: Callable[[Path], None], place: str
) -> None:
    size = newest_bundle(trace)[1].__len__()
    places = {
        "checkpoint": trace / "checkpoint",
        "bundle": trace / f"tile/entries/000.p/{size}",
        "tile": trace / f"tile/0/000.p/{size}",
        "journal": trace / f"journal/{size:016d}.wal",
    }
    places[place].unlink(missing_ok=True)
    make(places[place])
    report = bench.verify()
    if place == "journal" and make is huge:
        assert report.status == Exit.INCOMPLETE
    else:
        assert report.status in (Exit.TAMPERED, Exit.INCOMPLETE)
    assert all("root:" not in line for line in report.lines())


def test_linked_folders_are_not_followed(bench: Bench, trace: Path) -> None:
    shutil.move(trace / "tile", bench.root / "elsewhere")
    (trace / "tile").symlink_to(bench.root / "elsewhere")
    assert bench.verify().status != Exit.OK


def test_a_huge_size_is_no_work(bench: Bench, trace: Path) -> None:
    origin = (trace / "origin").read_text().strip()
    head = Checkpoint(origin=origin, size=2**63 - 1, root=bytes(32))
    key = generate_key("example.org/eve")
    sign(trace, key, head)
    assert verify_trace(trace, [key.verifier.line]).status in (Exit.INCOMPLETE, Exit.TAMPERED)


def test_nothing_in_a_report_reaches_the_terminal_raw(bench: Bench, trace: Path) -> None:
    note = (trace / "checkpoint").read_text()
    (trace / "checkpoint").write_text(
        note.replace("\u2014 example.org", "\u2014 \x9b31m\u202eexample.org")
    )
    text = "\n".join(bench.verify().lines())
    assert all(mark.isprintable() or mark == "\n" for mark in text)


def test_only_a_key_line_that_is_none_raises(trace: Path) -> None:
    with pytest.raises(TraceInvalid) as caught:
        verify_trace(trace, ["not a key"])
    assert caught.value.code == "key.invalid"


def test_the_verifier_loads_nothing_of_the_rest(bench: Bench, trace: Path) -> None:
    program = (
        "import sys; from safeconduct.attestation.verify.verification import verify_trace; "
        "from pathlib import Path; "
        "status = verify_trace(Path(sys.argv[1]), [sys.argv[2]]).status; "
        "banned = ('safeconduct.runtime', 'safeconduct.policies', 'wasmtime', 'pydantic', 'yaml', "
        "'typer', 'safeconduct.attestation.writing', 'safeconduct.attestation.signing'); "
        "print(status.name, [name for name in sys.modules if name.startswith(banned)])"
    )
    source = str(Path(__file__).parents[2] / "src")
    result = subprocess.run(
        [sys.executable, "-c", program, trace, bench.key_line],
        env={"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "OK []"
