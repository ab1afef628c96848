"""Step "sandbox": our own interpreter, for the workers that we run inside sandboxes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def interpreter() -> Sequence[str]:
    """Return the argv in front of a script: the base interpreter, isolated and without site."""
    base: object = getattr(sys, "_base_executable", None)
    executable = os.path.realpath(base if isinstance(base, str) and base else sys.executable)
    return [executable, "-I", "-S", "-B"]


def base_grants() -> tuple[str, ...]:
    """Return the real folders the base interpreter lives in, for a profile's ``read``."""
    return tuple(
        sorted({os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix)})
    )
