"""Attack `safeconduct mcp` from both ends with raw bytes: what passes, what is refused, what stays.

Every test drives the real command with a confined server; afterwards no process of it is left, no
mount, and the trace verifies.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from safeconduct.attestation import read_entries, verify_trace
from safeconduct.call import Confinement
from safeconduct.errors import Error, Exit
from safeconduct.runtime.adapters import mcp_calls
from safeconduct.runtime.adapters.jsonrpc import parse
from safeconduct.runtime.adapters.mcp_calls import OpenCall, OpenRequests

PYTHON = os.path.realpath(sys.executable)
SERVER = Path(__file__).with_name("mcp_raw_server.py")
SECONDS = 20.0
POLICY = f"""
version: 1
profiles:
  files: {{read: ["{SERVER}", "{os.path.realpath(sys.base_prefix)}/**"], write: ["$WS/**"]}}
tools:
  files.echo: {{allow: {{text: any}}}}
  files.hang: {{allow: any}}
  files.die: {{allow: any}}
  files.flood: {{allow: any}}
  files.junk: {{allow: any}}
  files.forge: {{allow: any}}
  files.stderr: {{allow: any}}
  files.error: {{allow: any}}
  files.shut: {{deny: any, id: never-shut}}
"""


class Session:
    """One run of the command, driven over its pipes."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder / "ws"
        # Tier landlock lets a tool make nothing beside protected names, so it writes below.
        (self.workspace / "out").mkdir(parents=True)
        (folder / "policy.yaml").write_text(POLICY)
        self.trace, self.state = folder / "trace", folder / "state"
        self.marker = uuid.uuid4().hex
        self.errors = folder / "stderr"
        self._buffer = b""
        with self.errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "safeconduct", "mcp",
                    "--policy", str(folder / "policy.yaml"), "--workspace", str(self.workspace),
                    "--trace", str(self.trace), "--name", "files",
                    "--", PYTHON, str(SERVER), self.marker,
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                env={**os.environ, "XDG_STATE_HOME": str(self.state)}, bufsize=0,
            )  # fmt: skip

    def send(self, frame: bytes) -> None:
        """Write one frame."""
        assert self.process.stdin is not None
        view = memoryview(frame + b"\n")
        while view:
            view = view[os.write(self.process.stdin.fileno(), view) :]

    def call(self, number: int | str, tool: str, **arguments: object) -> None:
        """Send one tools/call."""
        params = {"name": tool, "arguments": arguments}
        self.send(json.dumps(request(number, "tools/call", params)).encode())

    def line(self) -> bytes:
        """Read one frame of the answer; empty at the end."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                assert selector.select(SECONDS), f"no answer; stderr: {self.errors.read_text()}"
                data = os.read(self.process.stdout.fileno(), 1 << 16)
                if not data:
                    break
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def answer(self) -> Any:  # noqa: ANN401 - a test looks into any JSON
        """Read one frame as JSON."""
        return json.loads(self.line())

    def family(self) -> set[int]:
        """Return the process and all below it."""
        found, waiting = set[int](), [self.process.pid]
        while waiting:
            pid = waiting.pop()
            found.add(pid)
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                waiting += [int(word) for word in task.read_text().split()]
        return found

    def leave(self) -> int:
        """Close our end and return the exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(SECONDS)

    def seen(self) -> list[bytes]:
        """Return the lines that reached the server."""
        path = self.workspace / "out" / "seen.bin"
        return path.read_bytes().splitlines() if path.exists() else []

    def outcomes(self) -> list[tuple[str, str | None]]:
        """Return (status, code) of each outcome, in order."""
        bodies = [e.body for _, e in read_entries(self.trace) if e.kind == "call.outcome"]
        return [(body["status"], body.get("code")) for body in bodies]


def request(number: int | str, method: str, params: object) -> dict[str, object]:
    """Build a request."""
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


