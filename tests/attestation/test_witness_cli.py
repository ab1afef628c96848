"""``safeconduct witness`` as a person starts it: what it prints, serves, keeps and refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from safeconduct.attestation.cosignature import CosignerKey, CosigningKey
from safeconduct.attestation.note import SigningKey, VerifierKey
from safeconduct.attestation.witness.client import Answered, Endpoint, ask
from safeconduct.errors import Exit

from .witness_kit import ALICE, Log  # noqa: TID251 - the tests' own kit


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return {"HOME": str(home), **kept}


def command(tmp_path: Path, *more: str, log: VerifierKey = ALICE.verifier) -> list[str]:
    files = ["--state", str(tmp_path / "state"), "--key", str(tmp_path / "w.key")]
    said = ["witness", "--listen", "127.0.0.1:0", *files, "--log", log.line]
    return [sys.executable, "-m", "safeconduct", *said, *more]


@contextmanager
def started(
    arguments: list[str], environment: dict[str, str]
) -> Generator[tuple[CosignerKey, str]]:
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        key = CosignerKey.parse(process.stdout.readline().removeprefix("witness ").strip())
        url = process.stdout.readline().removeprefix("listening on ").strip()
        yield key, url
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def refused(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_it_serves_until_it_is_ended_and_remembers(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    log = Log(tmp_path / "log")
    log.grow(5)

    def asked(key: CosignerKey, url: str, one: Log) -> Answered:
        endpoint = Endpoint.of(key, url)
        keys = [ALICE.verifier]
        return ask(
            endpoint, one.note(), old_size=0, tree=one.tiles, log_keys=keys, timeout_s=20
        ).answered

    with started(command(tmp_path, "--name", "witness.example/w"), environment) as (key, url):
        assert key.name == "witness.example/w"
        assert asked(key, url, log) is Answered.COSIGNED
        code, said = refused(command(tmp_path), environment)
        assert (code, "witness.locked" in said) == (Exit.FAILURE, True)
    other = Log(tmp_path / "other")
    other.grow(9, salt="lie")
    with started(command(tmp_path), environment) as (again, url):
        assert again == key
        assert asked(key, url, other) is Answered.FORK
        log.grow(1)
        assert asked(key, url, log) is Answered.COSIGNED
    code, said = refused(command(tmp_path, "--name", "witness.example/w"), environment)
    assert (code, "key.exists" in said) == (Exit.USAGE, True)


def test_what_a_person_gets_wrong_is_said(tmp_path: Path, environment: dict[str, str]) -> None:
    for wrong in ("127.0.0.1", "127.0.0.1:99999"):
        arguments = command(tmp_path, "--name", "w.example")
        arguments[arguments.index("127.0.0.1:0")] = wrong
        code, said = refused(arguments, environment)
        assert (code, "HOST:PORT" in said) == (Exit.USAGE, True), wrong
    code, said = refused(command(tmp_path, "--log", "nonsense"), environment)
    assert (code, "safeconduct keys show" in said) == (Exit.USAGE, True)
    code, said = refused(command(tmp_path), environment)
    assert "key.missing" in said
    code, said = refused(command(tmp_path, "--name", "a b"), environment)
    assert (code, "key.invalid" in said) == (Exit.USAGE, True)


def test_the_operators_own_witness_must_say_so(tmp_path: Path, environment: dict[str, str]) -> None:
    """Whoever holds the log's key could answer as any witness: its name must give it away."""
    keys = Path(environment["HOME"]) / ".local/state/safeconduct/keys"
    keys.mkdir(parents=True)
    (keys / "log.pub").write_text(ALICE.verifier.line + "\n")
    code, said = refused(command(tmp_path, "--name", "witness.example/w"), environment)
    assert (code, "witness.operator" in said) == (Exit.USAGE, True)
    assert not (tmp_path / "w.key").exists()
    with started(command(tmp_path, "--name", f"{ALICE.name}/witness"), environment):
        pass
    # Another account's log is another matter, until its key lies beside the witness's.
    other = SigningKey("example.net/bob", b"\x07" * 32).verifier
    (tmp_path / "w.key").unlink()
    with started(command(tmp_path, "--name", "witness.example/w", log=other), environment):
        pass
    (tmp_path / "bob.pub").write_text(other.line + "\n")
    code, said = refused(command(tmp_path, log=other), environment)
    assert (code, "witness.operator" in said) == (Exit.FAILURE, True)


def test_a_logs_own_key_is_no_witness(tmp_path: Path, environment: dict[str, str]) -> None:
    twin = CosigningKey("witness.example/w", ALICE.seed)
    (tmp_path / "w.key").write_text(twin.line + "\n")
    (tmp_path / "w.key").chmod(0o600)
    code, said = refused(command(tmp_path), environment)
    assert (code, "a log's own key" in said) == (Exit.FAILURE, True)
