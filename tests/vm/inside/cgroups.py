"""The cgroups a supervisor is started in, made as systemd and container engines make them.

Each check gets fresh ones and they are looked at afterwards: nothing of ours may be left in them.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
CONTROLLERS = ("cpu", "io", "memory", "pids")
# The files systemd hands to a unit's user, https://systemd.io/CGROUP_DELEGATION/.
_DELEGATED = (".", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control")
# LIMIT: how long the kernel may take to let go of what has ended.
_GONE_SECONDS = 10.0


def place(scope: str, name: str, uid: int) -> Path:
    """Make the folder of one kind of scope and return it; a check's process joins it."""
    if scope == "root":
        return _folder("/")
    if scope == "session":  # a login: root's own, delegated to nobody
        return _folder(f"/user.slice/user-{uid}.slice/session-{name}.scope")
    if scope == "delegated":  # systemd-run --user --scope -p Delegate=yes
        manager = _folder(f"/user.slice/user-{uid}.slice/user@{uid}.service")
        folder = _folder(f"/user.slice/user-{uid}.slice/user@{uid}.service/app.slice/{name}.scope")
        for each in (manager, folder.parent, folder):
            _hand_over(each, uid)
        os.setxattr(folder, "user.delegate", b"1")
        return folder
    if scope == "unmarked":  # a desktop program in the user's own manager, no Delegate=
        folder = place("delegated", name, uid)
        os.removexattr(folder, "user.delegate")
        return folder
    if scope == "service":  # a system service with User= and Delegate=yes
        folder = _folder(f"/system.slice/{name}.service")
        _hand_over(folder, uid)
        os.setxattr(folder, "user.delegate", b"1")
        return folder
    folder = _folder(f"/machine.slice/{name}.scope")  # "container"
    _hand_over(folder, uid)
    return folder


def enter(folder: Path, scope: str) -> None:
    """Move this process into the folder; in a container it becomes all there is."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    if scope == "container":
        _unshare()


def leftovers() -> list[str]:
    """Name the cgroups of calls that are still there, once the kernel had time."""
    deadline = time.monotonic() + _GONE_SECONDS
    while found := [str(folder) for folder in ROOT.rglob("safeconduct-*-*-*")]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return found


def remove(folder: Path) -> None:
    """End what is still in a scope and remove it."""
    if folder == ROOT:
        return
    with suppress(OSError):
        (folder / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + _GONE_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        for inner in sorted(folder.rglob("*/"), reverse=True):
            with suppress(OSError):
                inner.rmdir()
        with suppress(OSError):
            folder.rmdir()
        time.sleep(0.02)


def _folder(path: str) -> Path:
    """Make a folder; everything above it hands all controllers down."""
    folder = ROOT
    for part in path.strip("/").split("/"):
        wanted = " ".join(f"+{controller}" for controller in CONTROLLERS)
        (folder / "cgroup.subtree_control").write_text(wanted)
        folder = folder / part
        folder.mkdir(exist_ok=True)
    return folder


def _hand_over(folder: Path, uid: int) -> None:
    for name in _DELEGATED:
        os.chown(folder / name, uid, uid)


def _unshare() -> None:
    """Take a cgroup namespace and a mount namespace, and mount the hierarchy as seen from there."""
    new_namespaces = 0x0200_0000 | 0x0002_0000  # CLONE_NEWCGROUP | CLONE_NEWNS, unshare(2)
    recursive_private = 0x4000 | 0x4_0000  # MS_REC | MS_PRIVATE, mount(2)
    libc = ctypes.CDLL(None, use_errno=True)
    calls = (
        libc.unshare(new_namespaces),
        libc.mount(b"none", b"/", None, recursive_private, None),
        libc.umount2(os.fsencode(ROOT), 0x2),  # MNT_DETACH
        libc.mount(b"cgroup", os.fsencode(ROOT), b"cgroup2", 0, None),
    )
    if any(calls):
        raise OSError(ctypes.get_errno(), "no namespaces for a container")
