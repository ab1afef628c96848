"""Which trace a person names, and whether the verb may look at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safeconduct.attestation.privacy.vault import Vault
from safeconduct.errors import Denied
from safeconduct.runtime.places import Places

_MARKER = Path("/run/safeconduct")
_VARIABLE = "SAFECONDUCT_SANDBOX"


def find_trace(name: str, environment: Mapping[str, str]) -> Path:
    """Return the trace that a person names: a path, or a name from ``trace ls``."""
    path = Path(name)
    if "/" in name or name in ("", ".", "..") or os.path.lexists(path):
        return path
    kept = Places.of(environment).traces / name
    return kept if os.path.lexists(kept) else path


def own_vault(environment: Mapping[str, str]) -> Vault | None:
    """Return what opens this user's own traces, or None where there is none yet.

    Raise TraceInvalid ``key.permissions`` where others could have it too.
    """
    return Vault.find(Places.of(environment).vault_key)


def refuse_inside_sandbox(verb: str) -> None:
    """Raise Denied in one of our sandboxes: there the agent would be asked about itself.

    This is a courtesy that fails early. The barrier is that state folder and policy are absent
    or read-only in every sandbox.
    """
    if _MARKER.exists() or _VARIABLE in os.environ:
        raise Denied(
            f"{verb} is for people and does not run inside a sandbox.",
            code="sandbox.inside",
            hint="run it in a terminal of your own",
        )
