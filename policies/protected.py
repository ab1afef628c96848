"""What no policy can grant: writing the files that decide what runs next (DESIGN §4).

The agent must not write its own rules, its host's, or code that somebody's next `git` or
editor runs. The sandbox mounts these read-only from the same list.
"""

from __future__ import annotations

from typing import Final

# Relative to the workspace. A folder ends with a slash and stands for all it holds.
PROTECTED: Final[tuple[str, ...]] = (
    ".safeconduct/",
    ".git/hooks/",
    ".git/config",
    ".git/config.worktree",
    ".git/commondir",
    ".git/info/attributes",
    ".gitmodules",
    ".husky/",
    ".claude/",
    ".claude.json",
    ".codex/",
    ".gemini/",
    ".mcp.json",
    ".vscode/",
    ".cursor/",
    ".cursorrules",
    ".windsurf/",
    ".windsurfrules",
    ".clinerules",
    ".roomodes",
    ".goosehints",
    ".aider.conf.yml",
    "opencode.json",
    # Code that an editor runs when it opens a file beside them.
    ".exrc",
    ".nvimrc",
    ".nvim.lua",
    ".dir-locals.el",
    ".idea/",
    ".zed/",
    ".devcontainer/",
    ".envrc",
)
_MARKS: Final = tuple(tuple(name.rstrip("/").split("/")) for name in PROTECTED)
_FIRST: Final = frozenset(mark[0] for mark in _MARKS)


def is_protected(path: str) -> bool:
    """Tell whether writing this absolute path would change rules or what runs later.

    Stricter than the mounts: nothing of any `.git` is written by our own tools, since
    `commondir`, `HEAD` and a submodule's `config` redirect git as well as hooks do. Names
    count at any depth, as a nested repository has hooks too, and in any case and with
    trailing dots or spaces, as vfat and case-folding ext4 fold them.
    """
    components = [fold_name(component) for component in path.split("/")]
    if _FIRST.isdisjoint(components):
        return False
    return ".git" in components or any(
        tuple(components[at : at + len(mark)]) == mark
        for mark in _MARKS
        for at in range(len(components) - len(mark) + 1)
    )


def fold_name(component: str) -> str:
    """Fold what case-insensitive file systems fold."""
    return component.casefold().rstrip(". ")
