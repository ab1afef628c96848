"""Step "sandbox": copy an overlay's changes into the workspace, all of them or none.

Each name changes by one rename (or one chmod), so at any moment it is as before or as after. What
a rename displaces is looked at again before it counts: a change that somebody made in the last
instant is put back, and is a conflict.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from safeconduct.call import Json
from safeconduct.errors import SandboxFailed

from . import content, kernel
from .changes import Change, Changes, Conflict, Kind, Node
from .journal import Act, Journal, Plan, Step, locked, plan
from .recovery import chmod_entry, finish, look, recover_locked, restore
from .seen import Identity
from .stage import Stage

# LIMIT: so many folders are synced one by one, more with the whole file system.
_FSYNC_MAX: Final = 32
# Tells which point a commit has reached; tests kill it there.
Reached = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitReport:
    """What a commit did: ``applied`` stands in the workspace, ``refused`` was left out.

    ``kept`` are paths where the version before was kept under a name of ours, because somebody
    else was writing there.
    """

    applied: tuple[Change, ...] = ()
    refused: tuple[Change, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def later(self) -> tuple[Change, ...]:
        """What was applied and takes effect outside of every sandbox."""
        return tuple(change for change in self.applied if change.later)

    def to_json(self) -> dict[str, Json]:
        """Return it for a trace."""
        return {
            "applied": [change.to_json() for change in self.applied],
            "refused": [change.to_json() for change in self.refused],
            "kept": list(self.kept),
        }


def commit(
    changes: Changes,
    *,
    upper: int,
    workspace: int,
    journal: Path,
    ended: Callable[[], bool],
    reached: Reached = lambda point: None,
) -> CommitReport:
    """Apply a diff to the workspace; afterwards the overlay is stale and must be dropped.

    ``upper`` and ``workspace`` are folder descriptors, ``journal`` a folder outside the workspace,
    the same one for every commit of it. ``ended`` says whether every process that could write the
    upper folder is gone. A crash that an earlier commit left is recovered first. Raises Conflict,
    or SandboxFailed (`workspace.busy`, `workspace.moved`, `workspace.commit`); then the workspace
    is as it was.
    """
    if not ended():
        raise SandboxFailed(
            "A process of the call still lives, so nothing is committed.",
            step="commit",
            code="workspace.busy",
        )
    try:
        with locked(journal):
            recover_locked(journal, workspace)
            planned = plan(_rebased(changes, workspace))
            _check(planned, workspace)
            if not planned.steps:
                return CommitReport(refused=changes.refused)
            log = Journal.begin(journal, workspace, planned.steps)
            reached("plan")
            _carry_out(log, planned, Stage(upper, workspace), reached)
            reached("applied")
            kept = finish(log, workspace, reached)
    except OSError as error:
        raise _failed(error) from error
    applied = [change for part in planned.parts for change in part if not change.refused]
    return CommitReport(applied=tuple(applied), refused=changes.refused, kept=kept)


def _carry_out(log: Journal, planned: Plan, stage: Stage, reached: Reached) -> None:
    """Stage and apply everything, or put everything back."""
    try:
        _stage(stage, log, planned.parts, reached)
        for at, (step, part) in enumerate(zip(planned.steps, planned.parts, strict=True)):
            _apply(stage.workspace, step, part)
            reached(f"apply:{at}")
        _sync_parents(stage.workspace, planned.steps)
        log.write("applied")
    except BaseException as error:
        # Also for KeyboardInterrupt: what has begun is undone before anybody hears of it.
        kept = restore(log, stage.workspace)
        if kept:
            raise _failed(error, kept) from error
        raise


def _sync_parents(workspace: int, steps: Sequence[Step]) -> None:
    """Write the renames to disk: they live in the folders, fsync(2)."""
    above = {step.path.rpartition("/")[0] for step in steps}
    if len(above) > _FSYNC_MAX:
        kernel.sync_file_system(workspace)
        return
    for path in above:
        fd = kernel.open_beneath(workspace, path, kernel.FOLDER)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _rebased(changes: Changes, workspace: int) -> Changes:
    """Take over base entries that are what the diff saw though their change time moved: after a
    commit that was restored, a new link, a chmod there and back. What a file holds is compared.
    """
    entries = [replace(change, base=_now(change, workspace)) for change in changes]
    return Changes(entries=tuple(entries))


def _now(change: Change, workspace: int) -> Identity | None:
    """Return the identity to compare from now on. INVARIANT: ``_check`` looks again, and strictly:
    what moves after this is a conflict.
    """
    base = change.base
    status = look(workspace, change.path) if base is not None else None
    if base is None or status is None or change.refused or change.conflict:
        return base
    now = Identity.of(status)
    if now == base or not _is_same(change, base, status):
        return base
    if stat.S_ISREG(base.mode) and _digest(workspace, change.path, base.size) != change.before:
        return base
    return now


def _is_same(change: Change, base: Identity, status: os.stat_result) -> bool:
    if change.kind is Kind.MODE and change.node is Node.FOLDER:
        # What was made in it meanwhile, and be it by us, does not make it another one.
        now = Identity.of(status)
        return (base.device, base.inode, base.mode) == (now.device, now.inode, now.mode)
    return base.moved(status)


def _digest(workspace: int, path: str, size: int) -> str:
    try:
        with content.regular(kernel.open_beneath(workspace, path, kernel.FILE)) as fd:
            return content.digest(fd, size)
    except (OSError, content.Moved):
        return ""


def _check(planned: Plan, workspace: int) -> None:
    """Compare the base with what the diff saw, before anything is touched."""
    known = [change for part in planned.parts for change in part if change.conflict]
    if known:
        raise Conflict((change.path for change in known), why=known[0].conflict or "")
    moved = [
        change.path
        for part in planned.parts
        for at, change in enumerate(part)
        # In a new tree only the top can be taken; of an old one every entry counts.
        if (at == 0 or change.base is not None) and not _is(workspace, change.path, change.base)
    ]
    if moved:
        raise Conflict(moved, why="it changed after the diff")


def _stage(stage: Stage, log: Journal, parts: Sequence[Sequence[Change]], reached: Reached) -> None:
    staged: list[Identity | None] = []
    for at, (step, part) in enumerate(zip(log.steps, parts, strict=True)):
        staged.append(stage.put(step, part))
        reached(f"stage:{at}")
    stage.sync()
    log.write("staged", staged)
    reached("staged")


def _apply(workspace: int, step: Step, part: Sequence[Change]) -> None:
    with kernel.parent_of(workspace, step.path) as (folder, name):
        if step.act is Act.CHMOD and step.base is not None:
            # What was staged in the folder has moved its times already; its inode must be the same.
            chmod_entry(folder, name, step.base, step.mode)
            return
        if step.base is not None and not _is(folder, name, step.base):
            raise Conflict([step.path], why="it changed during the commit")
        if step.act is Act.CREATE:
            _rename(folder, step.aside, name, step.path)
        elif step.act is Act.DELETE:
            _rename(folder, name, step.aside, step.path)
        else:
            kernel.exchange(folder, step.aside, name)
        if step.act in (Act.DELETE, Act.REPLACE) and not _displaced(folder, step, part):
            # ``restore`` puts it back: the journal says what stood where.
            raise Conflict([step.path], why="it changed during the commit")


def _rename(folder: int, old: str, new: str, path: str) -> None:
    try:
        kernel.rename_new(folder, old, new)
    except FileExistsError as error:
        raise Conflict([path], why="it was made during the commit") from error


def _displaced(folder: int, step: Step, part: Sequence[Change]) -> bool:
    """Tell whether what a step took away is what the diff saw, down to its last entry."""
    status = look(folder, step.aside)
    if status is None or step.base is None or not step.base.moved(status):
        return False
    if not stat.S_ISDIR(step.base.mode):
        return True
    inside = len(step.path) + 1
    return all(
        change.base is None or _is(folder, f"{step.aside}/{change.path[inside:]}", change.base)
        for change in part[1:]
    )


def _is(folder: int, path: str, identity: Identity | None) -> bool:
    """Tell whether a path holds exactly this, or nothing where ``identity`` is None."""
    status = look(folder, path)
    return (status and Identity.of(status)) == identity


def _failed(error: BaseException, kept: Sequence[str] = ()) -> SandboxFailed:
    why = error.strerror if isinstance(error, OSError) else str(error)
    number = (error.errno if isinstance(error, OSError) else None) or 0
    if number == errno.EINVAL:
        why = "its file system cannot swap two names"
    if kept:
        why = f"{why}; both versions are kept of {', '.join(ascii(path) for path in kept[:3])}"
    return SandboxFailed(
        f"The workspace could not take the changes: {why}.",
        step="commit",
        errno=number,
        code="workspace.commit",
    )
