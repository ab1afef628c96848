"""The policies we ship."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from safeconduct.errors import PolicyError

PRESETS: Final = ("coding-agent", "read-only")


def read_preset(name: str) -> bytes:
    """Return the bytes of a preset, to be written out as the start of an own policy."""
    if name not in PRESETS:
        raise PolicyError(
            f"there is no preset {name!r}",
            code="policy.not_found",
            hint=f"there are: {', '.join(PRESETS)}",
        )
    return (files("safeconduct.policies") / "presets" / f"{name}.yaml").read_bytes()
