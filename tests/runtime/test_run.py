"""`safeconduct run`: a whole program as one Call, its streams, its signals, its exit codes."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from safeconduct.errors import Exit

POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**"], write: ["$WS/**"], limits: {wall: 30s}}
  short: {like: base, limits: {wall: 500ms}}
  small: {like: base, limits: {output: 4KiB}}
  other: {engine: wasm, read: ["$WS/**"]}
tools:
  agent.run:
    - {allow: {argv: [sh, ...]}}
    - {allow: {argv: [missing-program]}}
    - {allow: {argv: [sleep, ...]}, profile: short}
    - {allow: {argv: [cat, ...]}, profile: small}
    - {allow: {argv: [make]}, profile: other}
    - {ask: {argv: [git]}}
    - {deny: {argv: [ls, ...]}}
  shell.run: {allow: {argv: [true]}}
"""
# LIMIT: seconds for one command; a hang must fail the test, not stop the suite.
SECONDS = 60


class Desk:
    """A user's folders, and the command over them."""

    def __init__(self, root: Path) -> None:
        self.root, self.project = root, root / "project"
        self.policy, self.trace = root / "policy.yaml", root / "trace"
        self.project.mkdir()
        self.policy.write_text(POLICY)

    def words(self, *argv: str, options: Sequence[str | Path] = ()) -> list[str]:
        given = ["--policy", self.policy, "--trace", self.trace, *options]
        command = [sys.executable, "-m", "safeconduct", "run", *map(str, given)]
        return [*command, "--", *argv]

    @property
    def environment(self) -> dict[str, str]:
        return {"HOME": str(self.root), "XDG_STATE_HOME": str(self.root / "state"),
                "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}  # fmt: skip

    def run(
        self, *argv: str, stdin: bytes = b"", options: Sequence[str | Path] = ()
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.words(*argv, options=options), input=stdin, capture_output=True,
            cwd=self.project, env=self.environment, timeout=SECONDS, check=False,
        )  # fmt: skip

    @contextmanager
    def begun(
        self, *argv: str, ready: bytes, options: Sequence[str | Path] = ()
    ) -> Generator[subprocess.Popen[bytes]]:
        """Start one, and wait until it has printed ``ready``."""
        process = subprocess.Popen(
            self.words(*argv, options=options), cwd=self.project, env=self.environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == ready + b"\n", process.stderr
            yield process
        finally:
            process.kill()
            process.wait(SECONDS)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None and not stream.closed:
                    stream.close()

    def entries(self) -> list[dict[str, Any]]:
        words = [sys.executable, "-m", "safeconduct", "trace", "show", str(self.trace), "--json"]
        done = subprocess.run(
            words, env=self.environment, capture_output=True, check=True, timeout=SECONDS
        )
        listed: list[dict[str, Any]] = json.loads(done.stdout)
        return listed

    def of(self, kind: str) -> dict[str, Any]:
        return next(one for one in self.entries() if one["kind"] == kind)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_its_streams_pass_through(desk: Desk) -> None:
    script = "read one; echo got $one; cat; echo err >&2"
    done = desk.run("sh", "-c", script, stdin=b"first\nsecond\nthird")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"got first\nsecond\nthird", b"err\n")


def test_it_reads_while_it_writes(desk: Desk) -> None:
    with desk.begun(
        "sh", "-c", "echo ready; while read x; do echo $x$x; done", ready=b"ready"
    ) as it:
        assert it.stdin is not None
        assert it.stdout is not None
        for word in (b"a", b"b"):
            it.stdin.write(word + b"\n")
            it.stdin.flush()
            assert it.stdout.readline() == word * 2 + b"\n"
        it.stdin.close()
        assert it.wait(SECONDS) == 0


def test_a_program_that_reads_nothing_is_not_held_up(desk: Desk) -> None:
    assert desk.run("sh", "-c", "exit 3", stdin=b"x" * (1 << 20)).returncode == 3


def shown(terminal: int) -> bytes:
    """Return what a terminal is sent until the last one who holds it is gone, or `end` came."""
    said = b""
    while b"end" not in said and select.select([terminal], [], [], SECONDS)[0]:
        try:
            said += os.read(terminal, 4096)
        except OSError:  # EIO: nobody holds the other side, pty(7)
            break
    return said


def test_it_has_no_terminal(desk: Desk) -> None:
    ours, theirs = pty.openpty()
    script = (
        "for fd in 0 1 2; do test -t $fd && echo terminal; done;"
        "(exec 3< /dev/tty) 2> /dev/null && echo terminal; echo end"
    )
    process = subprocess.Popen(
        desk.words("sh", "-c", script), cwd=desk.project, env=desk.environment,
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    said = shown(ours)
    assert process.wait(SECONDS) == 0
    os.close(ours)
    assert b"terminal" not in said
    assert b"end" in said


def test_what_it_prints_moves_no_terminal(desk: Desk) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        desk.words("sh", "-c", r"printf '\033]0;owned\007end'"), cwd=desk.project,
        env=desk.environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    said = shown(ours)
    process.wait(SECONDS)
    os.close(ours)
    assert b"owned" in said
    assert b"\x1b" not in said


CODES = {
    "its own": (("sh", "-c", "exit 7"), 7, "failed"),
    "a signal": (("sh", "-c", "kill -USR1 $$"), Exit.SIGNAL + signal.SIGUSR1, "failed"),
    "a limit": (("sleep", "30"), Exit.LIMIT, "limit"),
    "not found": (("missing-program",), Exit.NOT_FOUND, "failed"),
    "denied": (("ls", "-l"), Exit.DENIED, "denied"),
    "not granted": (("python3",), Exit.DENIED, "denied"),
    "unanswered": (("git",), Exit.DENIED, "denied"),
    "another engine": (("make",), Exit.FAILURE, "error"),
}


@pytest.mark.parametrize(("argv", "code", "status"), [*CODES.values()], ids=CODES)
def test_its_exit_codes(desk: Desk, argv: tuple[str, ...], code: int, status: str) -> None:
    done = desk.run(*argv, options=("--outcome", desk.root / "outcome"))
    assert done.returncode == code, done.stderr
    told = json.loads((desk.root / "outcome").read_text())
    assert (told["exit"], told["status"]) == (code, status)


def test_a_rule_for_programs_is_none_for_agents(desk: Desk) -> None:
    assert desk.run("true").returncode == Exit.DENIED
    exec_words = [word if word != "run" else "exec" for word in desk.words("true")]
    done = subprocess.run(
        exec_words, cwd=desk.project, env=desk.environment, capture_output=True, check=False,
        timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_nobody_else_runs_one(desk: Desk) -> None:
    words = [sys.executable, "-m", "safeconduct", "call", "agent.run"]
    arguments = json.dumps({"argv": ["sh", "-c", "echo ran > made"]})
    done = subprocess.run(
        [*words, arguments, "--policy", str(desk.policy)], cwd=desk.project,
        env=desk.environment, capture_output=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert b"tool.unknown" in done.stderr
    assert not (desk.project / "made").exists()


def test_it_is_recorded_as_one_call(desk: Desk) -> None:
    desk.run("sh", "-c", "echo hi; exit 4")
    intent, decision, outcome = (
        desk.of(f"call.{step}")["body"] for step in ("intent", "decision", "outcome")
    )
    assert (intent["tool"], intent["origin"]) == ("agent.run", "run")
    assert (decision["effect"], decision["enforcement"]) == ("allow", "sandbox")
    assert (outcome["status"], outcome["exit_code"]) == ("failed", 4)


def test_observing_runs_what_no_rule_grants_and_says_so(desk: Desk) -> None:
    script = "echo seen > made; cat /root/.bashrc /etc/shadow"
    assert desk.run("dash", "-c", script).returncode == Exit.DENIED
    assert not (desk.project / "made").exists()
    done = desk.run("dash", "-c", script, options=("--observe",))
    assert (desk.project / "made").read_text() == "seen\n"
    assert b"/etc/shadow: No such file" in done.stderr  # within the profile, as ever
    decision = [one for one in desk.entries() if one["kind"] == "call.decision"][-1]["body"]
    assert (decision["effect"], decision["observed"], decision["code"]) == (
        "deny", True, "policy.no_rule",
    )  # fmt: skip


def test_observing_lets_no_deny_pass(desk: Desk) -> None:
    assert desk.run("ls", options=("--observe",)).returncode == Exit.DENIED


def test_its_output_is_bounded_and_that_is_told(desk: Desk) -> None:
    (desk.project / "large").write_bytes(b"x" * 10_000)
    done = desk.run("cat", "large")
    assert done.stdout == b"x" * 4096
    assert b"limits.output" in done.stderr


class TestSignals:
    TRAP = "trap 'echo caught; exit 5' {name}; echo ready; while :; do sleep 0.05; done"

    @pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2"])
    def test_they_are_handed_on(self, desk: Desk, name: str) -> None:
        with desk.begun("sh", "-c", self.TRAP.format(name=name), ready=b"ready") as process:
            process.send_signal(signal.Signals[f"SIG{name}"])
            out, err = process.communicate(timeout=SECONDS)
            assert (process.returncode, out) == (5, b"caught\n"), err
        assert desk.of("call.outcome")["body"]["exit_code"] == 5
        assert desk.entries()[-1]["kind"] == "session.close"

    def test_they_are_handed_on_without_namespaces_too(self, desk: Desk, workspace: Path) -> None:
        script = self.TRAP.format(name="TERM")
        options = ("--tier", "landlock", "--workspace", workspace)
        with desk.begun("sh", "-c", script, ready=b"ready", options=options) as process:
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=SECONDS)[0] == b"caught\n"
            assert process.returncode == 5

    def test_one_that_it_does_not_catch_ends_it(self, desk: Desk) -> None:
        script = "echo ready; sleep 30 & wait"
        with desk.begun("sh", "-c", script, ready=b"ready") as process:
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == Exit.SIGNAL + signal.SIGTERM
        assert desk.of("call.outcome")["body"]["signal"] == signal.SIGTERM

    def test_what_it_started_gets_it_too(self, desk: Desk) -> None:
        inner = 'trap "echo inner; exit 0" TERM; echo ready; while :; do sleep 0.05; done'
        script = f"trap 'exit 6' TERM; sh -c '{inner}'; exit 7"
        with desk.begun("sh", "-c", script, ready=b"ready") as process:
            process.send_signal(signal.SIGTERM)
            # A shell waits for what it runs before it looks at its traps.
            assert process.communicate(timeout=SECONDS)[0] == b"inner\n"
            assert process.returncode == 6

    def test_the_third_that_asks_to_end_it_kills(self, desk: Desk) -> None:
        script = "trap 'echo no' TERM; trap 'echo no' INT; echo ready; while :; do sleep 0.05; done"
        with desk.begun("sh", "-c", script, ready=b"ready") as process:
            assert process.stdout is not None
            for number in (signal.SIGTERM, signal.SIGINT):
                process.send_signal(number)
                assert process.stdout.readline() == b"no\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == Exit.SIGNAL + signal.SIGKILL
        assert desk.entries()[-1]["kind"] == "session.close"

    def test_what_was_ignored_stays_ignored(self, desk: Desk) -> None:
        words = desk.words("sh", "-c", self.TRAP.format(name="USR1"))
        process = subprocess.Popen(
            ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *words], cwd=desk.project,
            env=desk.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
        assert process.communicate(timeout=SECONDS)[0] == b"caught\n"
        assert process.returncode == 5
