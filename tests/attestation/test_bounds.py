"""What a prepared folder or file may cost its reader, and errors that must end in a verdict."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unittest.mock import ANY
from zlib import crc32

import msgspec
import pytest

from safeconduct.attestation import (
    Report,
    TraceWriter,
    generate_key,
    read_entries,
    read_opened,
    verify_trace,
)
from safeconduct.attestation import journal as journals
from safeconduct.attestation.entry import parse_entry
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.journal import frame, journal_path
from safeconduct.attestation.merkle import leaf_hash
from safeconduct.attestation.privacy.opened import Missing, open_commitment
from safeconduct.attestation.privacy.openings import OpeningLine
from safeconduct.attestation.privacy.vault import SessionKey
from safeconduct.attestation.proofs.handed_on import Handed, check_handed
from safeconduct.attestation.proofs.proof import prove_entry
from safeconduct.attestation.reader import count_openings
from safeconduct.attestation.verify import verification, witnessed
from safeconduct.call import EntryKind, Json
from safeconduct.errors import Exit, TraceInvalid

from .evidence_kit import bundle, log_session, sessions, state  # noqa: TID251 - the tests' own kit
from .forge import (  # noqa: TID251 - the tests' own kit
    Fields,
    call,
    chain,
    entry,
    forge,
    opening,
    spell,
)
from .kit import Bench, write_trace  # noqa: TID251 - the tests' own kit

ORIGIN = "example.org/alice/log"
ALICE = generate_key("example.org/alice")
CLOSED: Fields = {"status": "closed"}


def small(trace: Path, *steps: Fields) -> int:
    """Write a signed log of one run and return its size."""
    entries = chain([opening(ORIGIN), *steps, entry("session.close", "run-1", CLOSED)])
    return forge(trace, entries, ALICE, ORIGIN).size


def verify(trace: Path, jobs: int = 1) -> Report:
    return verify_trace(trace, [ALICE.verifier.line], jobs=jobs)


def codes(report: Report) -> list[str]:
    return [one.code for one in report.findings]


def peak(act: Callable[[], object]) -> int:
    """Return the most bytes that were allocated at once meanwhile."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def opened_frame(lines: bytes) -> bytes:
    """Return a journal frame of openings."""
    return (1 << 31 | len(lines)).to_bytes(4, "big") + crc32(lines).to_bytes(8, "big") + lines


def holes(path: Path, size_bytes: int) -> None:
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, size_bytes)


# -- the journal -------------------------------------------------------------------------------


def test_a_journal_of_hard_links_is_read_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = small(tmp_path)
    assert verify(tmp_path).status == Exit.OK
    (tmp_path / "journal").mkdir()
    first = tmp_path / journal_path(size)
    first.write_bytes(frame(b"x", leaf_hash(b"x")) + 500 * opened_frame(b"\n"))
    for at in range(1, 20):
        os.link(first, tmp_path / journal_path(size + at))
    report = verify(tmp_path)
    assert (report.status, report.unsigned) == (Exit.INCOMPLETE, 20)
    monkeypatch.setattr(journals, "MAX_READ_FRAMES", 1200)
    report = verify(tmp_path)
    assert (report.status, report.unsigned, codes(report)) == (
        Exit.INCOMPLETE,
        3,
        ["log.unsigned"],
    )
    assert "at least 3 entries" in report.findings[0].message


def test_reading_a_journal_ends_at_the_bound_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = small(tmp_path)
    (tmp_path / "journal").mkdir()
    beat = entry("heartbeat", "run-2", {"sessions": 0, "calls": 0})
    data = spell({**beat, "sseq": 0, "prev": None})
    (tmp_path / journal_path(size)).write_bytes(
        frame(data, leaf_hash(data)) + 500 * opened_frame(b"\n")
    )
    assert len(list(read_entries(tmp_path))) == size + 1
    monkeypatch.setattr(journals, "MAX_READ_FRAMES", 100)
    with pytest.raises(TraceInvalid) as caught:
        list(read_entries(tmp_path))
    assert caught.value.code == "trace.hostile"


def test_bytes_of_a_journal_are_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = small(tmp_path)
    (tmp_path / "journal").mkdir()
    lines = b"x" * 100_000
    data = frame(b"x", leaf_hash(b"x")) + 10 * opened_frame(lines)
    (tmp_path / journal_path(size)).write_bytes(data)
    monkeypatch.setattr(journals, "MAX_READ_BYTES", 300_000)
    report = verify(tmp_path)
    assert codes(report) == ["log.unsigned"]
    assert "at least 1 entries" in report.findings[0].message


def test_journal_files_below_the_head_are_not_read(tmp_path: Path) -> None:
    size = small(tmp_path)
    (tmp_path / "journal").mkdir()
    (tmp_path / journal_path(0)).write_bytes(b"\xff" * 4096)
    (tmp_path / journal_path(size)).write_bytes(frame(b"x", leaf_hash(b"x")))
    report = verify(tmp_path)
    assert (report.unsigned, codes(report)) == (1, ["log.unsigned"])


