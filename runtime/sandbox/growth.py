"""Step "sandbox": find what a call has added to folders that it writes directly.

The walk follows no link and stays on its file system. A folder that the program closed to us is
opened (folders.py says why); one that stays closed could hold anything, and ends the call.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from safeconduct.call import Limits

from . import folders

_INFINITE = float("inf")
# LIMIT: a walk sees so many entries between looks at the clock.
_SLICE_ENTRIES = 128
_BLOCK_BYTES = 512


@dataclass(slots=True)
class Grown:
    """What a walk has found to be new or changed since the call began, up to the limits it seeks.

    A limit that the file system itself does not confirm is not sought: what changed may have been
    large before.
    """

    bytes_max: float = _INFINITE
    inodes_max: float = _INFINITE
    used_bytes: int = 0
    inodes: int = 0
    exceeded: str | None = None
    links: set[int] = field(default_factory=set[int])

    @property
    def sought(self) -> bool:
        """Tell whether the file system says that a limit was passed by somebody."""
        return self.bytes_max < _INFINITE or self.inodes_max < _INFINITE


class Walk:
    """Looks through some folders once, as far as its limits reach."""

    def __init__(self, limits: Limits, handles: Mapping[str, int], begun_ns: int) -> None:
        """``handles`` are the folders and files by path; their descriptors stay the caller's.

        ``begun_ns`` is when the call began: what has not changed since was there before.
        """
        self.grown = Grown()
        self._limits, self._handles, self._begun_ns = limits, handles, begun_ns

    def run(self) -> Generator[None]:
        """Add up what changed, in slices, until the end or a limit."""
        for root, handle in self._handles.items():
            if not any(root != other and _inside(root, other) for other in self._handles):
                yield from self._walk_one(handle)
            if self.grown.exceeded:
                return

    def _walk_one(self, root: int) -> Generator[None]:
        """Add up what changed below an open root, one open folder for each level of depth."""
        opened: list[tuple[int, list[str]]] = []
        top = os.fstat(root)
        if not stat.S_ISDIR(top.st_mode):
            self._count(top)
            return
        try:
            if not self._enter(opened, root, "."):
                return
            with suppress(OSError):
                yield from self._list(opened[-1], top.st_dev, len(opened))
            while opened and self.grown.exceeded is None:
                folder, names = opened[-1]
                if not names:
                    os.close(opened.pop()[0])
                    continue
                # A folder that was removed since can still be open, but not listed, getdents(2).
                if self._enter(opened, folder, names.pop()):
                    with suppress(OSError):
                        yield from self._list(opened[-1], top.st_dev, len(opened))
        finally:
            for folder, _ in opened:
                os.close(folder)

    def _enter(self, opened: list[tuple[int, list[str]]], above: int, name: str) -> bool:
        """Open one more folder; False where it is gone or not to be listed."""
        try:
            opened.append((folders.list_below(above, name), []))
        except PermissionError:
            self._closed(above, name)
            return False
        except OSError:
            # It may have been moved or replaced since, or there are no descriptors left: the next
            # walk tries again.
            return False
        return True

    def _closed(self, above: int, name: str) -> None:
        """End the call for what stays closed, if a program of ours can have made it so."""
        try:
            status = folders.look_at(above, name)
        except FileNotFoundError:
            return
        except OSError:
            status = os.fstat(above)
        if folders.is_ours(status) and status.st_ctime_ns >= self._begun_ns:
            self.grown.exceeded = "disk"

    def _list(self, opened: tuple[int, list[str]], device: int, depth: int) -> Generator[None]:
        """Count the entries of one folder and note its subfolders."""
        folder, names = opened
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number % _SLICE_ENTRIES == 0:
                    yield
                try:
                    status = folders.look_at(folder, entry.name)
                except PermissionError:
                    self._closed(folder, entry.name)
                    continue
                except OSError:
                    continue
                changed = self._count(status)
                if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
                    if depth < self._limits.depth:
                        names.append(entry.name)
                    elif changed:
                        self.grown.exceeded = "depth"
                if self.grown.exceeded:
                    return

    def _count(self, status: os.stat_result) -> bool:
        if status.st_ctime_ns < self._begun_ns:
            return False
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if status.st_ino in self.grown.links:
                return True
            self.grown.links.add(status.st_ino)
        self.grown.inodes += 1
        self.grown.used_bytes += status.st_blocks * _BLOCK_BYTES
        if self.grown.used_bytes > self.grown.bytes_max:
            self.grown.exceeded = "disk"
        elif self.grown.inodes > self.grown.inodes_max:
            self.grown.exceeded = "inodes"
        return True


def _inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
