"""Step "record": have witnesses cosign the log's heads, beside everything else.

About once a minute, when a session ends and at the end of a run the newest signed head is shown
to the witnesses of the operator's trust policy. Nothing waits for them unless the policy says
``require``: an unreachable witness lowers the level that a verifier will find, and is told of.
A witness that has seen another tree of this log is told of at once, and what it shows is kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Condition, Lock, Thread
from typing import Final, TypeAlias

from safeconduct.attestation import Checkpoint, TrustPolicy, VerifierKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.tiles import TileStore
from safeconduct.attestation.witness.client import Answered, Asked, ask
from safeconduct.attestation.writing.cosigned import store_cosignatures
from safeconduct.errors import TraceInvalid

from .witnesses import WitnessStanding, keep_evidence, witnesses_of

INTERVAL_S = 60.0
# LIMIT: how long one round of asking is waited for, and the last one at the end of a run.
TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 5.0
# LIMIT: for how many intervals entries may be without a quorum where the policy requires one.
_LATE_INTERVALS = 3
# LIMIT: cosignature lines that wait for a place; newer ones say more.
_MAX_ARRIVED = 64

Attach: TypeAlias = Callable[[bytes, Sequence[str]], None]
"""Adds cosignature lines to what is stored of a signed note of the trace that is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """A signed head, its note, and when it came, by the clock of the Cosigning."""

    head: Checkpoint
    note: bytes
    at: float


