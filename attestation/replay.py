"""Step "replay": judge every recorded intent again, by another policy.

Policy mode has no side effects: nothing runs. It answers what another policy would have said to
the calls as they were made, not what an agent would have done after a different answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safeconduct.call import Decision, Document, Effect, EntryKind, Facts, Json
from safeconduct.errors import PolicyError, TraceInvalid
from safeconduct.policies import decide, unspelled

from .entry import Entry
from .privacy.opened import Missing, Opening, read_opened
from .privacy.vault import Vault

if TYPE_CHECKING:
    from safeconduct.policies import Judged


# The code of the decision about a program that the operator's command line names.
_OPERATOR = "operator.command"
# What a sub-agent's Capability alone refused begins with it.
_CAPABILITY = "capability."
# What an erased opening looks like: no file, or one whose key is not here.
_GONE = frozenset({"opening.missing", "opening.sealed"})
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
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """One call that is judged alike but would run in another profile; both are named."""

    index: int
    call: str
    tool: str
    recorded: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Undecidable:
    """One call that cannot be judged again, and why: erased or false openings, no decision."""

    index: int
    call: str
    tool: str
    code: str
    reason: str
    session: str = ""


@dataclass(slots=True, kw_only=True)
class ReplayReport:
    """What changed. ``calls`` counts intents; ``same`` those judged alike, ``shifts`` among them.

    ``unjudged`` counts those that no rule judged then and no policy judges now: refused before
    they had a canonical form or as their Capability had ended, or started by the operator's own
    command line.
    """

    calls: int = 0
    same: int = 0
    unjudged: int = 0
    changes: list[Change] = field(default_factory=list[Change])
    shifts: list[Shift] = field(default_factory=list[Shift])
    undecidable: list[Undecidable] = field(default_factory=list[Undecidable])

    @property
    def clean(self) -> bool:
        """Tell whether every call was judged again, and alike."""
        return not self.changes and not self.undecidable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Intent:
    index: int
    session: str
    tool: str
    caller: str
    origin: str
    document: Document | Missing


def replay_policy(directory: Path, policy: Judged, *, vault: Vault | None = None) -> ReplayReport:
    """Judge every intent of a trace by a policy and compare with the recorded decision.

    Verify the trace first: replay believes the entries, and each opening only as far as it hashes
    to its commitment. ``vault`` opens what is encrypted; what was erased by order, and said so in
    the log, is undecidable as ``opening.erased``. Raise TraceInvalid where an entry cannot be read.
    """
    report = ReplayReport()
    waiting: dict[tuple[str, str], _Intent] = {}
    erased: dict[str, int] = {}  # session → index of its redaction
    for index, entry, opened in read_opened(directory, vault=vault):
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
        elif entry.kind is EntryKind.REDACTION:
            erased[entry.body["session"]] = index
    for (_, call), intent in waiting.items():
        _undecided(report, intent, call)
    report.undecidable = [_name_erased(one, erased) for one in report.undecidable]
    return report


def _name_erased(one: Undecidable, erased: Mapping[str, int]) -> Undecidable:
    """Say of an opening that is not there when the log tells that it was erased by order."""
    if one.code not in _GONE or one.session not in erased:
        return one
    reason = f"its session was erased, entry {erased[one.session]} says"
    return replace(one, code="opening.erased", reason=reason)


def _undecided(report: ReplayReport, intent: _Intent, call: str) -> None:
    missing = Missing("decision.missing", "no decision was recorded")
    report.undecidable.append(_cannot(intent, call, missing))


def _judge(report: ReplayReport, intent: _Intent, entry: Entry, policy: Judged) -> None:
    call: str = entry.body["call"]
    code: str = entry.body["code"]
    if code == _OPERATOR or code.startswith(_CAPABILITY) or intent.document == _NO_DOCUMENT:
        report.unjudged += 1
        return
    if isinstance(intent.document, Missing):
        report.undecidable.append(_cannot(intent, call, intent.document))
        return
    recorded = Effect(entry.body["effect"])
    facts = _facts(intent, entry)
    if isinstance(facts, Missing):
        report.undecidable.append(_cannot(intent, call, facts))
        return
    try:
        judged = policy.for_role(facts.role)
    except PolicyError as error:
        missing = Missing(error.code, error.message)
        report.undecidable.append(_cannot(intent, call, missing))
        return
    signature = judged.signature(intent.document.tool)
    if signature is not None and entry.body["policy"] != judged.version:
        name = unspelled(intent.document, signature)
        if name is not None:
            missing = Missing("document.spelling", f"this policy takes {name!a} for something else")
            report.undecidable.append(_cannot(intent, call, missing))
            return
    decision = decide(judged, intent.document, facts)
    if decision.effect is recorded:
        report.same += 1
        _shift(report, intent, entry, decision)
        return
    change = Change(
        index=intent.index,
        call=call,
        tool=intent.tool,
        recorded=recorded,
        new=decision.effect,
        rules=decision.rules,
        reason=decision.reason,
        advice=decision.advice,
    )
    report.changes.append(change)


def _shift(report: ReplayReport, intent: _Intent, entry: Entry, decision: Decision) -> None:
    recorded = entry.body.get("profile")
    if isinstance(recorded, str) and decision.profile and decision.profile.name != recorded:
        shift = Shift(
            index=intent.index,
            call=entry.body["call"],
            tool=intent.tool,
            recorded=recorded,
            new=decision.profile.name,
        )
        report.shifts.append(shift)


def _cannot(intent: _Intent, call: str, missing: Missing) -> Undecidable:
    return Undecidable(
        index=intent.index,
        call=call,
        tool=intent.tool,
        code=missing.code,
        reason=missing.reason,
        session=intent.session,
    )


def _intent(index: int, entry: Entry, opened: Mapping[str, Opening | Missing]) -> _Intent:
    opening = opened["document"]
    document = opening if isinstance(opening, Missing) else _document(opening)
    return _Intent(
        index=index,
        session=entry.session,
        tool=entry.body["tool"],
        caller=entry.body["caller"],
        origin=entry.body["origin"],
        document=document,
    )


def _facts(intent: _Intent, entry: Entry) -> Facts | Missing:
    """Return what the decision rested on; a trace from before facts were recorded has none."""
    if "facts" not in entry.body:
        return Facts(caller=intent.caller, origin=intent.origin)
    match entry.body["facts"]:
        case {
            "role": str() | None as role, "calls": int(calls), "denied": int(denied),
            "now_ms": int(now_ms),
        } if bool not in (type(calls), type(denied), type(now_ms)):  # fmt: skip
            return Facts(
                role=role, caller=intent.caller, origin=intent.origin,
                calls=calls, denied=denied, now_ms=now_ms,
            )  # fmt: skip
        case _:
            return Missing("facts.invalid", "the facts of the decision are none")


def _judged(
    tool: str, arguments: Mapping[str, Json], workspace: str, unfit: object
) -> Document | Missing:
    """Build a Document; ``unfit`` is there where an argument was not what the rules took it for."""
    found: dict[str, tuple[str, str]] | None = None
    if unfit is not None:
        if not isinstance(unfit, dict):
            return Missing("opening.invalid", "the opening is no document")
        found = {}
        for name, said in cast("dict[str, object]", unfit).items():
            match said:
                case [str(code), str(why)]:
                    found[name] = (code, why)
                case _:
                    return Missing("opening.invalid", "the opening is no document")
    return Document(tool=tool, arguments=arguments, workspace=workspace, unfit=found)


def _document(opening: Opening) -> Document | Missing:
    """Build the judged Document from its committed JSON: tool, arguments, workspace."""
    try:
        value: Any = opening.json()
    except TraceInvalid as error:
        return Missing(error.code, error.message)
    match value:
        case {"tool": str(tool), "arguments": dict(), "workspace": str(workspace)}:
            return _judged(tool, value["arguments"], workspace, value.get("unfit"))
        case {"arguments": None}:
            return _NO_DOCUMENT
        case _:
            return Missing("opening.invalid", "the opening is no document")
