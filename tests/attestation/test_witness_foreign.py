"""A witness, a client and a reader of policies that are not ours (in Go) work with ours."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from safeconduct.attestation import TrustPolicy
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.note import Note
from safeconduct.attestation.witness.client import Answered, Asked, Endpoint, ask

from .witness_kit import (  # noqa: TID251 - the tests' own kit
    ALICE,
    NOW,
    STRANGER,
    WITNESS,
    Desk,
    Log,
    served,
)

_PROGRAMS = Path(__file__).parents[1] / "foreign"
ORIGIN = "example.org/alice/log1"


def built(folder: Path, program: str) -> Path:
    """Build a Go program of tests/foreign; skip where Go or its modules cannot be had."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed")
    done = subprocess.run(
        ["go", "build", "-o", folder / program, "."],
        cwd=_PROGRAMS / program,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    if done.returncode and ("dial" in done.stderr or "requires go >=" in done.stderr):
        pytest.skip("the Go modules, or a Go that is new enough, cannot be had here")
    assert done.returncode == 0, done.stderr
    return folder / program


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("go"), "witness")


@pytest.fixture(scope="module")
def foreign_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("go"), "policy")


@pytest.fixture
def log(tmp_path: Path) -> Log:
    log = Log(tmp_path / "log", origin=ORIGIN)
    log.grow(5)
    return log


@pytest.fixture
def foreign_port(foreign: Path) -> Iterator[int]:
    key = ALICE.verifier.of_log(ORIGIN).line
    process = subprocess.Popen(
        [foreign, "serve", key, WITNESS.line], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def asked_at(port: int, log: Log, old_size: int) -> Asked:
    endpoint = Endpoint.of(WITNESS.verifier, f"http://127.0.0.1:{port}")
    return ask(
        endpoint,
        log.note(),
        old_size=old_size,
        tree=log.tiles,
        log_keys=[ALICE.verifier],
        timeout_s=20.0,
    )


def test_a_foreign_witness_cosigns_our_log_and_refuses_our_fork(
    log: Log, foreign_port: int, tmp_path: Path
) -> None:
    other = log.fork(tmp_path / "fork")
    for old_size, growth in ((0, 1), (5, 300), (0, 0), (306, 0)):
        asked = asked_at(foreign_port, log, old_size)
        assert (asked.answered, asked.size) == (Answered.COSIGNED, log.tiles.size), asked
        log.grow(growth)
    other.grow(400, salt="lie")
    assert asked_at(foreign_port, other, 306).answered is Answered.REFUSED
    unknown = Log(tmp_path / "unknown", origin="example.org/bob")
    unknown.grow(1)
    asked = asked_at(foreign_port, unknown, 0)
    assert (asked.answered, asked.cosignature) == (Answered.REFUSED, None)
    assert asked.why.startswith("HTTP 404")
    forged = Log(tmp_path / "forged", origin=ORIGIN, key=STRANGER)
    forged.grow(400)
    # It answers 500 here, where tlog-witness asks for 403.
    assert asked_at(foreign_port, forged, 306).cosignature is None


def test_a_foreign_client_is_served_by_our_witness(log: Log, foreign: Path, tmp_path: Path) -> None:
    desk = Desk(tmp_path / "state")
    other = log.fork(tmp_path / "fork")

    def submit(body: bytes, old_size: int, port: int) -> tuple[int, str]:
        done = subprocess.run(
            [foreign, "submit", f"http://127.0.0.1:{port}", WITNESS.verifier.line, str(old_size)],
            input=body,
            capture_output=True,
            timeout=60,
            check=False,
        )
        return done.returncode, (done.stdout + done.stderr).decode().strip()

    with served(desk.witness) as port:
        assert submit(log.request(0), 0, port) == (0, f"cosigned by {WITNESS.name}")
        log.grow(300)
        assert submit(log.request(5), 5, port) == (0, f"cosigned by {WITNESS.name}")
        assert submit(log.request(5), 5, port) == (1, "old size != current (305)")
        other.grow(400, salt="lie")
        assert submit(other.request(305), 305, port)[1] == "consistency proof invalid (0)"
        unknown = Log(tmp_path / "unknown", origin="example.org/bob")
        assert submit(unknown.request(0), 0, port)[1] == "unknown log (0)"
        forged = Log(tmp_path / "forged", origin=ORIGIN, key=STRANGER)
        assert submit(forged.request(0), 0, port)[1] == "no valid signatures (0)"


POLICIES = (
    "group a 2 w0 w1 w2\nquorum a",
    "group a any w0 w1\ngroup b all w2 w3\ngroup c all a b\nquorum c",
    "group a all w0 w1 w2 w3\nquorum a",
    "group a any w3\ngroup b 2 w0 w1 a\nquorum b",
    "quorum none",
)


def test_a_foreign_reader_of_policies_finds_the_same_quorums(
    foreign_policy: Path, tmp_path: Path
) -> None:
    keys = [CosigningKey(f"w{number}.example", bytes([number + 50]) * 32) for number in range(4)]
    log = Log(tmp_path / "log", origin=ORIGIN)
    log.grow(3)
    files: list[Path] = []
    for bits in range(16):
        lines = [key.sign(log.head().text(), time=NOW).line for key in cosigners(keys, bits)]
        files.append(tmp_path / f"checkpoint{bits}")
        files[-1].write_bytes(log.note() + "".join(lines).encode())
    witnesses = [
        f"witness w{number} {key.verifier.line} https://w{number}.example/"
        for number, key in enumerate(keys)
    ]
    for rules in POLICIES:
        text = "\n".join(["# ours", f"log {ALICE.verifier.line}", *witnesses, rules, ""])
        file = tmp_path / "policy.txt"
        file.write_text(text)
        ours = TrustPolicy.parse(text.encode())
        mine = [ours.evaluate(Note.parse(one.read_bytes())).satisfied for one in files]
        done = subprocess.run(
            [foreign_policy, file, *files], capture_output=True, text=True, timeout=60, check=True
        )
        theirs = [line == "true" for line in done.stdout.split()]
        assert mine == theirs, rules


def cosigners(keys: list[CosigningKey], bits: int) -> list[CosigningKey]:
    return [key for number, key in enumerate(keys) if bits >> number & 1]
