"""The verifier alone: built as a wheel, installed in a fresh environment, used by a stranger.

The stranger has a trace folder, a key line and the wheel; what to think of the trace must come
from the tool's own words.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from safeconduct.attestation import TraceWriter
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.proofs.proof import prove_entry
from safeconduct.attestation.signing.key import load_key
from safeconduct.errors import Exit

from .forge import chain, entry, forge, opening  # noqa: TID251 - the tests' own kit
from .kit import Bench, record_call, write_trace  # noqa: TID251 - the tests' own kit

ROOT = Path(__file__).parents[2]
# What the wheel depends on, taken from this environment: a test must not need a network.
NEEDED = ("msgspec", "cryptography", "cffi", "_cffi_backend*")


@dataclass(frozen=True)
class Stranger:
    """A machine with the wheel on it and nothing else of ours."""

    home: Path
    python: Path

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python.with_name("safeconduct-verify"), *map(str, words)],
            cwd=self.home,
            env={"HOME": str(self.home), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("wheel")
    builder = ROOT / "scripts/build_verifier.py"
    done = subprocess.run(
        [sys.executable, builder, scratch], capture_output=True, text=True, check=True
    )
    wheel = Path(done.stdout.splitlines()[-1])
    venv.create(scratch / "venv", with_pip=False)
    python = scratch / "venv/bin/python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    for pattern in NEEDED:
        for found in Path(sysconfig.get_path("platlib")).glob(pattern):
            (site / found.name).symlink_to(found)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)
    return python


@pytest.fixture
def stranger(installed: Path, tmp_path: Path) -> Stranger:
    home = tmp_path / "home"
    home.mkdir()
    return Stranger(home, installed)


@pytest.fixture
def handed(bench: Bench, tmp_path: Path) -> Path:
    """A trace as somebody hands it on."""
    return Path(shutil.copytree(write_trace(bench, calls=4), tmp_path / "home-trace"))


def test_nothing_else_of_ours_is_there(stranger: Stranger) -> None:
    program = (
        "import importlib.util, sys; import safeconduct_verify.attestation.verify.main; "
        "print(importlib.util.find_spec('safeconduct'), "
        "[name for name in sys.modules if name.split('.')[0] in ('pydantic', 'yaml', 'typer')])"
    )
    done = subprocess.run(
        [stranger.python, "-c", program], capture_output=True, text=True, check=True, env={}
    )
    assert done.stdout.strip() == "None []"


def test_a_stranger_without_a_key_is_told_what_to_get(stranger: Stranger, handed: Path) -> None:
    done = stranger.run(handed)
    assert done.returncode == Exit.UNTRUSTED
    assert done.stdout.startswith("NOT TRUSTED: ")
    assert "get the key line from the operator, not from this folder" in done.stdout
    assert f"safeconduct-verify --key 'NAME+HASH+BASE64' {handed}" in done.stdout
    assert "trace verify" not in done.stdout
    # The key that the log claims is shown, as a claim.
    assert "the log claims the key example.org/alice+" in done.stdout


def test_a_good_trace(stranger: Stranger, bench: Bench, handed: Path) -> None:
    done = stranger.run("--key", bench.key_line, handed)
    assert done.returncode == Exit.OK, done.stdout + done.stderr
    assert done.stdout.startswith("VERIFIED: ")
    assert "none changed, added, moved or taken out" in done.stdout
    assert "NOT CHECKED   a dropped tail would not be noticed" in done.stdout
    assert "4 of 4 calls have their arguments in this folder" in done.stdout
    # The key may stand in a file, but not in one of the trace.
    (stranger.home / "alice.pub").write_text(f"# from Alice\n{bench.key_line}\n")
    assert stranger.run("--no-remember", "--key", "alice.pub", handed).returncode == Exit.OK
    (handed / "alice.pub").write_text(bench.key_line)
    assert stranger.run("--key", handed / "alice.pub", handed).returncode == Exit.USAGE
    # The second time it is held against what was seen.
    assert "L2 yes" in stranger.run("trace", "--key", bench.key_line, handed).stdout
    as_json = json.loads(stranger.run("--json", "--key", bench.key_line, handed).stdout)
    assert (as_json["verdict"], as_json["level"], as_json["complete"]) == ("OK", 2, True)


def test_an_edited_trace(stranger: Stranger, bench: Bench, handed: Path) -> None:
    bundle = max((handed / "tile/entries/000.p").iterdir(), key=lambda path: int(path.name))
    whole = bundle.read_bytes()
    at = whole.index(b'"effect":"allow"')
    bundle.write_bytes(whole[: at + 10] + b"ALLOW" + whole[at + 15 :])
    done = stranger.run("--key", bench.key_line, handed)
    assert done.returncode == Exit.TAMPERED
    assert done.stdout.startswith("TAMPERED: ")
    assert "do not rely on this trace" in done.stdout
    assert "entry.hash at entry 3:" in done.stdout
    assert f"[tile/entries/000.p/{bundle.name} byte " in done.stdout
    assert "keep this folder unchanged, as evidence" in done.stdout


def test_a_trace_whose_last_files_are_gone(stranger: Stranger, bench: Bench, handed: Path) -> None:
    shutil.rmtree(handed / "tile/entries/000.p")
    done = stranger.run("--key", bench.key_line, handed)
    assert done.returncode == Exit.INCOMPLETE
    assert "files are missing, so nothing here could be held" in done.stdout


def test_a_trace_cut_back_to_an_older_checkpoint(
    stranger: Stranger, bench: Bench, handed: Path
) -> None:
    signer = bench.signer()
    with TraceWriter.open(bench.trace, signer=signer) as writer:
        session = writer.open_session("local", "sdk")
        record_call(writer, session, "late")
        writer.checkpoint()
        middle = bench.root / "middle"
        shutil.copytree(bench.trace, middle)
    signer.close()
    # In the middle of a run the log itself shows that its end is not there.
    done = stranger.run("--no-remember", "--key", bench.key_line, middle)
    assert done.returncode == Exit.INCOMPLETE
    assert "its end was cut off" in done.stdout
    # Cut back to where a run was closed it is a valid older log ...
    done = stranger.run("--no-remember", "--key", bench.key_line, handed)
    assert done.returncode == Exit.OK
    assert "a dropped tail would not be noticed" in done.stdout
    # ... unless a later checkpoint was kept, or remembered.
    kept = stranger.home / "kept"
    shutil.copy(bench.trace / "checkpoint", kept)
    for words in (["--no-remember", "--checkpoint", kept], []):
        if not words:
            assert stranger.run("--key", bench.key_line, bench.trace).returncode == Exit.OK
        done = stranger.run(*words, "--key", bench.key_line, handed)
        assert done.returncode == Exit.TAMPERED
        assert "entries were cut off, or it is an old copy" in done.stdout
        assert "integrity     intact" in done.stdout
        assert "it contradicts what was signed before" in done.stdout


def test_a_proof_is_checked_too(stranger: Stranger, bench: Bench, handed: Path) -> None:
    with Folder(handed) as folder:
        proof, stored = prove_entry(folder, 3)
    file = stranger.home / "one.tlog-proof"
    file.write_bytes(proof.encode())
    file.with_suffix(".entry").write_bytes(stored.data)
    done = stranger.run("proof", "--key", bench.key_line, file)
    assert done.returncode == Exit.OK, done.stdout + done.stderr
    file.with_suffix(".entry").write_bytes(stored.data.replace(b"allow", b"deny!"))
    assert stranger.run("--key", bench.key_line, file).returncode == Exit.TAMPERED


def test_a_large_trace_is_verified_by_workers(stranger: Stranger, bench: Bench) -> None:
    key = load_key(bench.key)
    origin = f"{key.name}/large"
    steps = [opening(origin)]
    steps += [entry("heartbeat", "run-1", {"sessions": 0, "calls": at}) for at in range(70_000)]
    steps.append(entry("session.close", "run-1", {"status": "closed"}))
    forge(bench.root / "large", chain(steps), key, origin)
    done = stranger.run("--jobs", 2, "--key", bench.key_line, bench.root / "large")
    assert done.returncode == Exit.OK, done.stdout + done.stderr
    assert "70002 signed entries" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "does not exist"),
        (["--key", "not a key", "trace"], "a key line is wrong"),
        (["--trust", "nowhere", "trace"], "--trust nowhere"),
        (["--policy", "nowhere", "trace"], "nowhere: No such file"),
        (["--checkpoint", "nowhere", "trace"], "nowhere: No such file"),
        ([], "usage: safeconduct-verify"),
    ],
)
def test_a_wrong_command_line_is_no_verdict(
    stranger: Stranger, words: list[str], said: str
) -> None:
    (stranger.home / "trace").mkdir()
    done = stranger.run(*words)
    assert done.returncode == Exit.USAGE
    assert said in done.stderr
    assert done.stdout == ""


def test_an_empty_folder_is_no_trace(stranger: Stranger) -> None:
    done = stranger.run(".")
    assert done.returncode == Exit.INCOMPLETE
    assert "checkpoint is missing" in done.stdout
    assert os.listdir(stranger.home) == []
