"""Step "sandbox": which layers this machine really gives, found by using them.

Reading version numbers and settings is not enough (a container may refuse what the kernel has),
so each tier is tried once with a program that does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from safeconduct.call import Tier
from safeconduct.errors import SandboxUnavailable

from .cgroup import Cgroups

LANDLOCK_ABI_FULL = 1
# Signal and abstract-socket scopes came with ABI 6 (Linux 6.12); tier landlock rests on them.
LANDLOCK_ABI_ALONE = 6

_HELP = {
    Tier.FULL: "Allow user namespaces (sysctl user.max_user_namespaces, and on Ubuntu the AppArmor "
    "profile that `safeconduct doctor` names), or run as root.",
    Tier.LANDLOCK: "Tier landlock needs Linux 6.12 or newer with Landlock enabled.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was found: for each tier the reason it is missing, or an empty string."""

    tiers: Mapping[Tier, str]
    landlock_abi: int
    cgroups: Cgroups | None
    root: bool

    def choose(self, require: Tier | None, *, cgroup: bool = False) -> Tier:
        """Pick the strongest tier in force here.

        Raises SandboxUnavailable where that is less than ``require``, or where ``cgroup`` is
        required and no cgroup can be made: nothing weakens silently.
        """
        if cgroup and self.cgroups is None:
            raise SandboxUnavailable(
                "The policy requires cgroup limits, and no cgroup is delegated to this process.",
                missing="cgroup",
                hint="Start it with: systemd-run --user --scope -p Delegate=yes COMMAND",
            )
        for tier in (Tier.FULL, Tier.LANDLOCK):
            if not self.tiers[tier]:
                return tier
            if require is tier:
                raise SandboxUnavailable(
                    f"The policy requires tier {tier}: {self.tiers[tier]}",
                    missing=f"tier:{tier}",
                    hint=_HELP[tier],
                )
        raise SandboxUnavailable(
            "This machine gives no tier: " + " ".join(self.tiers.values()),
            missing="tier",
            hint=_HELP[Tier.FULL],
        )


def landlock_shortfall(abi: int, tier: Tier) -> str:
    """Say why the kernel's Landlock ABI is not enough for a tier; empty where it is."""
    needed = LANDLOCK_ABI_FULL if tier is Tier.FULL else LANDLOCK_ABI_ALONE
    if abi >= needed:
        return ""
    have = f"ABI {abi}" if abi else "no Landlock"
    return f"Landlock ABI {needed} is needed, this kernel has {have}."


def is_root() -> bool:
    """Tell whether this process may give sandboxes user ids of their own."""
    return os.geteuid() == 0
