"""The path of one Call: what is recorded when, and what happens when a step fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.attestation import TraceWriter, verify_trace
from safeconduct.call import Call, Decision, EntryKind, Outcome
from safeconduct.errors import ApprovalRequired, Denied, Error, Exit, SandboxFailed, TraceInvalid
from safeconduct.runtime.pipeline import Approver, nobody
from safeconduct.runtime.supervisor import Runtime

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safeconduct.call import Json

POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**"], write: ["$WS/**"], limits: {wall: 20s}}
tools:
  fs.read: {allow: {path: ["$WS/**"]}}
  fs.write: {allow: {path: ["$WS/**"]}}
  shell.run:
    - {allow: {argv: [sh, ...]}}
    - {ask: {argv: [touch, ...]}}
"""


def gone(marker: str, seconds: float = 5.0) -> bool:
    """Wait, within a bound, until no process carries ``marker``."""
    deadline = time.monotonic() + seconds
    while running(marker):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def running(marker: str) -> bool:
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in entry.read_bytes():
                return True
        except OSError:
            continue
    return False


Entry = tuple[EntryKind, "Mapping[str, Json]"]


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """Watch what the real writer is given, in order."""
    seen: list[Entry] = []
    real = TraceWriter.append

    def append(
        self: TraceWriter, kind: EntryKind, body: Mapping[str, Json], **options: object
    ) -> int:
        seen.append((kind, body))
        return real(self, kind, body, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TraceWriter, "append", append)
    return seen


@pytest.fixture
def start(tmp_path: Path, workspace: Path) -> Iterator[Callable[..., Runtime]]:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    policy.chmod(0o600)
    opened: list[Runtime] = []

    def make(approver: Approver = nobody, trace: Path | None = None) -> Runtime:
        environment = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
        opened.append(
            Runtime.from_policy(
                policy, workspace=workspace, trace=trace, approver=approver, environment=environment
            )
        )
        return opened[-1]

    yield make
    for runtime in opened:
        runtime.close()


def kinds(entries: list[Entry]) -> list[EntryKind]:
    return [kind for kind, _ in entries if kind.startswith(("call", "approval"))]


WHOLE = [EntryKind.CALL_INTENT, EntryKind.CALL_DECISION, EntryKind.CALL_OUTCOME]


def test_intent_and_decision_come_before_the_effect(
    start: Callable[..., Runtime], entries: list[Entry], workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    runtime = start()
    at_effect: list[list[EntryKind]] = []
    real = type(runtime.native).run

    def run(*arguments: object, **options: object) -> Outcome:
        at_effect.append(kinds(entries))
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(runtime.native), "run", run)
    assert runtime.call("shell.run", argv=["sh", "-c", "echo hi"]).stdout == b"hi\n"
    assert at_effect == [WHOLE[:2]]
    assert kinds(entries) == WHOLE


def test_a_denied_call_is_recorded_and_has_no_effect(
    start: Callable[..., Runtime], entries: list[Entry], workspace: Path
) -> None:
    with pytest.raises(Denied):
        start().call("shell.run", argv=["touch2", "made"])
    with pytest.raises(Denied):
        start().call("fs.write", path="../outside", content="x")
    assert kinds(entries) == WHOLE * 2
    assert os.listdir(workspace) == []


