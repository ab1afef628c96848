"""Step "sandbox": what one sandbox sees, as mounts (tier full) and Landlock rules (both tiers).

The picture is the same in both tiers as far as the kernel allows: system programs read-only, a
private scratch folder, the profile's folders at the paths they have outside, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob
from typing import TypeAlias

from safeconduct.call import Profile, Tier, WorkspaceMode
from safeconduct.errors import SandboxFailed, SandboxUnavailable

from .shield import Shield

Plan: TypeAlias = "dict[str, object]"

SEARCH = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/local/go/bin")
INSIDE_UID = 1000
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
# Configuration without secrets that programs in /usr cannot do without.
_SYSTEM_FILES = (
    "/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
    "/etc/localtime", "/etc/mime.types", "/etc/ssl/certs", "/etc/java-*-openjdk",
    "/etc/python3*", "/etc/debian_version", "/etc/os-release",
)  # fmt: skip
# Their entries are used by name; a list of them is an inventory of the machine.
_UNLISTED = frozenset(
    ("/bin", "/sbin", "/lib", "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/local/bin",
     "/usr/local/sbin"),
)  # fmt: skip
# Only the folders in them are granted: what else lies there belongs to no package.
_PARTED = frozenset(("/usr", "/usr/local", "/usr/share"))
# Accounts and keys of the host that no program run here reads.
_MASKED_SYSTEM = ("/usr/share/base-passwd", "/usr/share/keyrings")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_SHM_BYTES = 64 << 20
_MASKED = (
    "sys", "bus", "irq", "fs", "acpi", "scsi", "tty", "driver", "kcore", "keys", "key-users",
    "kmsg", "kallsyms", "timer_list", "sched_debug", "sysrq-trigger", "latency_stats", "modules",
    "slabinfo", "swaps",
    # The machine itself: its boot line and devices.
    "cmdline", "iomem", "ioports", "interrupts", "config.gz", "partitions",
)  # fmt: skip
# These tell the processor and the memory; ps(1) wants to open them and is content with nothing.
_EMPTIED = ("cpuinfo", "meminfo")
# Landlock cannot grant "my own /proc/PID" to every future process, so tier landlock gets these.
_PROC_FACTS = ("filesystems", "loadavg", "stat", "uptime", "version")
_ETC = {
    "/etc/passwd": f"agent:x:{INSIDE_UID}:{INSIDE_UID}:agent:/tmp:/bin/sh\n",
    "/etc/group": f"agent:x:{INSIDE_UID}:\n",
    "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    # Enough for `openssl req -subj`; the host's own file may say more than programs need.
    "/etc/ssl/openssl.cnf": "[req]\ndistinguished_name = name\n[name]\n",
    # Lets a program of ours find out where it is, whatever its environment claims.
    "/run/safeconduct": "sandbox\n",
}


# What the mounts do not tell: folders of the root itself, and the private procfs.
_ALWAYS: tuple[Plan, ...] = (
    {"path": "/etc", "access": "use"},
    {"path": "/proc", "access": "read"},
    {"path": "/run", "access": "use"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the launcher is asked to show, and the environment that goes with it."""

    mounts: Sequence[Plan] = ()
    landlock: Sequence[Plan] = ()


def environment_of(tier: Tier, scratch: str) -> dict[str, str]:
    """Return the environment of a program; ``scratch`` is what it calls its private folder."""
    environment = {
        "PATH": ":".join(SEARCH),
        "HOME": scratch,
        "TMPDIR": scratch,
        "LANG": "C.UTF-8",
        "USER": "agent",
        "LOGNAME": "agent",
        "TERM": "dumb",
        "SAFECONDUCT_SANDBOX": str(tier),
    }
    if tier is Tier.LANDLOCK:
        # Landlock refuses what full does not even show, and git gives up on a refused file.
        environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1"}
        environment |= {"OPENSSL_CONF": "/dev/null"}
        # As root the workspace belongs to somebody else than the program, and git gives up there.
        environment |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory"}
        environment |= {"GIT_CONFIG_VALUE_0": "*"}
    return environment


