"""Attack the supervisor from inside the worker of ``http.get``, as a server would that broke it."""

from __future__ import annotations

import socket
from collections.abc import Generator
from pathlib import Path

import pytest

from safeconduct import Runtime, ToolFailed
from safeconduct.attestation import read_entries
from safeconduct.runtime.tools import http_worker

GOOD = b'{"status":200,"headers":[["x","y"]]}'
HOSTILE = {
    "deep": b"[" * 60_000,
    "deep-inside": b'{"status":200,"headers":' + b"[" * 60_000,
    "infinite": b'{"status":1e999,"headers":[]}',
    "not-a-number": b'{"status":NaN,"headers":[]}',
    "surrogate": b'{"status":200,"headers":[["x","\\ud800"]]}',
    "large": b'{"status":200,"headers":[],"n":' + b"9" * 4000 + b"}",
    "twice": b'{"status":200,"headers":[],"status":9007199254740993}',
    "more": b'{"status":200,"headers":[],"call":"another"}',
    "other": b'["status"]',
    "bytes": b'{"status":200,"headers":[["x","\xff"]]}',
    "nothing": b"",
}


@pytest.fixture
def listener() -> Generator[socket.socket]:
    """Listen; nobody needs to answer, since the worker makes the answer up."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def fetch(folder: Path, listener: socket.socket, head: bytes) -> object:
    """Have a worker that is somebody else's answer with ``head``."""
    (folder / "head").write_bytes(head)
    script = folder / "worker.py"
    script.write_text(f"import os\nos.write(1, {head!r} + b'\\nbody')\n")
    number = listener.getsockname()[1]
    grant = f'{{allow: {{url: ["http://127.0.0.1:{number}/**"]}}}}'
    (folder / "policy.yaml").write_text(f"version: 1\ntools: {{http.get: {grant}}}\n")
    (folder / "ws").mkdir()
    with Runtime.from_policy(
        folder / "policy.yaml", workspace=folder / "ws", trace=folder / "trace"
    ) as runtime:
        return runtime.call("http.get", url=f"http://127.0.0.1:{number}/").value


def statuses(folder: Path) -> list[object]:
    """Return how the calls in the trace ended."""
    entries = [entry for _, entry in read_entries(folder / "trace")]
    return [entry.body["status"] for entry in entries if entry.kind == "call.outcome"]


def test_what_the_worker_says_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(http_worker, "__file__", str(tmp_path / "worker.py"))
    assert fetch(tmp_path, listener, GOOD) == {"status": 200, "headers": [["x", "y"]]}
    assert statuses(tmp_path) == ["ok"]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_worker_of_ours_says_is_a_failed_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: socket.socket, name: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(http_worker, "__file__", str(tmp_path / "worker.py"))
    with pytest.raises(ToolFailed) as failure:
        fetch(tmp_path, listener, HOSTILE[name])
    assert failure.value.code == "http.protocol"
    assert statuses(tmp_path) == ["failed"]
