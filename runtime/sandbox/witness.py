"""Step "sandbox": tell cheaply that in some folders no entry has come, gone or been replaced.

A folder's ctime changes with its entries and cannot be set, inode(7). It comes from a clock that
moves in ticks, so one that changed a moment ago may change again without a trace: such a folder is
no witness.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TypeAlias

# Longer than a tick of any kernel, CONFIG_HZ=100.
_TICK_NS = 20_000_000
# Some file systems keep whole seconds (ext4 with small inodes) or every other one (vfat).
_COARSE_NS, _COARSE_TICK_NS = 1_000_000_000, 2_500_000_000
# LIMIT: folders of one witness; looking at more would take longer than it saves.
_FOLDERS_MAX = 2000

_Stamp: TypeAlias = "tuple[int, int, int] | None"


class Witness:
    """How some folders were when each was added."""

    def __init__(self) -> None:
        self._stamps: dict[str, _Stamp] = {}
        self._reliable = True

    def add(self, folder: str) -> None:
        """Look at a folder. What is then read of it may be believed while it is ``unchanged``."""
        if folder in self._stamps or not self._reliable:
            return
        stamp = self._stamps[folder] = _stamp(folder)
        fresh = stamp is not None and stamp[2] + _tick_ns(stamp[2]) >= time.time_ns()
        if fresh or len(self._stamps) > _FOLDERS_MAX:
            self._reliable = False

    def unchanged(self) -> bool:
        """Tell whether all are certainly still the same, with the same entries."""
        return self._reliable and _all_same(self._stamps)


def _tick_ns(changed_ns: int) -> int:
    return _TICK_NS if changed_ns % _COARSE_NS else _COARSE_TICK_NS


def _all_same(stamps: Mapping[str, _Stamp]) -> bool:
    return all([_stamp(folder) == stamp for folder, stamp in stamps.items()])


def _stamp(folder: str) -> _Stamp:
    try:
        status = os.lstat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns
