"""The signed log: writing a Trace and verifying one. Nothing is loaded before it is asked for.

The signer must start fast and the verifier must not load the writer's world, so every name comes
from its module on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .entry import Entry, clear_name
    from .key import generate_key, load_key, write_key
    from .note import SigningKey, VerifierKey
    from .openings import Opening
    from .reader import Missing, read_entries, read_opened
    from .report import Finding, Report
    from .signer import SignerClient
    from .verify import verify_trace
    from .writer import Clock, TraceWriter

_HOMES = {
    "Checkpoint": ".checkpoint",
    "Clock": ".writer",
    "Entry": ".entry",
    "Finding": ".report",
    "Missing": ".reader",
    "Opening": ".openings",
    "Report": ".report",
    "SignerClient": ".signer",
    "SigningKey": ".note",
    "TraceWriter": ".writer",
    "VerifierKey": ".note",
    "clear_name": ".entry",
    "generate_key": ".key",
    "load_key": ".key",
    "read_entries": ".reader",
    "read_opened": ".reader",
    "verify_trace": ".verify",
    "write_key": ".key",
}

__all__ = [
    "Checkpoint",
    "Clock",
    "Entry",
    "Finding",
    "Missing",
    "Opening",
    "Report",
    "SignerClient",
    "SigningKey",
    "TraceWriter",
    "VerifierKey",
    "clear_name",
    "generate_key",
    "load_key",
    "read_entries",
    "read_opened",
    "verify_trace",
    "write_key",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home, __name__), name)
