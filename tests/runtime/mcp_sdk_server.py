"""A small real MCP server for tests, written with the official SDK. Run confined."""

from __future__ import annotations

from pathlib import Path

from mcp.server.mcpserver import MCPServer

server = MCPServer("fixture")


@server.tool()
def add(one: int, other: int) -> int:
    """Add two numbers."""
    return one + other


@server.tool()
def read(path: str) -> str:
    """Read a file."""
    return Path(path).read_text()


server.run("stdio")