def lay_out(profile: Profile, tier: Tier, *, cwd: str, shield: Shield, mapped: bool) -> Layout:
    """Plan the sandboxes of a profile. ``mapped`` asks for id-mapped mounts of its folders.

    Raises SandboxFailed where the profile cannot be shown safely.
    """
    granted = [*profile.read, *profile.write]
    if "/" in granted:
        raise SandboxFailed("A profile cannot grant the whole file system.", step="layout")
    overlaid = profile.workspace.overlaid
    if tier is Tier.LANDLOCK:
        if overlaid:
            raise SandboxUnavailable(
                "An overlay workspace needs mounts, which tier landlock does not have.",
                missing="overlay",
                hint="Use workspace: direct in this profile, or require: {tier: full}.",
            )
        return Layout(landlock=list(_landlock_alone(profile, shield)))
    base, granted_here = (
        lay_out_base(profile),
        lay_out_grants(profile, cwd=cwd, shield=shield, mapped=mapped),
    )
    return Layout(
        mounts=[*base.mounts, *granted_here.mounts],
        landlock=[*base.landlock, *granted_here.landlock],
    )


def lay_out_base(profile: Profile) -> Layout:
    """Plan what every sandbox with these limits shows: system programs and private folders."""
    private = list(_private(profile))
    return Layout(
        mounts=[*private, *_system_mounts()],
        landlock=[*_landlock_of(private), *_ALWAYS, *_system_rules(Tier.FULL)],
    )


def lay_out_grants(profile: Profile, *, cwd: str, shield: Shield, mapped: bool) -> Layout:
    """Plan what the profile adds to that, in tier full; it can be attached late."""
    if profile.workspace.overlaid:
        # A layer of its own takes every change: what may not be renamed away is so only there.
        shield = replace(shield, anchors=())
    mounts = [*_profile_mounts(profile, mapped), *_shield_mounts(shield, mapped)]
    rules = list(_landlock_of(mounts))
    if cwd != "/":
        mounts.append({"kind": "folder", "target": cwd})
    return Layout(mounts=mounts, landlock=rules)


def _system() -> Iterator[tuple[str, str]]:
    """Yield (real source, path inside) of everything a program in /usr needs."""
    for path in _SYSTEM:
        if os.path.isdir(path) and not os.path.islink(path):
            yield path, path
    for pattern in _SYSTEM_FILES:
        for path in sorted(glob(pattern)):
            yield os.path.realpath(path), path


def _system_rules(tier: Tier) -> Iterator[Plan]:
    """Grant what `_system` names in Landlock's words, where folders can stay unlisted."""
    # In tier full the rules name paths of the new root, otherwise the host's.
    waiting = [path if tier is Tier.FULL else source for source, path in _system()]
    while waiting:
        path = waiting.pop()
        if path in _MASKED_SYSTEM:
            continue
        parted = path in _PARTED and (path != "/usr/share" or tier is Tier.LANDLOCK)
        if not parted and path not in _UNLISTED:
            yield {"path": path, "access": "read"}
            continue
        if path in _UNLISTED:
            yield {"path": path, "access": "use"}
        with os.scandir(path) as entries:
            waiting += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]


def _private(profile: Profile) -> Iterator[Plan]:
    limits = profile.limits
    private: Plan = {"kind": "tmpfs", "mode": 0o1777, "inodes": limits.inodes}
    yield private | {"target": "/tmp", "bytes": limits.disk_bytes}  # noqa: S108 - its own
    yield private | {"target": "/dev/shm", "bytes": min(_SHM_BYTES, limits.disk_bytes)}  # noqa: S108
    for name in _DEVICES:
        device = f"/dev/{name}"
        yield {"kind": "bind", "source": device, "target": device, "device": True, "write": True}
    for name, to in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        yield {"kind": "link", "target": f"/dev/{name}", "to": f"/proc/self/fd{to}"}
    yield {"kind": "proc", "target": "/proc"}
    for name in _MASKED:
        yield {"kind": "mask", "target": f"/proc/{name}"}
    for name in _EMPTIED:
        yield {"kind": "mask", "target": f"/proc/{name}", "empty": True}


def _system_mounts() -> Iterator[Plan]:
    for path in _SYSTEM:
        if os.path.islink(path):
            yield {"kind": "link", "target": path, "to": os.readlink(path)}
    for source, target in _system():
        yield _bind(source, target)
    for path in _MASKED_SYSTEM:
        yield {"kind": "mask", "target": path}
    for target, text in _ETC.items():
        yield {"kind": "file", "target": target, "text": text}


