"""Step "sandbox": a workspace that a tool changes only in an overlay: diff, commit, rollback.

    Keeper.begin → Layers.mount → run, end → Layers.keep: a set on the shelf → commit or drop

docs/workspace.md says what is promised. The upper folder is hostile; the base may change at any
time; nothing here follows a symbolic link.
"""

from __future__ import annotations

from . import shelf
from .changes import Bounds, Change, Changes, Conflict, Kind, Node
from .commit import CommitReport, commit
from .keeping import Keeper
from .mounting import Layers
from .names import protects
from .recovery import Recovered, Recovery, recover
from .seen import Identity, Marks, Snapshot
from .session import Pending, Session
from .text import unified
from .walk import diff

__all__ = [
    "Bounds",
    "Change",
    "Changes",
    "CommitReport",
    "Conflict",
    "Identity",
    "Keeper",
    "Kind",
    "Layers",
    "Marks",
    "Node",
    "Pending",
    "Recovered",
    "Recovery",
    "Session",
    "Snapshot",
    "commit",
    "diff",
    "protects",
    "recover",
    "shelf",
    "unified",
]
