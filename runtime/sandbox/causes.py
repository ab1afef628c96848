"""Step "sandbox": why a layer is missing here and what gives it, from facts alone.

Pure functions: the same facts always give the same sentence. The order of the questions matters;
each one rules out what a later one would wrongly name.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from .facts import Facts, Trial

_SETUP = "safeconduct setup (prints the one step, with root: --apply)"
_OUTSIDE = "nothing inside can give more: start safeconduct outside of it"
_SECCOMP_OPEN = (
    "start the container with a seccomp profile that allows clone, unshare, mount and pivot_root "
    "(docker, podman: --security-opt seccomp=PROFILE.json; seccomp=unconfined allows everything)"
)
_PROC_OPEN = (
    "start the container with an unmasked /proc (docker: --security-opt systempaths=unconfined; "
    "podman: --security-opt unmask=ALL; bubblewrap: nothing bound below /proc)"
)
# What each Landlock ABI brought, in which Linux; landlock(7).
_LANDLOCK = (
    (2, "5.19", "moving files between folders"),
    (3, "6.2", "truncate"),
    (4, "6.7", "TCP ports"),
    (5, "6.10", "ioctl on devices"),
    (6, "6.12", "scopes of signals and abstract sockets"),
    (7, "6.15", "audit log"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why something is missing, and the step that gives it."""

    note: str
    get: str


def user_namespaces(facts: Facts) -> Cause | None:
    """Say why no user namespace can be made and used; None where one was."""
    trial = facts.trial("user")
    if trial.ok:
        return None
    if trial.step == "unshare":
        return _not_made(facts, trial)
    return _not_usable(facts, trial)


def _not_made(facts: Facts, trial: Trial) -> Cause:
    around, knobs = facts.around, facts.knobs
    if around.ours:
        return Cause(
            note="the safeconduct sandbox around this process refuses user namespaces", get=_OUTSIDE
        )
    # Debian looks at its setting before it looks at what was asked, so it passes for a filter.
    forbidden = knobs.get("kernel.unprivileged_userns_clone") == "0" and not _is_admin(facts)
    if forbidden and trial.errno == errno.EPERM:
        return Cause(note="kernel.unprivileged_userns_clone = 0", get=_SETUP)
    if facts.filtered:
        where = around.container or "container or sandbox"
        return Cause(
            note=f"the seccomp filter of the {where} around refuses user namespaces ({trial})",
            get=_SECCOMP_OPEN,
        )
    if trial.errno == errno.ENOSPC:
        return _used_up(facts)
    if trial.errno == errno.EUSERS:
        return Cause(note="32 user namespaces are nested already", get=_OUTSIDE)
    if trial.errno in (errno.EINVAL, errno.ENOSYS):
        return Cause(
            note="this kernel was built without user namespaces", get="a kernel with CONFIG_USER_NS"
        )
    return _by_security_module(facts, trial)


def _used_up(facts: Facts) -> Cause:
    knob = "user.max_user_namespaces"
    if facts.knobs.get(knob) == "0":
        get = _SETUP if facts.around.ids_mapped else _OUTSIDE
        return Cause(note=f"{knob} = 0", get=get)
    return Cause(
        note=f"the limit of user namespaces is used up here or in a namespace around ({knob})",
        get=f"raise {knob} there: sysctl -w {knob}=15000",
    )


def _not_usable(facts: Facts, trial: Trial) -> Cause:
    if trial.step == "map ids" and facts.root and not _is_admin(facts):
        return Cause(
            note=f"made, but root without capabilities may not map itself ({trial})",
            get="start as an ordinary user, or give the container CAP_SYS_ADMIN and CAP_SETFCAP",
        )
    return _by_security_module(facts, trial)


def _by_security_module(facts: Facts, trial: Trial) -> Cause:
    around, modules = facts.around, facts.security_modules or ()
    if facts.knobs.get("kernel.apparmor_restrict_unprivileged_userns") == "1":
        return Cause(note=f"kernel.apparmor_restrict_unprivileged_userns = 1 ({trial})", get=_SETUP)
    if around.apparmor:
        return Cause(
            note=f"the AppArmor profile {around.apparmor} of this process refuses user namespaces "
            f"({trial})",
            get="start it under a profile with `userns,` "
            "(docker, podman: --security-opt apparmor=unconfined)",
        )
    if "selinux" in modules:
        return Cause(
            note=f"refused ({trial}), most likely by SELinux",
            get="allow user_namespace create for this domain: ausearch -m avc shows the refusal",
        )
    return Cause(
        note=f"refused by the kernel, a chroot or a security module around ({trial})",
        get="start as root, or outside of what is around this process",
    )


def namespace(facts: Facts, kind: str) -> Cause | None:
    """Say why a namespace of a kind cannot be made; None where one was."""
    trial = facts.trial(kind)
    if trial.ok:
        return None
    if user_namespaces(facts) is not None and not _is_admin(facts):
        return Cause(note="needs a user namespace", get="see user namespaces")
    if trial.errno == errno.EINVAL:
        return Cause(note="this kernel was built without it", get=f"a kernel with CONFIG_{kind}_NS")
    if trial.errno == errno.ENOSPC:
        knob = f"user.max_{kind}_namespaces"
        return Cause(note=f"the limit {knob} is used up", get=f"sysctl -w {knob}=15000")
    return Cause(note=f"refused ({trial})", get=_SECCOMP_OPEN)


