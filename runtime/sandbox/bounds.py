"""Step "sandbox": limits as the kernel takes them per process, and which of them ended a call."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import replace

from safeconduct.call import LIMIT_FIELDS, Held, Json, Limits, Tier

from . import machine
from .accounts import INIT_PIDS
from .cgroup import Charge
from .channel import Exit

_MEMLOCK_BYTES = 64 << 10
# Room for what the user starts while the call runs, other calls among it, where all of the user's
# processes count together: a limit without it would fail calls that did nothing wrong.
_SHARED_TASKS = 256
# RLIMIT_CPU counts ticks of the clock, which charge a process for what others got: it comes a
# little early, and on a busy machine much. So much of the limit was used when it ended one.
_KILLED_SHARE, _FAILED_SHARE = 0.5, 0.95
# What a shell makes of a command that a signal ended, POSIX sh "Exit Status for Commands".
_BY_SIGNAL = 128
# What the canonical `resources` of a Call ends its numbers with (policies/resources.py).
_UNITS = "msB"


def rlimits(limits: Limits, tier: Tier, *, in_cgroup: bool) -> list[Mapping[str, object]]:
    """Return the resource limits of each process; what already is lower stays lower."""
    values = {
        "core": 0,
        "fsize": file_bytes(limits),
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
        values["nproc"] = limits.pids + (_own_tasks() + _SHARED_TASKS if shared else INIT_PIDS)
    if limits.cpu_ms is not None:
        # In a cgroup the exact account is looked at (watch.py), and what counts ticks comes after.
        values["cpu"] = max(1, -(-limits.cpu_ms // 1000)) + in_cgroup
    return [{"name": name, "value": value} for name, value in values.items()]


def file_bytes(limits: Limits) -> int:
    """Return the bound on one file: its own, and never more than the whole disk limit."""
    if limits.file_bytes is None:
        return limits.disk_bytes
    return min(limits.file_bytes, limits.disk_bytes)


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


def narrow(limits: Limits, hint: Mapping[str, Json]) -> Limits:
    """Return the smaller of each limit and what a Call says it needs; it can raise none.

    ``hint`` is the canonical ``resources`` argument: names of a policy, each with a text such as
    ``30000ms``, ``1024B`` or ``64``.
    """
    least: dict[str, int] = {}
    for name, text in hint.items():
        field_name, wanted = LIMIT_FIELDS[name], int(str(text).rstrip(_UNITS))
        allowed: int | None = getattr(limits, field_name)
        least[field_name] = wanted if allowed is None else min(allowed, wanted)
    return replace(limits, **least)


def held(
    limits: Limits, tier: Tier, *, in_cgroup: bool, direct: bool, watched: bool = True
) -> dict[str, Held]:
    """Say how each limit holds here. ``direct``: there are writable folders without an overlay.

    What is only polled may be exceeded for the interval of ``watch.Watch``; without ``watched``
    nobody looks.
    """
    tree = Held.TREE if in_cgroup else Held.PROCESS
    # In tier landlock the scratch folder lies on the host's disk, as a direct workspace does.
    private = tier is Tier.FULL and not direct
    found = {
        "wall": Held.TREE,
        # RLIMIT_CPU holds each process anyway; the tree's sum needs the cgroup's account.
        "cpu": Held.POLLED if in_cgroup else Held.PROCESS,
        "memory": tree,
        "pids": Held.TREE if tier is Tier.FULL else tree,
        "files": Held.PROCESS,
        "disk": Held.TREE if private else Held.POLLED,
        "inodes": Held.TREE if private else Held.POLLED,
        "depth": Held.POLLED if direct else Held.NONE,
        "file": Held.PROCESS,
        "output": Held.TREE,
    }
    if limits.idle_ms is not None:
        # Silence alone is not idleness, and without the account computing cannot be told from it.
        found["idle"] = Held.POLLED if in_cgroup else Held.NONE
    if not watched:
        # RLIMIT_CPU and RLIMIT_FSIZE are left, for each process and each file.
        found |= {name: Held.NONE for name, how in found.items() if how is Held.POLLED}
        found |= {name: Held.PROCESS for name in ("cpu", "disk") if found[name] is Held.NONE}
    return found


def limit_of(
    end: Exit,
    charge: Charge,
    limits: Limits,
    *,
    polled: str | None = None,
    full: str | None = None,
) -> str | None:
    """Name the limit that ended the call, if one did.

    ``polled`` is what the watch ended it for. ``full`` names the limit that the private scratch
    folder had reached when the program ended. A limit that the program met and survived is only in
    its Usage: it must have failed too.
    """
    if polled is not None:
        return polled
    if end.wall_limit:
        return "wall"
    if end.signal == signal.SIGXCPU:
        return "cpu"
    if _signal_of(end) == signal.SIGXFSZ:
        return "disk" if limits.file_bytes is None else "file"
    if end.signal is None and not end.code:
        return None
    counted = counted_limit(charge)
    if counted == "memory":
        return counted
    if limits.cpu_ms and _used_up(end, charge, limits.cpu_ms):
        return "cpu"
    return counted if full is None else full


def counted_limit(charge: Charge) -> str | None:
    """Name the limit of which the kernel counted that a call met it: it may have failed by that."""
    if charge.oom_kills:
        return "memory"
    return "pids" if charge.refused_forks else None


def _used_up(end: Exit, charge: Charge, cpu_ms: int) -> bool:
    """Tell whether a program failed because it, or a child, had used its processor time."""
    share = _KILLED_SHARE if _signal_of(end) == signal.SIGKILL else _FAILED_SHARE
    return max(end.cpu_us, charge.cpu_us or 0) >= cpu_ms * 1000 * share


def _signal_of(end: Exit) -> int | None:
    """Return the signal that ended the program, or the command that its shell tells of."""
    if end.signal is None and end.code is not None and end.code > _BY_SIGNAL:
        return end.code - _BY_SIGNAL
    return end.signal
