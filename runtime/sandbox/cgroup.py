"""Step "sandbox": limits for a whole process tree through cgroups, v1 or v2.

A cgroup is made for one call, possibly ahead of it, and removed after it; a used one would stay
charged. Nothing is touched but folders this process made. Sources: cgroups(7), kernel admin-guide
cgroup-v1 and cgroup-v2.
"""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from safeconduct.call import Limits
from safeconduct.errors import SandboxFailed

from . import leaf
from .accounts import INIT_PIDS, Accounts, Charge

__all__ = ["Cgroup", "Cgroups", "Charge", "discover", "remove_abandoned"]

_REMOVE_SECONDS = 2.0
# Another pid namespace's supervisor looks dead from here; what it just made is left alone.
_ABANDONED_SECONDS = 60.0
_CONTROLLERS_V1 = ("memory", "pids", "cpuacct", "cpu")
# LIMIT: 16 removals of some 0.1 ms each, then a pause: at most a sixth of one processor, and more
# a second than calls can be started.
_BATCH, _PAUSE_SECONDS = 16, 0.008
# LIMIT: where calls end faster than that, whoever makes a new one removes two old ones.
_BACKLOG_MAX = 512
# LIMIT: closed templates whose cgroups are looked for again when another one is closed.
_ENDED_MAX = 8


@dataclass(slots=True, kw_only=True)
class Cgroup:
    """The cgroup of one call: one folder per controller (v1) or one folder (v2)."""

    version: int
    folders: Mapping[str, Path]
    accounts: Accounts = field(default_factory=Accounts)

    @property
    def joins(self) -> Sequence[str]:
        """The files through which a process of one thread joins by writing a zero to each.

        Version 1: through `cgroup.procs` it would wait until nothing of the machine forks, which
        `tasks` spares a thread that moves itself (`cgroup_procs_write_start` in the kernel's
        kernel/cgroup/cgroup.c).
        """
        file = "tasks" if self.version == 1 else "cgroup.procs"
        return sorted({f"{folder}/{file}" for folder in self.folders.values()})

    def charge(self) -> Charge:
        """Read the accounts, during the call or after it, until ``retire``."""
        return self.accounts.read()

    def members(self) -> list[int]:
        """Return the process ids that are in it now, some perhaps not yet in all of its folders."""
        folders = set(self.folders.values())
        return sorted({pid for folder in folders for pid in _members(folder / "cgroup.procs")})

    def kill(self) -> None:
        """End every process in it. The call is over: whatever is still there was left behind.

        That happens where init and launcher both died and there was no pid namespace.
        """
        for pid in self.members():
            try:
                process = os.pidfd_open(pid)
            except OSError:
                continue
            try:
                # The number may have been given to a stranger since; the descriptor cannot be.
                if pid in self.members():
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
            finally:
                os.close(process)

    def remove(self) -> bool:
        """Remove the folders; False while a process is still leaving."""
        self.accounts.close()
        try:
            for folder in set(self.folders.values()):
                # An interrupt may have come before all of them were made.
                with suppress(FileNotFoundError):
                    os.rmdir(folder)
        except OSError:
            return False
        return True


