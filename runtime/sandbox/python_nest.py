"""Step "sandbox": start our own program so that it can confine its forks itself.

Three things differ from every other program: no Landlock domain yet (mounting fails inside one),
an unmasked /proc (a fork could not mount its own otherwise, mount_namespaces(7)), and a seccomp
filter that also lets it make exactly the namespaces and mounts its forks need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

import pyseccomp as libseccomp

from safeconduct.call import Profile, Tier

from . import seccomp
from .cgroup import Cgroups
from .launcher import Launcher
from .layout import Layout
from .native import NativeSandbox
from .plan import Plan
from .python_confine import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    SECCOMP_LISTEN,
    SECCOMP_SET_MODE_FILTER,
)

# The only combinations that python_worker.py and python_confine.py ask for.
_UNSHARES = (
    CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID,
    CLONE_NEWPID,
    CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWCGROUP,
    CLONE_NEWUSER,
)
_MOUNTS = ("mount", "open_tree", "move_mount")
_PRCTL_SECCOMP, _PRCTL_BOUNDING_SET = 22, 24


class Nesting(NativeSandbox):
    """Starts programs of ours as ``NativeSandbox`` does, but open to nesting.

    Tier full only: without namespaces there is nothing that they could nest.
    """

    def __init__(self, launcher: Launcher, cgroups: Cgroups | None, *, asking: bool) -> None:
        """``asking`` where each fork shall have a listener of its own, for what it is refused."""
        super().__init__(launcher, tier=Tier.FULL, cgroups=cgroups, ahead=0)
        self._asking = asking

    def plan(
        self,
        profile: Profile,
        layout: Layout,
        ids: Mapping[str, object],
        *,
        explain: bool = False,
    ) -> Plan:
        plan = super().plan(profile, layout, ids, explain=explain)
        masked = [mount for mount in plan.mounts if not _masks_proc(str(mount["target"]))]
        layers = [layer for layer in plan.layers if layer != "landlock"]
        return replace(plan, layers=layers, mounts=masked, landlock=())

    def program(self, profile: Profile, *, explain: bool = False) -> bytes:
        del explain
        return nesting_filter(profile.syscalls, asking=self._asking)


def nesting(native: NativeSandbox, *, asking: bool) -> Nesting:
    """Return what starts one zygote beside ``native``; it must be open as long as the zygote is."""
    launcher, groups = native._launcher, native._cgroups  # pyright: ignore[reportPrivateUsage]
    return Nesting(launcher, groups, asking=asking)


def _masks_proc(target: str) -> bool:
    return target.startswith("/proc/")


@cache
def nesting_filter(syscalls: tuple[str, ...] = (), *, asking: bool = False) -> bytes:
    """Compile the zygote's filter: that of its forks and what it needs to confine them.

    An errno of this filter would go before a question of a fork's, seccomp(2), so with ``asking``
    it asks too. Nobody listens to it: what the zygote is refused is then always ENOSYS, and of two
    filters that ask the kernel asks the newer one, the fork's.
    INVARIANT: a fork's filter refuses seccomp(2), so nothing newer answers for that one.
    """
    program = seccomp.export(Tier.FULL, syscalls, _nesting_rules(asking=asking))
    return seccomp.asking(program) if asking else program


def listening_call() -> int:
    """Return the number of seccomp(2), which alone loads a filter with a listener."""
    return libseccomp.resolve_syscall(libseccomp.system_arch(), "seccomp")


def _nesting_rules(*, asking: bool) -> Iterator[seccomp.Rule]:
    allow = libseccomp.ALLOW
    for flags in _UNSHARES:
        yield allow, "unshare", (_equal(0, flags),)
    yield allow, "setns", (_equal(1, CLONE_NEWPID),)
    for name in _MOUNTS:
        yield allow, name, ()
    for option in (_PRCTL_SECCOMP, _PRCTL_BOUNDING_SET):
        yield allow, "prctl", (_equal(0, option),)
    if asking:
        loading = (_equal(0, SECCOMP_SET_MODE_FILTER), _equal(1, SECCOMP_LISTEN))
        yield allow, "seccomp", loading


def _equal(position: int, value: int) -> libseccomp.Arg:
    return libseccomp.Arg(position, libseccomp.EQ, value)
