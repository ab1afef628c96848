"""Step "sandbox": what one sandbox sees, as mounts (tier full) and Landlock rules (both tiers).

The picture is the same in both tiers as far as the kernel allows: system programs read-only, a
private scratch folder, the profile's folders at the paths they have outside, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from typing import TypeAlias

from safeconduct.call import Profile, Tier
from safeconduct.errors import SandboxFailed

from .shield import Shield

Plan: TypeAlias = "dict[str, object]"

SEARCH = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/local/go/bin")
INSIDE_UID = 1000
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
# Configuration without secrets that programs in /usr cannot do without.
_SYSTEM_FILES = (
    "/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
    "/etc/localtime", "/etc/mime.types", "/etc/ssl/certs", "/etc/ssl/openssl.cnf",
    "/etc/ca-certificates", "/etc/java-*-openjdk", "/etc/python3*", "/etc/debian_version",
    "/etc/os-release",
)  # fmt: skip
_DEVICES = ("null", "zero", "full", "random", "urandom")
_SHM_BYTES = 64 << 20
_SCRATCH_INODES = 65_536
_MASKED_FOLDERS = ("sys", "bus", "irq", "fs", "acpi", "scsi", "tty", "driver")
_MASKED_FILES = (
    "kcore", "keys", "key-users", "kmsg", "kallsyms", "timer_list", "sched_debug",
    "sysrq-trigger", "latency_stats", "modules", "slabinfo", "swaps", "mounts.bind",
)  # fmt: skip
# Landlock cannot grant "my own /proc/PID" to every future process, so tier landlock gets these.
_PROC_FACTS = ("cpuinfo", "filesystems", "loadavg", "meminfo", "stat", "uptime", "version")
_ETC = {
    "/etc/passwd": f"agent:x:{INSIDE_UID}:{INSIDE_UID}:agent:/tmp:/bin/sh\n",
    "/etc/group": f"agent:x:{INSIDE_UID}:\n",
    "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    # Lets a program of ours find out where it is, whatever its environment claims.
    "/run/safeconduct": "sandbox\n",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the launcher is asked to show, and the environment that goes with it."""

    mounts: Sequence[Plan] = ()
    landlock: Sequence[Plan] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


def lay_out(
    profile: Profile, tier: Tier, *, scratch: str, cwd: str, shield: Shield, mapped: bool
) -> Layout:
    """Plan one sandbox. ``mapped`` asks for id-mapped mounts of the profile's folders.

    ``scratch`` is the private folder: a path inside the new root (full) or on the host.
    Raises SandboxFailed where the profile cannot be shown safely.
    """
    granted = [*profile.read, *profile.write]
    if "/" in granted:
        raise SandboxFailed("A profile cannot grant the whole file system.", step="layout")
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
        rules = list(_landlock_alone(profile, scratch, shield))
        return Layout(landlock=rules, environment=environment)
    mounts = [*_private(profile, scratch), *_system_mounts()]
    mounts += _profile_mounts(profile, mapped)
    mounts += _shield_mounts(shield, mapped)
    if cwd != "/":
        mounts.append({"kind": "folder", "target": cwd})
    return Layout(mounts=mounts, landlock=list(_landlock_of(mounts)), environment=environment)


def _system() -> Iterator[tuple[str, str]]:
    """Yield (real source, path inside) of everything a program in /usr needs."""
    for path in _SYSTEM:
        if os.path.isdir(path) and not os.path.islink(path):
            yield path, path
    for pattern in _SYSTEM_FILES:
        for path in sorted(glob(pattern)):
            yield os.path.realpath(path), path


def _private(profile: Profile, scratch: str) -> Iterator[Plan]:
    limits = profile.limits
    private: Plan = {"kind": "tmpfs", "mode": 0o1777, "inodes": _SCRATCH_INODES, "write": True}
    yield private | {"target": scratch, "bytes": limits.disk_bytes}
    yield private | {"target": "/dev/shm", "bytes": min(_SHM_BYTES, limits.disk_bytes)}  # noqa: S108
    for name in _DEVICES:
        device = f"/dev/{name}"
        yield {"kind": "bind", "source": device, "target": device, "device": True, "write": True}
    for name, to in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        yield {"kind": "link", "target": f"/dev/{name}", "to": f"/proc/self/fd{to}"}
    yield {"kind": "proc", "target": "/proc"}
    for name in _MASKED_FOLDERS:
        yield _empty_folder(f"/proc/{name}") | {"optional": True}
    for name in _MASKED_FILES:
        yield _bind("/dev/null", f"/proc/{name}") | {"optional": True}


def _system_mounts() -> Iterator[Plan]:
    for path in _SYSTEM:
        if os.path.islink(path):
            yield {"kind": "link", "target": path, "to": os.readlink(path)}
    for source, target in _system():
        yield _bind(source, target)
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
            raise SandboxFailed(f"The profile grants {path}, which does not exist.", step="layout")
        shown[path] = write
        yield _bind(path, path) | {"write": write, "mapped": mapped}


def _shield_mounts(shield: Shield, mapped: bool) -> Iterator[Plan]:
    for path in shield.anchors:
        # A mount point cannot be renamed away together with what is protected below it.
        yield _bind(path, path) | {"write": True, "mapped": mapped}
    for path in shield.protected:
        yield _bind(path, path) | {"mapped": mapped}
    for path in shield.hidden:
        if os.path.isdir(path):
            yield _empty_folder(path)
        else:
            yield _bind("/dev/null", path)


def _bind(source: str, target: str) -> Plan:
    return {"kind": "bind", "source": source, "target": target}


def _empty_folder(target: str) -> Plan:
    return {
        "kind": "tmpfs", "target": target, "bytes": 4096, "inodes": 1, "mode": 0, "write": False,
    }  # fmt: skip


def _landlock_of(mounts: Iterable[Plan]) -> Iterator[Plan]:
    """Say in Landlock's words what the mounts already say: two barriers, one picture."""
    for mount in mounts:
        target = str(mount["target"])
        if mount["kind"] == "bind" and mount.get("device"):
            yield {"path": target, "access": "device"}
        elif mount["kind"] in ("bind", "tmpfs") and not mount.get("optional"):
            writable = mount.get("write") and mount.get("mode") != 0
            if mount.get("mode") != 0 and mount.get("source") != "/dev/null":
                yield {"path": target, "access": "write" if writable else "read"}
    for path in ("/etc", "/proc", "/run"):
        yield {"path": path, "access": "read"}


def _landlock_alone(profile: Profile, scratch: str, shield: Shield) -> Iterator[Plan]:
    """Grant by Landlock alone, where hiding and protecting can only mean not granting."""
    for path, _ in _system():
        yield {"path": path, "access": "read"}
    for name in _DEVICES:
        yield {"path": f"/dev/{name}", "access": "device"}
    for name in _PROC_FACTS:
        if os.path.exists(f"/proc/{name}"):
            yield {"path": f"/proc/{name}", "access": "read"}
    yield {"path": scratch, "access": "write"}
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
        with os.scandir(path) as entries:
            waiting += [entry.path for entry in entries if not entry.is_symlink()]


def inside(path: str, folder: str) -> bool:
    """Tell whether ``path`` is ``folder`` or lies below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
