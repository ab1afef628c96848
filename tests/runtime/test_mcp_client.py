"""Drive `safeconduct mcp` with the official client: an SDK server and the public file server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import anyio
import mcp_types
import pytest
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

from safeconduct.attestation import read_entries, verify_trace
from safeconduct.errors import Exit

PYTHON = os.path.realpath(sys.executable)
SERVER = Path(__file__).with_name("mcp_sdk_server.py")
PACKAGE = "@modelcontextprotocol/server-filesystem@2026.8.31"
MODES = ["legacy", "auto"]


def drive(
    folder: Path,
    policy: str,
    command: list[str],
    steps: Callable[[Client], Awaitable[None]],
    *,
    mode: str,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Run the steps against a wrapped server; return the statuses of a trace that verifies."""
    (folder / "policy.yaml").write_text(policy)
    variables = [f"--env={name}={value}" for name, value in (environment or {}).items()]
    parameters = StdioServerParameters(
        command=sys.executable,
        args=[
            "-m", "safeconduct", "mcp", "--policy", str(folder / "policy.yaml"),
            "--workspace", str(folder / "ws"), "--trace", str(folder / "trace"),
            "--name", "files", *variables, "--", *command,
        ],
        env={"XDG_STATE_HOME": str(folder / "state")},
    )  # fmt: skip

    async def run() -> None:
        with (folder / "stderr").open("w") as errors, anyio.fail_after(60):
            async with Client(stdio_client(parameters, errlog=errors), mode=mode) as client:
                await steps(client)

    try:
        anyio.run(run)
    finally:
        print((folder / "stderr").read_text())
    key = (folder / "state" / "safeconduct" / "keys" / "log.pub").read_text()
    assert verify_trace(folder / "trace", [key]).status == Exit.OK
    entries = [entry for _, entry in read_entries(folder / "trace")]
    return [str(entry.body["status"]) for entry in entries if entry.kind == "call.outcome"]


def text(result: mcp_types.CallToolResult) -> str:
    """Return the text of a result."""
    part = result.content[0]
    assert isinstance(part, mcp_types.TextContent)
    return part.text


@pytest.mark.parametrize("mode", MODES)
def test_the_official_client_and_server_do_not_notice_the_proxy(tmp_path: Path, mode: str) -> None:
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "note").write_text("kept")
    (tmp_path / "secret").write_text("secret")
    packages = Path(mcp_types.__file__).parent.parent
    policy = f"""
version: 1
profiles:
  files: {{read: ["$WS/**", "{SERVER}", "{packages}/**", "{os.path.realpath(sys.base_prefix)}/**"]}}
tools:
  files.add: {{allow: {{one: {{range: [0, 9]}}, other: {{range: [0, 9]}}}}}}
  files.read: {{allow: {{path: any}}}}
"""

    async def steps(client: Client) -> None:
        assert {tool.name for tool in (await client.list_tools()).tools} == {"add", "read"}
        good = await client.call_tool("add", {"one": 2, "other": 3})
        assert (good.is_error, text(good)) == (False, "5")
        denied = await client.call_tool("add", {"one": 2, "other": 30})
        assert denied.is_error
        assert "policy.no_rule" in text(denied)
        kept = await client.call_tool("read", {"path": str(tmp_path / "ws" / "note")})
        assert text(kept) == "kept"
        contained = await client.call_tool("read", {"path": str(tmp_path / "secret")})
        assert contained.is_error
        assert "secret" not in text(contained).replace(str(tmp_path), "").replace("/secret", "")

    statuses = drive(
        tmp_path, policy, [PYTHON, str(SERVER)], steps, mode=mode,
        environment={"PYTHONPATH": str(packages)},
    )  # fmt: skip
    assert statuses == ["ok", "denied", "ok", "failed", "ok"]


@pytest.fixture(scope="session")
def file_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the public file server, once, outside of every sandbox."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("npm")
    (folder / "package.json").write_text("{}")
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--cache", str(folder / "cache")]
    done = subprocess.run(
        [npm, "install", *flags, PACKAGE], cwd=folder, capture_output=True, check=False, timeout=300
    )
    if done.returncode != 0:
        pytest.skip(f"npm cannot install {PACKAGE} here")
    return folder / "node_modules"


def test_the_public_file_server_is_judged_and_contained(tmp_path: Path, file_server: Path) -> None:
    workspace = tmp_path / "ws"
    (workspace / "docs").mkdir(parents=True)
    (workspace / "docs" / "a.txt").write_text("readable")
    (workspace / "private.txt").write_text("hidden away")
    node = os.path.realpath(str(shutil.which("node")))
    policy = f"""
version: 1
profiles:
  files:
    read: ["{file_server}/**", "{Path(node).parent.parent}/**"]
    write: ["$WS/docs/**"]
    limits: {{memory: 1GiB, pids: 128}}
tools:
  files.read_text_file: {{allow: {{path: any}}}}
  files.write_file: {{allow: {{path: {{path: ["$WS/docs/out/**"]}}, content: any}}}}
"""
    program = file_server / "@modelcontextprotocol" / "server-filesystem" / "dist" / "index.js"

    async def steps(client: Client) -> None:
        good = await client.call_tool("read_text_file", {"path": str(workspace / "docs" / "a.txt")})
        assert (bool(good.is_error), text(good)) == (False, "readable")
        target = workspace / "docs" / "b.txt"
        denied = await client.call_tool("write_file", {"path": str(target), "content": "x"})
        assert denied.is_error
        assert "policy.no_rule" in text(denied)
        assert not target.exists()
        # The policy allows any path and the server is told to serve all of them: the sandbox
        # alone keeps the file away.
        contained = await client.call_tool(
            "read_text_file", {"path": str(workspace / "private.txt")}
        )
        assert contained.is_error
        assert "hidden away" not in text(contained)

    statuses = drive(tmp_path, policy, [node, str(program), "/"], steps, mode="legacy")
    assert statuses == ["ok", "denied", "failed", "ok"]
