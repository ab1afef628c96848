"""Step "sandbox": limits as the kernel takes them per process, and which of them ended a call."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

from safeconduct.call import Limits, Tier

from . import machine
from .cgroup import Charge
from .launcher import Exit

_MEMLOCK_BYTES = 64 << 10
# Room for what the user starts while the call runs, other calls among it, where all of the user's
# processes count together: a limit without it would fail calls that did nothing wrong.
_SHARED_TASKS = 256


def rlimits(limits: Limits, tier: Tier, *, in_cgroup: bool) -> list[Mapping[str, object]]:
    """Return the resource limits of each process; what already is lower stays lower."""
    values = {
        "core": 0,
        "fsize": limits.disk_bytes,
        "memlock": _MEMLOCK_BYTES,
        "msgqueue": 0,
        "nice": 0,
        "nofile": limits.files,
        "rtprio": 0,
        "sigpending": 256,
    }
    if not in_cgroup:
        values["data"] = limits.memory_bytes
        # setrlimit(2): in a user namespace of its own it counts that sandbox alone; elsewhere all
        # processes of the user, so the bound starts from what already runs.
        shared = tier is not Tier.FULL and not machine.is_root()
        values["nproc"] = limits.pids + (_own_tasks() + _SHARED_TASKS if shared else 0)
    if limits.cpu_ms is not None:
        values["cpu"] = max(1, -(-limits.cpu_ms // 1000))
    return [{"name": name, "value": value} for name, value in values.items()]


def _own_tasks() -> int:
    uid, count = os.geteuid(), 0
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count


def limit_of(end: Exit, charge: Charge, limits: Limits) -> str | None:
    """Name the limit that ended the call, if one did."""
    if end.wall_limit:
        return "wall"
    if end.signal == signal.SIGKILL and charge.oom_kills:
        return "memory"
    if end.signal == signal.SIGXCPU or (
        end.signal == signal.SIGKILL and limits.cpu_ms and end.cpu_us // 1000 >= limits.cpu_ms
    ):
        return "cpu"
    if end.signal == signal.SIGXFSZ:
        return "disk"
    return None