def test_a_trace_that_cannot_be_written_stops_the_call(
    start: Callable[..., Runtime], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = start()

    def full(*_: object, **__: object) -> int:
        raise TraceInvalid("No space left on device.", code="trace.io")

    with monkeypatch.context() as broken:
        broken.setattr(TraceWriter, "append", full)
        with pytest.raises(TraceInvalid):
            runtime.call("shell.run", argv=["sh", "-c", "echo x > made"])
        with pytest.raises(TraceInvalid):
            runtime.call("fs.write", path="made", content="x")
    assert not (workspace / "made").exists()


def test_an_ask_without_a_person_is_recorded_and_can_be_resumed(
    start: Callable[..., Runtime], entries: list[Entry], workspace: Path
) -> None:
    with pytest.raises(ApprovalRequired) as caught:
        start().call("shell.run", argv=["touch", "made"])
    assert caught.value.call
    assert kinds(entries) == [*WHOLE[:2], EntryKind.APPROVAL, EntryKind.CALL_OUTCOME]
    assert not (workspace / "made").exists()


@pytest.mark.parametrize("answer", ["ann", None], ids=["yes", "no"])
def test_a_person_decides(
    start: Callable[..., Runtime], entries: list[Entry], answer: str | None
) -> None:
    def person(call: Call, decision: Decision) -> str | None:
        return answer

    runtime = start(person)
    if answer is None:
        with pytest.raises(Denied) as caught:
            runtime.call("shell.run", argv=["touch", "made"])
        assert caught.value.code == "approval.refused"
    else:
        runtime.call("shell.run", argv=["touch", "made"])
    approval = next(body for kind, body in entries if kind is EntryKind.APPROVAL)
    assert approval["answer"] == ("yes" if answer else "no")


def test_an_interrupted_call_is_recorded_and_ended(
    start: Callable[..., Runtime], entries: list[Entry]
) -> None:
    runtime, marker = start(), f"interrupted{os.getpid()}"

    def interrupt() -> None:
        deadline = time.monotonic() + 5
        while not running(marker) and time.monotonic() < deadline:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    # A shell has what it starts in the background ignore this signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            runtime.call("shell.run", argv=["sh", "-c", f"sleep 60; : {marker}"])
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert entries[-1][0] is EntryKind.CALL_OUTCOME
    assert entries[-1][1]["status"] == "error"
    assert gone(marker)


def test_a_dead_launcher_fails_the_call_and_it_is_recorded(
    start: Callable[..., Runtime], entries: list[Entry]
) -> None:
    runtime, marker = start(), f"launcherless{os.getpid()}"
    launcher = runtime.native._launcher  # pyright: ignore[reportPrivateUsage]

    def kill() -> None:
        deadline = time.monotonic() + 5
        while not running(marker) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(launcher.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SandboxFailed):
        runtime.call("shell.run", argv=["sh", "-c", f"sleep 60; : {marker}"])
    thread.join()
    assert gone(marker)
    assert runtime.call("shell.run", argv=["sh", "-c", ":"]).exit_code == 0, (
        "the next call recovers"
    )
    assert [body["status"] for kind, body in entries if kind is EntryKind.CALL_OUTCOME] == [
        "error", "ok",
    ]  # fmt: skip


def test_a_second_writer_of_one_trace_is_refused(
    start: Callable[..., Runtime], tmp_path: Path
) -> None:
    start(trace=tmp_path / "trace")
    with pytest.raises(Error):
        start(trace=tmp_path / "trace")


@pytest.mark.parametrize("closes", [True, False], ids=["closes", "only calls"])
def test_a_fork_of_the_runtime_takes_nothing_from_its_trace(
    start: Callable[..., Runtime], workspace: Path, tmp_path: Path, closes: bool
) -> None:
    trace = tmp_path / "trace"
    runtime = start(trace=trace)
    runtime.call("fs.write", path="before", content="x")
    ours, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            for name, arguments in (
                ("fs.write", {"path": "forked", "content": "x"}),
                ("shell.run", {"argv": ["sh", "-c", "touch forked"]}),
                ("fs.read", {"path": "../outside"}),
            ):
                try:
                    runtime.call(name, **arguments)
                except TraceInvalid as error:
                    os.write(theirs, f"{error.code} ".encode())
            if closes:
                runtime.close()
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        assert answer.read().split() == ["trace.forked"] * 3
    os.waitpid(pid, 0)
    runtime.call("fs.write", path="after", content="x")
    assert runtime.call("shell.run", argv=["sh", "-c", "echo alive"]).stdout == b"alive\n"
    runtime.close()
    report = verify_trace(
        trace, [(tmp_path / "state/safeconduct/keys/log.pub").read_text().strip()]
    )
    assert (report.status, report.calls, report.complete) == (Exit.OK, 3, True)
    assert sorted(os.listdir(workspace)) == ["after", "before"]


def test_a_ctrl_c_just_after_the_outcome_stays_one(
    start: Callable[..., Runtime], entries: list[Entry]
) -> None:
    runtime = start()
    call = runtime.new_call("fs.write", {"path": "a", "content": ""})

    def interrupted() -> None:
        with runtime.pipeline.admit(call) as admitted:
            runtime.pipeline.settle(admitted, Outcome(call=call.id))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert kinds(entries) == WHOLE


def test_what_ends_a_call_is_raised_though_it_cannot_be_recorded(
    start: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = start()

    def full(*_: object, **__: object) -> int:
        raise TraceInvalid("No space left on device.", code="trace.io")

    call = runtime.new_call("fs.write", {"path": "a", "content": ""})

    def interrupted() -> None:
        with monkeypatch.context() as broken, runtime.pipeline.admit(call):
            broken.setattr(TraceWriter, "append", full)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted()
    assert "trace.io" in caught.value.__notes__[0]


@pytest.mark.parametrize("tool", ["\ud800", "caf\u00e9", 7, None, b"fs.read", []], ids=repr)
def test_a_name_that_no_tool_has_is_denied_and_recorded(
    start: Callable[..., Runtime], entries: list[Entry], tool: str
) -> None:
    with pytest.raises(Denied) as caught:
        start().call(tool)
    assert caught.value.code == "call.unknown_tool"
    assert kinds(entries) == WHOLE
    assert entries[-1][1]["status"] == "denied"


def test_a_killed_supervisor_leaves_nothing_running(tmp_path: Path, workspace: Path) -> None:
    # A fork of the supervisor holds copies of all its descriptors and must not keep it alive.
    marker = f"supervisor{os.getpid()}"
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "policy.yaml").chmod(0o600)
    code = f"""
    import os, time
    from safeconduct.runtime.supervisor import Runtime
    environment = {{"HOME": {str(tmp_path)!r}}}
    runtime = Runtime.from_policy(
        {str(tmp_path / "policy.yaml")!r}, workspace={str(workspace)!r}, environment=environment
    )
    if os.fork() == 0:
        time.sleep(8)
        os._exit(0)
    argv = ["sh", "-c", "setsid -f sh -c 'sleep 60; : {marker}'; sleep 60; : {marker}"]
    runtime.call("shell.run", argv=argv)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    inside = f"sleep 60; : {marker}\0"
    try:
        deadline = time.monotonic() + 20
        while not running(inside) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert gone(inside, 4.0)
