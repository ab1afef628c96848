"""Step "sandbox": a workspace that a tool changes only in an overlay: diff, commit, rollback.

    Snapshot.take → mount, run, end → diff → commit, or rollback: close the upper folder

docs/workspace.md says what is promised. The upper folder is hostile; the base may change at any
time; nothing here follows a symbolic link.
"""

from __future__ import annotations

from . import shelf
from .changes import Bounds, Change, Changes, Conflict, Kind, Node
from .commit import CommitReport, commit
from .names import protects
from .recovery import Recovered, Recovery, recover
from .seen import Identity, Marks, Snapshot
from .text import unified
from .walk import diff

__all__ = [
    "Bounds",
    "Change",
    "Changes",
    "CommitReport",
    "Conflict",
    "Identity",
    "Kind",
    "Marks",
    "Node",
    "Recovered",
    "Recovery",
    "Snapshot",
    "commit",
    "diff",
    "protects",
    "recover",
    "shelf",
    "unified",
]
