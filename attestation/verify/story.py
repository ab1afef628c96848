"""Step "verify": whether what came of a call fits what was decided about it.

A recorder that breaks this rule contradicts itself, although every hash of its log is true.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from safeconduct.attestation.entry import Entry
from safeconduct.call import EntryKind
from safeconduct.errors import TraceInvalid

Barred: TypeAlias = dict[str, str]
"""Open calls of one session that may not run as it stands, with the decision: ask or deny."""

_DENY, _ASK = "deny", "ask"
_DECISION, _APPROVAL = EntryKind.CALL_DECISION, EntryKind.APPROVAL
_OUTCOME = EntryKind.CALL_OUTCOME


def bars(body: Mapping[str, object]) -> bool:
    """Tell whether a call may not run after this decision, or not before a person's yes."""
    return body["effect"] != "allow" and body.get("observed") is not True


def bar(barred: Barred, body: Mapping[str, object]) -> None:
    """Note a decision that ``bars``. A deny stands, whatever else is decided."""
    call = str(body["call"])
    barred[call] = _DENY if _DENY in (body["effect"], barred.get(call)) else _ASK


def approves(body: Mapping[str, object]) -> bool:
    """Tell whether a person said yes."""
    return body["answer"] == "yes"


def approve(barred: Barred, call: str) -> None:
    """Let a call run that waited for a person's yes."""
    if barred.get(call) == _ASK:
        del barred[call]


def ran(body: Mapping[str, object]) -> bool:
    """Tell whether an outcome says that the call ran: only what ran has a usage."""
    return body["status"] == "ok" or "usage" in body


def follow(barred: Barred, index: int, entry: Entry) -> None:
    """Take the next entry of a session. Raise TraceInvalid ``call.denied`` or ``call.unasked``."""
    body = entry.body
    if entry.kind is _DECISION and bars(body):
        bar(barred, body)
    elif entry.kind is _APPROVAL and approves(body):
        approve(barred, body["call"])
    elif entry.kind is _OUTCOME:
        effect = barred.pop(body["call"], None)
        if effect is not None and ran(body):
            raise _contradicts(index, str(body["call"]), effect)


def _contradicts(index: int, call: str, effect: str) -> TraceInvalid:
    why, code = "was denied", "call.denied"
    if effect == _ASK:
        why, code = "needed a person's yes and has none", "call.unasked"
    message = f"entry {index} says that call {call!r} ran, which {why}"
    return TraceInvalid(message, code=code, offset=index)
