"""Attack `safeconduct mcp` by silence and noise: who waits for whom, for how long, at what cost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from safeconduct.attestation import read_entries
from safeconduct.call import Confinement
from safeconduct.errors import ProtocolError
from safeconduct.runtime.adapters.jsonrpc import escape_separators, parse, salvage_answered
from safeconduct.runtime.adapters.mcp_calls import OpenCall, OpenRequests
from safeconduct.runtime.adapters.stderr import relay

PYTHON = os.path.realpath(sys.executable)
SECONDS = 30.0
# It answers what it is told to, in bytes of its own choice; told nothing it reads no more.
SERVER = """
import json, os, sys, time
for line in sys.stdin.buffer:
    message = json.loads(line)
    tool = message["params"]["name"]
    if tool == "deaf":
        os.write(1, b'{"jsonrpc":"2.0","id":1,"result":{}}\\n')
        time.sleep(86400)
    for text in message["params"]["arguments"]["say"]:
        os.write(1, text.encode() + b"\\n")
"""


class Wrapped:
    """The command in front of that server; its client's end are two pipes."""

    def __init__(self, folder: Path) -> None:
        workspace = folder / "ws"
        workspace.mkdir()
        server = folder / "server.py"
        server.write_text(SERVER)
        base = os.path.realpath(sys.base_prefix)
        (folder / "policy.yaml").write_text(
            "version: 1\n"
            f'profiles: {{files: {{read: ["{server}", "{base}/**"]}}}}\n'
            "tools: {files.deaf: {allow: any}, files.say: {allow: any}}\n"
        )
        self.trace, self.errors = folder / "trace", folder / "stderr"
        with self.errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "safeconduct", "mcp",
                    "--policy", str(folder / "policy.yaml"), "--workspace", str(workspace),
                    "--trace", str(self.trace), "--name", "files", "--", PYTHON, str(server),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                env={**os.environ, "XDG_STATE_HOME": str(folder / "state")}, bufsize=0,
            )  # fmt: skip

    def call(self, number: int, tool: str, **arguments: object) -> None:
        """Send one call."""
        assert self.process.stdin is not None
        params = {"name": tool, "arguments": arguments}
        frame = {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}
        self.process.stdin.write(json.dumps(frame).encode() + b"\n")

    def line(self) -> bytes:
        """Read one frame."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def codes(self) -> list[str | None]:
        """Leave, and return the code of each outcome but the server's own."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(SECONDS)
        bodies = [e.body for _, e in read_entries(self.trace) if e.kind == "call.outcome"]
        return [None if (code := body.get("code")) is None else str(code) for body in bodies[:-1]]


@pytest.fixture
def wrapped(tmp_path: Path) -> Generator[Wrapped]:
    """Start it; a test that would hang ends with its process."""
    running = Wrapped(tmp_path)
    watchdog = threading.Timer(SECONDS, running.process.kill)
    watchdog.start()
    try:
        yield running
    finally:
        watchdog.cancel()
        running.process.kill()
        running.process.wait()
        for pipe in (running.process.stdin, running.process.stdout):
            assert pipe is not None
            pipe.close()


def stuck(pid: int) -> bool:
    """Wait a bounded time until a process sleeps and goes on sleeping."""
    deadline, slept = time.monotonic() + SECONDS, 0
    while slept < 2000 and time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        slept = slept + 1 if state == "S" else 0
        os.sched_yield()
    return slept == 2000


def test_a_server_that_reads_nothing_does_not_outlive_a_client_that_died(wrapped: Wrapped) -> None:
    wrapped.call(1, "deaf")
    assert b'"id":1' in wrapped.line()
    client = os.fork()
    if client == 0:  # the last one that holds the line open, stuck in the middle of a frame
        try:
            for number in range(2, 200):
                wrapped.call(number, "deaf", padding="x" * 5000)
        finally:
            os._exit(0)
    for pipe in (wrapped.process.stdin, wrapped.process.stdout):
        assert pipe is not None
        pipe.close()
    assert stuck(client)
    os.kill(client, signal.SIGKILL)
    os.waitpid(client, 0)
    # The server would sleep for a day, and so the session.
    assert wrapped.process.wait(SECONDS) in (0, 125)
    bodies = [e.body for _, e in read_entries(wrapped.trace) if e.kind == "call.outcome"]
    assert "unknown" not in {body["status"] for body in bodies}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_text_that_some_reader_splits_arrives_escaped(wrapped: Wrapped, separator: str) -> None:
    # What JSON.stringify writes of a file that holds such a character.
    wrapped.call(1, "say", say=[f'{{"jsonrpc":"2.0","id":1,"result":{{"t":"a\\\\{separator}b"}}}}'])
    line = wrapped.line()
    assert line.isascii()
    assert json.loads(line)["result"]["t"] == f"a\\{separator}b"
    assert wrapped.codes() == [None]


