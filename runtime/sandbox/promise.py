"""Step "sandbox": what will enforce a program, as its Outcome, the trace and `doctor` tell it."""

from __future__ import annotations

from safeconduct.call import Confinement, Limits, Profile, Tier, WorkspaceMode

from . import bounds, machine, share
from .cgroup import Cgroups
from .launcher import Launcher

_NAMESPACE_LAYERS = ("user-ns", "mount-ns", "pid-ns", "net-ns", "ipc-ns", "uts-ns", "cgroup-ns")


class Promises:
    """What one tier enforces on this machine; calls alike are told the same object."""

    def __init__(self, tier: Tier, launcher: Launcher, cgroups: Cgroups | None) -> None:
        self._tier, self._launcher, self._cgroups = tier, launcher, cgroups
        self._known: dict[tuple[Limits, bool, bool], Confinement] = {}

    def of(self, profile: Profile, *, watched: bool) -> Confinement:
        """Say what enforces a program of a profile; ``watched`` is one that is looked at."""
        direct = bool(profile.write) and profile.workspace is WorkspaceMode.DIRECT
        key = profile.limits, direct, watched
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._promise(*key)
        return found

    def _promise(self, limits: Limits, direct: bool, watched: bool) -> Confinement:
        layers = [f"landlock-abi{self._launcher.landlock_abi}", "seccomp", "no-capabilities"]
        if self._tier is Tier.FULL:
            layers = [*_NAMESPACE_LAYERS, *layers]
        if self._cgroups is not None:
            layers.append(f"cgroup-v{self._cgroups.version}")
        if watched:
            layers.append(share.means(self._cgroups))
        if machine.is_root():
            layers.append("own-uid")
        in_cgroup = self._cgroups is not None
        held = bounds.held(limits, self._tier, in_cgroup=in_cgroup, direct=direct, watched=watched)
        return Confinement(tier=self._tier, layers=tuple(layers), held=held)
