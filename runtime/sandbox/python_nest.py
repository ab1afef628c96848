"""Step "sandbox": start our own program so that it can confine its forks itself.

Three things differ from every other program: no Landlock domain yet (mounting fails inside one),
an unmasked /proc (a fork could not mount its own otherwise, mount_namespaces(7)), and a seccomp
filter that also lets it make exactly the namespaces and mounts its forks need.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from tempfile import TemporaryFile

import pyseccomp as libseccomp

from safeconduct.call import Profile, Tier
from safeconduct.errors import SandboxUnavailable

from . import seccomp
from .layout import Layout
from .native import NativeSandbox
from .plan import Plan
from .python_confine import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
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
        return nesting_filter(profile.syscalls)


def nesting(native: NativeSandbox) -> Nesting:
    """Return what starts one zygote beside ``native``; it must be open as long as the zygote is."""
    launcher, groups = native._launcher, native._cgroups  # pyright: ignore[reportPrivateUsage]
    return Nesting(launcher, tier=Tier.FULL, cgroups=groups, ahead=0)


def _masks_proc(target: str) -> bool:
    return target.startswith("/proc/")


@cache
def nesting_filter(syscalls: tuple[str, ...] = ()) -> bytes:
    """Compile the zygote's filter: that of its forks and what it needs to confine them."""
    try:
        program = libseccomp.SyscallFilter(defaction=libseccomp.ERRNO(errno.ENOSYS))
        program.set_attr(libseccomp.Attr.ACT_BADARCH, libseccomp.KILL_PROCESS)
        program.set_attr(libseccomp.Attr.CTL_OPTIMIZE, 2)
        for action, name, arguments in seccomp._rules(Tier.FULL, syscalls):  # pyright: ignore[reportPrivateUsage]
            if libseccomp.resolve_syscall(libseccomp.system_arch(), name) >= 0:
                program.add_rule(action, name, *arguments)
        for flags in _UNSHARES:
            program.add_rule(libseccomp.ALLOW, "unshare", _equal(0, flags))
        program.add_rule(libseccomp.ALLOW, "setns", _equal(1, CLONE_NEWPID))
        for name in _MOUNTS:
            program.add_rule(libseccomp.ALLOW, name)
        for option in (_PRCTL_SECCOMP, _PRCTL_BOUNDING_SET):
            program.add_rule(libseccomp.ALLOW, "prctl", _equal(0, option))
        with TemporaryFile() as file:
            program.export_bpf(file)
            file.seek(0)
            return file.read()
    except (OSError, RuntimeError, ValueError) as error:
        raise SandboxUnavailable(
            f"libseccomp cannot compile the filter: {error}",
            missing="seccomp",
            hint="Install libseccomp 2.5 or newer (package libseccomp2).",
        ) from error


def _equal(position: int, value: int) -> libseccomp.Arg:
    return libseccomp.Arg(position, libseccomp.EQ, value)
