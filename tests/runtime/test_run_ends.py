"""`safeconduct run` and `exec` end when they must: nobody reads, or the program forges the end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from safeconduct.errors import Exit
from safeconduct.runtime.cli.signals import Forwarding

RULES = (
    "[{allow: {argv: [sh, ...]}}, {allow: {argv: [dash, ...]}, profile: busy}, "
    "{allow: {argv: [env, ...]}, profile: patient}]"
)
POLICY = f"""\
version: 1
profiles:
  base: {{read: ["$WS/**"], write: ["$WS/**"], limits: {{wall: 2s}}}}
  busy: {{like: base, limits: {{wall: 30s, cpu: 300ms}}}}
  patient: {{like: base, limits: {{wall: 60s}}}}
tools: {{agent.run: {RULES}, shell.run: {RULES}}}
"""
# LIMIT: seconds for one command; a hang must fail the test, not stop the suite.
SECONDS = 20


class Desk:
    """A user's folders, and the commands over them."""

    def __init__(self, root: Path) -> None:
        self.root, self.project = root, root / "project"
        self.outcome = self.project / "out.json"
        self.project.mkdir()
        (root / "policy.yaml").write_text(POLICY)

    def words(self, verb: str, *argv: str, outcome: Path | None = None) -> list[str]:
        options = ["--policy", self.root / "policy.yaml", "--outcome", outcome or self.outcome]
        return [sys.executable, "-m", "safeconduct", verb, *map(str, options), "--", *argv]

    @contextmanager
    def begun(self, words: Sequence[str], out: int) -> Generator[subprocess.Popen[bytes]]:
        environment = {"HOME": str(self.root), "XDG_STATE_HOME": str(self.root / "state"),
                       "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}  # fmt: skip
        process = subprocess.Popen(
            words, cwd=self.project, env=environment,
            stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait(SECONDS)

    def run(self, verb: str, script: str, outcome: Path | None = None) -> int:
        words = self.words(verb, "sh", "-c", script, outcome=outcome)
        with self.begun(words, subprocess.DEVNULL) as process:
            return process.wait(SECONDS)

    def told(self) -> dict[str, Any]:
        assert not self.outcome.is_symlink()
        found: dict[str, Any] = json.loads(self.outcome.read_text())
        return found


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def unread() -> Generator[tuple[int, int]]:
    """Give a pipe that stays open at both ends."""
    ends = os.pipe2(os.O_CLOEXEC)
    yield ends
    for fd in ends:
        os.close(fd)


def await_full(pipe: int) -> None:
    """Wait until nobody can write to a pipe, poll(2)."""
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    until = time.monotonic() + SECONDS
    while poll.poll(0):
        assert time.monotonic() < until
        os.sched_yield()


LIMITS = {
    "wall": ("sh", "yes"),
    "cpu": ("dash", "yes & while :; do :; done"),
}


@pytest.mark.parametrize("verb", ["run", "exec"])
@pytest.mark.parametrize("limit", LIMITS)
def test_limits_hold_while_nobody_reads(
    desk: Desk, unread: tuple[int, int], verb: str, limit: str
) -> None:
    shell, script = LIMITS[limit]
    # Both streams into one pipe: what we say ourselves must not wait for its reader either.
    with desk.begun(desk.words(verb, shell, "-c", script), unread[1]) as process:
        assert process.wait(SECONDS) == Exit.LIMIT
    assert (desk.told()["limit"], desk.told()["truncated"]) == (limit, True)


class TestSignals:
    def test_the_third_leaves_while_nobody_reads(self, desk: Desk, unread: tuple[int, int]) -> None:
        script = "trap '' TERM HUP INT; echo up; yes & wait; sleep 60"
        with desk.begun(desk.words("run", "env", "dash", "-c", script), unread[1]) as process:
            await_full(unread[1])
            # Two of one number may count as one, signal(7); Python keeps a flag for each number.
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                process.send_signal(number)
            assert process.wait(SECONDS) == Exit.SIGNAL + signal.SIGKILL
        assert desk.told()["signal"] == signal.SIGKILL

    def test_once_the_program_is_gone_the_next_leaves(self) -> None:
        given: list[int] = []
        with Forwarding() as forwarding:
            with forwarding.starting():
                forwarding.to(given.append)
                signal.raise_signal(signal.SIGTERM)
            with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)), forwarding.finishing():
                signal.raise_signal(signal.SIGINT)
        assert given[0] == signal.SIGTERM

    def test_the_sixth_leaves_though_the_program_lives(self) -> None:
        given: list[int] = []
        with Forwarding() as forwarding, forwarding.starting():
            forwarding.to(given.append)
            for _ in range(5):
                signal.raise_signal(signal.SIGTERM)
            with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
                signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # it is leaving
        assert given == [signal.SIGTERM] * 2 + [signal.SIGKILL] * 5

    def test_three_before_the_program_keep_it_from_starting(self, desk: Desk) -> None:
        words = desk.words("run", "sh", "-c", "echo > ran")
        with desk.begun(words, subprocess.DEVNULL) as process:
            until = time.monotonic() + SECONDS
            while not desk.outcome.exists():
                assert time.monotonic() < until
                os.sched_yield()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                process.send_signal(number)
                await_taken(process.pid)
                process.send_signal(signal.SIGUSR1)
            assert process.wait(SECONDS) == Exit.SIGNAL + signal.SIGINT
        assert not (desk.project / "ran").exists()
        assert (desk.told()["status"], desk.told()["exit"]) == ("error", 130)

    def test_none_that_waits_is_evicted(self) -> None:
        given: list[int] = []
        with Forwarding() as forwarding:
            signal.raise_signal(signal.SIGTERM)
            for _ in range(8):
                signal.raise_signal(signal.SIGUSR1)
            forwarding.to(given.append)
        assert given == [signal.SIGTERM, signal.SIGUSR1]


