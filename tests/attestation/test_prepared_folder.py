"""What the writer refuses to touch: beyond the quota, behind its close, and in a prepared folder.

A folder that somebody else prepared holds hard links to files of ours and FIFOs; opening the trace
must change none of those, and not block.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from safeconduct.attestation import SignerClient, TraceWriter
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.privacy.openings import INLINE_BYTES
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.call import EntryKind
from safeconduct.errors import TraceInvalid

from .kit import Bench  # noqa: TID251 - the tests' own kit

_TEXT = b"precious\n" * 100


def intend(writer: TraceWriter, session: str, call: str, *, beyond_quota: bool = False) -> int:
    return writer.append(
        EntryKind.CALL_INTENT,
        {"call": call, "tool": "t", "caller": "l", "origin": "o", "parent": None},
        session=session,
        committed={"document": {"text": "x" * (INLINE_BYTES + 1)}},
        beyond_quota=beyond_quota,
    )


def code_of(work: Callable[[], object]) -> str:
    with pytest.raises(TraceInvalid) as refused:
        work()
    return refused.value.code


def test_a_call_refused_leaves_no_blob(bench: Bench, signer: SignerClient) -> None:
    blobs = bench.trace / "blobs"
    writer = TraceWriter.open(bench.trace, signer=signer, quota_bytes=INLINE_BYTES)
    with writer:
        session = writer.open_session("l", "o")
        assert code_of(lambda: intend(writer, session, "c1")) == "trace.quota"
        assert code_of(lambda: intend(writer, "none", "c1", beyond_quota=True)) == "chain.start"
        assert not list(blobs.iterdir())
        intend(writer, session, "c1", beyond_quota=True)  # a summary of what is over
        assert len(list(blobs.iterdir())) == 1
    assert code_of(lambda: intend(writer, session, "c2", beyond_quota=True)) == "trace.closed"
    assert len(list(blobs.iterdir())) == 1
    assert not bench.verify().findings


def test_a_session_refused_leaves_no_key(bench: Bench, signer: SignerClient) -> None:
    vault = Vault.open(bench.root / "vault.key")
    with TraceWriter.open(bench.trace, signer=signer, vault=vault, quota_bytes=1) as writer:
        assert code_of(lambda: writer.open_session("l", "o")) == "trace.quota"
    assert not [path for path in (bench.root / "vault").rglob("*") if path.is_file()]


def test_a_closed_folder_writes_nowhere_else(tmp_path: Path) -> None:
    for name in ("ours", "other"):
        (tmp_path / name).mkdir()
    folder = Folder(tmp_path / "ours")
    folder.close()
    with Folder(tmp_path / "other"), pytest.raises(OSError, match="Bad file descriptor"):
        folder.write("file", b"data")
    assert not os.listdir(tmp_path / "other")


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_bytes(_TEXT)
    return path


def test_no_hard_link_leads_out_of_a_prepared_folder(
    bench: Bench, signer: SignerClient, precious: Path
) -> None:
    journal = bench.trace / "journal"
    journal.mkdir(parents=True)
    bench.trace.chmod(0o700)
    os.link(precious, bench.trace / ".origin.tmp")
    os.link(precious, journal / "0000000000000000.wal")
    with pytest.raises(TraceInvalid) as refused:
        TraceWriter.open(bench.trace, signer=signer)
    assert refused.value.code == "trace.hostile"
    assert precious.read_bytes() == _TEXT
    assert precious.stat().st_nlink == 2  # the temporary name is gone


def test_files_with_two_names_are_not_changed(tmp_path: Path, precious: Path) -> None:
    trace = tmp_path / "trace"
    trace.mkdir()
    os.link(precious, trace / "file")
    os.mkfifo(trace / "fifo")
    with Folder(trace) as folder:
        for name in ("file", "fifo"):
            with pytest.raises((TraceInvalid, OSError)):
                folder.open_append(name)
            with pytest.raises((TraceInvalid, OSError)):
                folder.truncate(name, 0)
        assert folder.destroy("file")
        assert not (trace / "file").exists()
        os.mkfifo(trace / ".new.tmp")
        folder.write("new", b"data")
    assert precious.read_bytes() == _TEXT


def test_a_lock_file_removed_lets_no_second_writer_in(bench: Bench, signer: SignerClient) -> None:
    with TraceWriter.open(bench.trace, signer=signer):
        (bench.trace / "journal" / "lock").unlink()
        with pytest.raises(TraceInvalid) as refused:
            TraceWriter.open(bench.trace, signer=signer)
        assert refused.value.code == "trace.locked"
    TraceWriter.open(bench.trace, signer=signer).close()
