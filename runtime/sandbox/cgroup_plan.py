"""Step "sandbox": the cgroups that the launcher makes, one for each sandbox ahead of its call.

The supervisor says what they are to be and understands what the launcher reports of them;
native/launcher/src/account.rs makes, reads and removes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

from safeconduct.call import Limits
from safeconduct.errors import SandboxFailed

from . import accounts
from .accounts import INIT_PIDS, Charge
from .cgroup import Cgroup, Cgroups


def plan(cgroups: Cgroups, limits: Limits) -> list[Mapping[str, object]]:
    """Return where and how to make the cgroups of a template's sandboxes."""
    return [
        {
            "base": str(cgroups.bases[controller]),
            "settings": _settings(cgroups.version, controller, limits),
            "accounts": accounts.files(cgroups.version, controller),
        }
        for controller in _controllers(cgroups)
    ]


def charge(cgroups: Cgroups, texts: Sequence[str]) -> Charge:
    """Read what the launcher reported of the accounts of one sandbox."""
    return accounts.parse(cgroups.version, _controllers(cgroups), texts)


def opened(cgroups: Cgroups, name: str) -> Cgroup:
    """Return a cgroup that the launcher made; without accounts where it is gone already.

    Raises SandboxFailed where there are no descriptors left.
    """
    folders = {controller: cgroups.bases[controller] / name for controller in _controllers(cgroups)}
    found = Cgroup(version=cgroups.version, folders=folders)
    try:
        with ExitStack() as held, suppress(FileNotFoundError):
            handles: dict[str, int] = {}
            for controller, folder in folders.items():
                handles[controller] = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                held.callback(os.close, handles[controller])
            found.accounts.open(cgroups.version, handles, set())
    except OSError as error:
        found.accounts.close()
        raise SandboxFailed(f"The call cannot be watched: {error}.", step="cgroup") from error
    return found


def _controllers(cgroups: Cgroups) -> list[str]:
    return ["memory"] if cgroups.version == 2 else list(cgroups.bases)


def _settings(version: int, controller: str, limits: Limits) -> list[tuple[str, str, bool]]:
    """Return the files to write, in order, and whether the kernel must have them."""
    pids = ("pids.max", str(limits.pids + INIT_PIDS), True)
    memory = str(limits.memory_bytes)
    if version == 2:
        # No swap at all: then `memory.max` is the whole.
        return [pids, ("memory.max", memory, True), ("memory.swap.max", "0", False)]
    if controller == "memory":
        # In this order: memory and swap together are never less than memory alone.
        return [
            ("memory.limit_in_bytes", memory, True),
            ("memory.memsw.limit_in_bytes", memory, False),
        ]
    return [pids] if controller == "pids" else []
