"""Step "sandbox": which names are never copied out of an overlay.

Stricter than the mounts: a name counts at any depth, since a nested repository has hooks too, and
in every spelling that some file system takes for the same one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

Protects: TypeAlias = Callable[[str], bool]

# What a repository keeps its history in. Everything else below .git may run programs, or say where
# else git looks: config, hooks, attributes, modules, worktrees, rebase-merge's `exec` lines …
_GIT_DATA: Final = frozenset(
    [
        "branches",
        "cherry_pick_head",
        "commit_editmsg",
        "description",
        "fetch_head",
        "head",
        "index",
        "logs",
        "merge_head",
        "merge_mode",
        "merge_msg",
        "objects",
        "orig_head",
        "packed-refs",
        "refs",
        "revert_head",
        "shallow",
    ]
)


def protects(names: Sequence[str]) -> Protects:
    """Return the judge over paths relative to the workspace.

    ``names`` are relative paths; a folder ends with a slash and stands for all it holds.
    """
    marks = tuple(tuple(_fold(part) for part in name.rstrip("/").split("/")) for name in names)
    begins = frozenset(mark[0] for mark in marks)

    def protected(path: str) -> bool:
        parts = tuple(_fold(part) for part in path.split("/"))
        if begins.isdisjoint(parts) and ".git" not in parts:
            return False
        return _leads_git(parts) or any(
            parts[at : at + len(mark)] == mark for mark in marks for at in range(len(parts))
        )

    return protected


def is_git_link(name: str) -> bool:
    """Tell whether a file or link of this name would tell git where the repository is."""
    return _fold(name) == ".git"


def _leads_git(parts: tuple[str, ...]) -> bool:
    """Tell whether a path below some .git is not plainly data."""
    for at, part in enumerate(parts):
        if part == ".git" and len(parts) > at + 1:
            name = parts[at + 1]
            alternates = parts[at + 1 : at + 4] == ("objects", "info", "alternates")
            return name not in _GIT_DATA or alternates or ".git" in parts[at + 1 :]
    return False


def _fold(part: str) -> str:
    """Fold what some file system folds: case, widths, invisible marks, and 8.3 names of .git.

    ext4 and f2fs folders with +F ignore the marks (fs/unicode, "NFDICF"), as HFS+ does; vfat drops
    trailing dots and spaces, NTFS takes a colon for a stream (git's `is_ntfs_dotgit`).
    """
    if part.isascii():
        folded = part.lower()
    else:
        seen = (mark for mark in part if unicodedata.category(mark) not in ("Cf", "Mn", "Cc"))
        folded = unicodedata.normalize("NFKC", "".join(seen)).casefold()
    folded = folded.partition(":")[0].rstrip(". ")
    return ".git" if folded == "git~1" else folded
