"""Step "verify": join what ranges of a log came to, so that every session is followed exactly.

A range was checked without knowing what came before it; here its summary meets the sessions and
calls that were open. It is taken whole or not at all: what does not fit is read again, entry by
entry, by ``exact.py``, which names the first entry that is wrong.
"""

from __future__ import annotations

from safeconduct.attestation.chain import MAX_OPEN, Chains, OpenSession

from .summary import BEFORE, Part, Summary


class JoinedChains(Chains):
    """Chains that can also take a whole range at once."""

    sessions: int
    calls: int

    def join(self, summary: Summary) -> bool:
        """Take a range's summary. False: it does not fit, and nothing changed."""
        # LIMIT: as in Chains; a range that could go beyond it is counted entry by entry.
        if len(self.open) + len(summary.parts) > MAX_OPEN:
            return False
        if self._open_calls + summary.calls > MAX_OPEN:
            return False
        before: dict[str, OpenSession | None] = {}
        delta = 0
        for part in summary.parts:
            known = self.open.get(part.session)
            before.setdefault(part.session, known)
            calls = _calls_after(known, part)
            if calls is None or (part.closed and calls):
                self._restore(before)
                return False
            delta += len(calls) - (len(known.calls) if known else 0)
            if part.closed:
                self.open.pop(part.session, None)
            else:
                self.open[part.session] = OpenSession(
                    sseq=part.sseq,
                    prev=part.prev,
                    opened_at=known.opened_at if known else part.first_index,
                    is_log=known.is_log if known else part.is_log,
                    calls=calls,
                )
        self._open_calls += delta
        self.sessions += summary.sessions
        self.calls += summary.calls
        return True

    def _restore(self, before: dict[str, OpenSession | None]) -> None:
        for name, session in before.items():
            if session is None:
                self.open.pop(name, None)
            else:
                self.open[name] = session


def _calls_after(known: OpenSession | None, part: Part) -> dict[str, int] | None:
    """Return the session's open calls after a part of it, or None when it does not follow."""
    if part.starts:
        return dict(part.calls) if known is None else None
    if known is None or part.first_sseq != known.sseq + 1 or part.first_prev != known.prev:
        return None
    open_calls = known.calls
    if not all(call in open_calls for call in part.needed):
        return None
    if any(call in part.absent for call in open_calls):
        return None
    calls = dict(open_calls)
    for call in part.taken:
        del calls[call]
    calls.update((call, index) for call, index in part.calls.items() if index != BEFORE)
    return calls
