"""Safeconduct: judge, confine and record every tool call of an AI agent.

Names are imported when they are first used, so that a verifier never loads the runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .call import Call, Decision, Document, Effect, Limits, Outcome, Profile, Tier
    from .errors import (
        ApprovalRequired,
        Denied,
        Error,
        LimitExceeded,
        PolicyError,
        ProtocolError,
        SandboxFailed,
        SandboxUnavailable,
        ToolFailed,
        TraceInvalid,
    )
    from .runtime.supervisor import Runtime

__all__ = [
    "ApprovalRequired",
    "Call",
    "Decision",
    "Denied",
    "Document",
    "Effect",
    "Error",
    "LimitExceeded",
    "Limits",
    "Outcome",
    "PolicyError",
    "Profile",
    "ProtocolError",
    "Runtime",
    "SandboxFailed",
    "SandboxUnavailable",
    "Tier",
    "ToolFailed",
    "TraceInvalid",
    "__version__",
]

__version__ = "0.1.0"

_CALL = {"Call", "Decision", "Document", "Effect", "Limits", "Outcome", "Profile", "Tier"}


def __getattr__(name: str) -> object:
    """Import a public name on first use, PEP 562."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "errors"
    if name == "Runtime":
        module = "runtime.supervisor"
    elif name in _CALL:
        module = "call"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
