"""The public names, and what importing them does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import safeconduct.policies

NAMES = """
BUILT_IN NO_FACTS PRESETS PROTECTED Argument Canonical Capability Considered Explanation Finding
Found Judged Kind Level NarrowedPolicy Origin Policy PolicyFile Resolution Resolved Revocations Role
Rule Server Signature TrustStore as_observed attenuate beside both canonicalize check_file
check_policy compile_elsewhere decide decode_arguments describe_bound discover_policy explain
hidden_by is_protected load_policy narrow_profiles parse_policy policy_schema read_policy_file
read_preset require_passing resolve_policy state_folder unspelled
"""
PUBLIC = set(NAMES.split())


def test_the_public_names() -> None:
    assert set(safeconduct.policies.__all__) == PUBLIC
    assert all(hasattr(safeconduct.policies, name) for name in PUBLIC)


def test_importing_loads_neither_runtime_nor_wasmtime() -> None:
    source = Path(safeconduct.policies.__file__).parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(source.parent)!r}); import safeconduct.policies;"
        "print([m for m in sys.modules if m.startswith(('wasmtime', 'safeconduct.runtime',"
        " 'safeconduct.attestation'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
