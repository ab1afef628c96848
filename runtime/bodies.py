"""Step "record": what is known of a Call, as it stands in the bodies of entries."""

from __future__ import annotations

import os
from collections.abc import Sequence

from safeconduct.attestation import clear_name
from safeconduct.call import Confinement, Json, KeptChanges, Refused, Usage

# LIMIT: names of refused system calls in one entry.
_REFUSED_MAX = 64
# LIMIT: sets of changes in one entry; a profile has as many as it writes to folders.
SETS_MAX = 64


def usage(used: Usage) -> dict[str, Json]:
    """Return what a Call used."""
    return {
        "wall_ms": used.wall_ms,
        "cpu_ms": used.cpu_ms,
        "throttled_ms": used.throttled_ms,
        "peak_memory_bytes": used.peak_memory_bytes,
        "oom_kills": used.oom_kills,
        "peak_pids": used.peak_pids,
        "refused_forks": used.refused_forks,
        "read_bytes": used.read_bytes,
        "written_bytes": used.written_bytes,
        "fuel": used.fuel,
    }


def tool_name(tool: object) -> str:
    """Return the name of a tool in clear. What is no text is named by its type alone."""
    return clear_name(tool if isinstance(tool, str) else f"not text: {type(tool).__name__}")


def refused(found: Sequence[Refused]) -> list[Json]:
    """Name what was refused, most often first; the names are the kernel's, whatever the program."""
    return [{"syscall": one.syscall, "count": one.count} for one in found[:_REFUSED_MAX]]


def counts(changes: KeptChanges) -> dict[str, Json]:
    """Return how many changes of each sort a set holds."""
    counted = ("created", "modified", "deleted", "refused", "conflicts", "later")
    return {"id": changes.id, **{name: int(getattr(changes, name)) for name in counted}}


def sets(changes: Sequence[KeptChanges]) -> list[Json]:
    """Name where each set belongs, what it holds and what of it takes effect later."""
    return [
        {
            "id": one.id,
            "workspace": _text(one.workspace),
            "sha256": one.digest,
            "flagged": [_text(path) for path in one.flagged],
        }
        for one in changes[:SETS_MAX]
    ]


def _text(path: str) -> str:
    """Spell a name that is not UTF-8 so that any encoding holds it."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def confinement(held_by: Confinement) -> dict[str, Json]:
    """Return what held a Call."""
    return {
        "tier": str(held_by.tier) if held_by.tier else None,
        "layers": list(held_by.layers),
        "held": {name: str(held) for name, held in held_by.held.items()},
    }
