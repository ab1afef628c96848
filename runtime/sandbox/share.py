"""Step "sandbox": a call that computes for long gives way to whoever wants the processors.

It goes on at full speed where nobody else wants them. Where somebody always does, it would never
end: so one that got next to nothing is an ordinary one again for a moment, every second.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from .cgroup import Cgroup, Cgroups

# From here on it is no short call.
_LONG_CPU_US = 20_000
# LIMIT: one that gives way gets this part of one processor, or is ordinary until the next look:
# the first time after that many seconds, then after twice as many, at last after so many.
_LEAST_SHARE = 0.05
_PATIENCE_SECONDS, _PATIENCE_SECONDS_MAX = 0.05, 1.0
# The lowest that a session can be put, which is undone later; for a task it cannot be undone.
_NICE_SESSION, _NICE_TASK = 19, 10
WITHOUT_CGROUP: Final = ("session-nice", "nice")


class Way(Protocol):
    """How a call is put last, with all that it starts later."""

    def cpu_us(self) -> int:
        """Return the processor time of its tree, where nothing else accounts for it."""
        ...

    def give(self) -> bool:
        """Put it last; False for some of it, which is to be tried again soon.

        Called again for one that goes on, which may have made more processes.
        """
        ...

    def recover(self) -> object:
        """Make it an ordinary one again."""


class Share:
    """The share of one call. Not for several threads at once."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._low = False
        self._patience_seconds = _PATIENCE_SECONDS
        self._since, self._since_cpu_us = 0.0, 0

    def look(self, now_seconds: float, cpu_us: int | None = None) -> None:
        """Judge the call by the processor time that its tree has used until now.

        Without ``cpu_us`` it is asked for here.
        """
        if cpu_us is None:
            cpu_us = self._way.cpu_us()
        used_us, seconds = cpu_us - self._since_cpu_us, now_seconds - self._since
        if not self._low:
            if used_us < _LONG_CPU_US:
                return
            self._low = True
        elif seconds < self._patience_seconds:
            return
        else:
            self._low = used_us >= seconds * 1e6 * _LEAST_SHARE
            self._patience_seconds = min(2 * self._patience_seconds, _PATIENCE_SECONDS_MAX)
        if self._low:
            if not self._way.give():
                self._patience_seconds = _PATIENCE_SECONDS
        else:
            self._way.recover()
        self._since, self._since_cpu_us = now_seconds, cpu_us

    def end(self) -> None:
        """Let a call that is being ended come to its end: that takes processor time too."""
        if self._low:
            self._way.recover()
            self._low = False


class CpuCgroup:
    """Whatever else wants a processor goes before it at once, admin-guide/cgroup-v2 `cpu.idle`.

    After anything less it waits for the end of a slice or for the next tick, up to 4 ms each time.
    """

    def __init__(self, opened: Callable[[], Cgroup]) -> None:
        """``opened`` returns the cgroup of the call, which lives."""
        self._opened = opened

    def cpu_us(self) -> int:
        """Return its account."""
        return self._opened().charge().cpu_us or 0

    def give(self) -> bool:
        """Put it last."""
        self._set(b"1")
        return True

    def recover(self) -> None:
        """Make it an ordinary one again."""
        self._set(b"0")

    def _set(self, value: bytes) -> None:
        folders = self._opened().folders
        with suppress(OSError):  # it has ended
            _write(folders.get("cpu", folders["memory"]), "cpu.idle", value)


class Processes:
    """Where there is no cpu cgroup: nice values, which the program may only raise, of its sessions
    where autogroups share the processors out, else of its tasks, sched(7).

    LIMIT: seen are as many processes as the call may have. New sessions are as they were made until
    the next look. Only sessions recover: nobody but root may lower the nice value of a task.
    """

    def __init__(self, init: int, most: int) -> None:
        """``init`` is a pidfd of the first process of the sandbox."""
        self._init, self._most = init, most
        self._set: set[int] = set()

    def cpu_us(self) -> int:
        """Add up what the living processes have used."""
        return sum(_used_ns(pid) for pid in self.below()) // 1000

    def give(self) -> bool:
        """Put it last, as far as an ordinary user can."""
        by_session, whole = _autogroups(), True
        for pid in self.below():
            try:
                if not by_session:
                    self._nice(pid)
                elif os.getsid(pid) not in self._set:
                    _write(Path(f"/proc/{pid}"), "autogroup", b"%d" % _NICE_SESSION)
                    self._set.add(os.getsid(pid))
            except BlockingIOError:
                # Somebody of this machine did so less than a tenth of a second ago.
                whole = False
            except OSError:
                continue  # it has ended
        return whole

    def recover(self) -> None:
        """Make its sessions ordinary ones again, those whose leader lives."""
        for pid in self._set & set(self.below()):
            with suppress(OSError):
                _write(Path(f"/proc/{pid}"), "autogroup", b"0")
        self._set.clear()

    def _nice(self, pid: int) -> None:
        for task in os.listdir(f"/proc/{pid}/task"):
            os.setpriority(os.PRIO_PROCESS, int(task), _NICE_TASK)

    def below(self) -> list[int]:
        """Return the processes of the tree without the first one, the nearest to it first."""
        found: list[int] = []
        wanted = [*_named(self._init)]
        while wanted and len(found) < self._most:
            with suppress(OSError, ValueError):
                pid = wanted.pop(0)
                for task in os.listdir(f"/proc/{pid}/task"):
                    text = Path(f"/proc/{pid}/task/{task}/children").read_text()
                    found += (below := [int(word) for word in text.split()])
                    wanted += below
        return found


def of_call(cgroups: Cgroups | None, opened: Callable[[], Cgroup], init: int, most: int) -> Share:
    """Return the share of a call, by the best that there is here.

    ``opened`` returns its cgroup, ``init`` is a pidfd of the first process of its sandbox, and
    ``most`` is how many processes it may have.
    """
    if cgroups is not None and cgroups.shares:
        return Share(CpuCgroup(opened))
    return Share(Processes(init, most))


def means(cgroups: Cgroups | None) -> str:
    """Name what puts a long call last here, as the trace and ``doctor`` do."""
    if cgroups is not None and cgroups.shares:
        return "cpu-idle"
    return WITHOUT_CGROUP[0] if _autogroups() else WITHOUT_CGROUP[1]


def in_cgroup(cgroups: Cgroups, cgroup: Cgroup) -> Share | None:
    """Return the share of a call that has a cgroup and no init; None without a cpu controller."""
    return Share(CpuCgroup(lambda: cgroup)) if cgroups.shares else None


def _autogroups() -> bool:
    """Tell whether sessions share the processors out: those in no cpu cgroup do, sched(7)."""
    try:
        if Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() != "1":
            return False
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return False
    paths = [line.split(":", 2) for line in lines]
    cpu = [path for _, names, path in paths if "cpu" in names.split(",")]
    if cpu:
        return cpu[0] == "/"
    top = next((path.split("/")[1] for _, names, path in paths if not names), "")
    return not top or not os.path.exists(f"/sys/fs/cgroup/{top}/cpu.weight")


def _used_ns(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def _named(pidfd: int) -> set[int]:
    """Return the process id behind a pidfd, pidfd_open(2); none where the process is gone."""
    try:
        lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    except OSError:
        return set()  # no descriptors left
    found = {int(line.removeprefix("Pid:")) for line in lines if line.startswith("Pid:")}
    return found - {-1}


def _write(folder: Path, file: str, value: bytes) -> None:
    fd = os.open(folder / file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)