def _profile_mounts(profile: Profile, mapped: bool) -> Iterator[Plan]:
    """Bind the granted folders, outer before inner, leaving out what is already shown so."""
    writable = set(profile.write)
    shown: dict[str, bool] = dict.fromkeys(_SYSTEM, False)
    for path in sorted({*profile.read, *writable}):
        write = path in writable
        around = [write_there for outer, write_there in shown.items() if inside(path, outer)]
        if around and around[-1] >= write:
            continue
        if not os.path.lexists(path):
            raise SandboxFailed(
                f"The profile grants {path}, which does not exist.",
                step="layout",
                code="sandbox.missing_grant",
                hint="Make it, or take it out of the profile.",
            )
        shown[path] = write
        if write and profile.workspace.overlaid:
            limits = profile.limits
            yield {
                "kind": "overlay", "source": path, "target": path, "bytes": limits.disk_bytes,
                "inodes": limits.inodes, "mapped": mapped,
                "session": profile.workspace is WorkspaceMode.SESSION,
            }  # fmt: skip
            continue
        # One that lies in another is gone as soon as somebody replaces its folder outside.
        yield _bind(path, path) | {"write": write, "mapped": mapped, "held": bool(around)}


def overlaid(profile: Profile) -> list[str]:
    """Return the folders that a sandbox of this profile writes through overlays, in their order."""
    if not profile.workspace.overlaid:
        return []
    mounts = _profile_mounts(profile, mapped=False)
    return [str(mount["source"]) for mount in mounts if mount["kind"] == "overlay"]


def _shield_mounts(shield: Shield, mapped: bool) -> Iterator[Plan]:
    for path in shield.anchors:
        # A mount point cannot be renamed away together with what is protected below it.
        yield _bind(path, path) | {"write": True, "mapped": mapped, "held": True}
    for path in shield.protected:
        yield _bind(path, path) | {"mapped": mapped, "held": True}
    for path in shield.hidden:
        yield {"kind": "mask", "target": path, "held": True}


def _bind(source: str, target: str) -> Plan:
    return {"kind": "bind", "source": source, "target": target}


def _landlock_of(mounts: Iterable[Plan]) -> Iterator[Plan]:
    """Say in Landlock's words what the mounts already say: two barriers, one picture."""
    for mount in mounts:
        target = str(mount["target"])
        if mount["kind"] == "bind" and mount.get("device"):
            yield {"path": target, "access": "device"}
        elif mount["kind"] in ("bind", "tmpfs", "overlay"):
            writable = mount["kind"] != "bind" or mount.get("write")
            yield {"path": target, "access": "write" if writable else "read"}


def _landlock_alone(profile: Profile, shield: Shield) -> Iterator[Plan]:
    """Grant by Landlock alone, where hiding and protecting can only mean not granting."""
    yield from _system_rules(Tier.LANDLOCK)
    for name in _DEVICES:
        yield {"path": f"/dev/{name}", "access": "device"}
    for name in _PROC_FACTS:
        if os.path.exists(f"/proc/{name}"):
            yield {"path": f"/proc/{name}", "access": "read"}
    for access, roots, without in (
        ("read", {*profile.read, *profile.write}, shield.hidden),
        ("write", set(profile.write), (*shield.hidden, *shield.protected)),
    ):
        for root in sorted(roots):
            yield from _carve(root, access, frozenset(without))


def _carve(root: str, access: str, without: frozenset[str]) -> Iterator[Plan]:
    """Grant ``root`` except ``without``: Landlock only adds, so grant the siblings instead.

    New entries of a folder that had to be carved cannot be made, and hidden names in it can be
    listed but not read (docs/threat-model.md).
    """
    waiting = [root]
    while waiting:
        path = waiting.pop()
        if any(inside(path, hole) for hole in without):
            continue
        if not any(inside(hole, path) for hole in without):
            yield {"path": path, "access": access}
            continue
        if access == "read":
            yield {"path": path, "access": "list"}
        waiting += _siblings(path)


def _siblings(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if not entry.is_symlink()]
    except OSError as error:
        # The shield opened it a moment ago, so something closes it on purpose, or it is not ours.
        raise SandboxFailed(
            f"{folder} holds what must not be granted, and cannot be listed: {error.strerror}.",
            step="layout",
            errno=error.errno or 0,
            hint="Give your user the right to list it, chmod(1).",
        ) from error


def inside(path: str, folder: str) -> bool:
    """Tell whether ``path`` is ``folder`` or lies below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