def gone(pids: set[int], marker: str) -> bool:
    """Wait a bounded time until none of these processes, and none with the marker, lives."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        left = {pid for pid in pids if os.path.exists(f"/proc/{pid}")}
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if marker.encode() in file.read_bytes():
                    left.add(int(file.parent.name))
            except OSError:
                continue
        if not left:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def session(tmp_path: Path) -> Generator[Session]:
    """Run the command, and afterwards prove that nothing is left and the trace is good."""
    mounts = Path("/proc/self/mountinfo").read_text()
    running = Session(tmp_path)
    try:
        running.send(json.dumps(request("first", "ping", {})).encode())
        assert running.answer()["id"] == "first"
        family = running.family()
        assert len(family) > 3  # the command, its launcher, its signer, the server
        yield running
        assert running.process.poll() is not None
    finally:
        running.process.kill()
        running.process.wait()
        for pipe in (running.process.stdin, running.process.stdout):
            assert pipe is not None
            pipe.close()
    assert gone(family, running.marker)
    assert Path("/proc/self/mountinfo").read_text() == mounts
    key = (running.state / "safeconduct" / "keys" / "log.pub").read_text()
    report = verify_trace(running.trace, [key])
    assert report.status == Exit.OK, report
    assert "unknown" not in {status for status, _ in running.outcomes()}


def test_other_traffic_passes_byte_for_byte(session: Session) -> None:
    frames = [
        b'{ "jsonrpc":"2.0",  "id":7 ,"method":"tools/list","params":{"x":1.50e3}}',
        b'{"method":"resources/read","params":{"uri":"\xc3\xa9\\u00e9\\/"},"id":"a","jsonrpc":"2.0"}',
        b'{"jsonrpc":"2.0","method":"notifications/initialized"}',
        b'{"jsonrpc":"2.0","id":8,"method":"ping"}\r',
    ]
    for frame in frames:
        session.send(frame)
    answers = [session.line() for _ in range(3)]
    assert answers[0] == b'{ "result" :{"content":[], "\xc3\xa9":1.50} ,"id": 7,"jsonrpc":"2.0"}'
    assert b'"id": "a"' in answers[1]
    assert session.leave() == 0
    raw = (session.workspace / "out" / "seen.bin").read_bytes()
    assert raw.endswith(b"\n".join(frames) + b"\n")


def test_an_allowed_call_passes_unchanged_and_is_recorded(session: Session) -> None:
    params = b'{"arguments":{"text":"x"},"name":"echo"}'
    frame = b'{"jsonrpc":"2.0" ,"id":1,"method":"tools\\/call","params":' + params + b"}"
    session.send(frame)
    assert session.line().startswith(b'{ "result" :{')
    assert session.leave() == 0
    assert session.seen()[-1] == frame
    assert session.outcomes() == [("ok", None), ("ok", None)]


def test_the_trace_shows_what_was_started_where(session: Session) -> None:
    session.call(1, "echo", text="x")
    session.line()
    assert session.leave() == 0
    bodies = [e.body for _, e in read_entries(session.trace) if e.kind.startswith("call.")]
    start, decision, intent = bodies[0], bodies[1], bodies[2]
    assert (start["tool"], start["origin"]) == ("mcp.start", "operator")
    assert (decision["code"], decision["profile"]) == ("operator.command", "files")
    assert (intent["tool"], intent["parent"]) == ("files.echo", start["call"])
    assert bodies[-1]["call"] == start["call"]
    assert bodies[-1]["tier"] in ("full", "landlock")


@pytest.mark.parametrize(
    ("tool", "arguments", "code"),
    [
        ("unknown", {}, "call.unknown_tool"),
        ("echo", {}, "policy.no_rule"),
        ("echo", {"text": "x", "more": 1}, "policy.no_rule"),
        ("shut", {}, "policy.deny"),
        ("../etc", {}, "call.unknown_tool"),
    ],
)
def test_a_denied_call_is_a_tool_error(
    session: Session, tool: str, arguments: dict[str, object], code: str
) -> None:
    session.call(5, tool, **arguments)
    answer = session.answer()
    assert answer["id"] == 5
    assert answer["result"]["isError"] is True
    assert code in answer["result"]["content"][0]["text"]
    if tool == "shut":
        assert "never-shut" in answer["result"]["content"][0]["text"]
    assert session.leave() == 0
    assert len(session.seen()) == 1  # the first ping
    assert session.outcomes()[0] == ("denied", code)


HEAD = '{"jsonrpc":"2.0","id":5,'
PING = HEAD + '"method":"ping","params":'
CALL = '"method":"tools/call","params":{"name":"hang"'
# Each frame, the code of its refusal, and whether its id can be told so that it is answered.
AMBIGUOUS = [
    (HEAD + '"method":"ping",' + CALL + "}}", "json.duplicate_key", True),
    (HEAD + '"id":6,' + CALL + "}}", "json.duplicate_key", False),
    (HEAD + '"method":"ping","Method":"tools/call","params":{}}', "jsonrpc.member", True),
    ("\ufeff" + HEAD + CALL + "}}", "json.bom", False),
    ("[" + HEAD + CALL + "}}]", "json.not_object", False),
    (HEAD + CALL + "}} {}", "json.syntax", True),
    (PING + '{"x":NaN}}', "json.number", True),
    (PING + '{"x":1e999}}', "json.number", True),
    (PING + '{"x":"\\ud800"}}', "json.surrogate", True),
    (PING + '\r{"jsonrpc":"2.0","id":6,' + CALL + "}}\r}", "json.line_break", True),
    (PING + '{"x":"\u2028"}}', "json.line_break", True),
    (PING + "[" * 3000 + "]" * 3000 + "}", "json.too_deep", True),
    (HEAD.replace("5", "5.0") + '"method":"ping"}', "jsonrpc.id", False),
    (HEAD.replace("5", "null") + CALL + "}}", "jsonrpc.id", False),
    (HEAD.replace("5", "9007199254740993") + '"method":"ping"}', "jsonrpc.id", False),
    (HEAD + '"result":{},' + CALL + "}}", "jsonrpc.shape", True),
    (HEAD + CALL.replace("tools/call", "Tools/Call") + "}}", "mcp.method", True),
    (HEAD + CALL.replace("tools/call", "tools/call ") + "}}", "jsonrpc.method", True),
    ('{"jsonrpc":"2.0",' + CALL + "}}", "mcp.notification", False),
    (HEAD + CALL + ',"task":{}}}', "mcp.task", True),
    (HEAD + CALL + ',"Name":"echo"}}', "mcp.params", True),
    (HEAD + CALL + ',"arguments":[]}}', "mcp.params", True),
    (HEAD + CALL + ',"arguments":{"p":1,"P":2}}}', "mcp.params", True),
]


def test_a_frame_that_two_parsers_read_differently_never_passes(session: Session) -> None:
    for number, (frame, code, answered) in enumerate(AMBIGUOUS):
        session.send(frame.encode())
        if answered:
            refused = session.answer()
            assert refused["id"] == 5, frame
            assert code in refused["error"]["message"]
        session.send(b'{"jsonrpc":"2.0","id":%d,"method":"ping"}' % (100 + number))
        assert session.answer()["id"] == 100 + number, frame
        told = session.errors.read_text().splitlines()
        assert told[-1].endswith(f"[{code}]"), frame
    assert session.leave() == 0
    assert len(session.seen()) == 1 + len(AMBIGUOUS)
    assert session.outcomes() == [("ok", None)]


def test_invalid_utf8_never_passes(session: Session) -> None:
    session.send(b'{"jsonrpc":"2.0","id":5,"method":"ping","params":{"x":"\xff\xc0\xaf"}}')
    assert "json.encoding" in session.answer()["error"]["message"]
    assert session.leave() == 0
    assert len(session.seen()) == 1


def test_a_frame_too_long_is_refused_by_its_id(session: Session) -> None:
    session.call(5, "echo", text="x" * (5 << 20))
    assert "mcp.frame_too_long" in session.answer()["error"]["message"]
    session.call(6, "echo", text="x" * (1 << 19))
    assert session.answer()["id"] == 6
    assert session.leave() == 0


def test_a_frame_too_long_without_an_id_ends_the_session(session: Session) -> None:
    with contextlib.suppress(BrokenPipeError):
        session.send(b'{"x":"' + b"x" * (5 << 20) + b'","id":5}')
    assert session.process.wait(SECONDS) == Exit.FAILURE
    assert "mcp.frame_too_long" in session.errors.read_text()


def test_an_id_is_not_used_twice_while_open(session: Session) -> None:
    session.call(5, "hang")
    session.call(5, "echo", text="x")
    assert "mcp.id_reused" in session.answer()["error"]["message"]
    session.send(b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":5}}')
    session.call(5, "echo", text="x")
    assert "mcp.id_reused" in session.answer()["error"]["message"]
    session.call("5", "echo", text="x")
    assert session.answer()["id"] == "5"
    assert session.leave() == 0
    assert ("failed", "mcp.cancelled") in session.outcomes()


CANCEL = b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":%d}}'


def test_a_cancelled_call_that_completes_is_recorded_as_it_came(session: Session) -> None:
    session.call(424242, "hang")
    session.send(CANCEL % 424242)
    session.call(6, "forge")  # answers 424242, "guessed" and itself
    assert session.answer()["id"] == 424242
    assert session.answer()["id"] == 6
    assert session.leave() == 0
    assert session.outcomes() == [("ok", None)] * 3
    assert session.errors.read_text().count("nothing asked for") == 1


def test_a_cancelled_call_without_an_answer_ends_with_the_session(session: Session) -> None:
    session.call(4, "hang")
    session.send(CANCEL % 4)
    session.call(5, "die")
    answer = session.answer()
    assert (answer["id"], session.line()) == (5, b"")
    assert session.process.wait(SECONDS) == 3
    found = session.outcomes()
    assert found == [("failed", "mcp.server_gone"), ("failed", "mcp.cancelled"), ("failed", None)]


def open_call(ended: list[str]) -> OpenCall:
    """Make an open Call that notes the code it ends with."""

    @contextlib.contextmanager
    def admitted() -> Generator[Any]:
        try:
            yield None
        except Error as error:
            ended.append(error.code)

    context = admitted()
    context.__enter__()
    nothing: Any = None
    return OpenCall(
        pipeline=nothing, admitted=nothing, context=context, confinement=Confinement(tier=None)
    )


def test_cancelled_calls_are_bounded_and_the_oldest_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mcp_calls, "_CANCELLED_MAX", 2)
    monkeypatch.setattr(mcp_calls, "_OPEN_MAX", 1)
    requests, calls = OpenRequests(), [open_call([]) for _ in range(3)]
    forgotten: list[list[OpenCall]] = []
    for number, call in enumerate(calls):
        requests.hold(number)  # what was cancelled takes no place among the open
        assert requests.forwarding(number, call)
        forgotten.append(requests.cancel(number))
    assert forgotten == [[], [], [calls[0]]]
    assert requests.take(0) == (False, None)
    assert requests.take(1) == (True, calls[1])
    assert requests.cancel(1) == []
    assert requests.end() == ({}, [calls[2]])
    assert requests.take(2) == (False, None)


@pytest.mark.parametrize(("cancelled", "code"), [(True, "mcp.cancelled"), (False, "mcp.error")])
def test_an_error_that_answers_a_cancelled_call_is_its_cancelling(
    cancelled: bool, code: str
) -> None:
    ended: list[str] = []
    requests, call = OpenRequests(), open_call(ended)
    requests.hold(1)
    requests.forwarding(1, call)
    if cancelled:
        assert requests.cancel(1) == []
    frame = b'{"jsonrpc":"2.0","id":1,"error":{"code":0,"message":"Request cancelled"}}'
    assert requests.take(1) == (True, call)
    call.answered(parse(frame), frame)
    assert ended == [code]


def test_a_server_that_floods_is_ended(session: Session) -> None:
    session.call(5, "flood")
    assert "mcp.frame_too_long" in session.answer()["error"]["message"]
    assert session.process.wait(SECONDS) == Exit.FAILURE
    assert session.outcomes()[0] == ("error", "mcp.frame_too_long")


def test_a_server_that_dies_fails_its_calls(session: Session) -> None:
    session.call(4, "hang")
    session.call(5, "die")
    answers = [session.answer(), session.answer()]
    assert {answer["id"] for answer in answers} == {4, 5}
    assert all("mcp.server_gone" in answer["error"]["message"] for answer in answers)
    assert session.process.wait(SECONDS) == 3
    assert session.outcomes() == [("failed", "mcp.server_gone")] * 2 + [("failed", None)]


def test_a_server_killed_from_outside_fails_its_calls(session: Session) -> None:
    session.call(5, "hang")
    victims = [
        pid
        for pid in session.family() - {session.process.pid}
        if session.marker.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(victims) == 1
    while len(session.seen()) < 2:
        time.sleep(0.001)
    os.kill(victims[0], signal.SIGKILL)
    assert "mcp.server_gone" in session.answer()["error"]["message"]
    assert session.process.wait(SECONDS) == Exit.SIGNAL + signal.SIGKILL


def test_a_client_that_leaves_ends_everything(session: Session) -> None:
    session.call(5, "hang")
    assert session.leave() == 0
    assert session.outcomes()[0] == ("failed", "mcp.client_gone")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_everything_in_order(session: Session, number: signal.Signals) -> None:
    session.call(5, "hang")
    session.process.send_signal(number)
    assert session.process.wait(SECONDS) == Exit.SIGNAL + number
    assert session.outcomes()[-1][0] == "failed"


def test_a_client_that_reads_nothing_cannot_keep_it_alive(session: Session) -> None:
    assert session.process.stdin is not None
    stdin = session.process.stdin.fileno()
    os.set_blocking(stdin, False)
    frame = json.dumps(request(1, "tools/call", {"name": "unknown"})).encode() + b"\n"
    deadline = time.monotonic() + SECONDS
    # Its answers fill the pipe to us, so it stops reading, so the pipe to it fills.
    while time.monotonic() < deadline:
        try:
            os.write(stdin, frame * 16)
        except BlockingIOError:
            with selectors.DefaultSelector() as selector:
                selector.register(stdin, selectors.EVENT_WRITE)
                if not selector.select(0.5):
                    break
    session.process.send_signal(signal.SIGTERM)
    assert session.process.wait(SECONDS) == Exit.SIGNAL + signal.SIGTERM


def test_what_is_no_message_of_the_server_is_dropped(session: Session) -> None:
    session.call(5, "junk")
    assert session.answer()["id"] == 5
    session.call(6, "forge")
    assert session.answer()["id"] == 6
    assert session.leave() == 0
    told = session.errors.read_text()
    assert "json.syntax" in told
    assert "json.duplicate_key" in told
    assert told.count("nothing asked for") == 2


def test_a_tool_error_is_recorded_as_failed(session: Session) -> None:
    session.call(5, "error")
    assert session.answer()["result"] == {"isError": True}
    assert session.leave() == 0
    assert session.outcomes()[0] == ("failed", "mcp.tool_error")


def test_stderr_reaches_no_terminal_raw(session: Session) -> None:
    session.call(5, "stderr")
    session.answer()
    assert session.leave() == 0
    deadline = time.monotonic() + SECONDS
    while "hello" not in session.errors.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert b"\x1b" not in session.errors.read_bytes()
    assert "files| \\x1b]0;owned\\x07 hello" in session.errors.read_text()
