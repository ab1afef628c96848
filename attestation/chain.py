"""Step "verify": the rules that tie the entries of a log together.

One tracker serves the verifier and the writer's recovery, so that both mean the same by an open
session and an open call. Its memory grows with what is open at once, not with the log: of what is
over it knows a bounded number of ids, so that none is used twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from safeconduct.call import EntryKind
from safeconduct.errors import TraceInvalid

from .entry import Entry

# LIMIT: sessions, and calls, that are open at the same time.
MAX_OPEN = 65_536
# LIMIT: ids of sessions that are over, and of calls begun in sessions that are open, that are known
# at once; each takes some 70 bytes. ``Chains.forgot`` tells that there were more.
MAX_KNOWN = 131_072

_FIRST_KINDS = (EntryKind.LOG_OPEN, EntryKind.SESSION_OPEN)
# Looking up a member of an Enum runs Python code; these are looked up for every entry.
_INTENT, _DECISION = EntryKind.CALL_INTENT, EntryKind.CALL_DECISION
_APPROVAL, _OUTCOME = EntryKind.APPROVAL, EntryKind.CALL_OUTCOME
_CLOSE = EntryKind.SESSION_CLOSE


@dataclass(slots=True)
class OpenSession:
    """A session without its session.close. ``prev`` is the leaf hash (hex) of its last Entry.

    ``used`` are the hashes of the call ids it began: 64 bits by a key of this process, so that
    nobody can make two ids look the same.
    """

    sseq: int
    prev: str | None
    opened_at: int
    is_log: bool = False
    calls: dict[str, int] = field(default_factory=dict[str, int])  # call id → index of its intent
    used: set[int] = field(default_factory=set[int])


class Chains:
    """Follows every session's chain through a log, entry by entry."""

    def __init__(self) -> None:
        self.open: dict[str, OpenSession] = {}
        self.sessions = 0
        self.calls = 0
        self.forgot = False
        self._open_calls = 0
        self._known_calls = 0
        self._over: set[int] = set()

    @classmethod
    def resume(cls, open_sessions: dict[str, OpenSession]) -> Chains:
        """Go on with what was open at some place of a log; the counts begin anew.

        Ids used before that place are not known: for a writer, whose own are random, and who
        begins nothing more in a session that a crash took.
        """
        chains = cls()
        chains.open = open_sessions
        chains._open_calls = sum(len(one.calls) for one in open_sessions.values())
        return chains

    @property
    def open_calls(self) -> int:
        """Return how many intents have no outcome yet."""
        return self._open_calls

    def follow(self, index: int, entry: Entry, leaf: str) -> None:
        """Take the next Entry.

        Raise TraceInvalid ``chain.*`` or ``call.*`` where it does not fit; then nothing changed.
        """
        session = self.open.get(entry.session)
        if session is None:
            session = self._start(index, entry)
        elif entry.kind in _FIRST_KINDS:
            raise _broken("chain.start", index, "opens a session that is open")
        elif entry.sseq != session.sseq + 1:
            where = f"has number {entry.sseq} in its session where {session.sseq + 1} follows"
            raise _broken("chain.sequence", index, where)
        elif entry.prev != session.prev:
            raise _broken("chain.previous", index, "does not name its session's previous entry")
        self._advance(index, entry.kind, entry.session, session, entry.body.get("call", ""))
        session.sseq, session.prev = entry.sseq, leaf

    def extend(self, index: int, kind: EntryKind, name: str, call: str) -> OpenSession:
        """Make place for the Entry that its writer is about to make, whose number is then ``sseq``.

        The writer sets ``prev`` when it knows the Entry's hash. Raises as ``follow`` does.
        """
        session = self.open.get(name)
        if session is None:
            if kind not in _FIRST_KINDS:
                raise _broken("chain.start", index, "does not begin its session")
            session = self._begin(index, kind, name)
            session.sseq = -1
        elif kind in _FIRST_KINDS:
            raise _broken("chain.start", index, "opens a session that is open")
        self._advance(index, kind, name, session, call)
        session.sseq += 1
        return session

    def _advance(
        self, index: int, kind: EntryKind, name: str, session: OpenSession, call: str
    ) -> None:
        if kind is _INTENT:
            if call in session.calls or hash(call) in session.used:
                raise _broken("call.twice", index, "intends a call whose id its session has used")
            if self._open_calls >= MAX_OPEN:
                raise _broken("chain.limit", index, "intends one call too many")
            session.calls[call] = index
            if self._known_calls < MAX_KNOWN:
                session.used.add(hash(call))
                self._known_calls += 1
            else:
                self.forgot = True
            self.calls += 1
            self._open_calls += 1
        elif kind is _DECISION or kind is _APPROVAL:
            if call not in session.calls:
                raise _broken("call.unknown", index, "speaks of a call that is not open")
        elif kind is _OUTCOME:
            if session.calls.pop(call, None) is None:
                raise _broken("call.unknown", index, "ends a call that is not open")
            self._open_calls -= 1
        elif kind is _CLOSE:
            self._close(name, session)

    def _close(self, name: str, session: OpenSession) -> None:
        if session.calls:
            call, intent = next(iter(session.calls.items()))
            raise _broken("chain.close", intent, f"intends call {call!r} that has no outcome")
        del self.open[name]
        self._end(name, session)

    def _end(self, name: str, session: OpenSession) -> None:
        """Know that a session is over; its calls need not be known any more."""
        self._known_calls -= len(session.used)
        if len(self._over) < MAX_KNOWN:
            self._over.add(hash(name))
        else:
            self.forgot = True

    def _start(self, index: int, entry: Entry) -> OpenSession:
        if entry.kind not in _FIRST_KINDS or entry.sseq != 0 or entry.prev is not None:
            raise _broken("chain.start", index, "does not begin its session")
        return self._begin(index, entry.kind, entry.session)

    def _begin(self, index: int, kind: EntryKind, name: str) -> OpenSession:
        is_log = kind is EntryKind.LOG_OPEN
        if index == 0 and not is_log:
            raise _broken("chain.start", index, "is the log's first and does not open the log")
        if hash(name) in self._over:
            raise _broken("chain.twice", index, "opens a session whose id was used before")
        if len(self.open) >= MAX_OPEN:
            raise _broken("chain.limit", index, "opens one session too many")
        self.sessions += kind is EntryKind.SESSION_OPEN
        session = OpenSession(sseq=0, prev=None, opened_at=index, is_log=is_log)
        self.open[name] = session
        return session


def _broken(code: str, index: int, what: str) -> TraceInvalid:
    return TraceInvalid(f"entry {index} {what}", code=code, offset=index)
