"""Step "sandbox": the overlays of one call, from before they are mounted until their changes are
kept.

    Keeper.begin → Layers.mount (snapshot, a fresh sandbox) → run, every process gone → keep → close

Changes of overlays inside the workspace are one set of it, so that a commit takes all of them or
none; an overlay elsewhere is a set of its own. Those of a session are in session.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from safeconduct.call import KeptChanges, Profile, WorkspaceMode
from safeconduct.runtime.sandbox import machine

from . import shelf
from .mounting import Layers, WaitingT, arriving
from .names import protects
from .session import Session
from .terms import Root, Terms


class Keeper:
    """Keeps what the calls of one runtime change in overlays. Safe to use from several threads.

    ``folder`` is a private folder of ours, outside of every workspace. ``protected`` are names
    that are never copied out, relative to the workspace; a folder's ends with a slash.
    """

    def __init__(self, folder: Path, *, workspace: str, protected: Sequence[str]) -> None:
        self._terms = Terms(
            folder=folder,
            workspace=workspace,
            protects=protects(protected),
            # What the launcher's overlays write, native/launcher/src/overlay.rs.
            marks="trusted" if machine.is_root() else "user",
        )
        self.session = Session(self._terms)
        shelf.sweep(folder)

    def begin(
        self, profile: Profile, roots: Sequence[str], *, shielded: Sequence[str], lasting: bool
    ) -> Layers:
        """Open the folders that a call will see through overlays. The caller closes them.

        What lies at or below a ``shielded`` path is never copied out: the call could not reach it.
        ``lasting`` is said of a program that is no call and ends nobody knows when. Raises
        SandboxUnavailable for what is no folder, and SandboxFailed where too many changes wait for
        a decision or the session's overlay is in use.
        """
        if profile.workspace is WorkspaceMode.SESSION:
            return self.session.begin(profile, roots, shielded=shielded, lasting=lasting)
        shelf.refuse_full(self._terms.folder)
        disk_bytes = profile.limits.disk_bytes
        layers = _CallLayers(self._terms, shielded=frozenset(shielded), disk_bytes=disk_bytes)
        try:
            layers.open(roots)
        except BaseException:
            layers.close()
            raise
        return layers


@dataclass(slots=True)
class _CallLayers:
    """The overlays of one call."""

    terms: Terms
    shielded: frozenset[str]
    disk_bytes: int
    _roots: list[Root] = field(default_factory=list[Root])

    def open(self, roots: Sequence[str]) -> None:
        """Open the base of each overlay."""
        for path in roots:
            self._roots.append(Root.open(path))

    def mount(self, take: Callable[[], WaitingT]) -> WaitingT:
        """Have a sandbox made whose overlays begin now, and take their upper folders over."""
        with self.terms.alone:
            for root in self._roots:
                root.begin()
            waiting = take()
        try:
            for root, upper in zip(
                self._roots, arriving(waiting.channel, len(self._roots)), strict=True
            ):
                root.upper = upper
        except BaseException:
            waiting.close()
            raise
        return waiting

    def keep(self) -> tuple[KeptChanges, ...]:
        """Compare, and keep what differs. Call it after the last process of the call is gone.

        Raises LimitExceeded, SandboxFailed or Moved; then nothing is kept.
        """
        parts = self.terms.compare(self._roots, shielded=self.shielded, disk_bytes=self.disk_bytes)
        return self.terms.shelve(parts)

    def close(self) -> None:
        """Let go of everything: what was not kept is rolled back. May be called again."""
        with ExitStack() as stack:
            for root in self._roots:
                stack.callback(root.close)
