"""Step "sandbox": one overlay for all calls of a session, one after the other.

    Session.begin (waits for its turn) → Turn.mount → run, every process gone → Turn.close
    … → Session.changes, keep or drop

Between two calls no process holds the overlay, only a descriptor here: of a mount of its tmpfs that
is in no namespace. Each sandbox attaches that and mounts an overlay over it anew. Two overlays at a
time over one upper folder would undo each other's work ("Sharing and copying layers" in the
kernel's filesystems/overlayfs.rst), so calls take turns. One mount for all sandboxes would need the
same user in all of them: an overlay cannot be mounted under other ids, its layers can.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Final

from safeconduct.call import KeptChanges, Profile
from safeconduct.errors import SandboxFailed, SandboxUnavailable

from . import content, kernel, shelf
from .changes import Changes
from .mounting import Mounting, WaitingT, arriving
from .terms import Root, Terms

# LIMIT: how long an operator's question waits for its turn, and who has it for the end of what the
# sandbox before had mounted.
_OPERATOR_SECONDS: Final = 2.0
_UNMOUNT_SECONDS: Final = 5.0
# What a program sent to itself over a ring of sockets outlives it: the kernel closes one such file
# after the other, three ticks of its clock each (unix_gc and delayed_fput in its net/unix/garbage.c
# and fs/file_table.c). No more of them can be under way than its user may open files.
_FILE_SECONDS: Final = 0.04
_UNMOUNT_SECONDS_MAX: Final = 300.0
# What overlay.rs understands.
_FIRST, _AGAIN = b"first", b"again"
# Its steps that fail where a sandbox broke while it had the layer: a mount is attached but once; or
# where the launcher died, whose user namespace an ordinary user's layer belongs to.
_CANNOT_TAKE: Final = ("attach /.stage", "pick layer", "resize layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """What a session changed so far in one workspace, an absolute path."""

    workspace: str
    changes: Changes


class Session:
    """The overlay of one runtime's session. Safe to use from several threads."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        # INVARIANT: whoever holds it is the only one to use what follows.
        self._turn = threading.Lock()
        self._roots: dict[str, Root] = {}
        self._shielded: set[str] = set()
        self._disk_bytes = 0
        self._unmount_seconds = _UNMOUNT_SECONDS
        self._ending: list[kernel.UnmountWatch] = []
        # Whoever has the turn has it for longer than a call.
        self._lasting = False

    def begin(
        self, profile: Profile, roots: Sequence[str], *, shielded: Sequence[str], lasting: bool
    ) -> Turn:
        """Wait until no other call uses the overlay, and take it. The caller closes the Turn.

        Waits no longer than the call may take. Raises SandboxFailed (`workspace.session_in_use`,
        `.session_full`, `.changes_full`) and SandboxUnavailable (`overlay:session`).
        """
        seconds = profile.limits.wall_ms / 1000
        self._take_turn(seconds, unmount=min(seconds, self._unmount_seconds))
        try:
            self._refuse_apart(profile, roots)
            self._refuse_less(profile, roots)
            shelf.refuse_full(self.terms.folder)
            for path in roots:
                if path not in self._roots:
                    self._roots[path] = Root.open(path)
                if not self._roots[path].is_there():
                    raise _lost(f"{path} is another folder than when the session began.")
            self._shielded.update(shielded)
            self._disk_bytes = max(self._disk_bytes, profile.limits.disk_bytes)
            wanted = _UNMOUNT_SECONDS + profile.limits.files * _FILE_SECONDS
            self._unmount_seconds = min(wanted, _UNMOUNT_SECONDS_MAX)
            self._lasting = lasting
        except BaseException:
            self.release()
            raise
        turn = Turn(self, [self._roots[path] for path in roots])
        if not roots:
            turn.close()
        return turn

    def changes(self) -> tuple[Pending, ...]:
        """Return what the session changed so far. Raises as ``keep``."""
        with self._alone():
            parts = self._compare()
            return tuple(
                Pending(
                    workspace=workspace,
                    changes=Changes(entries=tuple(one for part in found for one in part.changes)),
                )
                for workspace, found in parts.items()
            )

    def keep(self) -> tuple[KeptChanges, ...]:
        """Keep all that the session changed so far; the next call begins a new overlay.

        Waits for the end of the last call's mounts, as long as that may take. Raises LimitExceeded
        or SandboxFailed (`workspace.session_in_use` while a call runs); then nothing is kept and
        the overlay stays.
        """
        with self._alone(unmount=self._unmount_seconds):
            kept = self.terms.shelve(self._compare())
            self._forget()
            return kept

    def drop(self) -> None:
        """Forget what the session changed so far; the next call begins a new overlay."""
        with self._alone():
            self._forget()

    @property
    def begun(self) -> bool:
        """Tell whether there is an overlay."""
        return any(root.tree >= 0 for root in list(self._roots.values()))

    def close(self) -> None:
        """Let go of everything: what was not kept is rolled back."""
        mine = self._turn.acquire(timeout=_OPERATOR_SECONDS)
        try:
            self._forget()
        finally:
            if mine:
                self._turn.release()

    def release(self) -> None:
        """End a turn, and forget the folders whose overlay never began."""
        for path in [path for path, root in self._roots.items() if root.tree < 0]:
            self._roots.pop(path).close()
        self._lasting = False
        self._turn.release()

    def note(self, merged: int) -> None:
        """Take over the merged folder of a sandbox, to know when nothing of it is left."""
        try:
            self._ending.append(kernel.UnmountWatch(merged))
        finally:
            os.close(merged)

    def _take_turn(self, seconds: float, *, unmount: float) -> None:
        """Wait for the turn, and then for the end of what the one before mounted."""
        if not self._turn.acquire(timeout=0 if self._lasting else seconds):
            raise _in_use()
        try:
            self._settle(unmount)
        except BaseException:
            self._turn.release()
            raise

    def _settle(self, seconds: float) -> None:
        """Wait until the overlay of the turn before is gone, and with it all that could write."""
        until = time.monotonic() + seconds
        while self._ending:
            if not self._ending[0].wait(max(0.0, until - time.monotonic())):
                raise _in_use()
            self._ending.pop(0).close()

    @contextmanager
    def _alone(self, *, unmount: float = _OPERATOR_SECONDS) -> Generator[None]:
        self._take_turn(_OPERATOR_SECONDS, unmount=unmount)
        try:
            yield
        finally:
            self._turn.release()

    def _compare(self) -> dict[str, list[shelf.Part]]:
        begun = [root for root in self._roots.values() if root.tree >= 0]
        for root in begun:
            if root.upper < 0:
                # Without root a tool may have taken our own permission away.
                root.upper = content.open_upper(root.tree, "upper", kernel.FOLDER)
        return self.terms.compare(begun, shielded=self._shielded, disk_bytes=self._disk_bytes)

    def _forget(self) -> None:
        roots, self._roots = self._roots, {}
        self._shielded, self._disk_bytes = set(), 0
        with ExitStack() as stack:
            for root in roots.values():
                stack.callback(root.close)
            for watch in self._ending:
                stack.callback(watch.close)
        self._ending = []

    def _refuse_apart(self, profile: Profile, roots: Sequence[str]) -> None:
        """Refuse a call that would see a folder of the session otherwise than other calls do."""
        for path in self._roots.keys() - set(roots):
            for other in (*roots, *profile.read):
                if _overlap(path, other):
                    raise SandboxUnavailable(
                        f"Calls of this session changed {path} in an overlay that the profile "
                        f"{profile.name} does not see, as it does not write to the same folder.",
                        missing="overlay:session",
                        hint="Name the same folders under write in all profiles with "
                        "workspace: session-overlay.",
                    )

    def _refuse_less(self, profile: Profile, roots: Sequence[str]) -> None:
        """Refuse a call whose limits are less than what the session holds already."""
        limits = profile.limits
        for root in (self._roots[path] for path in roots if path in self._roots):
            if root.tree < 0:
                continue
            held = os.fstatvfs(root.tree)
            used = (held.f_blocks - held.f_bfree) * held.f_frsize
            # The kernel gives out whole pages, of which the last may lie beyond the bound.
            pages = -(-limits.disk_bytes // held.f_frsize)
            for name, have, may in (
                ("disk", used, pages * held.f_frsize),
                ("inodes", held.f_files - held.f_ffree, limits.inodes),
            ):
                if have > may:
                    raise SandboxFailed(
                        f"The session's overlay holds {have} of {name}, and {profile.name} allows "
                        f"{may}.",
                        step="overlay",
                        code="workspace.session_full",
                        hint="Keep or roll back what the session changed, or raise "
                        f"limits.{name}: it bounds the whole session.",
                    )


@dataclass(slots=True)
class Turn:
    """One call's use of the overlay, ``Layers`` for it. What it changes stays in the session."""

    session: Session
    roots: list[Root]
    _over: bool = False

    def mount(self, take: Callable[[], WaitingT]) -> WaitingT:
        """Have a sandbox made, hand it the session's layers and take their next mounts over."""
        had = self.session.begun
        with self.session.terms.alone:
            for root in self.roots:
                if root.tree < 0:
                    root.begin()
            waiting = take()
        try:
            self._hand_over(waiting.channel)
        except BaseException as error:
            waiting.close()
            if isinstance(error, SandboxFailed) and had and error.step.startswith(_CANNOT_TAKE):
                raise _lost(
                    "What had the session's overlay broke; nothing can mount it again."
                ) from error
            raise
        return waiting

    def _hand_over(self, channel: Mounting) -> None:
        for root in self.roots:
            channel.tell(*((_AGAIN, [root.tree]) if root.tree >= 0 else (_FIRST, [])))
        with closing(arriving(channel, 2 * len(self.roots))) as arrived:
            for root in self.roots:
                root.renew(next(arrived))
                self.session.note(next(arrived))

    def keep(self) -> tuple[KeptChanges, ...]:
        """Keep nothing: that is for the session."""
        return ()

    def close(self) -> None:
        """Let the next call have it. May be called again."""
        if not self._over:
            self._over = True
            self.session.release()


def _overlap(one: str, other: str) -> bool:
    one, other = f"{one.rstrip('/')}/", f"{other.rstrip('/')}/"
    return one.startswith(other) or other.startswith(one)


def _in_use() -> SandboxFailed:
    return SandboxFailed(
        "Another call of this session uses its overlay.",
        step="overlay",
        code="workspace.session_in_use",
        hint="Let it end first. A server has the overlay for as long as it lives: give it a "
        "profile with workspace: overlay, or the other calls.",
    )


def _lost(why: str) -> SandboxFailed:
    return SandboxFailed(
        why,
        step="overlay",
        code="workspace.session_lost",
        hint="What it holds is still there: keep it or roll it back, then a new one begins.",
    )
