"""Step "sandbox": limits for a whole process tree through cgroups, v1 or v2.

A cgroup is made for one call and removed after it; a used one would stay charged. Nothing is
touched but folders this process made. Sources: cgroups(7), kernel admin-guide cgroup-v1 and -v2.
"""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from safeconduct.call import Limits
from safeconduct.errors import SandboxFailed

# The launcher's stub in front of the program counts as one process.
_STUB_PIDS = 1
_REMOVE_SECONDS = 2.0
# Another pid namespace's supervisor looks dead from here; what it just made is left alone.
_ABANDONED_SECONDS = 60.0
_CONTROLLERS_V1 = ("memory", "pids", "cpuacct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What the kernel charged to one call."""

    cpu_ms: int | None = None
    peak_memory_bytes: int | None = None
    refused_forks: int | None = None
    oom_kills: int = 0


@dataclass(slots=True, kw_only=True)
class Cgroup:
    """The cgroup of one call: one folder per controller (v1) or one folder (v2)."""

    version: int
    folders: Mapping[str, Path]

    @property
    def procs(self) -> Sequence[str]:
        """The files a process joins through."""
        return sorted({str(folder / "cgroup.procs") for folder in self.folders.values()})

    def charge(self) -> Charge:
        """Read the accounts. The call must be over."""
        memory, pids = self.folders["memory"], self.folders["pids"]
        if self.version == 1:
            usage = self.folders.get("cpuacct")
            nanoseconds = _number(usage / "cpuacct.usage") if usage else None
            return Charge(
                cpu_ms=None if nanoseconds is None else nanoseconds // 1_000_000,
                peak_memory_bytes=_number(memory / "memory.max_usage_in_bytes"),
                refused_forks=_keyed(pids / "pids.events", "max"),
                oom_kills=_keyed(memory / "memory.oom_control", "oom_kill") or 0,
            )
        microseconds = _keyed(memory / "cpu.stat", "usage_usec")
        return Charge(
            cpu_ms=None if microseconds is None else microseconds // 1000,
            peak_memory_bytes=_number(memory / "memory.peak"),
            refused_forks=_keyed(pids / "pids.events", "max"),
            oom_kills=_keyed(memory / "memory.events", "oom_kill") or 0,
        )

    def kill(self) -> None:
        """End every process in it. The call is over: whatever is still there was left behind.

        That happens where init and launcher both died and there was no pid namespace.
        """
        procs = self.folders["pids"] / "cgroup.procs"
        for pid in _members(procs):
            try:
                process = os.pidfd_open(pid)
            except OSError:
                continue
            try:
                # The number may have been given to a stranger since; the descriptor cannot be.
                if pid in _members(procs):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
            finally:
                os.close(process)

    def remove(self) -> bool:
        """Remove the folders; False while a process is still leaving."""
        try:
            for folder in set(self.folders.values()):
                # An interrupt may have come before all of them were made.
                with suppress(FileNotFoundError):
                    folder.rmdir()
        except OSError:
            return False
        return True


@dataclass(slots=True)
class Cgroups:
    """Where this process may make cgroups, and those it made that are not yet removed."""

    version: int
    bases: Mapping[str, Path]
    _live: list[Cgroup] = field(default_factory=list[Cgroup])
    _used: list[Cgroup] = field(default_factory=list[Cgroup])
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _token: str = field(default_factory=lambda: secrets.token_hex(4))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def make(self, limits: Limits) -> Cgroup:
        """Make a cgroup with the limits set. Raises SandboxFailed where the kernel refuses."""
        self.sweep()
        name = f"safeconduct-{os.getpid()}-{self._token}-{next(self._numbers)}"
        folders = {controller: base / name for controller, base in self.bases.items()}
        made = Cgroup(version=self.version, folders=folders)
        with self._lock:
            # Known before it exists: an interrupt may come at any line from here on.
            self._live.append(made)
        try:
            for folder in sorted(set(folders.values())):
                folder.mkdir()
            for file, value in self._settings(folders, limits):
                file.write_text(value)
        except OSError as error:
            self.retire(made)
            raise SandboxFailed(
                f"The kernel refused a cgroup limit: {error}.",
                step="cgroup",
                errno=error.errno or 0,
            ) from error
        return made

    def _settings(self, folders: Mapping[str, Path], limits: Limits) -> list[tuple[Path, str]]:
        memory, pids = folders["memory"], folders["pids"]
        settings = [(pids / "pids.max", str(limits.pids + _STUB_PIDS))]
        if self.version == 2:
            settings += [(memory / "memory.max", str(limits.memory_bytes))]
            swap, oom = memory / "memory.swap.max", memory / "memory.oom.group"
            return settings + [
                (file, text) for file, text in ((swap, "0"), (oom, "0")) if file.exists()
            ]
        settings += [(memory / "memory.limit_in_bytes", str(limits.memory_bytes))]
        swap = memory / "memory.memsw.limit_in_bytes"
        return settings + ([(swap, str(limits.memory_bytes))] if swap.exists() else [])

    def retire(self, cgroup: Cgroup) -> None:
        """Hand back a cgroup whose call is over; it is removed as soon as it is empty."""
        with self._lock:
            self._used.append(cgroup)
            self._live = [one for one in self._live if one is not cgroup]
        self.sweep()

    def sweep(self) -> None:
        """Try again to remove what was still busy."""
        with self._lock:
            busy = [cgroup for cgroup in self._used if not cgroup.remove()]
            for cgroup in busy:
                cgroup.kill()
            self._used = busy

    def close(self) -> None:
        """Remove everything made here, waiting a bounded time for the kernel."""
        deadline = time.monotonic() + _REMOVE_SECONDS
        with self._lock:
            self._used += self._live
            self._live = []
        while self._used and time.monotonic() < deadline:
            self.sweep()
            time.sleep(0.005)


def discover(
    proc: Path = Path("/proc/self"), root: Path = Path("/sys/fs/cgroup")
) -> Cgroups | None:
    """Find where this process may make cgroups with memory and pids limits, if anywhere."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return None
    own: dict[str, str] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    found = _version_1(own, root) or _version_2(own.get("", "/"), root)
    if found is not None:
        remove_abandoned(found.bases)
    return found


def _version_1(own: Mapping[str, str], root: Path) -> Cgroups | None:
    bases: dict[str, Path] = {}
    for controller in _CONTROLLERS_V1:
        if controller not in own:
            continue
        base = root / controller / own[controller].lstrip("/")
        if (base / "cgroup.procs").exists() and os.access(base, os.W_OK):
            bases[controller] = base
    return Cgroups(1, bases) if {"memory", "pids"} <= bases.keys() else None


def _version_2(own: str, root: Path) -> Cgroups | None:
    """Find the nearest folder above us that is ours to write and hands down both controllers.

    A folder that holds processes cannot hand down controllers ("no internal processes"), so our
    own cgroup serves only where its parent was delegated to us too, as systemd's user slices are.
    """
    base = root / own.lstrip("/")
    for folder in (base, *base.parents):
        if not folder.is_relative_to(root):
            return None
        try:
            handed_down = (folder / "cgroup.subtree_control").read_text().split()
        except OSError:
            continue
        writable = os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK)
        if {"memory", "pids"} <= set(handed_down) and writable:
            return Cgroups(2, {"memory": folder, "pids": folder})
    return None


def remove_abandoned(bases: Mapping[str, Path]) -> None:
    """Remove what a supervisor left that was killed: named after it, empty, and not new."""
    before = time.time() - _ABANDONED_SECONDS
    for base in set(bases.values()):
        for folder in base.glob("safeconduct-*-*-*"):
            pid = folder.name.split("-")[1]
            try:
                if not os.path.exists(f"/proc/{pid}") and folder.stat().st_mtime < before:
                    folder.rmdir()
            except OSError:
                continue  # somebody else was faster, or it holds processes: not ours to end


def _members(procs: Path) -> list[int]:
    try:
        return [int(line) for line in procs.read_text().split()]
    except OSError:
        return []


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _keyed(file: Path, key: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(values[key]) if key in values else None