def test_a_read_error_is_a_verdict(tmp_path: Path) -> None:
    """read(2) of /proc/self/clear_refs fails, as it does on a disk or share that broke."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting a file that cannot be read takes root and unshare(1)")
    trace = tmp_path / "trace"
    size = small(trace)
    (trace / "journal").mkdir()
    (trace / journal_path(size)).touch()
    program = [sys.executable, "-m", "safeconduct.attestation.verify.main", "--no-remember"]
    words = [*program, "--key", ALICE.verifier.line, str(trace)]
    assert subprocess.run(words, capture_output=True, check=False).returncode == Exit.OK
    mounted = shlex.join(
        ["mount", "--bind", "/proc/self/clear_refs", str(trace / journal_path(size))]
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mounted} || exit 99; exec {shlex.join(words)}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 99:
        pytest.skip("mounts are not allowed here")
    assert done.returncode == Exit.TRACE_IO, done.stderr
    assert "Traceback" not in done.stderr


# -- memory and time ---------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", [b"[]", b"[[[[[[[]]]]]]]"], ids=["flat", "deep"])
def test_a_bundle_of_many_values_is_not_held_whole(tmp_path: Path, spelled: bytes) -> None:
    count = 65_000 // (len(spelled) + 1)
    heavy: Fields = {"sessions": 0, "calls": 0, "x": [msgspec.Raw(spelled)] * count}
    small(tmp_path, *[entry("heartbeat", "run-1", heavy) for _ in range(64)])
    assert peak(lambda: verify(tmp_path)) < 50 << 20
    assert verify(tmp_path).status == Exit.OK


def test_holes_are_no_openings(tmp_path: Path) -> None:
    small(tmp_path)
    holes(tmp_path / "openings/a.jsonl", 1 << 40)
    mark = b'{"field":"document"}\n'
    with (tmp_path / "openings/a.jsonl").open("r+b") as file:
        file.write(mark)
        file.seek(1 << 39)
        file.write(mark)
    counted = count_openings(Folder(tmp_path))
    assert (counted.documents, counted.cut) == (2, False)


def test_a_large_blob_is_kept_only_if_it_hashes(tmp_path: Path) -> None:
    closed = entry("session.close", "s1", CLOSED)
    begin = entry("session.open", "s1", {"caller": "local", "origin": "sdk"})
    small(tmp_path, begin, *call("s1", "c1"), closed)
    (tmp_path / "openings").mkdir()
    line = f'{{"field":"document","salt":"{"00" * 32}","blob":true,"index":2}}\n'
    (tmp_path / "openings/s1.jsonl").write_text(line)
    holes(tmp_path / "blobs" / ("ab" * 32), 64 << 20)

    def look() -> None:
        found = [openings for _, _, openings in read_opened(tmp_path)]
        assert found[2]["document"] == Missing("opening.false", ANY)

    assert peak(look) < 16 << 20


def test_an_encrypted_blob_has_no_holes(tmp_path: Path) -> None:
    intent = call("s1", "c1")[0]
    said = parse_entry(spell({**intent, "sseq": 0, "prev": None}))
    holes(tmp_path / "blobs" / ("ab" * 32), 64 << 20)
    line = OpeningLine(field="document", salt="00" * 32, blob=True, index=2)

    def look() -> None:
        with Folder(tmp_path) as folder, pytest.raises(TraceInvalid) as caught:
            open_commitment(folder, line, said, SessionKey(bytes(32), "s1"))
        assert caught.value.code == "opening.false"

    assert peak(look) < 16 << 20


def test_kept_heads_are_bounded_and_above_the_head_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path)
    note = (tmp_path / "checkpoint").read_text()
    (tmp_path / "checkpoints").mkdir()
    for size in range(1, 100):
        (tmp_path / f"checkpoints/{size}").write_text(note)
    read: list[str] = []

    class Counted(Folder):
        def read(self, path: str, *, limit: int) -> bytes:
            read.append(path)
            return super().read(path, limit=limit)

    monkeypatch.setattr(witnessed, "MAX_HEADS", 10)
    with Counted(tmp_path) as folder:
        assert [head.size for head, _ in witnessed.kept_notes(folder, 4)] == [2]
        assert read == [f"checkpoints/{size}" for size in (4, 3, 2, 1)]
        read.clear()
        list(witnessed.kept_notes(folder))
        assert read == [f"checkpoints/{size}" for size in range(99, 89, -1)]


# -- the same report, however many look --------------------------------------------------------


def test_what_follows_the_first_bad_entry_is_told_by_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "RANGE_BUNDLES", 1)
    monkeypatch.setattr(verification, "_WORKER_BUNDLES", 2)
    erased: Fields = {"session": "s", "what": "openings", "by": "me"}
    steps = [entry("redaction", "run-1", erased, at) for at in range(5 * 256)]
    steps[10] = entry("policy.load", "run-1", {"nopolicy": 1}, 10)
    small(tmp_path, *steps)
    alone, together = verify(tmp_path, jobs=1), verify(tmp_path, jobs=3)
    assert alone.status == Exit.TAMPERED
    assert alone.redactions == 10
    assert together == alone


# -- what is handed on -------------------------------------------------------------------------


def handed(file: Path, entry: Path | None = None, line: str = ALICE.verifier.line) -> Handed:
    return Handed(file=file, keys=[line], entry=entry)


def found_in(file: Path, data: bytes, held: bytes, other: bytes, line: str) -> None:
    """Require that an entry is found in what holds it, and that no other is."""
    file.write_bytes(data)
    asked = file.with_suffix(".asked")
    assert check_handed(handed(file, line=line)).status == Exit.OK
    asked.write_bytes(held)
    good = check_handed(handed(file, asked, line))
    assert (good.status, good.leaf) == (Exit.OK, leaf_hash(held).hex())
    asked.write_bytes(other)
    bad = check_handed(handed(file, asked, line))
    assert (bad.status, bad.shows) == (Exit.TAMPERED, ())
    assert [one.code for one in bad.findings] == ["proof.entry"]


def test_an_entry_must_be_in_the_bundle_or_statement(bench: Bench, tmp_path: Path) -> None:
    trace = write_trace(bench, calls=12)
    statement = state(trace, bench)
    with Folder(trace) as folder:
        inside = [
            prove_entry(folder, index)[1].data
            for index, one in read_entries(trace)
            if one.body.get("call") == "c7"
        ]
        outside = prove_entry(folder, 0)[1].data
    assert parse_entry(outside).session == log_session(trace)
    whole = bundle(trace, sessions(trace)[0])
    found_in(tmp_path / "one.bundle", whole, inside[0], outside, bench.key_line)
    found_in(tmp_path / "one.statement", statement.encode(), inside[-1], outside, bench.key_line)


def test_a_read_error_of_a_proof_is_a_verdict(bench: Bench) -> None:
    """proc(5): at its beginning no memory is mapped, so that read(2) gives EIO."""
    found = check_handed(Handed(file=Path("/proc/self/mem"), keys=[bench.key_line]))
    assert (found.status, found.findings[0].code) == (Exit.TRACE_IO, "proof.io")
    assert "Input/output error" in found.findings[0].message


def test_what_lies_beside_a_proof_ends_in_a_verdict(tmp_path: Path) -> None:
    small(tmp_path / "trace")
    with Folder(tmp_path / "trace") as folder:
        proof, stored = prove_entry(folder, 0)
    file, beside = tmp_path / "a.tlog-proof", tmp_path / "a.entry"
    file.write_bytes(proof.encode())
    beside.write_bytes(stored.data)
    assert check_handed(handed(file)).status == Exit.OK
    beside.write_bytes(bytes(70_000))
    told = check_handed(handed(file))
    assert (told.status, [one.code for one in told.findings]) == (Exit.TAMPERED, ["proof.entry"])
    beside.unlink()
    beside.symlink_to("/proc/self/clear_refs")  # a file whose read fails
    assert check_handed(handed(file)).status == Exit.TRACE_IO


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_folder_is_no_proof(name: str) -> None:
    assert check_handed(handed(Path(name))).status == Exit.TRACE_IO


# -- the quota ---------------------------------------------------------------------------------


def record_calls(writer: TraceWriter, session: str) -> None:
    """Record calls for as long as that is allowed."""
    begun = {"tool": "t", "caller": "l", "origin": "s", "parent": None}
    for at in range(10_000):
        body: dict[str, Json] = {"call": f"c{at}", **begun}
        writer.append(EntryKind.CALL_INTENT, body, session=session, committed={"document": {}})
        outcome: dict[str, Json] = {"call": f"c{at}", "status": "denied"}
        writer.append(EntryKind.CALL_OUTCOME, outcome, session=session)


def test_the_quota_holds_for_all_that_is_kept(bench: Bench) -> None:
    quota = 300_000
    signer = bench.signer()
    try:
        with TraceWriter.open(bench.trace, signer=signer, quota_bytes=quota) as writer:
            session = writer.open_session("local", "sdk")
            with pytest.raises(TraceInvalid) as caught:
                record_calls(writer, session)
            assert caught.value.code == "trace.quota"
            writer.close_session(session)
    finally:
        signer.close()
    files = [one for one in bench.trace.rglob("*") if one.is_file()]
    stored = sum(one.stat().st_size for one in files if one.parts[-2] != "journal")
    # Beyond it what runs may end: the last outcome, the end of the session, and the heads signed.
    assert 0.9 * quota < stored <= quota + 4096
