"""Step "sandbox": what a call nested too deep, moved to where every program can remove it.

The depth limit is polled, so a call may have gone far beyond it before it was ended. Walkers that
call themselves (such as Python's shutil.rmtree) give up on such a chain, and cleaning up after the
call would fail. Nothing is deleted: pieces of it lie at the top of the folder afterwards.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress

from . import folders

# LIMIT: pieces that are moved in one go; what is left then stays deep.
_MOVES_MAX = 4096
# LIMIT: folders that are opened in search of them.
_FOLDERS_MAX = 200_000


def flatten(root: int, depth: int, since_ns: int) -> int:
    """Move folders that lie deeper than ``depth`` below ``root`` to its top; return how many.

    ``root`` is an open folder, O_PATH too. Only what changed since is moved: what was there before
    stays where it is. The program is dead, so nothing moves meanwhile.
    Folders of our own that it closed are opened; those of others that may not be entered are left.
    Raises OSError where ``root`` cannot be listed.
    """
    token, moved = secrets.token_hex(4), 0
    top = folders.list_again(root)
    budget = iter(range(_FOLDERS_MAX))
    try:
        waiting = _subfolders(top)
        while waiting and moved < _MOVES_MAX:
            for folder, name in _too_deep(top, waiting.pop(), depth, since_ns, budget):
                piece = f"too-deep-{token}-{moved}"
                with suppress(OSError):
                    _move(folder, name, top, piece)
                    waiting.append(piece)
                    moved += 1
    finally:
        os.close(top)
    return moved


def _move(folder: int, name: str, top: int, piece: str) -> None:
    try:
        os.rename(name, piece, src_dir_fd=folder, dst_dir_fd=top)
    except PermissionError:
        # Moving a folder rewrites its "..", which needs the right to change itself, rename(2).
        moved = folders.step_down(folder, name)
        try:
            for one in (folder, moved, top):
                folders.admit(one, folders.CHANGE)
        finally:
            os.close(moved)
        os.rename(name, piece, src_dir_fd=folder, dst_dir_fd=top)


def _too_deep(
    top: int, name: str, depth: int, since_ns: int, budget: Iterator[int]
) -> Iterator[tuple[int, str]]:
    """Yield (open folder, name) of each changed folder that lies at ``depth`` below ``name``."""
    opened: list[tuple[int, list[str]]] = []
    try:
        _enter(opened, top, name)
        while opened and next(budget, None) is not None:
            folder, names = opened[-1]
            if len(opened) >= depth:
                yield from ((folder, one) for one in _subfolders(folder, since_ns))
                names = []
            if not names:
                os.close(opened.pop()[0])
                continue
            _enter(opened, folder, names.pop())
    finally:
        for folder, _ in opened:
            os.close(folder)


def _enter(opened: list[tuple[int, list[str]]], above: int, name: str) -> None:
    """Open one more folder and note its subfolders: a folder need not have changed for one that
    lies in it to have.
    """
    with suppress(OSError):
        opened.append((folders.list_below(above, name), []))
        opened[-1][1].extend(_subfolders(opened[-1][0]))


def _subfolders(folder: int, since_ns: int = 0) -> list[str]:
    """Return the names of subfolders on the same file system that changed since."""
    device, found = os.fstat(folder).st_dev, list[str]()
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                status = folders.look_at(folder, entry.name)
                if (
                    stat.S_ISDIR(status.st_mode)
                    and status.st_dev == device
                    and status.st_ctime_ns >= since_ns
                ):
                    found.append(entry.name)
    return found
