"""Step "sandbox": the overlays of one call, from before they are mounted until their changes are
kept.

    Keeper.begin → Layers.mount (snapshot, a fresh sandbox) → run, every process gone → keep → close

Changes of overlays inside the workspace are one set of it, so that a commit takes all of them or
none; an overlay elsewhere is a set of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol, TypeVar

from safeconduct.call import KeptChanges
from safeconduct.errors import SandboxFailed, SandboxUnavailable
from safeconduct.runtime.sandbox import machine

from . import kernel, later, shelf
from .changes import Bounds, Change, Changes, Kind, Node
from .names import Protects, protects
from .seen import Marks, Snapshot
from .walk import diff

# LIMIT: how long a new sandbox may take to tell of its overlays, paths that an Outcome names.
_MOUNT_SECONDS: Final = 20.0
_FLAGGED_MAX: Final = 20


class Mounting(Protocol):
    """The line to a sandbox that is being made."""

    def next(self, seconds: float | None = None) -> object | None:
        """Take its next message; None for one that came before its program ended."""
        ...

    def take_layers(self) -> list[int]:
        """Hand over the descriptors of its upper folders."""
        ...


class _Waiting(Protocol):
    @property
    def channel(self) -> Mounting: ...

    def close(self) -> None: ...


_WaitingT = TypeVar("_WaitingT", bound=_Waiting)


@dataclass(slots=True)
class _Root:
    """One overlaid folder: its path, the base under it, when it began and what took its changes."""

    path: str
    base: int
    snapshot: Snapshot | None = None
    upper: int = -1

    def close(self) -> None:
        for fd in (self.base, self.upper):
            if fd >= 0:
                os.close(fd)
        self.base = self.upper = -1
        if self.snapshot is not None:
            self.snapshot.close()
            self.snapshot = None


class Keeper:
    """Keeps what the calls of one runtime change in overlays. Safe to use from several threads.

    ``folder`` is a private folder of ours, outside of every workspace. ``protected`` are names
    that are never copied out, relative to the workspace; a folder's ends with a slash.
    """

    def __init__(self, folder: Path, *, workspace: str, protected: Sequence[str]) -> None:
        self.folder, self.workspace = folder, workspace
        self.protects: Protects = protects(protected)
        # What the launcher's overlays write, native/launcher/src/overlay.rs.
        self.marks: Marks = "trusted" if machine.is_root() else "user"
        shelf.sweep(folder)
        # INVARIANT: whoever holds it takes the sandbox that was asked for after the snapshot.
        self.alone = threading.Lock()

    def begin(self, roots: Sequence[str], *, shielded: Sequence[str], disk_bytes: int) -> Layers:
        """Open the folders that a call will see through overlays. The caller closes them.

        What lies at or below a ``shielded`` path is never copied out: the call could not reach it.
        Raises SandboxUnavailable for what is no folder, and SandboxFailed where too many changes
        wait for a decision.
        """
        shelf.refuse_full(self.folder)
        layers = Layers(self, shielded=frozenset(shielded), disk_bytes=disk_bytes)
        try:
            layers.open(roots)
        except BaseException:
            layers.close()
            raise
        return layers


@dataclass(slots=True)
class Layers:
    """The overlays of one call."""

    keeper: Keeper
    shielded: frozenset[str]
    disk_bytes: int
    _roots: list[_Root] = field(default_factory=list[_Root])

    def open(self, roots: Sequence[str]) -> None:
        """Open the base of each overlay."""
        for path in roots:
            try:
                self._roots.append(_Root(path, os.open(path, kernel.FOLDER)))
            except NotADirectoryError as error:
                raise SandboxUnavailable(
                    f"{path} is no folder, so it cannot be written through an overlay.",
                    missing="overlay:file",
                    hint="Grant the folder it lies in, or use workspace: direct.",
                ) from error
            except OSError as error:
                raise SandboxFailed(
                    f"{path} cannot be opened: {error.strerror}.",
                    step="overlay",
                    errno=error.errno or 0,
                ) from error

    def mount(self, take: Callable[[], _WaitingT]) -> _WaitingT:
        """Have a sandbox made whose overlays begin now, and take their upper folders over.

        ``take`` asks for one and waits for it. INVARIANT: it gives none that was made before: its
        overlays would still see what the base was then, and the snapshot would not tell.
        """
        with self.keeper.alone:
            for root in self._roots:
                root.snapshot = Snapshot.take(root.base)
            waiting = take()
        try:
            self._take_over(waiting.channel)
        except BaseException:
            waiting.close()
            raise
        return waiting

    def _take_over(self, channel: Mounting) -> None:
        missing = list(self._roots)
        while missing:
            if channel.next(_MOUNT_SECONDS) is not None:
                raise SandboxFailed("The sandbox ended before its program.", step="overlay")
            # One message each, in the order of the mounts, native/launcher/src/root.rs.
            for upper in channel.take_layers():
                missing.pop(0).upper = upper

    def keep(self) -> tuple[KeptChanges, ...]:
        """Compare, and keep what differs. Call it after the last process of the call is gone.

        Raises LimitExceeded, SandboxFailed or Moved; then nothing is kept.
        """
        parts: dict[str, list[shelf.Part]] = {}
        for root in self._roots:
            workspace, below = self._place(root.path)
            part = shelf.Part(changes=self._diff(root, below), upper=root.upper, below=below)
            parts.setdefault(workspace, []).append(part)
        try:
            return tuple(
                self._shelve(workspace, found)
                for workspace, found in parts.items()
                if any(part.changes for part in found)
            )
        except OSError as error:
            raise SandboxFailed(
                f"The changes of the call could not be kept: {error.strerror}.",
                step="changes",
                errno=error.errno or 0,
                code="workspace.not_kept",
                hint="Make room in the state folder and run it again; the workspace is as it was.",
            ) from error

    def close(self) -> None:
        """Let go of everything: what was not kept is rolled back. May be called again."""
        with ExitStack() as stack:
            for root in self._roots:
                stack.callback(root.close)

    def _place(self, path: str) -> tuple[str, str]:
        """Say to which workspace an overlaid folder belongs, and where in it it lies."""
        workspace = self.keeper.workspace
        if path == workspace:
            return path, ""
        inside = workspace.rstrip("/") + "/"
        return (
            (workspace, path.removeprefix(inside) + "/") if path.startswith(inside) else (path, "")
        )

    def _diff(self, root: _Root, below: str) -> Changes:
        if root.snapshot is None or root.upper < 0:
            raise SandboxFailed(f"{root.path} has no overlay.", step="overlay")
        changes = diff(
            root.upper,
            root.base,
            root.snapshot,
            marks=self.keeper.marks,
            protected=lambda path: (
                self.keeper.protects(below + path) or self._is_shielded(f"{root.path}/{path}")
            ),
            bounds=Bounds(read_bytes=min(Bounds().read_bytes, 4 * self.disk_bytes + (256 << 20))),
        )
        return Changes(entries=tuple(_moved(changes, below))) if below else changes

    def _is_shielded(self, path: str) -> bool:
        while self.shielded and path:
            if path in self.shielded:
                return True
            path = path.rpartition("/")[0]
        return False

    def _shelve(self, workspace: str, parts: Sequence[shelf.Part]) -> KeptChanges:
        name, digest = shelf.shelve(self.keeper.folder, parts, workspace=workspace)
        changes = [change for part in parts for change in part.changes]
        return replace(summary(name, workspace, changes), digest=digest)


def _moved(changes: Changes, below: str) -> Iterator[Change]:
    """Name each change from the workspace on: what lies above may tell what it is obeyed by."""
    for change in changes:
        path = below + change.path
        named = None if change.node is Node.FOLDER else later.reason(path)
        yield replace(change, path=path, later=change.later or named)


def summary(name: str, workspace: str, changes: Sequence[Change]) -> KeptChanges:
    """Count what a set holds."""
    kinds = [change.kind for change in changes]
    flagged = [change.path for change in changes if change.later and not change.refused]
    return KeptChanges(
        id=name,
        workspace=workspace,
        created=kinds.count(Kind.CREATED),
        modified=kinds.count(Kind.MODIFIED) + kinds.count(Kind.MODE),
        deleted=kinds.count(Kind.DELETED),
        refused=sum(1 for change in changes if change.refused),
        conflicts=sum(1 for change in changes if change.conflict),
        later=len(flagged),
        flagged=tuple(flagged[:_FLAGGED_MAX]),
    )
