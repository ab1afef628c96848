"""What does the seccomp filter cost: to load, and each system call that a program then makes?

Baselines: no filter, and the program as libseccomp exports it before it is made shorter. Each
round forks a process per subject, loads the filter there and times two system calls: one that
is decided by its number alone, and one by an argument.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable

from safeconduct.call import Tier
from safeconduct.runtime.sandbox import bpf, seccomp

from .harness import finish, options, spread

_NO_NEW_PRIVILEGES, _SECCOMP, _MODE_FILTER = 38, 22, 2
_LOOPS = 2000
_CALLS: dict[str, Callable[[], object]] = {
    "number": os.getppid,
    "argument": lambda: os.get_blocking(0),  # fcntl(2) F_GETFL
}
_RESULT = struct.Struct(f"={1 + len(_CALLS)}d")


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def measure(program: bytes | None) -> tuple[float, ...]:
    """Fork, load, time; return the seconds of the load and of one call of each kind."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(writing, _RESULT.pack(*_timed(program)))
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    data = os.read(reading, _RESULT.size)
    os.close(reading)
    os.waitpid(pid, 0)
    return _RESULT.unpack(data)


def _timed(program: bytes | None) -> list[float]:
    libc = ctypes.CDLL(None, use_errno=True)
    begun = time.perf_counter()
    if program is not None:
        wanted = _Filter(len(program) // 8, program)
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        begun = time.perf_counter()
        if libc.prctl(_SECCOMP, _MODE_FILTER, ctypes.byref(wanted), 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "the filter does not load")
    found = [time.perf_counter() - begun]
    for call in _CALLS.values():
        begun = time.perf_counter()
        for _ in range(_LOOPS):
            call()
        found.append((time.perf_counter() - begun) / _LOOPS)
    return found


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__)
    exported = seccomp.export(Tier.FULL, ())
    programs = {
        "none": None,
        "exported": exported,
        "full": seccomp.compile_filter(Tier.FULL),
        "landlock": seccomp.compile_filter(Tier.LANDLOCK),
    }
    begun = time.perf_counter()
    bpf.shorten(exported)
    shortening_ms = (time.perf_counter() - begun) * 1e3
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in programs}
    for _ in range(chosen.rounds(300)):
        for name, program in programs.items():
            samples[name].append(measure(program))
    figures: dict[str, object] = {"shorten_once_ms": round(shortening_ms, 1)}
    details: dict[str, object] = {}
    for name, program in programs.items():
        columns = list(zip(*samples[name], strict=True))
        if program is not None:
            figures[f"{name}_instructions"] = len(program) // 8
            load = spread(columns[0], scale=1e6)
            figures[f"{name}_load_us"] = load["median"]
            details[f"{name} load µs"] = load
        for kind, column in zip(_CALLS, columns[1:], strict=True):
            cost = spread(column, scale=1e9)
            details[f"{name} {kind} ns"] = cost
            figures[f"{name}_{kind}_ns"] = round(cost["median"])
    finish(__doc__ or "", figures, details, chosen)


if __name__ == "__main__":
    main()
