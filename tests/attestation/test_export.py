"""What `trace export` writes: a public copy, a session, a statement; whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from safeconduct.attestation import TraceWriter, write_key
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.proofs.bundle import write_bundle
from safeconduct.attestation.proofs.evidence import trusted_keys
from safeconduct.attestation.proofs.export import copy_public, fresh_folder
from safeconduct.attestation.verify.vouching import Brought
from safeconduct.errors import Exit, TraceInvalid
from safeconduct.runtime.cli.app import dispatch
from safeconduct.runtime.cli.source import UsageError
from safeconduct.runtime.places import Places
from safeconduct.runtime.signing import start_signer

from .evidence_kit import CALLS, sessions  # noqa: TID251 - the same
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


def test_a_public_copy_verifies_and_holds_nothing_private(
    trace: Path, bench: Bench, tmp_path: Path
) -> None:
    assert (trace / "openings").is_dir()
    out = tmp_path / "public"
    assert dispatch(["trace", "export", str(trace), "--out", str(out)]) == Exit.OK
    assert {path.name for path in out.iterdir()} <= {
        "README", "origin", "checkpoint", "checkpoints", "tile",
    }  # fmt: skip
    report = bench.verify(out)
    assert (report.status, report.level) == (Exit.OK, 1)
    with pytest.raises(UsageError) as refused:
        dispatch(["trace", "export", str(trace), "--out", str(out)])
    assert refused.value.code == "export.exists"
    with Folder(out) as folder:
        assert write_bundle(folder, sessions(trace)[0], io.BytesIO()).closed


def test_a_log_can_be_copied_while_it_grows(bench: Bench, tmp_path: Path) -> None:
    directory = tmp_path / "growing"
    signer = bench.signer()
    try:
        with TraceWriter.open(directory, signer=signer) as writer:
            session = writer.open_session("local", "sdk")
            for number in range(300):
                record_call(writer, session, f"c{number}")
                if number in (1, 85, 170, 299):
                    writer.checkpoint()
                    with fresh_folder(tmp_path / f"copy{number}") as to, Folder(directory) as of:
                        copy_public(of, to)
            writer.close_session(session)
    finally:
        signer.close()
    for number in (1, 85, 170, 299):
        report = bench.verify(tmp_path / f"copy{number}")
        assert report.status is Exit.INCOMPLETE, report.findings  # its session is open
        assert report.integrity == "intact"


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    with (
        pytest.raises(TraceInvalid),
        Folder(broken) as source,
        fresh_folder(tmp_path / "out") as target,
    ):
        copy_public(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_the_verb_writes_a_session_and_refuses_to_overwrite(
    trace: Path, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = sessions(trace)[0]
    out = tmp_path / "session.bundle"
    words = ["trace", "export", str(trace), "--session", session, "--out", str(out)]
    assert dispatch(words) == Exit.OK
    assert dispatch(["trace", "verify-proof", str(out), "--key", bench.key_line]) == Exit.OK
    assert f"session {session}: {CALLS * 3 + 2} entries" in capsys.readouterr().out
    with pytest.raises(UsageError, match="exists already"):
        dispatch(words)
    absent = ["trace", "export", str(tmp_path / "absent"), "-o", str(tmp_path / "x")]
    assert dispatch(absent) == Exit.TRACE_IO
    for wrong in (["--call", "c1"], ["--statement"], ["--statement", "--call", "c1", *words[3:5]]):
        with pytest.raises(UsageError, match=r"name what|needs"):
            dispatch(["trace", "export", str(trace), *wrong, "-o", str(tmp_path / "x")])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", [".", "..", "/", "", "here"])
def test_nothing_is_overwritten_or_written_to_no_place(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").write_text("mine")
    for words in (["prove", str(trace), "--index", "1"], ["export", str(trace)]):
        with pytest.raises((UsageError, TraceInvalid)):
            dispatch(["trace", *words, "--out", where])
    assert (tmp_path / "here").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_verb_has_ones_own_signer_state_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the key and the signer's memory where a user's state lies."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    places = Places.of(os.environ)
    places.prepare()
    trace = tmp_path / "trace"
    signer = start_signer(places, os.environ, forbidden=(trace,))
    try:
        key = signer.key.line
        with TraceWriter.open(trace, signer=signer) as writer:
            session = writer.open_session("local", "sdk")
            record_call(writer, session, "c1")
            writer.close_session(session)
    finally:
        signer.close()
    for number, what in enumerate((["--call", "c1"], ["--session", session[:6]])):
        out = tmp_path / f"{number}.json"
        words = ["trace", "export", str(trace), "--statement", *what, "-o", str(out)]
        assert dispatch(words) == Exit.OK
        assert dispatch(["trace", "verify-proof", str(out), "--key", key]) == Exit.OK
        assert "VERIFIED: statement of" in capsys.readouterr().out
