"""Step "sandbox": which layers this machine really gives, found by using them.

Reading version numbers and settings is not enough (a container may refuse what the kernel has),
so each tier is tried once with a program that does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from safeconduct.call import Tier
from safeconduct.errors import SandboxUnavailable

from .cgroup import Cgroups

LANDLOCK_ABI_FULL = 1
# Signal and abstract-socket scopes came with ABI 6 (Linux 6.12); tier landlock rests on them.
LANDLOCK_ABI_ALONE = 6

# Host ids of sandboxes started by root: above every range that distributions and containers hand
# out (systemd's container ids end at 0x6FFFFFFF), below what a signed 32-bit id allows.
OWN_ID_FIRST, OWN_ID_COUNT = 0x7000_0000, 0x0F00_0000

_HELP = {
    Tier.FULL: "`safeconduct doctor` says what refuses it here and the step that gives it.",
    Tier.LANDLOCK: "Tier landlock needs Linux 6.12 or newer with Landlock switched on; "
    "`safeconduct doctor` says what is missing.",
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
                hint="As a user of systemd: systemd-run --user --scope -p Delegate=yes -- COMMAND; "
                "`safeconduct doctor` says what holds here.",
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
            f"This machine gives no tier. {self._reasons()}",
            missing="tier",
            hint=_HELP[Tier.FULL],
        )

    def _reasons(self) -> str:
        """Say why each tier is missing, and a reason that both share only once."""
        reasons = set(self.tiers.values())
        if len(reasons) == 1:
            return reasons.pop()
        return " ".join(f"{tier}: {why}" for tier, why in self.tiers.items())


def landlock_shortfall(abi: int, tier: Tier) -> str:
    """Say why the kernel's Landlock ABI is not enough for a tier; empty where it is."""
    needed = LANDLOCK_ABI_FULL if tier is Tier.FULL else LANDLOCK_ABI_ALONE
    if abi >= needed:
        return ""
    have = f"ABI {abi}" if abi else "no Landlock"
    return f"Landlock ABI {needed} is needed, this kernel has {have}."


def is_root() -> bool:
    """Tell whether this process may give sandboxes user ids of their own.

    Root of a user namespace is not: where the ids are not mapped, setresuid(2) says EINVAL.
    """
    return os.geteuid() == 0 and _all_mapped()


@cache
def _all_mapped() -> bool:
    # The maps of a user namespace are written once, user_namespaces(7).
    return all(maps_own_ids(_read(f"/proc/self/{kind}_map")) for kind in ("uid", "gid"))


def maps_own_ids(text: str) -> bool:
    """Tell whether an id map (user_namespaces(7)) holds every id that sandboxes are given."""
    for line in text.splitlines():
        first, _, count = (int(number) for number in line.split())
        if first <= OWN_ID_FIRST and first + count >= OWN_ID_FIRST + OWN_ID_COUNT:
            return True
    return not text


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return ""  # a kernel without user namespaces: every id is itself
