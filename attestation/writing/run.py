"""Step "record": what the log says about itself: first entries of a run, repairs, ends, heartbeats.

Each run of the writer is a session of its own, opened by ``log.open``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from safeconduct.attestation.bodies import spell_body
from safeconduct.attestation.signing.signer import SignerClient
from safeconduct.call import EntryKind, Json
from safeconduct.errors import TraceInvalid

from .appending import Appending, no_session
from .recovery import Recovered
from .sessions import lost_facts

FORMAT = "safeconduct/trace/v1"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Kinds that stand in the log's own session only: ``append_own``.
_OF_THE_LOG = (EntryKind.KEY_ROTATE, EntryKind.REDACTION, EntryKind.HEARTBEAT)


class Run(Appending):
    """One run of the writer, and how sessions end in it."""

    origin: str
    session: str

    def append_own(self, kind: EntryKind, body: Mapping[str, Json]) -> int:
        """Record an Entry about the log itself, in the log's own session; it is on disk on return.

        For ``key.rotate``, ``redaction`` and ``heartbeat``. Raises as ``append`` does.
        """
        if kind not in _OF_THE_LOG:
            raise TraceInvalid(f"{kind} is no entry about the log itself", code="trace.body")
        index = self._append(kind, spell_body(kind, body, {}), self.session)
        self._sync(index)
        return index

    def _begin(self, recovered: Recovered, signer: SignerClient) -> str:
        """Write the first entries of this run: log.open and, after a crash, the repairs."""
        run = os.urandom(8).hex()
        lost = {} if recovered.tail is None else dict(self._chains.open)
        body: dict[str, Json] = {
            "format": FORMAT,
            "origin": self.origin,
            "key": signer.key.line,
            "signer_isolation": signer.isolation,
            "size": self._size,
            "boot": boot_id(self.origin),
        }
        try:
            self._append(EntryKind.LOG_OPEN, spell_body(EntryKind.LOG_OPEN, body, {}), run)
            if recovered.tail is not None:
                facts = lost_facts(recovered.tail, lost)
                data = spell_body(EntryKind.LOG_RECOVERED, facts, {})
                self._append(EntryKind.LOG_RECOVERED, data, run)
            for session in lost:
                self._end(session, "lost")
            # What a crash left may never have reached the disk: after a failed write its pages
            # count as written (fsync(2)). Nothing new may follow on it, to be lost with it.
            self._checkpointing.checkpoint(turn_over=recovered.tail is not None)
        except BaseException:
            self._checkpointing.close()
            for close in (self._openings.close, self._journal.close):
                with suppress(OSError):  # the error under way says more
                    close()
            raise
        self._journal.start()
        self._commits.start()
        self._checkpointing.start()
        return run

    def _end(self, session: str, status: str) -> None:
        with self._lock:
            self._end_here(session, status)

    def _end_here(self, session: str, status: str) -> None:
        """End a session whole: no call of it begins or ends meanwhile; the caller has the lock."""
        chain = self._chains.open.get(session)
        if chain is None:
            raise no_session(session)
        for call in list(chain.calls):
            unknown: dict[str, Json] = {"call": call, "status": "unknown"}
            data = spell_body(EntryKind.CALL_OUTCOME, unknown, {})
            self._place(EntryKind.CALL_OUTCOME, data, session, call)
        data = spell_body(EntryKind.SESSION_CLOSE, {"status": status}, {})
        self._place(EntryKind.SESSION_CLOSE, data, session)
        self._unsigned.ended.append(session)

    def _end_all(self) -> None:
        """End every session, the log's own as the last; no Entry follows. Can be repeated."""
        with self._lock:
            for session in [one for one in self._chains.open if one != self.session]:
                self._end_here(session, "left open")
            if self.session in self._chains.open:
                self._end_here(self.session, "closed")
            self._health.ended = True

    def _heartbeat(self) -> None:
        """Say that the log still lives, although nothing happened for long."""
        with self._lock:
            open_sessions = [one for one in self._chains.open.values() if not one.is_log]
            calls = self._chains.open_calls
        body: dict[str, Json] = {"sessions": len(open_sessions), "calls": calls}
        self.append_own(EntryKind.HEARTBEAT, body)


def boot_id(origin: str) -> str:
    """Return which start of the machine this is: a hash that tells two starts apart, no more."""
    try:
        boot = _BOOT_ID.read_bytes()
    except OSError:
        boot = b""
    return sha256(b"safeconduct/boot/v1\n%b\n%b" % (origin.encode(), boot)).hexdigest()[:32]