def without_admin(facts: Facts, cause: Cause) -> Cause:
    """Add to a cause that this root is none, as in a container."""
    if not facts.root or facts.around.ours:
        return cause
    where = f" ({facts.around.container})" if facts.around.container else ""
    return Cause(
        note=f"root without CAP_SYS_ADMIN{where}, and user namespaces: {cause.note}", get=cause.get
    )


def mounts(facts: Facts, trial_name: str) -> Cause | None:
    """Say why something cannot be mounted in a mount namespace; None where it was."""
    trial = facts.trial(trial_name)
    if trial.ok:
        return None
    cause = namespace(facts, "mount")
    if cause is not None:
        return cause
    if trial_name == "proc" and trial.step == "mount proc" and trial.errno == errno.EPERM:
        # mount_namespaces(7): a new proc may show nothing that the one around hides.
        masks = ", ".join(facts.around.proc_masked[:4]) or "it is not fully visible"
        return Cause(note=f"/proc is masked around this process: {masks}", get=_PROC_OPEN)
    if trial.errno in (errno.ENODEV, errno.EINVAL):
        return Cause(note=f"not in this kernel ({trial})", get=f"modprobe {trial_name}, as root")
    return Cause(note=f"refused ({trial})", get=_by_security_module(facts, trial).get)


def mapped_mounts(facts: Facts) -> Cause | None:
    """Say why the workspace cannot be shown under other ids; None where it was."""
    trial = facts.trial("idmap")
    if trial.ok:
        return None
    if not facts.around.ids_mapped:
        return Cause(note="only the first user namespace can map ids for others", get=_OUTSIDE)
    if not facts.root:
        return Cause(note="only root can; not needed with your own user id", get="start as root")
    if trial.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        return Cause(
            note=f"the file system of this folder does not know them ({trial})",
            get="a workspace on ext4, xfs, btrfs or tmpfs (Linux 6.3)",
        )
    return Cause(note=f"refused ({trial})", get="CAP_SYS_ADMIN: start as root outside a container")


def own_ids(facts: Facts) -> Cause | None:
    """Say why sandboxes cannot be given user ids of their own; None where one was."""
    trial = facts.trial("own ids")
    if trial.ok:
        return None
    if not facts.root:
        return Cause(note="sandboxes run as your own user id, mapped", get="start as root")
    if trial.errno == errno.EINVAL:
        return Cause(note="root of a user namespace that maps too few ids", get=_OUTSIDE)
    return Cause(note=f"root without CAP_SETUID ({trial})", get="give the container CAP_SETUID")


def landlock(facts: Facts) -> Cause | None:
    """Say why Landlock does not hold; None where it did."""
    trial, asked = facts.trial("landlock"), -min(facts.landlock_abi, 0)
    if trial.ok:
        return None
    if facts.around.ours:
        return Cause(note=f"the sandbox around refuses Landlock ({trial})", get=_OUTSIDE)
    if asked == errno.EOPNOTSUPP:
        modules = ",".join(facts.security_modules or ())
        have = f" (lsm={modules})" if modules else ""
        return Cause(
            note=f"Landlock is in this kernel, but not switched on{have}",
            get="boot with landlock first in the lsm= list, such as lsm=landlock,"
            f"{modules or 'lockdown,yama,integrity,apparmor,bpf'}",
        )
    if asked == errno.ENOSYS and not (facts.filtered and facts.around.seccomp_filter):
        return Cause(
            note="Landlock is not in this kernel",
            get="Linux 6.12 or newer with CONFIG_SECURITY_LANDLOCK",
        )
    if facts.filtered or facts.around.seccomp_filter:
        return Cause(note=f"a seccomp filter around refuses Landlock ({trial})", get=_SECCOMP_OPEN)
    return Cause(note=f"Landlock does not hold ({trial})", get="Linux 6.12 or newer")


def landlock_lacks(abi: int) -> str:
    """Say what an ABI does not know yet; empty where nothing that we use."""
    return "; ".join(
        f"{what} (ABI {needed}, Linux {release})"
        for needed, release, what in _LANDLOCK
        if 0 < abi < needed
    )


def seccomp(facts: Facts) -> Cause | None:
    """Say why no seccomp filter can be loaded; None where one held."""
    trial = facts.trial("seccomp")
    if trial.ok:
        return None
    if facts.around.ours:
        return Cause(
            note=f"the safeconduct sandbox around refuses a filter ({trial})", get=_OUTSIDE
        )
    if facts.around.seccomp_filter:
        return Cause(note=f"the seccomp filter around refuses another ({trial})", get=_SECCOMP_OPEN)
    return Cause(note=f"seccomp does not hold ({trial})", get="a kernel with CONFIG_SECCOMP_FILTER")


def _is_admin(facts: Facts) -> bool:
    return "CAP_SYS_ADMIN" in facts.capabilities
