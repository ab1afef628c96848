"""Step "record": a denial that is repeated and repeated is counted, not written out each time.

An agent that tries the same forbidden thing in a loop must not fill the log with it. The first
few are recorded whole; of those that follow, the last one is, with how many it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock, Timer

import msgspec

from safeconduct.call import Call, Json
from safeconduct.errors import TraceInvalid

# So many identical denials in a row are recorded one by one before they are counted.
WRITTEN_OUT = 4
# LIMIT: how many may wait for a record, and for how long.
MOST_COUNTED = 1000
WAIT_S = 1.0

_encoder = msgspec.json.Encoder(order="deterministic")


@dataclass(frozen=True, slots=True, kw_only=True)
class Denial:
    """A denied Call as it would be recorded."""

    call: Call
    intent: dict[str, Json]
    judged: dict[str, Json]
    decision: dict[str, Json]

    def key(self) -> bytes | None:
        """Return what identical denials have in common; None where it cannot be spelled."""
        said = {name: self.decision[name] for name in ("effect", "code", "rules", "policy")}
        asked = {name: value for name, value in self.intent.items() if name != "call"}
        try:
            return _encoder.encode([asked, self.judged, said])
        except (TypeError, ValueError, RecursionError, OverflowError):
            return None


@dataclass(slots=True, kw_only=True)
class Counted:
    """Identical denials that one record is to stand for, that of the last."""

    key: bytes
    last: Denial
    count: int = 1
    written: int = 0
    """How many entries of the record are in the log: an interrupted one is finished later."""


class Denials:
    """Counts the identical denials of one session. Thread-safe."""

    def __init__(self, write: Callable[[Counted], None]) -> None:
        """``write`` records a Denial and how many it stands for."""
        self._write = write
        self._lock = Lock()
        self._key: bytes | None = None
        self._seen = 0
        # Of different kinds where calls of several threads come before one of them is recorded.
        self._counted: list[Counted] = []
        self._swallowed: set[str] = set()
        self._timer: Timer | None = None
        self.waiting = 0
        """How many were counted that no record stands for yet."""

    def counts(self, denial: Denial) -> bool:
        """Tell whether this one is only counted; else it is to be recorded."""
        key = denial.key()
        with self._lock:
            if key is None or key != self._key:
                self._key, self._seen = key, 0
            self._seen += 1
            if key is None or self._seen <= WRITTEN_OUT or self.waiting >= MOST_COUNTED:
                return False
            newest = self._counted[-1] if self._counted else None
            if newest is None or newest.key != key or newest.written:
                self._counted.append(Counted(key=key, last=denial))
            else:
                newest.last = denial
                newest.count += 1
            self.waiting += 1
            self._swallowed.add(denial.call.id)
            if self._timer is None:
                self._timer = Timer(WAIT_S, self.try_flush)
                self._timer.daemon = True
                self._timer.start()
            return True

    def unrecorded(self) -> None:
        """Begin anew: a denial could not be recorded, and is none that the log knows already.

        Beyond the quota nothing new is counted so, and there is at most one record a second.
        """
        with self._lock:
            self._key, self._seen = None, 0

    def swallowed(self, call: str) -> bool:
        """Tell, once, whether this call was only counted: then its outcome is not recorded."""
        with self._lock:
            known = call in self._swallowed
            self._swallowed.discard(call)
            return known

    def flush(self) -> None:
        """Record what was counted. What is recorded next comes after it.

        What cannot be recorded now goes on waiting; the reason is raised.
        """
        with self._lock:
            counted, self._counted, self.waiting = self._counted, [], 0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        try:
            while counted:
                self._write(counted[0])
                del counted[0]
        finally:
            if counted:
                with self._lock:
                    self._counted[:0] = counted
                    self.waiting += sum(one.count for one in counted)

    def try_flush(self) -> None:
        """Do the same before something else is recorded, which must not fail for it.

        What is the matter with the writer, that raises too; what else there is, ``flush`` in the
        end.
        """
        with suppress(TraceInvalid):
            self.flush()