def await_taken(pid: int) -> None:
    """Wait until a process has no signal pending, proc(5)."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        pending = [int(line.split()[1], 16) for line in lines if line.startswith(("Sig", "ShdPnd"))
                   and line.split(":")[0] in ("SigPnd", "ShdPnd")]  # fmt: skip
        if not any(pending):
            return
        os.sched_yield()
    pytest.fail("the signal was not taken")


FORGED = {
    "moved": "mv out.json x; echo '{\"exit\": 0}' > out.json",
    "link": "echo > target; ln -sf target out.json",
    "second name": "ln out.json second",
    "long": "head -c 5000 /dev/zero | tr '\\0' ' ' > out.json",
    "removed": "rm out.json",
    "held": "exec 3<> out.json; head -c 5000 /dev/zero >&3",
}


@pytest.mark.parametrize("verb", ["run", "exec"])
@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_the_program_forges_no_outcome(desk: Desk, verb: str, forge: str) -> None:
    assert desk.run(verb, f"{forge}; exit 9") == 9
    assert (desk.told()["status"], desk.told()["exit"]) == ("failed", 9)
    for name in ("target", "second", "x"):
        left = desk.project / name
        assert not left.exists() or left.read_text().strip() == ""
    assert not list(desk.project.glob(".safeconduct-*"))


def test_an_outcome_whose_place_is_taken_is_no_success(desk: Desk) -> None:
    assert desk.run("run", "rm out.json; mkdir out.json") == Exit.FAILURE
    folder = desk.project / "folder"
    folder.mkdir()
    script = "mv folder other; mkdir folder; echo '{\"exit\": 0}' > folder/out.json"
    assert desk.run("run", script, folder / "out.json") == Exit.FAILURE
    assert not list(desk.project.glob("**/.safeconduct-*"))


@pytest.mark.parametrize("verb", ["run", "exec"])
def test_an_outcome_is_told_also_where_nobody_can_read(desk: Desk, verb: str) -> None:
    source, target = os.pipe2(os.O_CLOEXEC)
    os.close(source)
    with desk.begun(desk.words(verb, "sh", "-c", "echo one; sleep 1"), target) as process:
        os.close(target)
        assert process.wait(SECONDS) == Exit.SIGNAL + signal.SIGPIPE
    assert (desk.told()["ok"], desk.told()["status"]) == (False, "error")


def test_an_outcome_is_told_also_where_the_disk_is_full(desk: Desk) -> None:
    full = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
    with desk.begun(desk.words("run", "sh", "-c", "echo one"), full) as process:
        os.close(full)
        process.wait(SECONDS)
    assert (desk.told()["ok"], desk.told()["status"]) == (False, "error")