def test_an_answer_that_is_refused_is_told_and_recorded(wrapped: Wrapped) -> None:
    # Half of a surrogate pair: how Python spells a file name that is not UTF-8.
    wrapped.call(1, "say", say=['{"jsonrpc":"2.0","id":1,"result":{"name":"\\udcff"}}'])
    answer = json.loads(wrapped.line())
    assert answer["id"] == 1
    assert "json.surrogate" in answer["error"]["message"]
    assert wrapped.codes() == ["mcp.bad_answer"]


def test_a_refused_request_of_the_server_answers_nothing_of_the_client(wrapped: Wrapped) -> None:
    asks = '{"jsonrpc":"2.0","id":1,"method":"roots/list","params":{"x":"\\udcff"}}'
    wrapped.call(1, "say", say=[asks, '{"jsonrpc":"2.0","id":1,"result":{"mine":true}}'])
    assert json.loads(wrapped.line())["result"] == {"mine": True}
    assert wrapped.codes() == [None]


@pytest.mark.parametrize(
    ("frame", "number"),
    [
        (b'{"jsonrpc":"2.0","id":1,"result":' + b"[" * 5000, 1),
        (b'{"jsonrpc":"2.0","result":{},"id":"a","extra":1}', "a"),
        (b'{"jsonrpc":"2.0","id":1,"error":{"code":NaN}}', 1),
        (b'{"jsonrpc":"2.0","id":1,"id":2,"result":{}}', None),
        (b'{"jsonrpc":"2.0","id":1,"result":{},"method":"x"}', None),
        (b'{"jsonrpc":"2.0","id":1}', None),
        (b'{"id":1,"result":1,' + b'"x":1,' * 1_000_000 + b'"id":2}', 1),
        (b"[" * 100_000, None),
    ],
)
def test_of_a_refused_frame_it_is_known_whom_it_answers(
    frame: bytes, number: int | str | None
) -> None:
    assert salvage_answered(frame) == number


def test_an_escape_never_makes_a_message_of_what_was_none() -> None:
    outside = '{"jsonrpc":"2.0","id":1,"result":{}}\u2028'.encode()
    assert outside != escape_separators(outside)
    with pytest.raises(Exception, match="not JSON"):
        parse(escape_separators(outside))


def opened(frame_bytes: int) -> OpenCall:
    """Make an open Call of so many bytes."""
    nothing: Any = None
    return OpenCall(
        pipeline=nothing, admitted=nothing, context=contextlib.nullcontext(nothing),
        confinement=Confinement(tier=None), frame_bytes=frame_bytes,
    )  # fmt: skip


def test_what_a_silent_server_leaves_open_has_a_bound_in_bytes() -> None:
    """A thousand open calls, and four times as many cancelled ones, held a MiB each."""
    requests, calls = OpenRequests(), [opened(1 << 20) for _ in range(64)]
    for number, call in enumerate(calls):
        requests.hold(number)
        requests.forwarding(number, call)
    with pytest.raises(ProtocolError, match="64 requests have no answer"):
        requests.hold("one more")
    assert [requests.cancel(number) for number in range(64)] == [[]] * 64
    requests.hold("one more")  # what was cancelled takes no place among the open
    requests.forwarding("one more", opened(3 << 20))
    assert requests.cancel("one more") == calls[:3]
    assert requests.take(3) == (True, calls[3])
    assert requests.take(2) == (False, None)
    requests.hold("large")
    requests.forwarding("large", opened(64 << 20))
    with pytest.raises(ProtocolError):
        requests.hold("next")
    requests.take("large")
    requests.hold("next")


@pytest.mark.parametrize("noise", [b"\n", b"\x1b\n", b"\xff" * 100])
def test_noise_costs_the_log_what_it_is_allowed_and_no_more(noise: bytes) -> None:
    """A server paid for what it wrote, and a name of 64 letters was written for each empty line."""
    read, write = os.pipe2(os.O_CLOEXEC)
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    kept = bytearray()

    def collect() -> None:
        while data := os.read(out_read, 1 << 16):
            kept.extend(data)

    def flood() -> None:
        os.write(write, b"first\n")
        for _ in range(100):
            os.write(write, noise * (8192 // len(noise)))
        os.write(write, b"\nlast")
        os.close(write)

    threads = [threading.Thread(target=run) for run in (collect, flood)]
    for thread in threads:
        thread.start()
    relay(read, out_write, "n" * 64, clock=lambda: 0.0)
    os.close(out_write)
    for thread in threads:
        thread.join(SECONDS)
    os.close(read)
    os.close(out_read)
    assert kept.startswith(b"n" * 64 + b"| first\n")
    assert kept.endswith(b"last\n") or b"bytes left out]" in kept
    assert len(kept) <= (256 << 10) + 16384