class Cosigning:
    """Asks the witnesses of one trace, in threads of its own. Thread-safe.

    ``noticed`` is the writer's ``on_checkpoint``: it never waits and never raises. In a fork of
    the process that made it nothing is asked. When ``close`` is over nothing more is stored or
    told; a witness that still keeps a thread waiting then is given up by it within its own limit.
    """

    def __init__(
        self,
        policy: TrustPolicy,
        *,
        directory: Path,
        origin: str,
        log_keys: Callable[[], Sequence[VerifierKey]],
        tell: Callable[[str], None],
        interval_s: float = INTERVAL_S,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to ask; ``log_keys`` returns the keys that may sign this log now.

        ``tell`` gets one line whenever a witness's answer changes for the worse, from any
        thread. Raise TraceInvalid ``witness.url`` for an address that is none.
        """
        self._policy, self._directory, self._log_keys = policy, directory, log_keys
        self._tell, self._clock = tell, clock
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self._witnesses = {one.name: one for one in witnesses_of(policy, origin, log_keys())}
        self._asking: dict[str, _Shown] = {}
        self._changed = Condition()
        self._newest: _Shown | None = None
        self._witnessed: _Shown | None = None
        self._late_since: float | None = None
        self._arrived: list[tuple[bytes, str]] = []
        self._attach: Attach | None = None
        self._wanted = self._closing = self._closed = False
        self._storing = Lock()  # order: _storing before _changed
        self._owner_pid: Final = os.getpid()
        self._thread = Thread(target=self._keep_asking, name="trace-witnesses", daemon=True)
        self._thread.start()

    def noticed(self, head: Checkpoint, note: bytes) -> None:
        """Take the newest signed head; the first of a run is shown to the witnesses at once."""
        with self._changed:
            self._wanted |= self._newest is None
            self._newest = _Shown(head=head, note=note, at=self._clock())
            if self._late_since is None:
                self._late_since = self._newest.at
            if self._wanted:
                self._changed.notify_all()

    def attach_with(self, attach: Attach) -> None:
        """Store cosignatures through the open writer, until ``close``."""
        with self._changed:
            self._attach = attach

    def ask_soon(self) -> None:
        """Show the newest head to the witnesses now, beside everything else."""
        with self._changed:
            self._wanted = True
            self._changed.notify_all()

    @property
    def witnessed(self) -> Checkpoint | None:
        """Return the newest head that a quorum of others than the operator cosigned."""
        with self._changed:
            return self._witnessed.head if self._witnessed else None

    def standing(self) -> list[WitnessStanding]:
        """Return how each witness answered last."""
        with self._changed:
            return list(self._witnesses.values())

    def require(self, *, covering: int = 0) -> None:
        """Raise TraceInvalid ``trace.unwitnessed`` unless others than the operator watch this log.

        They do while a quorum of them has cosigned a head of this run with at least ``covering``
        entries, and no later entry waits for one since more than three intervals. Where they do
        not, they are asked once, and that is waited for.
        """
        if self._is_watched(covering):
            return
        self._ask_and_wait(self._timeout_s)
        if self._is_watched(covering):
            return
        reasons = [f"{one.name} {one.why or one.answered}" for one in self.standing()]
        raise TraceInvalid(
            f"the log is not witnessed as the policy requires ({self._policy.describe()}):"
            f" {'; '.join(reasons)[:500]}",
            code="trace.unwitnessed",
            hint="nothing ran; see that the witnesses answer, or take `require` out of the policy",
        )

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Ask once more about the last head, wait for it that long, and store what came.

        To be called when the writer has closed the trace. Never raises for what a witness does.
        """
        if os.getpid() != self._owner_pid:
            return
        ends_at = self._clock() + timeout_s
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._attach = partial(store_cosignatures, self._directory)
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._ask_and_wait(max(0.0, ends_at - self._clock()), closing=True)
        with self._storing, self._changed:
            self._closed = True

    # -- asking ------------------------------------------------------------------------------

    def _keep_asking(self) -> None:
        while True:
            with self._changed:
                if not self._wanted and not self._closing:
                    self._changed.wait(self._interval_s)
                if self._closing:
                    return
                self._wanted = False
            self._ask_and_wait(self._timeout_s)

    def _ask_and_wait(self, timeout_s: float, *, closing: bool = False) -> None:
        """Ask about the newest head until every witness has answered, or no longer than that.

        What ``close`` finds under way ends at once: it asks, ``closing``, and stores by itself.
        """
        deadline = self._clock() + timeout_s
        again = True
        while again and self._clock() < deadline and self._closing == closing:
            # Who was being asked about an earlier head is asked about this one afterwards.
            again = self._ask_all()
            with self._changed:
                while (
                    self._asking
                    and self._closing == closing
                    and (left := deadline - self._clock()) > 0
                ):
                    self._changed.wait(left)
        if self._closing == closing:
            self._store()

    def _ask_all(self) -> bool:
        """Begin to ask every witness that has not cosigned the newest head, each in a thread.

        Tell whether one is still being asked about an earlier head. Looking up a name can take
        longer than any limit of ours, and cannot be interrupted: such a thread is left to itself,
        and its witness is not asked again before it ends.
        """
        with self._changed:
            newest = self._newest
            if newest is None or os.getpid() != self._owner_pid:
                return False
            behind = [one for one in self._witnesses.values() if one.cosigned != newest.head.size]
            free = [one for one in behind if one.name not in self._asking]
            busy = any(self._asking.get(one.name, newest) is not newest for one in behind)
            self._asking |= {one.name: newest for one in free}
        for one in free:
            asking = partial(self._ask, one, newest)
            try:
                Thread(target=asking, name="trace-witness", daemon=True).start()
            except RuntimeError as error:  # a limit of processes, or the interpreter ends
                why = f"no thread could be started: {error}"
                self._heard(one, newest, Asked(answered=Answered.UNREACHABLE, why=why))
        return busy

    def _ask(self, one: WitnessStanding, shown: _Shown) -> None:
        asked = Asked(answered=Answered.UNREACHABLE, why="asking it failed here")
        try:
            with Folder(self._directory) as folder:
                asked = ask(
                    one.endpoint,
                    shown.note,
                    old_size=max(one.cosigned, 0),
                    tree=TileStore.load(folder, shown.head.size),
                    log_keys=self._log_keys(),
                    timeout_s=self._timeout_s,
                )
        except (TraceInvalid, OSError) as error:
            asked = Asked(answered=Answered.UNREACHABLE, why=f"this log: {error}")
        finally:
            self._heard(one, shown, asked)

    def _heard(self, before: WitnessStanding, shown: _Shown, asked: Asked) -> None:
        one = before.after(asked)
        try:
            with self._storing:
                if asked.evidence and not self._closed:
                    keep_evidence(self._directory, asked.evidence)
            if one.answered is not Answered.COSIGNED and one.answered is not before.answered:
                self._say(one.told())
        finally:
            with self._changed:
                self._witnesses[one.name] = one
                self._asking.pop(one.name)
                if asked.cosignature is not None:
                    self._arrived = [*self._arrived, (shown.note, asked.cosignature.line)]
                    self._count(shown)
                self._changed.notify_all()

    def _count(self, shown: _Shown) -> None:
        """Find out whether a head now has its quorum. Call it with the condition held."""
        others = [one for one in self._witnesses.values() if not one.operator]
        if not self._policy.reached(
            {one.name for one in others if one.cosigned == shown.head.size}
        ):
            return
        self._witnessed = shown
        is_newest = self._newest is not None and self._newest.head == shown.head
        # What came after the head that was shown came after it was shown.
        self._late_since = None if is_newest else shown.at

    def _is_watched(self, covering: int) -> bool:
        with self._changed:
            if self._witnessed is None or self._witnessed.head.size < covering:
                return False
            late_s = self._clock() - self._late_since if self._late_since is not None else 0.0
            return late_s <= _LATE_INTERVALS * self._interval_s

    def _store(self) -> None:
        """Put what arrived beside the log's own signatures."""
        with self._storing:
            if not self._closed:
                self._store_arrived()

    def _store_arrived(self) -> None:
        with self._changed:
            attach, arrived = self._attach, self._arrived[-_MAX_ARRIVED:]
            self._arrived = [] if attach is not None else arrived
        if attach is None:
            return
        for note in dict.fromkeys(note for note, _ in arrived):
            try:
                attach(note, [line for other, line in arrived if other == note])
            except TraceInvalid as error:
                if error.code in ("trace.closed", "trace.locked"):
                    with self._changed:  # the writer is closing: ``close`` stores it
                        self._arrived += [one for one in arrived if one[0] == note]
                else:
                    self._say(f"cosignatures could not be stored: {error.message}")

    def _say(self, text: str) -> None:
        """Tell it, unless all is over. What nobody can be told ends no thread and no run."""
        if not self._closed:
            with suppress(OSError, ValueError):  # stderr may be closed, or its reader gone
                self._tell(text)
