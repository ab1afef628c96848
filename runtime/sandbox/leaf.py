"""Step "sandbox": make room for calls below our own cgroup, version 2.

A cgroup that holds processes cannot hand controllers down ("no internal processes", cgroups(7)).
A delegated scope or service holds just its own processes when a supervisor starts in it, so those
are moved into one leaf below it first, as systemd's own user manager and container engines do.
The leaf stays: another supervisor may count on it by then. It goes with its scope.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# Never mistaken for the cgroup of a call, whose name goes on with a process id.
LEAF = "safeconduct-leaf"
NEEDED = frozenset({"memory", "pids"})
_WELCOME = ("cpu", "io")
# LIMIT: processes that fork while they are moved are moved again, so often.
_ROUNDS_MAX = 16


def delegated(folder: Path) -> bool:
    """Tell whether systemd says that all below this folder is its user's (systemd 251 and newer).

    https://systemd.io/CGROUP_DELEGATION/: `Delegate=` sets the extended attribute.
    """
    try:
        return os.getxattr(folder, "user.delegate") == b"1"
    except OSError:
        return False


def make_room(own: Path) -> bool:
    """Let ``own``, the cgroup of this process, hand down memory and pids. False where it cannot.

    Moves every process of ``own``, this one included, into ``own/safeconduct-leaf``: what they may
    use is still bounded and counted by ``own``. Where it fails nothing is left below ``own``.
    """
    control = own / "cgroup.subtree_control"
    if not _ours(own, control):
        return False
    leaf = own / LEAF
    try:
        leaf.mkdir(exist_ok=True)
        _empty(own, leaf, control)
    except OSError:
        _give_back(own, leaf)
        return False
    for controller in _WELCOME:
        with suppress(OSError):  # not delegated: a call is bounded without it
            _write(control, f"+{controller}")
    return True


def _ours(own: Path, control: Path) -> bool:
    try:
        plain = (own / "cgroup.type").read_text().strip() == "domain"
        there = set((own / "cgroup.controllers").read_text().split())
    except OSError:
        return False  # the real root of the hierarchy has no type: it is everybody's
    files = (own, own / "cgroup.procs", control)
    return plain and there >= NEEDED and all(os.access(file, os.W_OK) for file in files)


def _empty(own: Path, leaf: Path, control: Path) -> None:
    """Move until nothing is left that forbids to hand controllers down."""
    wanted = " ".join(f"+{controller}" for controller in sorted(NEEDED))
    for attempt in range(_ROUNDS_MAX):
        _move(_members(own), leaf)
        try:
            _write(control, wanted)
        except OSError:
            if attempt == _ROUNDS_MAX - 1:
                raise
        else:
            return


def _give_back(own: Path, leaf: Path) -> None:
    with suppress(OSError):
        _move(_members(leaf), own)
        leaf.rmdir()


def _members(folder: Path) -> Sequence[str]:
    return (folder / "cgroup.procs").read_text().split()


def _move(pids: Sequence[str], folder: Path) -> None:
    """Move processes. A 0 stands for one of another pid namespace, which has no name here."""
    for pid in pids:
        if pid == "0":
            continue
        with suppress(ProcessLookupError):  # it has ended
            _write(folder / "cgroup.procs", pid)


def _write(file: Path, text: str) -> None:
    # No buffer: the kernel's answer to write(2) is what counts.
    with file.open("wb", buffering=0) as opened:
        opened.write(text.encode())
