"""The public names of the package, and what importing it must not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import safeconduct

HEAVY = ["wasmtime", "pydantic", "typer", "safeconduct.runtime"]


def test_public_names_are_these() -> None:
    assert safeconduct.__all__ == [
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
    for name in safeconduct.__all__:
        assert getattr(safeconduct, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = getattr(safeconduct, "Nonsense")  # noqa: B009 - pyright knows it is not there


@pytest.mark.parametrize("module", ["safeconduct", "safeconduct.attestation.verify.verification"])
def test_importing_loads_neither_runtime_nor_its_libraries(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
