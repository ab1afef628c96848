"""Step "sandbox": what the kernel charged to the cgroup of one call, v1 or v2.

The files are opened when the cgroup is made, so reading them needs no path and takes microseconds,
also while the call runs. Sources: kernel admin-guide cgroup-v1 and cgroup-v2.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from errno import ENODEV
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TypeAlias

# LIMIT: no account we read is longer: `io.stat` has a line of some 90 bytes for each device.
_ACCOUNT_BYTES_MAX = 16 << 10
_TEXTS_KEPT = 64
# The sandbox's init counts as one process and is not the program's.
INIT_PIDS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What the kernel charged to one call. ``None`` where it keeps no such account."""

    cpu_us: int | None = None
    throttled_us: int | None = None
    peak_memory_bytes: int | None = None
    oom_kills: int | None = None
    peak_pids: int | None = None
    refused_forks: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None


_Values: TypeAlias = "Mapping[str, int | None]"
_Parse: TypeAlias = Callable[[bytes], _Values]


@dataclass(frozen=True, slots=True)
class _Account:
    """One file, the controller it belongs to, and what its text says of a Charge."""

    controller: str
    file: str
    parse: _Parse


def _number(name: str, divisor: int = 1, less: int = 0) -> _Parse:
    return lambda text: {name: max(0, int(text) // divisor - less)}


def _keyed(*wanted: tuple[bytes, str, int]) -> _Parse:
    @lru_cache(maxsize=_TEXTS_KEPT)  # mostly zeros, the same for all calls
    def parse(text: bytes) -> _Values:
        found: dict[str, int] = {}
        for line in text.splitlines():
            key, _, value = line.partition(b" ")
            for name, field_name, divisor in wanted:
                if key == name:
                    found[field_name] = int(value) // divisor
        return found

    return parse


def _io_v2(text: bytes) -> _Values:
    """Add up `io.stat`: `8:0 rbytes=1 wbytes=2 …`, one device a line."""
    read = written = 0
    for word in text.split():
        name, _, value = word.partition(b"=")
        if name == b"rbytes":
            read += int(value)
        elif name == b"wbytes":
            written += int(value)
    return {"read_bytes": read, "written_bytes": written}


def _io_v1(text: bytes) -> _Values:
    """Add up `blkio.throttle.io_service_bytes`: `8:0 Read 1`, one device and kind a line."""
    totals = {b"Read": 0, b"Write": 0}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[1] in totals:
            totals[words[1]] += int(words[2])
    return {"read_bytes": totals[b"Read"], "written_bytes": totals[b"Write"]}


_OOM = _keyed((b"oom_kill", "oom_kills", 1))
_REFUSED = _keyed((b"max", "refused_forks", 1))
_PEAK_PIDS = _Account("pids", "pids.peak", _number("peak_pids", less=INIT_PIDS))
_PIDS_EVENTS = _Account("pids", "pids.events", _REFUSED)
_ACCOUNTS: Mapping[int, tuple[_Account, ...]] = MappingProxyType(
    {
        1: (
            _Account("cpuacct", "cpuacct.usage", _number("cpu_us", divisor=1000)),
            _Account("cpu", "cpu.stat", _keyed((b"throttled_time", "throttled_us", 1000))),
            _Account("memory", "memory.max_usage_in_bytes", _number("peak_memory_bytes")),
            _Account("memory", "memory.oom_control", _OOM),
            _PEAK_PIDS,
            _PIDS_EVENTS,
            _Account("blkio", "blkio.throttle.io_service_bytes", _io_v1),
        ),
        2: (
            _Account(
                "memory",
                "cpu.stat",  # there without the cpu controller too; then nothing throttles
                _keyed((b"usage_usec", "cpu_us", 1), (b"throttled_usec", "throttled_us", 1)),
            ),
            _Account("memory", "memory.peak", _number("peak_memory_bytes")),
            _Account("memory", "memory.events", _OOM),
            _PEAK_PIDS,
            _PIDS_EVENTS,
            _Account("memory", "io.stat", _io_v2),
        ),
    }
)


def files(version: int, controller: str) -> list[str]:
    """Return the files of one controller, in the order that ``parse`` expects."""
    return [account.file for account in _ACCOUNTS[version] if account.controller == controller]


def parse(version: int, controllers: Iterable[str], texts: Sequence[str]) -> Charge:
    """Return what the texts of all ``files`` of these controllers say, in their order."""
    kept = _parsers(version, tuple(controllers))
    values: dict[str, int | None] = {}
    for parse_one, text in zip(kept, texts, strict=False):
        try:
            values |= parse_one(text.encode())
        except ValueError:
            continue  # empty: the kernel keeps no such account
    return Charge(**values)


@cache
def _parsers(version: int, controllers: tuple[str, ...]) -> tuple[_Parse, ...]:
    return tuple(
        account.parse
        for controller in controllers
        for account in _ACCOUNTS[version]
        if account.controller == controller
    )


@dataclass(slots=True)
class Accounts:
    """The opened accounts of one cgroup; ``close`` closes them."""

    _open: list[tuple[int, _Parse]] = field(default_factory=list[tuple[int, _Parse]])

    def open(self, version: int, folders: Mapping[str, int], missing: set[str]) -> None:
        """Open what the kernel has below ``folders`` (descriptors).

        What it does not have is added to ``missing`` and not asked for again. Raises OSError where
        there are no descriptors left.
        """
        for account in _ACCOUNTS[version]:
            if account.controller not in folders or account.file in missing:
                continue
            try:
                fd = os.open(
                    account.file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folders[account.controller]
                )
            except FileNotFoundError:
                missing.add(account.file)
                continue
            except OSError as error:
                if error.errno != ENODEV:
                    raise
                continue  # the cgroup is being removed at this moment: there is no account of it
            self._open.append((fd, account.parse))

    def read(self) -> Charge:
        """Read all of them. An account that cannot be read is one that is not kept."""
        values: dict[str, int | None] = {}
        for fd, parse in self._open:
            try:
                values |= parse(os.pread(fd, _ACCOUNT_BYTES_MAX, 0))
            except (OSError, ValueError):
                continue  # ENODEV: the cgroup is gone
        return Charge(**values)

    def close(self) -> None:
        """Close the files; a charge read afterwards is empty."""
        while self._open:
            os.close(self._open.pop()[0])
