"""Step "sandbox": limits that the kernel does not hold, looked at while a call runs.

These are ``polled``: cpu time of the whole tree, silence, storms of refused forks, and what a call
adds to folders it may write directly. A call that is over before the first look pays two system
calls for it.

Growth is noticed by statvfs(2), which costs the same however large the folders are. It counts for
everybody on that file system, so it ends no call by itself: a walk must find as much that changed
since the call began. The walk (growth.py) goes on for a few milliseconds at each look.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress

from safeconduct.call import Limits

from . import deep
from .cgroup import Charge
from .growth import Grown, Walk
from .share import Share

# (until so many seconds of the call, look every so many seconds)
_INFINITE = float("inf")
_INTERVALS = ((0.3, 0.01), (1.0, 0.05), (10.0, 0.1), (_INFINITE, 0.25))
# LIMIT: a walk goes on so long at each look where nothing is suspected yet, and so long where the
# file system says that a limit was passed: what made it may be removing it again. It sees so many
# entries between looks at the clock.
_SLICE_SECONDS, _SOUGHT_SECONDS = 0.005, 0.05
_SOUGHT_REST_SECONDS = 0.02
# LIMIT: how long it may take to tell why a call failed.
_LAST_SECONDS = 0.25
# LIMIT: a walk that nothing calls for takes a fiftieth of the time, and comes after two seconds.
_WALK_SECONDS, _WALK_REST = 2.0, 50
# A program whose forks are refused gives up or waits; one that goes on, twice for each process it
# may have within these bounds, is a bomb.
_REFUSED_FORKS_MIN, _REFUSED_FORKS_MAX = 100, 1000
# Less of one processor than this is not work: a program that waits wakes up now and then.
_IDLE_CPU_SHARE = 0.01
# Times of files come from a clock that may be one tick behind, CONFIG_HZ=100.
_CLOCK_TICK_NS = 20_000_000
# A folder's name may lead elsewhere, or nowhere, as soon as a program closes one above it.
_ROOT = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Watch:
    """Looks at one call. Not for several threads at once."""

    def __init__(
        self,
        limits: Limits,
        roots: Sequence[str],
        charge: Callable[[], Charge] | None = None,
        *,
        members: Callable[[], Sequence[int]] | None = None,
        share: Share | None = None,
    ) -> None:
        """Note how full the file systems of ``roots`` (writable, without an overlay) are now.

        ``charge`` reads the call's cgroup and ``members`` lists its processes, where there is one;
        ``share`` is its part of the processors.
        """
        self._limits = limits
        self._charge = charge
        self._members = members
        self._share = share
        # How many forks of the call were refused so far.
        self._refused = 0
        self._begun = self._quiet_since = time.monotonic()
        self._begun_ns = time.time_ns() - _CLOCK_TICK_NS
        self._quiet_cpu_us = 0
        self._age = 0.0
        # What could not be looked at when the call began; the call must not go on.
        self._unseen = False
        self._handles: dict[str, int] = {}
        for root in roots:
            self._hold(root)
        self._before = [(handle, _used(handle)) for handle in self._handles.values()]
        self._walk: Generator[None] | None = None
        self._grown = Grown()
        # How much had been added when the last walk began: the next one waits for more.
        self._walked_bytes = self._walked_inodes = 0
        self._walk_seconds, self._walk_at = 0.0, self._begun + _WALK_SECONDS

    @property
    def interval_seconds(self) -> float:
        """How long to wait until the next look."""
        if self._walk is not None and self._grown.sought:
            return _SOUGHT_REST_SECONDS
        if self._refused:
            return _INTERVALS[0][1]
        return next(interval for until, interval in _INTERVALS if self._age < until)

    def check(self, now_seconds: float, output_seen: bool) -> str | None:
        """Name the limit that the call exceeds, if any. ``now_seconds`` is time.monotonic()."""
        self._age = now_seconds - self._begun
        exceeded = self._by_account(now_seconds, output_seen) if self._charge else None
        if self._charge is None and self._share is not None:
            self._share.look(now_seconds)
        if exceeded is None and self._unseen:
            return "disk"
        return exceeded or (self._by_growth(now_seconds) if self._before else None)

    def end(self) -> None:
        """Note that the call is being ended."""
        share, self._share = self._share, None
        if share is not None:
            share.end()

    def last(self) -> str | None:
        """Name the limit that a call, which is over and failed, may have met between two looks.

        What the kernel refuses beyond a limit is never added: to have reached it is enough. LIMIT:
        others may have freed half as much meanwhile.
        """
        used_bytes, inodes = self._added() if self._before else (0, 0)
        walk = Walk(self._limits, self._handles, self._begun_ns)
        if 0 < self._limits.disk_bytes <= 2 * used_bytes:
            walk.grown.bytes_max = self._limits.disk_bytes - 1
        if 0 < self._limits.inodes <= 2 * inodes:
            walk.grown.inodes_max = self._limits.inodes - 1
        if walk.grown.sought:
            deadline = time.monotonic() + _LAST_SECONDS
            for _ in walk.run():
                if time.monotonic() > deadline:
                    break
        return walk.grown.exceeded

    def flatten(self) -> None:
        """Bring what the call, which is over, nested too deep to where it can be removed."""
        for handle in self._handles.values():
            with suppress(OSError):  # no folder, or no descriptors left: then it stays deep
                deep.flatten(handle, self._limits.depth, self._begun_ns)

    def close(self) -> None:
        """Give back what is held open."""
        if self._walk is not None:
            self._walk.close()
        while self._handles:
            os.close(self._handles.popitem()[1])
        self._before = []

    def _hold(self, root: str) -> None:
        if root in self._handles:
            return
        try:
            self._handles[root] = os.open(root, _ROOT)
        except (FileNotFoundError, NotADirectoryError):
            return  # gone, and so nothing can be added to it
        except OSError:
            self._unseen = True

    def _by_account(self, now_seconds: float, output_seen: bool) -> str | None:
        charge = self._charge() if self._charge else Charge()
        self._refused = charge.refused_forks or 0
        most = min(max(_REFUSED_FORKS_MIN, 2 * self._limits.pids), _REFUSED_FORKS_MAX)
        if self._refused > most:
            return "pids"
        cpu_us = charge.cpu_us
        if cpu_us is None:
            return None
        if self._limits.cpu_ms is not None and cpu_us >= self._limits.cpu_ms * 1000:
            return "cpu"
        if self._share:
            self._share.look(now_seconds, cpu_us)
        quiet = now_seconds - self._quiet_since
        if output_seen or cpu_us - self._quiet_cpu_us > quiet * 1e6 * _IDLE_CPU_SHARE:
            self._quiet_since, self._quiet_cpu_us = now_seconds, cpu_us
        elif self._limits.idle_ms is not None and quiet * 1000 >= self._limits.idle_ms:
            return "idle"
        return None

    def _by_growth(self, now_seconds: float) -> str | None:
        used_bytes, inodes = self._added()
        if self._walk is None:
            # Whoever removes files meanwhile hides what is made: so a walk comes now and then.
            due = now_seconds >= self._walk_at
            if not self._more(used_bytes, inodes) and not due:
                return None
            self._walked_bytes, self._walked_inodes = used_bytes, inodes
            walk = Walk(self._limits, self._handles, self._begun_ns)
            self._grown, self._walk, self._walk_seconds = walk.grown, walk.run(), 0.0
        grown, limits = self._grown, self._limits
        if used_bytes > limits.disk_bytes:
            grown.bytes_max = limits.disk_bytes
        if inodes > limits.inodes:
            grown.inodes_max = limits.inodes
        begun = now = time.monotonic()
        deadline = begun + (_SOUGHT_SECONDS if grown.sought else _SLICE_SECONDS)
        ended = False
        while now < deadline and not ended:
            ended = next(self._walk, True) is True
            now = time.monotonic()
        self._walk_seconds += now - begun
        if not ended:
            return None
        self._walk = None
        self._walk_at = now + max(_WALK_SECONDS, _WALK_REST * self._walk_seconds)
        return self._judge(grown)

    def _more(self, used_bytes: int, inodes: int) -> bool:
        """Tell whether enough was added since the last walk for another one."""
        limits = self._limits
        more_bytes = used_bytes - self._walked_bytes > limits.disk_bytes // 8
        # There is no deeper nesting without as many new folders.
        more_inodes = inodes - self._walked_inodes >= min(limits.depth, limits.inodes)
        return more_inodes or (used_bytes > limits.disk_bytes and more_bytes)

    def _judge(self, grown: Grown) -> str | None:
        # Files without a name are in no folder: then it counts what the tree has written.
        if grown.exceeded is None and self._written() > grown.bytes_max:
            return "disk"
        return grown.exceeded

    def _added(self) -> tuple[int, int]:
        """Return by how many bytes and inodes the fullest-grown file system grew."""
        used_bytes = inodes = 0
        for handle, (bytes_before, inodes_before) in self._before:
            bytes_now, inodes_now = _used(handle)
            used_bytes = max(used_bytes, bytes_now - bytes_before)
            inodes = max(inodes, inodes_now - inodes_before)
        return used_bytes, inodes

    def _written(self) -> int:
        """Return what the living processes, and the dead they waited for, have written, proc(5)."""
        total = 0
        for pid in self._members() if self._members else ():
            with suppress(OSError, ValueError, KeyError):
                with open(f"/proc/{pid}/io", "rb") as account:
                    lines = account.read(1024).splitlines()
                values = dict(line.split(b": ", 1) for line in lines)
                total += int(values[b"write_bytes"]) - int(values[b"cancelled_write_bytes"])
        return total


def _used(root: int) -> tuple[int, int]:
    """Return the used bytes and inodes of the file system that an open path lies on."""
    found = os.fstatvfs(root)
    return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree
