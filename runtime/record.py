"""Step "record": what the pipeline knows, as entries of one session of a Trace.

What may hold secrets or can be guessed (arguments, output) enters as salted commitments.
docs/trace-format.md lists the fields of each kind.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields

from safeconduct.attestation import TraceWriter, clear_name
from safeconduct.call import (
    Call,
    Confinement,
    Decision,
    Document,
    Durability,
    EntryKind,
    Facts,
    Json,
    KeptChanges,
    Outcome,
    Refused,
    Usage,
)  # fmt: skip
from safeconduct.errors import Denied, Error, LimitExceeded, ToolFailed

# Tools whose effect stays on this machine; before all others the intent is on disk.
_LOCAL_TOOLS = frozenset({"fs.read", "fs.list", "fs.write", "shell.run", "python.run", "wasm.run"})
# The fields of what is recorded whole. Copying what they hold would take longer than encoding it.
_DOCUMENT = tuple(field.name for field in fields(Document))
# Caller and origin stand in the intent.
_FACTS = ("role", "calls", "denied", "now_ms")
_USAGE = tuple(field.name for field in fields(Usage))
# LIMIT: names of refused system calls in one entry.
_REFUSED_MAX = 64
# LIMIT: sets of changes in one entry; a profile has as many as it writes to folders.
_SETS_MAX = 64


class Recorder:
    """Writes the entries of one session. Thread-safe as the TraceWriter is."""

    def __init__(self, writer: TraceWriter, *, caller: str, origin: str) -> None:
        self._writer = writer
        self.session = writer.open_session(clear_name(caller), clear_name(origin))

    def policy(self, version: str, file: str, why: str, confinement: Confinement) -> None:
        """Record which policy is in force and what this machine enforces."""
        body: dict[str, Json] = {
            "policy": version,
            "file": clear_name(file),
            "why": clear_name(why),
        }
        self._append(EntryKind.POLICY_LOAD, body | _confinement(confinement))

    def policy_kept(self, version: str, error: Error) -> None:
        """Record that another policy was to come into force, and why the old one stays."""
        body: dict[str, Json] = {"policy": version, "kept": clear_name(error.code)}
        self._append(EntryKind.POLICY_LOAD, body)

    def intent(self, call: Call, document: Document | None) -> None:
        """Record what is about to be judged; on return it is as durable as the tool demands.

        Without ``document`` the Call could not be brought to a canonical form. Its tool then has
        the name that stands in clear: a raw one may hold what no encoding has (a lone surrogate),
        and must not keep the denial out of the log.
        """
        tool = _tool_name(call.tool)
        judged: dict[str, Json] = {"tool": tool, "arguments": None, "workspace": None}
        if document is not None:
            judged = {name: getattr(document, name) for name in _DOCUMENT}
        body: dict[str, Json] = {
            "call": call.id,
            "tool": tool,
            "caller": clear_name(call.caller),
            "origin": clear_name(call.origin),
            "parent": call.parent,
        }
        self._append(EntryKind.CALL_INTENT, body, committed={"document": judged})

    def decision(self, call: Call, decision: Decision, facts: Facts | None = None) -> None:
        """Record the judgement and the facts it may rest on; after it, the effect may happen."""
        body: dict[str, Json] = {
            "call": call.id,
            "effect": str(decision.effect),
            "code": decision.code,
            "rules": list(decision.rules),
            "policy": decision.policy,
            "enforcement": str(decision.enforcement),
            "profile": decision.profile.name if decision.profile else None,
        }
        if facts is not None:
            body["facts"] = {name: getattr(facts, name) for name in _FACTS}
        if decision.observed:
            body["observed"] = True
        if decision.obligations:
            body["obligations"] = sorted({bound.id for bound in decision.obligations})
        local = _tool_name(call.tool) in _LOCAL_TOOLS
        durability = Durability.VOLATILE if local else Durability.SYNC
        self._append(EntryKind.CALL_DECISION, body, durability=durability)

    def approval(self, call: Call, *, answer: str, by: str) -> None:
        """Record a person's answer to an asked Call."""
        body: dict[str, Json] = {"call": call.id, "answer": answer, "by": clear_name(by)}
        self._append(EntryKind.APPROVAL, body)

    def outcome(self, call: Call, outcome: Outcome) -> None:
        """Record what came of a Call that ran."""
        status = "limit" if outcome.limit else "ok" if outcome.ok else "failed"
        body: dict[str, Json] = {
            "call": call.id,
            "status": status,
            "code": f"limit.{outcome.limit}" if outcome.limit else None,
            "exit_code": outcome.exit_code,
            "signal": outcome.signal,
            "limit": outcome.limit,
            "truncated": outcome.truncated,
            "usage": {name: getattr(outcome.usage, name) for name in _USAGE},
        }
        if outcome.refused:
            body["refused"] = _refused(outcome.refused)
        if outcome.changes:
            body["changes"] = [_counts(changes) for changes in outcome.changes[:_SETS_MAX]]
        results: dict[str, Json | bytes] = {"stdout": outcome.stdout, "stderr": outcome.stderr}
        if outcome.changes:
            results["changed"] = _sets(outcome.changes)
        if outcome.value is not None:
            results["value"] = outcome.value
        committed = {name: value for name, value in results.items() if value != b""}
        self._append(
            EntryKind.CALL_OUTCOME, body | _confinement(outcome.confinement), committed=committed
        )

    def failure(self, call: Call, error: Error) -> None:
        """Record that a Call was refused or broke: there is no Outcome."""
        status = "error"
        if isinstance(error, Denied):
            status = "denied"
        elif isinstance(error, LimitExceeded):
            status = "limit"
        elif isinstance(error, ToolFailed):
            status = "failed"
        body: dict[str, Json] = {"call": call.id, "status": status, "code": clear_name(error.code)}
        if isinstance(error, ToolFailed) and error.refused:
            body["refused"] = _refused(error.refused)
        self._append(EntryKind.CALL_OUTCOME, body)

    def close(self) -> None:
        """End the session; what was recorded is then signed."""
        self._writer.close_session(self.session)

    def _append(
        self,
        kind: EntryKind,
        body: Mapping[str, Json],
        *,
        committed: Mapping[str, Json | bytes] | None = None,
        durability: Durability = Durability.VOLATILE,
    ) -> None:
        self._writer.append(
            kind, body, session=self.session, committed=committed, durability=durability
        )


def _tool_name(tool: object) -> str:
    """Return the name of a tool in clear. What is no text is named by its type alone."""
    return clear_name(tool if isinstance(tool, str) else f"not text: {type(tool).__name__}")


def _refused(refused: Sequence[Refused]) -> list[Json]:
    """Name what was refused, most often first; the names are the kernel's, whatever the program."""
    return [{"syscall": one.syscall, "count": one.count} for one in refused[:_REFUSED_MAX]]


def _counts(changes: KeptChanges) -> dict[str, Json]:
    counted = ("created", "modified", "deleted", "refused", "conflicts", "later")
    return {"id": changes.id, **{name: int(getattr(changes, name)) for name in counted}}


def _sets(changes: Sequence[KeptChanges]) -> list[Json]:
    """Name where each set belongs, what it holds and what of it takes effect later."""
    return [
        {
            "id": one.id,
            "workspace": _text(one.workspace),
            "sha256": one.digest,
            "flagged": [_text(path) for path in one.flagged],
        }
        for one in changes[:_SETS_MAX]
    ]


def _text(path: str) -> str:
    """Spell a name that is not UTF-8 so that any encoding holds it."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _confinement(confinement: Confinement) -> dict[str, Json]:
    return {
        "tier": str(confinement.tier) if confinement.tier else None,
        "layers": list(confinement.layers),
        "held": {name: str(held) for name, held in confinement.held.items()},
    }
