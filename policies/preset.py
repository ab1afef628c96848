"""The policies we ship. Each has its tests beside it, NAME.test.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Final

from safeconduct.errors import PolicyError

# What each is for; the first is what `safeconduct init` writes unasked.
PRESETS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "coding-agent": "edits, builds and tests one repository; no network",
        "customer-support": "reads mail and orders, writes mail, pays small amounts back",
        "data-analysis": "computes with Python on data/, writes to out/; no network",
        "mcp-filesystem": "the public MCP filesystem server, confined to one folder",
        "read-only": "reads a repository and its history, changes nothing",
        "web-research": "reads the public web, keeps notes in notes/",
    }
)


def read_preset(name: str) -> bytes:
    """Return the bytes of a preset, to be written out as the start of an own policy."""
    return _read(name, "yaml")


def read_preset_tests(name: str) -> bytes:
    """Return the bytes of the tests of a preset, which stand beside it."""
    return _read(name, "test.yaml")


def _read(name: str, suffix: str) -> bytes:
    if name not in PRESETS:
        raise PolicyError(
            f"there is no preset {name!r}",
            code="policy.not_found",
            hint=f"there are: {', '.join(PRESETS)}",
        )
    return (files("safeconduct.policies") / "presets" / f"{name}.{suffix}").read_bytes()
