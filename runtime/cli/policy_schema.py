"""``safeconduct policy schema``: the JSON Schema of policy files, for editors."""

from __future__ import annotations

from safeconduct.errors import Exit
from safeconduct.policies import policy_schema

from .terminal import print_json


def schema() -> int:
    """Print the JSON Schema (draft 2020-12) of policy files."""
    print_json(policy_schema())
    return Exit.OK
