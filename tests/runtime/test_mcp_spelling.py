"""What an MCP server gets is what was judged: one spelling, else the client's own bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from safeconduct.attestation import read_entries
from safeconduct.call import Json
from safeconduct.errors import ProtocolError
from safeconduct.runtime.adapters.jsonrpc import parse, request_frame

PYTHON = os.path.realpath(sys.executable)
SERVER = Path(__file__).with_name("mcp_raw_server.py")
POLICY = f"""
version: 1
profiles:
  files: {{read: ["{SERVER}", "{os.path.realpath(sys.base_prefix)}/**"], write: ["$WS/**"]}}
tools:
  files.path: {{allow: {{path: {{path: ["$WS/**"]}}, text: any}}}}
  files.paths: {{allow: {{paths: {{path: ["$WS/**"]}}}}}}
  files.host: {{allow: {{host: {{host: ["127.0.0.1"]}}}}}}
  files.mail: {{allow: {{to: {{email: ["bob@corp.example"]}}}}}}
  files.url: {{allow: {{url: {{url: ["https://a.example/**"]}}}}}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapped:
    """The command with the server of raw lines behind it."""

    process: subprocess.Popen[bytes]
    workspace: Path
    trace: Path

    def send(self, frame: bytes) -> Mapping[str, Json]:
        """Send one frame and return its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(frame + b"\n")
        found: Mapping[str, Json] = json.loads(self.process.stdout.readline())
        return found

    def leave(self) -> list[bytes]:
        """End the session and return the lines that reached the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(20) == 0
        return (self.workspace / "out" / "seen.bin").read_bytes().splitlines()


@pytest.fixture
def wrapped(tmp_path: Path) -> Generator[Wrapped]:
    """Start it; whatever happens, it is gone afterwards."""
    workspace = Path(os.path.realpath(tmp_path)) / "ws"
    (workspace / "out").mkdir(parents=True)
    (workspace / "real").mkdir()
    (workspace / "link").symlink_to("real")
    (tmp_path / "policy.yaml").write_text(POLICY)
    with (tmp_path / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "safeconduct", "mcp",
                "--policy", str(tmp_path / "policy.yaml"), "--workspace", str(workspace),
                "--trace", str(tmp_path / "trace"), "--name", "files", "--", PYTHON, str(SERVER),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}, bufsize=0,
        )  # fmt: skip
    try:
        yield Wrapped(process=process, workspace=workspace, trace=tmp_path / "trace")
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.mark.parametrize(
    ("tool", "given", "judged"),
    [
        ("path", {"path": "link/./new//x", "text": "é\u2028"}, {"path": "$WS/real/new/x"}),
        ("path", {"path": "private", "text": 1.5}, {"path": "$WS/private"}),
        ("paths", {"paths": ["a", "link/b"]}, {"paths": ["$WS/a", "$WS/real/b"]}),
        ("host", {"host": "0x7f.1"}, {"host": "127.0.0.1"}),
        ("mail", {"to": "BOB@Corp.example"}, {"to": "bob@corp.example"}),
        ("url", {"url": "HTTPS://A.example:443/x/../y#z"}, {"url": "https://a.example/y"}),
    ],
)
def test_a_server_gets_the_spelling_that_was_judged(
    wrapped: Wrapped, tool: str, given: dict[str, Json], judged: dict[str, Json]
) -> None:
    # Left to itself a server resolves `private` from a folder of its own, where a deny of the
    # path that it then opens has not looked.
    params = {"name": tool, "arguments": given, "_meta": {"progressToken": "é"}}
    call = {"jsonrpc": "2.0", "id": "n-1", "method": "tools/call", "params": params}
    assert wrapped.send(json.dumps(call).encode())["id"] == "n-1"
    expected = json.loads(json.dumps(judged).replace("$WS", str(wrapped.workspace)))
    frame = wrapped.leave()[-1]
    assert frame.isascii()
    seen = json.loads(frame)
    assert seen == {**call, "params": {**params, "arguments": {**given, **expected}}}
    entries = [entry for _, entry in read_entries(wrapped.trace)]
    ends = [entry.body["status"] for entry in entries if entry.kind == "call.outcome"]
    assert ends == ["ok", "ok"]


def test_a_call_that_was_judged_as_it_came_keeps_its_bytes(wrapped: Wrapped) -> None:
    path = json.dumps(str(wrapped.workspace / "real")).encode()
    frame = b'{"id": 7 ,"params":{"arguments":{"text":1.50e0, "path":%s},"name":"p\\u0061th"},'
    frame = (frame + b'"method":"tools/call","jsonrpc":"2.0"}') % path
    assert wrapped.send(frame)["id"] == 7
    assert wrapped.leave() == [frame]


def test_params_too_deep_to_write_are_refused_and_not_forwarded() -> None:
    message = parse(b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{}}')
    deep: Json = []
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(ProtocolError) as refused:
        request_frame(message, {"_meta": deep})
    assert refused.value.code == "json.too_deep"
