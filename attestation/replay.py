"""Step "replay": judge every recorded intent again, by another policy.

Policy mode has no side effects: nothing runs. It answers what another policy would have said to
the calls as they were made, not what an agent would have done after a different answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeconduct.call import Document, Effect, EntryKind
from safeconduct.errors import TraceInvalid
from safeconduct.policies import decide

from .entry import Entry
from .openings import Opening
from .reader import Missing, read_opened

if TYPE_CHECKING:
    from safeconduct.policies import Judged


# The code of the decision about a program that the operator's command line names.
_OPERATOR = "operator.command"
_NO_DOCUMENT = Missing("document.none", "the call was refused before it had a canonical form")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One call that the other policy judges differently."""

    index: int
    call: str
    tool: str
    recorded: Effect
    new: Effect
    rules: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Undecidable:
    """One call that cannot be judged again, and why: erased or false openings, no decision."""

    index: int
    call: str
    tool: str
    code: str
    reason: str


@dataclass(slots=True, kw_only=True)
class ReplayReport:
    """What changed. ``calls`` counts intents; ``same`` those judged alike.

    ``unjudged`` counts those that no rule judged then and no policy judges now: refused before
    they had a canonical form, or started by the operator's own command line.
    """

    calls: int = 0
    same: int = 0
    unjudged: int = 0
    changes: list[Change] = field(default_factory=list[Change])
    undecidable: list[Undecidable] = field(default_factory=list[Undecidable])

    @property
    def clean(self) -> bool:
        """Tell whether every call was judged again, and alike."""
        return not self.changes and not self.undecidable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Intent:
    index: int
    tool: str
    document: Document | Missing


def replay_policy(directory: Path, policy: Judged) -> ReplayReport:
    """Judge every intent of a trace by a policy and compare with the recorded decision.

    Verify the trace first: replay believes the entries, and each opening only as far as it hashes
    to its commitment. Raise TraceInvalid where an entry cannot be read.
    """
    report = ReplayReport()
    waiting: dict[tuple[str, str], _Intent] = {}
    for index, entry, opened in read_opened(directory):
        if entry.kind is EntryKind.CALL_INTENT:
            report.calls += 1
            key = (entry.session, entry.body["call"])
            waiting[key] = _intent(index, entry, opened)
        elif entry.kind is EntryKind.CALL_DECISION:
            intent = waiting.pop((entry.session, entry.body["call"]), None)
            if intent is not None:
                _judge(report, intent, entry, policy)
        elif entry.kind is EntryKind.CALL_OUTCOME:
            intent = waiting.pop((entry.session, entry.body["call"]), None)
            if intent is not None:
                _undecided(report, intent, entry.body["call"])
    for (_, call), intent in waiting.items():
        _undecided(report, intent, call)
    return report


def _undecided(report: ReplayReport, intent: _Intent, call: str) -> None:
    missing = Missing("decision.missing", "no decision was recorded")
    report.undecidable.append(_cannot(intent, call, missing))


def _judge(report: ReplayReport, intent: _Intent, entry: Entry, policy: Judged) -> None:
    call: str = entry.body["call"]
    if entry.body["code"] == _OPERATOR or intent.document == _NO_DOCUMENT:
        report.unjudged += 1
        return
    if isinstance(intent.document, Missing):
        report.undecidable.append(_cannot(intent, call, intent.document))
        return
    recorded = Effect(entry.body["effect"])
    decision = decide(policy, intent.document)
    if decision.effect is recorded:
        report.same += 1
        return
    change = Change(
        index=intent.index,
        call=call,
        tool=intent.tool,
        recorded=recorded,
        new=decision.effect,
        rules=decision.rules,
        reason=decision.reason,
    )
    report.changes.append(change)


def _cannot(intent: _Intent, call: str, missing: Missing) -> Undecidable:
    return Undecidable(
        index=intent.index, call=call, tool=intent.tool, code=missing.code, reason=missing.reason
    )


def _intent(index: int, entry: Entry, opened: Mapping[str, Opening | Missing]) -> _Intent:
    opening = opened["document"]
    document = opening if isinstance(opening, Missing) else _document(opening)
    return _Intent(index=index, tool=entry.body["tool"], document=document)


def _document(opening: Opening) -> Document | Missing:
    """Build the judged Document from its committed JSON: tool, arguments, workspace."""
    try:
        value: Any = opening.json()
    except TraceInvalid as error:
        return Missing(error.code, error.message)
    match value:
        case {"tool": str(tool), "arguments": dict(), "workspace": str(workspace)}:
            return Document(tool=tool, arguments=value["arguments"], workspace=workspace)
        case {"arguments": None}:
            return _NO_DOCUMENT
        case _:
            return Missing("opening.invalid", "the opening is no document")
