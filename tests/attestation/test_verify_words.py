"""What the verifier prints of a hostile log: always its verdict, never more than can be read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from safeconduct.attestation import generate_key, verify_trace
from safeconduct.errors import Exit

from .forge import chain, entry, forge, opening  # noqa: TID251 - the tests' own kit
from .kit import Bench, write_trace  # noqa: TID251 - the tests' own kit

ORIGIN = "example.org/alice/log"
KEY = generate_key("example.org/alice")
_NOBODY = 65534


def hostile(trace: Path, kind: str) -> Path:
    """Forge a log whose first entry is of a kind that the verifier has to quote."""
    spelled = chain([opening(ORIGIN), entry("session.close", "run-1", {"status": "closed"})])
    forge(trace, [spelled[0].replace(b"log.open", kind.encode()), spelled[1]], KEY, ORIGIN)
    return trace


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_encoding_of_the_terminal_costs_the_verdict(tmp_path: Path, encoding: str) -> None:
    trace = hostile(tmp_path, "\u4e2d\\u001b[2J\u202e")
    words = ["--no-remember", "--key", KEY.verifier.line, str(trace)]
    done = subprocess.run(
        [sys.executable, "-m", "safeconduct.attestation.verify.main", *words],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (Exit.TAMPERED, b"")
    text = done.stdout.decode(encoding)
    assert text.startswith("TAMPERED")
    assert ("\u4e2d" if encoding == "utf-8" else "\\u4e2d") in text
    assert "\x1b" not in text


def test_a_finding_quotes_no_more_than_can_be_read(tmp_path: Path) -> None:
    trace = hostile(tmp_path, "x" * 60_000)
    report = verify_trace(trace, [KEY.verifier.line], jobs=1)
    assert report.status == Exit.TAMPERED
    assert max(map(len, report.lines())) < 1000
    assert "more characters" in report.findings[0].message


def test_openings_that_were_not_counted_are_not_said_to_be_none(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log may have more sessions than names are read of one folder."""
    trace = write_trace(bench, calls=3, sessions=3)
    assert "3 of 3 calls have their arguments" in "\n".join(bench.verify().lines())
    monkeypatch.setattr("safeconduct.attestation.folder.MAX_NAMES", 2)
    report = bench.verify()
    assert (report.status, report.openings_cut) == (Exit.OK, True)
    assert "at least 0 of 3 calls have their arguments" in "\n".join(report.lines())
    monkeypatch.undo()
    shutil.rmtree(trace / "openings")
    assert "  replay        0 of 3 calls" in "\n".join(bench.verify().lines())


def as_somebody_else(trace: Path, key: str) -> list[str]:
    """Verify in a process that may only read what everybody may; return what is printed."""
    seen, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setresgid(_NOBODY, _NOBODY, _NOBODY)
                os.setresuid(_NOBODY, _NOBODY, _NOBODY)
            os.write(told, "\n".join(verify_trace(trace, [key], jobs=1).lines()).encode())
        finally:
            os._exit(0)
    os.close(told)
    with os.fdopen(seen, "rb") as stream:
        lines = stream.read().decode().split("\n")
    os.waitpid(child, 0)
    return lines


def test_what_is_not_public_need_not_be_readable(bench: Bench) -> None:
    """A trace's private folders are of mode 0700: whoever may read the rest verifies the rest."""
    write_trace(bench, calls=3)
    assert bench.verify().status == Exit.OK  # all is loaded that the other process needs
    with tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o755)
        trace = shutil.copytree(bench.trace, Path(shared) / "trace")
        trace.chmod(0o755)
        for name in ("journal", "openings", "blobs"):
            assert (trace / name).stat().st_mode & 0o777 == 0o700
            if os.getuid():
                (trace / name).chmod(0)
        lines = as_somebody_else(trace, bench.key_line)
        for name in ("journal", "openings", "blobs"):
            (trace / name).chmod(0o700)
    assert lines[0].startswith("VERIFIED"), lines
    assert any("may not look into the journal" in line for line in lines)
    assert not any("may not look" in line for line in bench.verify().lines())