@dataclass(slots=True)
class Cgroups:
    """Where this process may make cgroups, and those it made that are not yet removed.

    Safe to use from several threads. What is retired is removed by a thread of its own.
    """

    version: int
    bases: Mapping[str, Path]
    # Whether a call's share of the processors can be set.
    shares: bool = False
    # The controllers of each folder in ``bases``: version 2 has one for all.
    hierarchies: Mapping[Path, Sequence[str]] = field(init=False)
    _live: dict[str, Cgroup] = field(default_factory=dict[str, Cgroup])
    _used: deque[tuple[str, Cgroup]] = field(default_factory=deque[tuple[str, Cgroup]])
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _token: str = field(default_factory=lambda: secrets.token_hex(4))
    _missing: set[str] = field(default_factory=set[str])
    _owner_pid: int = field(default_factory=os.getpid)
    _wake: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: deque[str] = field(default_factory=lambda: deque[str](maxlen=_ENDED_MAX))
    _sweeper: threading.Thread | None = None
    _closed: bool = False

    def __post_init__(self) -> None:
        found: dict[Path, list[str]] = {}
        for controller, base in self.bases.items():
            found.setdefault(base, []).append(controller)
        self.hierarchies = found

    def new_name(self) -> str:
        """Return a name that no cgroup has. What it begins, ``close`` removes too."""
        return f"safeconduct-{os.getpid()}-{self._token}-{next(self._numbers)}"

    def make(self, limits: Limits) -> Cgroup:
        """Make a cgroup with the limits set; from any thread, also ahead of its call.

        Raises SandboxFailed where the kernel refuses.
        """
        if len(self._used) > _BACKLOG_MAX:
            self.sweep(2)
        name = self.new_name()
        folders = {controller: base / name for controller, base in self.bases.items()}
        made = Cgroup(version=self.version, folders=folders)
        # Known before it exists: an interrupt may come at any line from here on.
        self._live[name] = made
        try:
            with ExitStack() as opened:
                for folder in sorted({str(folder) for folder in folders.values()}):
                    os.mkdir(folder)
                handles = {
                    controller: _handle(path, opened) for controller, path in folders.items()
                }
                self._set(handles, limits)
                made.accounts.open(self.version, handles, self._missing)
        except OSError as error:
            self._retire(name, made)
            raise _refused(error) from error
        except BaseException:
            self._retire(name, made)
            raise
        return made

    def narrow(self, cgroup: Cgroup, limits: Limits) -> None:
        """Set lower limits on a cgroup that was made ahead, before a program runs in it."""
        try:
            with ExitStack() as opened:
                self._set({c: _handle(path, opened) for c, path in cgroup.folders.items()}, limits)
        except OSError as error:
            raise _refused(error) from error

    def _set(self, handles: Mapping[str, int], limits: Limits) -> None:
        memory = str(limits.memory_bytes).encode()
        settings = [("pids", "pids.max", str(limits.pids + INIT_PIDS).encode())]
        if self.version == 2:
            # No swap at all: then `memory.max` is the whole.
            settings += [("memory", "memory.max", memory), ("memory", "memory.swap.max", b"0")]
        else:
            # In this order: memory and swap together are never less than memory alone.
            settings += [("memory", "memory.limit_in_bytes", memory)]
            settings += [("memory", "memory.memsw.limit_in_bytes", memory)]
        for controller, file, value in settings:
            if file in self._missing:
                continue
            try:
                _write(file, value, handles[controller])
            except FileNotFoundError:
                if "sw" not in file:
                    raise
                self._missing.add(file)  # a kernel without swap accounting

    def retire(self, cgroup: Cgroup) -> None:
        """Hand back a cgroup whose call is over. Does not wait: it is removed soon after."""
        self._retire(next(iter(cgroup.folders.values())).name, cgroup)

    def _retire(self, name: str, cgroup: Cgroup) -> None:
        self._used.append((name, cgroup))
        if self._sweeper is None:
            with self._lock:
                if self._sweeper is None and not self._closed:
                    self._sweeper = threading.Thread(
                        target=self._sweep_on, name="safeconduct-cgroups", daemon=True
                    )
                    self._sweeper.start()
        self._wake.set()

    def _sweep_on(self) -> None:
        while not self._closed:
            self._wake.wait()
            # Whoever retired it has an answer to give first.
            time.sleep(_PAUSE_SECONDS)
            self.sweep(_BATCH)
            if not self._used and not self._closed:
                self._wake.clear()
                if self._used:
                    self._wake.set()

    def sweep(self, most: int) -> None:
        """Remove up to ``most`` retired ones now; what is busy is ended and tried again later."""
        for _ in range(min(most, len(self._used))):
            try:
                name, cgroup = self._used.popleft()
            except IndexError:
                return
            if cgroup.remove():
                self._live.pop(name, None)
                continue
            cgroup.kill()
            self._used.append((name, cgroup))

    def close(self) -> None:
        """Remove everything made here, waiting a bounded time for the kernel.

        In a fork of the process that made them nothing is done: they are that process's own.
        """
        if os.getpid() != self._owner_pid:
            return
        with self._lock:
            self._closed = True
            sweeper, self._sweeper = self._sweeper, None
        self._wake.set()
        if sweeper is not None:
            sweeper.join()
        self._used.clear()
        self._used.extend(self._live.items())
        self._used.extend(self._made_for_us(f"safeconduct-{os.getpid()}-{self._token}-*"))
        deadline = time.monotonic() + _REMOVE_SECONDS
        while self._used and time.monotonic() < deadline:
            self.sweep(len(self._used))
            if self._used:
                time.sleep(0.005)

    def retire_made(self, name: str) -> None:
        """Hand back what the launcher made under ``name`` and does not need any more: it removes
        that itself, unless it was killed.
        """
        # Whoever made the earlier ones may have been killed a moment later, and made one more.
        self._ended.append(name)
        for ended in tuple(self._ended):
            for made, left in self._made_for_us(f"{ended}-*"):
                self._retire(made, left)

    def _made_for_us(self, pattern: str) -> list[tuple[str, Cgroup]]:
        """Find what the launcher made under our names and was killed before it removed."""
        found = [folder for base in set(self.bases.values()) for folder in base.glob(pattern)]
        return [(f.name, Cgroup(version=self.version, folders={"left": f})) for f in found]


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
        # One hierarchy of several controllers has a link for each.
        base = (root / controller / own[controller].lstrip("/")).resolve()
        if (base / "tasks").exists() and os.access(base, os.W_OK):
            bases[controller] = base
    return Cgroups(1, bases, "cpu" in bases) if {"memory", "pids"} <= bases.keys() else None


def _version_2(own: str, root: Path) -> Cgroups | None:
    """Find the nearest folder above us that is ours to write and hands down both controllers.

    A folder that holds processes cannot hand down controllers ("no internal processes"). Our own
    is emptied into a leaf where systemd marked it as delegated, so that its limits bound the calls
    too, or where nothing above us is ours, as in a container; a desktop's scopes are left alone.
    """
    base = root / own.lstrip("/")
    if leaf.delegated(base):
        leaf.make_room(base)
    return _handing_down(base, root) or (
        _handing_down(base, root) if leaf.make_room(base) else None
    )


def _handing_down(base: Path, root: Path) -> Cgroups | None:
    for folder in (base, *base.parents):
        if not folder.is_relative_to(root):
            return None
        try:
            handed_down = (folder / "cgroup.subtree_control").read_text().split()
        except OSError:
            continue
        writable = os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK)
        if {"memory", "pids"} <= set(handed_down) and writable:
            bases = {"memory": folder, "pids": folder}
            return Cgroups(2, bases, "cpu" in handed_down)
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


def _handle(folder: Path, opened: ExitStack) -> int:
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    return fd


def _write(file: str, value: bytes, at: int | None = None) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC, dir_fd=at)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)


def _refused(error: OSError) -> SandboxFailed:
    return SandboxFailed(
        f"The kernel refused a cgroup limit: {error}.", step="cgroup", errno=error.errno or 0
    )
