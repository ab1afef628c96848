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
    from .note import SigningKey, VerifierKey
    from .privacy.opened import Missing, Opening, read_opened
    from .reader import read_entries
    from .signing.key import generate_key, load_key, write_key
    from .signing.signer import SignerClient
    from .verify.report import Finding, Report
    from .verify.trust import TrustPolicy
    from .verify.verification import verify_trace
    from .writing.appending import Clock
    from .writing.writer import TraceWriter

_HOMES = {
    "Checkpoint": ".checkpoint",
    "Clock": ".writing.appending",
    "Entry": ".entry",
    "Finding": ".verify.report",
    "Missing": ".privacy.opened",
    "Opening": ".privacy.opened",
    "Report": ".verify.report",
    "SignerClient": ".signing.signer",
    "SigningKey": ".note",
    "TraceWriter": ".writing.writer",
    "TrustPolicy": ".verify.trust",
    "VerifierKey": ".note",
    "clear_name": ".entry",
    "generate_key": ".signing.key",
    "load_key": ".signing.key",
    "read_entries": ".reader",
    "read_opened": ".privacy.opened",
    "verify_trace": ".verify.verification",
    "write_key": ".signing.key",
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
    "TrustPolicy",
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
