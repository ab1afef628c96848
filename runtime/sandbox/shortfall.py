"""Step "sandbox": which failures of the native side mean that this machine cannot, and what helps.

A step that failed and its errno come from native/launcher/src; the names of steps are the same.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from safeconduct.call import Tier
from safeconduct.errors import Error, SandboxFailed, SandboxUnavailable

from . import machine

_NAMESPACE_STEPS = ("clone namespaces", "user namespace", "clone id mapping")
_PRIVATE_PLACE = (
    "Started by root, tier landlock runs programs under a user id of their own: put what is to run "
    "where every user may enter, not below a private home folder, or start as its owner."
)


def typed(error: SandboxFailed) -> Error:
    """Return a failure that this machine or profile will always give as such, else ``error``.

    clone(2), mount_setattr(2) and seccomp(2) say which errno means what.
    """
    if error.step.startswith("map ids") and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        return SandboxUnavailable(
            "A folder of the profile lies on a file system that cannot be shown under another "
            "user id (id-mapped mounts).",
            missing="id-mapped-mount",
            hint="Use a workspace on ext4, xfs, btrfs or tmpfs (from Linux 6.3), not on overlayfs; "
            "or start as an ordinary user, who needs none. `safeconduct doctor` tries this folder.",
        )
    if error.step in _NAMESPACE_STEPS and error.errno == errno.ENOSPC:
        return SandboxUnavailable(
            "User namespaces are refused (max_user_namespaces): the limit is 0 or used up.",
            missing="user-namespaces",
            hint="`safeconduct doctor` says which limit and the step that raises it.",
        )
    if error.step == "seccomp" and error.errno == errno.EBUSY:
        return SandboxUnavailable(
            "Refused system calls cannot be shown: somebody around already listens to them.",
            missing="seccomp-listener",
            hint="Run without --explain, or outside the container or sandbox that listens.",
        )
    if error.step == "request: a list is too long":
        return SandboxFailed(
            "The sandbox would need more mounts or Landlock rules than there may be (4096).",
            step=error.step,
            code="sandbox.too_many_paths",
            hint="Hide or protect whole folders, not thousands of files one by one.",
        )
    return error


def place_hint(tier: Tier, number: int) -> str:
    """Return what to do where a program could not be run for lack of permission; may be empty."""
    if tier is Tier.LANDLOCK and number == errno.EACCES and machine.is_root():
        return _PRIVATE_PLACE
    return ""


def closed_above(path: str) -> str:
    """Return the outermost folder above ``path`` that only its owner may enter; empty if none."""
    for folder in reversed(Path(os.path.realpath(path)).parents):
        if not folder.stat().st_mode & 0o001:
            return str(folder)
    return ""
