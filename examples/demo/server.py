"""(d) A public MCP server behind the policy, driven by the official MCP client."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import anyio
from mcp import ClientSession, MCPError, StdioServerParameters, stdio_client
from mcp.types import CallToolResult, TextContent
from stage import Program, Stage, is_open, node
from story import Story

from safeconduct import Error, Tier

_PACKAGE, _VERSION = "@modelcontextprotocol/server-filesystem", "2026.8.31"
_ENTRY = Path("node_modules", _PACKAGE, "dist", "index.js")
_LOG = "server.log"
_META = "safeconduct/code"
# LIMIT: how long the registry may take, and one answer of the server.
_INSTALL_SECONDS = 40
_ANSWER_SECONDS = 20


class Skipped(Exception):
    """This part cannot be shown here; the text says why."""


def drive(stage: Stage, story: Story) -> None:
    """Wrap the server, let one call pass and one be denied; or say why not."""
    try:
        program = node()
        if program is None:
            raise Skipped("no node")
        entry = _installed(stage, story)
        _require_reach(stage, program, entry)
    except Skipped as reason:
        story.event("skipped", "MCP server", f"{reason}")
        return
    # Lets the event loop handle Ctrl-C: it cancels the client, which ends the server.
    after = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        anyio.run(_talk, stage, story, program, entry)
    except KeyboardInterrupt:
        after = signal.SIG_IGN  # once is enough: what follows is cleaning up, and bounded
        raise
    except (MCPError, ExceptionGroup) as error:
        said = (stage.root / _LOG).read_text(errors="replace").strip().splitlines()
        raise Error(f"The wrapped server failed ({error}).", hint=" | ".join(said[-3:])) from error
    finally:
        signal.signal(signal.SIGINT, after)


async def _talk(stage: Stage, story: Story, program: Program, entry: Path) -> None:
    parameters = StdioServerParameters(
        command=sys.executable,
        args=_command(stage, program, entry),
        env=dict(stage.environment),
        cwd=stage.workspace,
    )
    readme, elsewhere = stage.workspace / "README.md", stage.workspace / "README.txt"
    with (stage.root / _LOG).open("w+") as log:
        async with (
            stdio_client(parameters, errlog=log) as (reader, writer),
            ClientSession(reader, writer, read_timeout_seconds=_ANSWER_SECONDS) as client,
        ):
            said = await client.initialize()
            tools = await client.list_tools()
            info = f"{said.server_info.name}: {len(tools.tools)} tools, confined"
            story.event("allowed", f"initialize {_VERSION}", info)
            read = await client.call_tool("read_text_file", {"path": str(readme)})
            story.event("allowed", "files.read_text_file README.md", _text(read))
            arguments = {"path": str(elsewhere), "content": "planted"}
            write = await client.call_tool("write_file", arguments)
            story.event("denied", "files.write_file README.txt", _code(write))
    refused = write.is_error and _META in (write.meta or {}) and not elsewhere.exists()
    if not (refused and "Basket" in _text(read)):
        raise Error("The wrapped server did not answer as it must.")


def _command(stage: Stage, program: Program, entry: Path) -> list[str]:
    folder = entry.parents[len(_ENTRY.parts) - 2]
    grants = {"/usr/lib/node_modules/**": f"{folder}/**"}
    policy = stage.policy("files.yaml", {"/usr/**": f"{program.folder}/**"} | grants)
    tier = ["--tier", stage.tier] if stage.tier else []
    return [
        "-m", "safeconduct", "mcp", "--policy", str(policy), "--workspace", str(stage.workspace),
        "--trace", str(stage.trace), *tier, "--name", "files",
        "--", program.path, str(entry), str(stage.workspace),
    ]  # fmt: skip


def _text(result: CallToolResult) -> str:
    """Return the first line of a tool's answer."""
    texts = [part.text for part in result.content if isinstance(part, TextContent)]
    return (texts[0].splitlines() or [""])[0] if texts else ""


def _code(result: CallToolResult) -> str:
    """Return why a call was refused, as the proxy says it for programs."""
    return f"{(result.meta or {}).get(_META, '')}: the server never saw it"


def _require_reach(stage: Stage, program: Program, entry: Path) -> None:
    alone = os.geteuid() == 0 and stage.tier is Tier.LANDLOCK
    for path in (program.path, entry):
        if alone and not is_open(path):
            raise Skipped(f"{path} is closed to other users, whose ids sandboxes get here")


def _installed(stage: Stage, story: Story) -> Path:
    """Return the server's entry file, installing it once into the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safeconduct-demo"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        cache = stage.root
    if os.geteuid() == 0 and not is_open(cache):
        cache = stage.root
    folder = cache / f"server-filesystem-{_VERSION}"
    if not (folder / _ENTRY).is_file():
        story.fact("installing", f"{_PACKAGE} {_VERSION}, scripts off")
        new = cache / f".installing-{secrets.token_hex(6)}"
        try:
            new.mkdir()
            _install(new)
            os.rename(new, folder)
        except OSError as error:
            raise Skipped(f"cannot install: {error.strerror}") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return folder / _ENTRY


def _install(folder: Path) -> None:
    """Run npm in a process group of its own, so that an interrupt leaves nothing of it."""
    command = [
        "npm", "install", "--prefix", str(folder), "--cache", str(folder / "cache"),
        "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier",
        "--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=15000",
        "--loglevel=error", f"{_PACKAGE}@{_VERSION}",
    ]  # fmt: skip
    npm = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip
    try:
        _, stderr = npm.communicate(timeout=_INSTALL_SECONDS)
    except BaseException as error:
        os.killpg(npm.pid, signal.SIGKILL)
        npm.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Skipped(f"npm did not finish within {_INSTALL_SECONDS} s") from error
        raise
    if npm.returncode != 0 or not (folder / _ENTRY).is_file():
        said = [line for line in stderr.splitlines() if " code " in line]
        why = said[0].strip() if said else f"exit {npm.returncode}"
        raise Skipped(f"npm cannot install it: {why}")
    shutil.rmtree(folder / "cache", ignore_errors=True)
