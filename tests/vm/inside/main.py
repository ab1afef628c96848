"""Runs the checks of one boot and writes each result to the second serial line, as JSON.

Each check is a fork with its own user, cgroup and home. What it leaves behind fails it too.
"""

from __future__ import annotations

import io
import json
import os
import platform
import select
import signal
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from . import cgroups, demo, hierarchy, kernel, landlock, refused
from .desk import HOMES, become, landlock_abi
from .registry import CHECKS, Check

LINE = Path("/dev/ttyS1")
# LIMIT: seconds for one check, emulated; a hang fails it and the next one runs.
_CHECK_SECONDS = 150.0
_DETAIL_CHARACTERS_MAX = 6000
# Importing them filled CHECKS.
MODULES = (demo, hierarchy, kernel, landlock, refused)


def main(boot: str) -> None:
    """Run them one after the other."""
    _prepare()
    facts = {"kernel": platform.release(), "landlock_abi": landlock_abi(), "boot": boot}
    _tell({"facts": facts})
    for check in CHECKS.values():
        if boot in check.boots:
            begun = time.monotonic()
            detail = _run(check)
            seconds = round(time.monotonic() - begun, 1)
            _tell({"check": check.name, "detail": detail, "seconds": seconds})
    _tell({"end": True})


def _prepare() -> None:
    """Let the ordinary user reach the interpreter and the checkout, above the host's own modes."""
    reach = [Path(sys.executable).resolve(), Path(sys.prefix), Path(__file__).resolve()]
    for folder in {parent for path in reach for parent in path.parents}:
        mode = folder.stat().st_mode & 0o7777
        if mode & 0o5 != 0o5:
            folder.chmod(mode | 0o5)
    HOMES.chmod(0o755)


def _run(check: Check) -> str:
    """Return what is wrong, or nothing."""
    before = _processes()
    folder = cgroups.place(check.scope, check.name, check.uid)
    was = {name: _setting(name).read_text() for name in check.settings}
    for name, value in check.settings.items():
        _setting(name).write_text(value)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be(check, folder, writing)
    os.close(writing)
    detail = _follow(child, reading)
    for name, value in was.items():
        _setting(name).write_text(value)
    try:
        if left := cgroups.leftovers():
            detail += f"\ncgroups left: {left}"
        if left := _left(before):
            detail += f"\nprocesses left: {left}"
    finally:
        cgroups.remove(folder)
    return detail.strip()[-_DETAIL_CHARACTERS_MAX:]


def _setting(name: str) -> Path:
    return Path("/proc/sys", *name.split("."))


def _be(check: Check, folder: Path, writing: int) -> None:
    """Run the check in this process, a child, and end it."""
    said = io.StringIO()
    detail = "it ended without a result"
    try:
        os.setsid()
        cgroups.enter(folder, check.scope)
        become(check.uid)
        with redirect_stdout(said), redirect_stderr(said):
            check.run()
        detail = ""
    except BaseException:
        detail = f"{said.getvalue()}\n{traceback.format_exc()}"
    finally:
        os.write(writing, detail.encode()[-_DETAIL_CHARACTERS_MAX:])
        os._exit(0)


def _follow(child: int, reading: int) -> str:
    """Collect what a child says until it ends, or end it."""
    said = b""
    deadline = time.monotonic() + _CHECK_SECONDS
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            said += b"the check did not end in time"
            os.killpg(child, signal.SIGKILL)
            break
        piece = os.read(reading, 65536)
        if not piece:
            break
        said += piece
    os.close(reading)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return said.decode(errors="replace") + (f"\nits process ended with {code}" if code else "")


def _processes() -> dict[int, str]:
    """Return every process with a command line: kernel threads have none."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if line:
            found[int(entry.name)] = line.replace(b"\0", b" ").decode(errors="replace")[:200]
    return found


def _left(before: dict[int, str]) -> list[str]:
    """Name the processes that a check left, once they had time to end; then end them."""
    deadline = time.monotonic() + 5
    while new := {pid: line for pid, line in _processes().items() if pid not in before}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for pid in new:
        os.kill(pid, signal.SIGKILL)
    return sorted(new.values())


def _tell(event: dict[str, object]) -> None:
    with LINE.open("wb", buffering=0) as line:
        line.write(json.dumps(event).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
