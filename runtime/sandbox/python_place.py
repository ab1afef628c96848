"""Step "sandbox": where Python calls of one kind run, and how their forks are walled in."""

from __future__ import annotations

import base64
import os
import sys
import sysconfig
from dataclasses import dataclass, replace

import msgspec

from safeconduct.call import Limits, Profile, Tier
from safeconduct.errors import SandboxUnavailable

from . import bounds, python_call, python_confine, python_nest, python_worker, seccomp
from .interpreter import base_grants
from .layout import inside, lay_out
from .shield import Shield

_SCRATCH = "/tmp"  # noqa: S108 - inside a fork, a file system of its own
_SHM = "/dev/shm"  # noqa: S108 - as above
_SHM_BYTES, _PAGE_BYTES = 64 << 20, 4096
# The zygote lives as long as its engine; each call has a wall limit of its own.
_SESSION_MS = 24 * 60 * 60 * 1000
# Beyond the memory of one call: an interpreter and what a profile imports.
_OVERHEAD_BYTES = 512 << 20
_FILES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where calls of one kind run: what a zygote is made for."""

    profile: Profile
    workspace: str
    shield: Shield
    # Count the system calls that are refused.
    explain: bool = False

    @property
    def cwd(self) -> str:
        """The workspace where it is granted, else the scratch folder."""
        granted = (*self.profile.read, *self.profile.write)
        seen = any(inside(self.workspace, path) for path in granted)
        return self.workspace if seen else _SCRATCH

    @property
    def sites(self) -> tuple[str, ...]:
        """Folders of installed packages, if the profile imports more than the standard library.

        Raises SandboxUnavailable where a call could change what the next zygote imports.
        """
        if all(name.partition(".")[0] in sys.stdlib_module_names for name in self.profile.imports):
            return ()
        # Where the packages are that this runtime itself uses, and where more are installed.
        folders = [os.path.dirname(os.path.dirname(msgspec.__file__))]
        folders += [sysconfig.get_path(name) for name in ("purelib", "platlib")]
        found = dict.fromkeys(os.path.realpath(path) for path in folders if os.path.isdir(path))
        for folder in found:
            if any(inside(folder, root) for root in self.profile.write):
                raise SandboxUnavailable(
                    f"The profile {self.profile.name} may write {folder}, which it imports from.",
                    missing="python-imports",
                    hint="Install the packages outside of the folders that the profile may write.",
                )
        return tuple(found)

    def granted(self) -> Profile:
        """Return the profile with what the interpreter itself needs to read."""
        files = (python_worker.__file__, python_call.__file__, python_confine.__file__)
        needed = {*base_grants(), *self.sites, *(os.path.realpath(file) for file in files)}
        read = (*self.profile.read, *sorted(needed - set(self.profile.read)))
        return replace(self.profile, read=read)

    def setting(self, mode: str) -> dict[str, object]:
        """Return what every configuration says."""
        return {
            "mode": mode,
            "imports": list(self.profile.imports),
            "paths": list(self.sites),
            "cwd": self.cwd,
        }


def zygote_limits(limits: Limits) -> Limits:
    """Return the limits of a zygote, which must leave room for all of its forks."""
    return replace(
        limits,
        wall_ms=_SESSION_MS,
        cpu_ms=None,
        # Without cgroups of their own all forks count here too.
        memory_bytes=limits.memory_bytes + _OVERHEAD_BYTES,
        pids=(limits.pids + 1) * python_worker.FORKS_MAX,
        files=max(limits.files, _FILES),
    )


def walls(place: Place, granted: Profile, *, in_cgroup: bool) -> dict[str, object]:
    """Describe the confinement of a fork: the same picture that the launcher makes."""
    layout = lay_out(granted, Tier.FULL, cwd="/", shield=place.shield, mapped=False)
    limits = place.profile.limits
    options = f"nr_inodes={limits.inodes},mode=1777"
    sizes = {_SCRATCH: limits.disk_bytes, _SHM: min(_SHM_BYTES, limits.disk_bytes)}
    # tmpfs(5): a size of 0 would mean no limit at all.
    private = [(path, f"size={max(size, _PAGE_BYTES)},{options}") for path, size in sizes.items()]
    kept: list[str] = []
    for mount in layout.mounts:
        target = str(mount["target"])
        below = any(inside(target, path) and target != path for path in sizes)
        if below and not any(inside(target, path) for path in kept):
            kept.append(target)
    rlimits = bounds.rlimits(limits, Tier.FULL, in_cgroup=in_cgroup)
    return {
        "rules": [(rule["path"], rule["access"]) for rule in layout.landlock],
        "private": private,
        "kept": kept,
        "rlimits": [(bound["name"], bound["value"]) for bound in rlimits],
        "filter": base64.b64encode(
            seccomp.filter_of(Tier.FULL, place.profile, explain=place.explain)
        ).decode(),
        "listen": python_nest.listening_call() if place.explain else 0,
    }
