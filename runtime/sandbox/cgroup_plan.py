"""Step "sandbox": the cgroups that the launcher makes, one for each sandbox ahead of its call.

The supervisor says what they are to be and understands what the launcher reports of them;
native/launcher/src/account.rs makes, reads and removes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import chain

from safeconduct.call import Limits
from safeconduct.errors import SandboxFailed

from . import accounts
from .accounts import INIT_PIDS, Charge
from .cgroup import Cgroup, Cgroups


def plan(cgroups: Cgroups, limits: Limits) -> list[Mapping[str, object]]:
    """Return where and how to make the cgroups of a template's sandboxes."""
    version = cgroups.version
    return [
        {
            "base": str(base),
            "settings": [one for name in names for one in _settings(version, name, limits)],
            "accounts": [file for name in names for file in accounts.files(version, name)],
        }
        for base, names in cgroups.hierarchies.items()
    ]


def charge(cgroups: Cgroups, texts: Sequence[str]) -> Charge:
    """Read what the launcher reported of the accounts of one sandbox."""
    names = chain.from_iterable(cgroups.hierarchies.values())
    return accounts.parse(cgroups.version, names, texts)


def opened(cgroups: Cgroups, name: str) -> Cgroup:
    """Return a cgroup that the launcher made; without accounts where it is gone already.

    Raises SandboxFailed where there are no descriptors left.
    """
    folders = {controller: base / name for controller, base in cgroups.bases.items()}
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


def _settings(version: int, controller: str, limits: Limits) -> list[tuple[str, str, bool]]:
    """Return the files to write, in order, and whether the kernel must have them."""
    memory = str(limits.memory_bytes)
    if controller == "pids":
        return [("pids.max", str(limits.pids + INIT_PIDS), True)]
    if controller == "memory" and version == 2:
        # No swap at all: then `memory.max` is the whole.
        return [("memory.max", memory, True), ("memory.swap.max", "0", False)]
    if controller == "memory":
        # In this order: memory and swap together are never less than memory alone.
        return [
            ("memory.limit_in_bytes", memory, True),
            ("memory.memsw.limit_in_bytes", memory, False),
        ]
    return []
