"""Step "sandbox": what a call nested too deep, moved to where every program can remove it.

The depth limit is polled, so a call may have gone far beyond it before it was ended. Walkers that
call themselves (such as Python's shutil.rmtree) give up on such a chain, and cleaning up after the
call would fail. Nothing is deleted: pieces of it lie at the top of the folder afterwards.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# LIMIT: pieces that are moved in one go; what is left then stays deep.
_MOVES_MAX = 4096


def flatten(root: str, depth: int, since_ns: int) -> int:
    """Move folders that lie deeper than ``depth`` below ``root`` to its top; return how many.

    Only what changed since, with all that holds it: what was there before stays where it is. The
    program is dead, so nothing moves meanwhile. What this user may not enter is left. Raises
    OSError where ``root`` cannot be opened.
    """
    token, moved = secrets.token_hex(4), 0
    top = os.open(root, _FOLDER)
    try:
        waiting = _changed_folders(top, since_ns)
        while waiting and moved < _MOVES_MAX:
            for folder, name in _too_deep(top, waiting.pop(), depth, since_ns):
                piece = f"too-deep-{token}-{moved}"
                with suppress(OSError):
                    os.rename(name, piece, src_dir_fd=folder, dst_dir_fd=top)
                    waiting.append(piece)
                    moved += 1
    finally:
        os.close(top)
    return moved


def _too_deep(top: int, name: str, depth: int, since_ns: int) -> Iterator[tuple[int, str]]:
    """Yield (open folder, name) of each changed folder that lies at ``depth`` below ``name``."""
    opened: list[tuple[int, list[str]]] = []
    try:
        with suppress(OSError):
            folder = os.open(name, _FOLDER, dir_fd=top)
            opened.append((folder, _changed_folders(folder, since_ns)))
        while opened:
            folder, names = opened[-1]
            if len(opened) >= depth:
                yield from ((folder, one) for one in names)
                names = []
            if not names:
                os.close(opened.pop()[0])
                continue
            with suppress(OSError):
                inner = os.open(names.pop(), _FOLDER, dir_fd=folder)
                opened.append((inner, _changed_folders(inner, since_ns)))
    finally:
        for folder, _ in opened:
            os.close(folder)


def _changed_folders(folder: int, since_ns: int) -> list[str]:
    """Return the names of subfolders on the same file system that changed since."""
    device, found = os.fstat(folder).st_dev, list[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if (
                    entry.is_dir(follow_symlinks=False)
                    and status.st_dev == device
                    and status.st_ctime_ns >= since_ns
                ):
                    found.append(entry.name)
    return found
