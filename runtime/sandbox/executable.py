"""Step "sandbox": the launcher's executable, and why it cannot be started where it cannot.

It travels inside the package and is never looked for through PATH.
"""

from __future__ import annotations

import importlib.resources
import os
import sys
from pathlib import Path

from safeconduct.errors import SandboxUnavailable

from .causes import Cause

_REBUILD = "install safeconduct again (from a checkout: make setup)"
# elf(5): the magic, and where e_machine is.
_ELF, _MACHINE = b"\x7fELF", slice(18, 20)


def launcher_path() -> Path:
    """Return where the launcher of this package lies, or would."""
    packaged = importlib.resources.files("safeconduct.runtime")
    return Path(str(packaged.joinpath("bin", "safeconduct-launcher")))


def trouble(path: Path) -> Cause | None:
    """Say why ``path`` cannot be executed, as far as looking at it tells; None where it can."""
    try:
        mounted = os.statvfs(path).f_flag
        with open(path, "rb") as file:
            head = file.read(20)
    except FileNotFoundError:
        return Cause(note=f"missing: {path}", get=_REBUILD)
    except OSError as error:
        get = "let this user read the folder the package is in, or install it for this user"
        return Cause(note=f"{path}: {error.strerror}", get=get)
    if mounted & os.ST_NOEXEC:
        return Cause(
            note=f"{path} lies on a file system mounted noexec",
            get="install safeconduct elsewhere, or as root: mount -o remount,exec MOUNTPOINT",
        )
    if not path.is_file() or not os.access(path, os.X_OK):
        return Cause(note=f"not executable for this user: {path}", get=f"chmod 755 {path}")
    if head[:4] != _ELF or head[_MACHINE] != _own_machine():
        return Cause(note=f"not a program for this machine: {path}", get=_REBUILD)
    return None


def unavailable(path: Path, error: OSError | None = None) -> SandboxUnavailable:
    """Return the error for a launcher that cannot be started, with what helps."""
    cause = trouble(path)
    if cause is None:
        reason = error.strerror if error is not None else "it does not answer"
        cause = Cause(note=f"{path}: {reason}", get=_REBUILD)
    return SandboxUnavailable(
        f"The launcher cannot be started: {cause.note}.", missing="launcher", hint=cause.get
    )


def _own_machine() -> bytes:
    """Return the machine field of the interpreter that runs us, which surely fits."""
    with open(sys.executable or "/proc/self/exe", "rb") as file:
        return file.read(20)[_MACHINE]
