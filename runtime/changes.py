"""Sets of changes that calls left in overlays: look at them, commit them, forget them.

They belong to a user, not to one runtime: whoever comes later can still decide about them.
docs/workspace.md says what a commit promises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from safeconduct.call import Json, KeptChanges
from safeconduct.errors import Error, SandboxFailed

from .places import Places
from .sandbox.overlay import (
    CommitReport,
    Pending,
    Recovered,
    Recovery,
    Session,
    commit,
    recover,
    shelf,
)

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Tell(Protocol):
    """Records what came of a deed on a workspace."""

    def __call__(self, value: Json, changes: Sequence[KeptChanges] = ()) -> None:
        """Record a value, and the sets that were kept."""
        ...


Recording = Callable[[str, dict[str, Json]], AbstractContextManager[Tell]]


def _unrecorded(verb: str, arguments: dict[str, Json]) -> AbstractContextManager[Tell]:
    def tell(value: Json, changes: Sequence[KeptChanges] = ()) -> None:
        pass

    return nullcontext(tell)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSets:
    """The sets of one user. Must not be used inside a sandbox; there they are absent.

    ``recording`` records what is done to a workspace, before it is done and what came of it.
    ``overlay`` is the one that the calls of a session share, where there is a session.
    """

    places: Places
    recording: Recording = _unrecorded
    overlay: Session | None = None

    def names(self) -> list[str]:
        """Return the names of all sets, newest first."""
        return shelf.shelved(self.places.changes)

    def load(self, name: str) -> shelf.Shelved:
        """Read what a set holds. SandboxFailed (`workspace.no_changes`) where there is none."""
        return shelf.load(self.places.changes, name)

    @contextmanager
    def opened(self, name: str) -> Generator[int]:
        """Open the folder that holds a set's new files, at their paths in the workspace."""
        with shelf.opened(self.places.changes, name) as upper:
            yield upper

    def commit(self, name: str) -> CommitReport:
        """Apply a set to its workspace, all of it or nothing, and forget it.

        What is refused is left out. Raises Conflict where the workspace is no longer what the
        call saw, SandboxFailed or Error (`workspace.missing`); then the workspace is as it was.
        """
        found = self.load(name)
        with self.recording("workspace.commit", _named(found)) as tell:
            with opened_workspace(found.workspace) as workspace, self.opened(name) as upper:
                found.refuse_others(workspace)
                report = commit(
                    found.changes,
                    upper=upper,
                    workspace=workspace,
                    journal=self.places.commits(os.path.realpath(found.workspace)),
                    # A set is made after the last process of its call is gone; nothing writes it.
                    ended=lambda: True,
                )
            shelf.drop(self.places.changes, name)
            counts: dict[str, Json] = {
                "applied": len(report.applied),
                "refused": len(report.refused),
                "later": len(report.later),
                "kept": len(report.kept),
            }
            tell(counts)
        return report

    def rollback(self, name: str) -> shelf.Shelved:
        """Forget a set and return what it was; the workspace stays as it is."""
        found = self.load(name)
        with self.recording("workspace.rollback", _named(found)) as tell:
            shelf.drop(self.places.changes, name)
            tell(None)
        return found

    def session(self) -> tuple[Pending, ...]:
        """Say what the session changed so far in each workspace, kept nowhere yet.

        Raises SandboxFailed (`workspace.session_in_use`) while a call of it runs.
        """
        return self.overlay.changes() if self.overlay is not None else ()

    def keep_session(self) -> tuple[KeptChanges, ...]:
        """Keep what the session changed so far as one set for each workspace.

        The next call begins a new overlay, with what the workspace is then. Raises LimitExceeded or
        SandboxFailed; then nothing is kept and the session's overlay stays.
        """
        if self.overlay is None or not self.overlay.begun:
            return ()
        with self.recording("workspace.keep", {}) as tell:
            kept = self.overlay.keep()
            tell(None, kept)
        return kept

    def rollback_session(self) -> None:
        """Forget what the session changed so far; the next call begins a new overlay."""
        if self.overlay is not None and self.overlay.begun:
            with self.recording("workspace.rollback", {"session": True}) as tell:
                self.overlay.drop()
                tell(None)

    def recover(self, workspace: str) -> Recovery:
        """End a commit to a workspace that a crash broke off; a living one is left alone.

        Raises SandboxFailed where the workspace cannot be restored.
        """
        journal = self.places.commits(os.path.realpath(workspace))
        try:
            with opened_workspace(workspace) as folder:
                found = recover(journal, folder)
        except SandboxFailed as error:
            # Somebody is committing now; or the folder here is another one than the journal's.
            if error.code not in ("workspace.busy", "workspace.journal"):
                raise
            return Recovery()
        if found.done is not Recovered.NOTHING:
            arguments: dict[str, Json] = {"workspace": workspace}
            with self.recording("workspace.recover", arguments) as tell:
                tell({"done": str(found.done), "kept": len(found.kept)})
        return found


@contextmanager
def opened_workspace(path: str) -> Generator[int]:
    """Open a workspace. Error `workspace.missing` where it is no folder any more."""
    try:
        fd = os.open(path, _FOLDER)
    except OSError as error:
        raise Error(
            f"{path}: {error.strerror}",
            code="workspace.missing",
            hint="put the workspace back where it was, or roll the changes back",
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _named(found: shelf.Shelved) -> dict[str, Json]:
    return {"id": found.id, "workspace": found.workspace, "changes": len(found.changes)}
