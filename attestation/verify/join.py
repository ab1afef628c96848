"""Step "verify": join what ranges of a log came to, so that every session is followed exactly.

A range was checked without knowing what came before it; here its summary meets the sessions and
calls that were open. It is taken whole or not at all: what does not fit is read again, entry by
entry, by ``exact.py``, which names the first entry that is wrong.
"""

from __future__ import annotations

from safeconduct.attestation.chain import MAX_KNOWN, MAX_OPEN, Chains, OpenSession
from safeconduct.attestation.entry import Entry

from . import story
from .summary import BEFORE, Part, Summary


class JoinedChains(Chains):
    """Chains that can also take a whole range at once, and know which open calls may not run."""

    sessions: int
    calls: int
    _open_calls: int

    def __init__(self) -> None:
        super().__init__()
        self._barred: dict[str, story.Barred] = {}

    def follow(self, index: int, entry: Entry, leaf: str) -> None:
        """Take the next Entry. Raise TraceInvalid ``chain.*`` or ``call.*``."""
        super().follow(index, entry, leaf)
        story.follow(self._barred.setdefault(entry.session, {}), index, entry)
        if not self._barred[entry.session]:
            del self._barred[entry.session]

    def join(self, summary: Summary) -> bool:
        """Take a range's summary. False: it does not fit, and nothing changed."""
        # LIMIT: as in Chains; a range that could go beyond it is counted entry by entry.
        if len(self.open) + len(summary.parts) > MAX_OPEN:
            return False
        if self._open_calls + summary.calls > MAX_OPEN:
            return False
        taken: list[tuple[Part, dict[str, int]]] = []
        for part in summary.parts:
            calls = self._calls_after(part)
            if calls is None or (part.closed and calls) or self._ran_barred(part):
                return False
            taken.append((part, calls))
        # INVARIANT: a range has one part of each session, so none of these changes another's.
        for part, calls in taken:
            self._take(part, calls)
        self.sessions += summary.sessions
        self.calls += summary.calls
        return True

    def _take(self, part: Part, calls: dict[str, int]) -> None:
        session = self.open.get(part.session)
        if session is None:
            at = part.first_index
            session = OpenSession(sseq=0, prev=None, opened_at=at, is_log=part.is_log)
        self._open_calls += len(calls) - len(session.calls)
        self._bar(part, calls)
        session.sseq, session.prev, session.calls = part.sseq, part.prev, calls
        if part.closed:
            self.open.pop(part.session, None)
            self._end(part.session, session)
            return
        self.open[part.session] = session
        begun = part.ids()
        if self._known_calls + len(begun) <= MAX_KNOWN:
            session.used.update(map(hash, begun))
            self._known_calls += len(begun)
        else:
            self.forgot = True

    def _ran_barred(self, part: Part) -> bool:
        """Tell whether a call may have run here that a decision before the range forbids to."""
        barred = self._barred.get(part.session)
        if barred is None:
            return False
        freed = barred.copy()
        for call in part.freed:
            story.approve(freed, call)
        return any(call in freed for call in part.ran)

    def _bar(self, part: Part, calls: dict[str, int]) -> None:
        barred = self._barred.pop(part.session, {})
        for call in part.freed:
            story.approve(barred, call)
        for call, effect in part.barred.items():
            story.bar(barred, {"call": call, "effect": effect})
        barred = {call: effect for call, effect in barred.items() if call in calls}
        if barred:
            self._barred[part.session] = barred

    def _calls_after(self, part: Part) -> dict[str, int] | None:
        """Return the session's open calls after a part of it, or None when it does not follow."""
        known = self.open.get(part.session)
        if part.starts:
            new = known is None and hash(part.session) not in self._over
            return dict(part.calls) if new else None
        if known is None or part.first_sseq != known.sseq + 1 or part.first_prev != known.prev:
            return None
        open_calls, used = known.calls, known.used
        if not all(call in open_calls for call in part.needed):
            return None
        if any(call in open_calls or hash(call) in used for call in part.ids()):
            return None
        calls = dict(open_calls)
        for call in part.taken:
            del calls[call]
        calls.update((call, index) for call, index in part.calls.items() if index != BEFORE)
        return calls
