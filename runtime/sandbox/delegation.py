"""Step "sandbox": why no cgroup is this process's to divide, and the command that makes it so.

Reads the same files as cgroup.py, but to explain and not to use them. Sources: cgroups(7),
systemd's "Control Group APIs and Delegation".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .causes import Cause

CONTROLLERS = ("memory", "pids")
_SCOPE = "-p Delegate=yes -- COMMAND"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mounted:
    """One cgroup file system: its version, where it is, and its version 1 controllers."""

    version: int
    place: str
    read_only: bool
    controllers: frozenset[str]


def why_none(*, root: Path = Path("/"), uid: int | None = None) -> Cause:
    """Say why ``cgroup.discover`` found nothing, and the exact command that helps.

    Settings are read below ``root``; ``uid`` is the user that asks (default: this process's).
    """
    user = os.geteuid() if uid is None else uid
    mounted = _mounted(root)
    if not mounted:
        return Cause(
            note="no cgroup file system is mounted here",
            get="mount it: mount -t cgroup2 none /sys/fs/cgroup, or give it to the container",
        )
    if any(set(CONTROLLERS) & one.controllers for one in mounted):
        return _version_1(mounted, user)
    unified = next(one for one in mounted if one.version == 2 or not one.controllers)
    have = (_read(root, unified.place, "cgroup.controllers") or "").split()
    # At its own root a container or a scope shows only what was handed down to it.
    if unified.read_only:
        return Cause(
            note=f"cgroup v2 is mounted read-only at {unified.place}, as in a container",
            get="start the container with a writable cgroup of its own (podman: --systemd=always; "
            "docker: --cgroupns=private and a writable /sys/fs/cgroup)",
        )
    missing = [name for name in CONTROLLERS if name not in have]
    if missing:
        return Cause(
            note=f"cgroup v2 without the controller {' and '.join(missing)}",
            get="boot with cgroup_enable=memory, and without version 1 controllers "
            "(systemd.unified_cgroup_hierarchy=1)",
        )
    return _not_delegated(root, user)


def _version_1(mounted: Sequence[_Mounted], user: int) -> Cause:
    if user != 0:
        return Cause(
            note="cgroup v1 here: only root can make cgroups in it",
            get="start as root, or boot with systemd.unified_cgroup_hierarchy=1",
        )
    closed = [one.place for one in mounted if one.read_only and set(CONTROLLERS) & one.controllers]
    places = f": read-only at {', '.join(closed)}" if closed else ""
    return Cause(
        note=f"the cgroup v1 controllers memory and pids are not both writable{places}",
        get="mount both writable, or give the container writable cgroups",
    )


def _not_delegated(root: Path, user: int) -> Cause:
    if not (root / "run/systemd/system").is_dir():
        return Cause(
            note="cgroup v2: the folder of this process is not its own to divide",
            get="without systemd, root hands one over: mkdir, chown it with its cgroup.procs and "
            "cgroup.subtree_control, and start the command in it",
        )
    if user == 0:
        return Cause(
            note="cgroup v2: systemd delegated nothing to this process",
            get=f"systemd-run --scope {_SCOPE}",
        )
    if not (root / f"run/user/{user}/systemd").is_dir():
        return Cause(
            note="cgroup v2: no systemd user manager runs for you",
            get=f"log in through systemd (loginctl enable-linger), then: systemd-run --user "
            f"--scope {_SCOPE}",
        )
    lacking = manager_lacks(user, root=root)
    if lacking:
        return Cause(
            note=f"cgroup v2: systemd hands your user manager no {' and '.join(lacking)}",
            get="safeconduct setup (prints the one step, with root: --apply), log in again, then: "
            f"systemd-run --user --scope {_SCOPE}",
        )
    return Cause(
        note="cgroup v2: systemd delegated nothing to this process",
        get=f"systemd-run --user --scope {_SCOPE}",
    )


def managers(*, root: Path = Path("/")) -> list[int]:
    """Return the users whose systemd user manager runs now."""
    slices = (root / "sys/fs/cgroup/user.slice").glob("user-*.slice/user@*.service")
    names = (path.name.removeprefix("user@").removesuffix(".service") for path in slices)
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def manager_lacks(uid: int, *, root: Path = Path("/")) -> list[str]:
    """Return the controllers that a user's systemd manager was not handed; empty if unknown."""
    place = f"/sys/fs/cgroup/user.slice/user-{uid}.slice/user@{uid}.service"
    text = _read(root, place, "cgroup.controllers")
    return [] if text is None else [name for name in CONTROLLERS if name not in text.split()]


def _mounted(root: Path) -> list[_Mounted]:
    """Return the cgroup file systems of this mount namespace, proc_pid_mountinfo(5)."""
    found: list[_Mounted] = []
    for line in (_read(root, "/proc/self", "mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if len(before) < 6 or len(after) < 3 or after[0] not in ("cgroup", "cgroup2"):
            continue
        options = {*before[5].split(","), *after[2].split(",")}
        version = 2 if after[0] == "cgroup2" else 1
        found.append(
            _Mounted(
                version=version,
                place=before[4],
                read_only="ro" in options,
                controllers=frozenset(options) if version == 1 else frozenset(),
            )
        )
    return found


def _read(root: Path, folder: str, name: str) -> str | None:
    try:
        return (root / folder.lstrip("/") / name).read_text()
    except (OSError, UnicodeDecodeError):
        return None
