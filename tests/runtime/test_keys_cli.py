"""``safeconduct keys`` as a person uses it: rotation, passphrases, what is printed and what not."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import pytest

from safeconduct.attestation.signing.passphrase import FILE
from safeconduct.errors import Exit
from safeconduct.runtime.signing import CHOICE

SECONDS = 60
SECRET = "correct horse"


@dataclass(frozen=True)
class Desk:
    """A user's state folder."""

    root: Path

    @property
    def keys(self) -> Path:
        return self.root / "state" / "safeconduct" / "keys"

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        state = {"HOME": str(self.root), "XDG_STATE_HOME": str(self.root / "state")}
        return {**kept, **state, "LANG": "C.UTF-8", CHOICE: "process", **variables}

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "safeconduct", *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=self.environment(**variables),
            cwd=self.root,
            timeout=SECONDS,
            check=False,
            start_new_session=True,  # no terminal, wherever the tests run
        )

    def good(self, *arguments: str | Path, **variables: str) -> str:
        done = self.run(*arguments, **variables)
        assert done.returncode == Exit.OK, done.stderr
        return done.stdout.strip()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_rotation_leaves_a_trace_that_carries_the_old_line_over(desk: Desk) -> None:
    desk.good("keys", "rotate")  # makes the first key too
    old = desk.good("keys", "show")
    private = (desk.keys / "log.key").read_text().split("+", 4)[4].strip()
    done = json.loads(desk.good("keys", "rotate", "--json"))
    assert done["old"] == old
    assert done["line"] == desk.good("keys", "show") != old
    assert desk.run("trace", "verify", done["trace"], "--key", old).returncode == Exit.OK
    assert desk.run("trace", "verify", done["trace"], "--key", done["line"]).returncode == Exit.OK
    assert sorted(path.name for path in desk.keys.iterdir() if path.is_file()) == [
        "log.key",
        "log.pub",
        "vault.key",
    ]
    assert private not in (desk.keys / "log.key").read_text()
    again = json.loads(desk.good("keys", "rotate", "--trace", done["trace"], "--json"))
    assert again["trace"] == done["trace"]
    assert desk.run("trace", "verify", done["trace"], "--key", old).returncode == Exit.OK


def test_a_folder_that_is_no_trace_is_not_begun(desk: Desk) -> None:
    done = desk.run("keys", "rotate", "--trace", desk.root / "typo")
    assert done.returncode == Exit.USAGE
    assert not (desk.root / "typo").exists()


def test_a_broken_off_rotation_is_told_and_finished(desk: Desk) -> None:
    desk.good("keys", "rotate")
    old = desk.good("keys", "show")
    from safeconduct.attestation import SignerClient

    state = desk.root / "state/safeconduct/signer"
    signer = SignerClient.start(desk.keys / "log.key", state=state)
    coming = signer.rotate("example.org/log")["new"]
    signer.close()
    shown = desk.run("keys", "show")
    assert shown.stdout.strip() == old
    assert "keys rotate" in shown.stderr
    assert json.loads(desk.good("keys", "rotate", "--json"))["line"] == coming
    assert desk.run("keys", "show").stderr == ""


def test_a_key_under_a_passphrase_needs_it_every_time(desk: Desk) -> None:
    desk.keys.mkdir(parents=True, mode=0o700)
    secret = desk.root / "secret"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    line = desk.good(
        "keys", "new", desk.keys / "log.key", "--name", "example.org/alice", "--passphrase",
        **{FILE: str(secret)},
    )  # fmt: skip
    refused = desk.run("keys", "rotate")
    assert refused.returncode == Exit.FAILURE
    assert FILE in refused.stderr
    made = json.loads(desk.good("keys", "rotate", "--json", **{FILE: str(secret)}))
    assert made["old"] == line
    assert (desk.keys / "log.key").read_text().startswith("SAFECONDUCT+PROTECTED+KEY+v1\n")
    secret.write_text("another\n")
    wrong = desk.run("keys", "rotate", **{FILE: str(secret)})
    assert wrong.returncode == Exit.FAILURE
    assert "key.passphrase" in wrong.stderr
    assert SECRET not in wrong.stderr + refused.stderr


def test_unlocking_keeps_it_until_it_is_locked(desk: Desk) -> None:
    desk.keys.mkdir(parents=True, mode=0o700)
    secret = desk.root / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    given = {FILE: str(secret)}
    name = f"example.org/{os.urandom(8).hex()}"
    desk.good("keys", "new", desk.keys / "log.key", "--name", name, "--passphrase", **given)
    unlocked = desk.run("keys", "unlock", "--minutes", "1", **given)
    if "key.keyring" in unlocked.stderr:
        pytest.skip("needs keyrings(7)")
    assert unlocked.returncode == Exit.OK, unlocked.stderr
    try:
        desk.good("keys", "rotate")
        desk.good("keys", "rotate")  # the new key is under the same passphrase
    finally:
        desk.good("keys", "lock")
    assert desk.run("keys", "rotate").returncode == Exit.FAILURE


def test_a_key_without_a_passphrase_has_nothing_to_unlock(desk: Desk) -> None:
    desk.good("keys", "rotate")
    for verb in ("unlock", "lock"):
        done = desk.run("keys", verb)
        assert done.returncode == Exit.FAILURE
        assert "no passphrase" in done.stderr


def test_on_a_terminal_it_is_asked_twice_and_not_shown(desk: Desk) -> None:
    path = desk.root / "a.key"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "safeconduct",
            "keys",
            "new",
            str(path),
            "--name",
            "n",
            "--passphrase",
        ],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=desk.environment(),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    seen = answer(ours, b"New passphrase: ", SECRET) + answer(ours, b"The same again: ", SECRET)
    seen += until_end(ours)
    os.close(ours)
    assert process.wait(SECONDS) == Exit.OK, seen
    assert SECRET.encode() not in seen
    assert path.read_text().startswith("SAFECONDUCT+PROTECTED+KEY+v1\n")


def answer(terminal: int, prompt: bytes, text: str) -> bytes:
    seen = b""
    while prompt not in seen:
        seen += os.read(terminal, 1024)
    os.write(terminal, text.encode() + b"\n")
    return seen


def until_end(terminal: int) -> bytes:
    seen = b""
    try:
        while part := os.read(terminal, 1024):
            seen += part
    except OSError:  # EIO: the other side is closed
        pass
    return seen


def test_the_choice_of_a_signer_is_never_guessed(desk: Desk) -> None:
    for choice, code in (("root", "signer.choice"), ("user", "signer.user")):
        if choice == "user" and Path("/usr/lib/safeconduct-signer/run").exists():
            continue
        done = desk.run("keys", "rotate", **{CHOICE: choice})
        assert done.returncode == Exit.FAILURE
        assert code in done.stderr
