"""Step "record": what the pipeline knows, as entries of one session of a Trace.

What may hold secrets or can be guessed (arguments, output) enters as salted commitments.
docs/trace-format.md lists the fields of each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from safeconduct.attestation import TraceWriter, clear_name
from safeconduct.call import (
    Call,
    Confinement,
    Decision,
    Document,
    Durability,
    Effect,
    EntryKind,
    Facts,
    Json,
    Outcome,
)  # fmt: skip
from safeconduct.errors import Denied, Error, LimitExceeded, ToolFailed, TraceInvalid

from . import bodies
from .denials import Counted, Denial, Denials

# Looking up a member of an Enum runs Python code; these are looked up for every call.
_INTENT, _DECISION = EntryKind.CALL_INTENT, EntryKind.CALL_DECISION
_OUTCOME = EntryKind.CALL_OUTCOME
_DENY, _VOLATILE = Effect.DENY, Durability.VOLATILE


class Watched(Protocol):
    """Raises TraceInvalid unless the log is witnessed, and so many entries of it."""

    def __call__(self, *, covering: int) -> None: ...


class Recorder:
    """Writes the entries of one session. Thread-safe as the TraceWriter is."""

    def __init__(self, writer: TraceWriter, *, caller: str, origin: str) -> None:
        self._writer = writer
        self.session = writer.open_session(clear_name(caller), clear_name(origin))
        # Raises unless witnesses have cosigned so many entries, where the policy needs them to.
        self.watched: Watched | None = None
        self._intents: dict[str, tuple[dict[str, Json], dict[str, Json]]] = {}
        # Calls whose decision is recorded and whose end is not: how durable that must be.
        self._open: dict[str, Durability] = {}
        self._denials = Denials(self._write_denial)
        self._confined: tuple[Confinement, dict[str, Json]] | None = None

    def policy(self, version: str, file: str, why: str, confinement: Confinement) -> None:
        """Record which policy is in force and what this machine enforces."""
        body: dict[str, Json] = {
            "policy": version,
            "file": clear_name(file),
            "why": clear_name(why),
        }
        self._append(EntryKind.POLICY_LOAD, body | bodies.confinement(confinement))

    def policy_kept(self, version: str, error: Error) -> None:
        """Record that another policy was to come into force, and why the old one stays."""
        body: dict[str, Json] = {"policy": version, "kept": clear_name(error.code)}
        self._append(EntryKind.POLICY_LOAD, body)

    def intent(self, call: Call, document: Document | None) -> None:
        """Take down what is about to be judged; ``decision`` records both, before any effect.

        Without ``document`` the Call could not be brought to a canonical form. Its tool then has
        the name that stands in clear: a raw one may hold what no encoding has (a lone surrogate),
        and must not keep the denial out of the log.
        """
        tool = bodies.tool_name(call.tool)
        judged: dict[str, Json] = {"tool": tool, "arguments": None, "workspace": None}
        if document is not None:
            judged = {
                "tool": document.tool,
                "arguments": document.arguments,
                "workspace": document.workspace,
            }
            if document.unfit is not None:
                judged["unfit"] = {name: list(said) for name, said in document.unfit.items()}
        body: dict[str, Json] = {
            "call": call.id,
            "tool": tool,
            "caller": clear_name(call.caller),
            "origin": clear_name(call.origin),
            "parent": call.parent,
        }
        self._intents[call.id] = body, judged

    def decision(self, call: Call, decision: Decision, facts: Facts | None = None) -> None:
        """Record the judgement and the facts it may rest on; after it, the effect may happen."""
        body: dict[str, Json] = {
            "call": call.id,
            "effect": decision.effect,
            "code": decision.code,
            "rules": decision.rules,
            "policy": decision.policy,
            "enforcement": decision.enforcement,
            "profile": decision.profile.name if decision.profile else None,
        }
        if facts is not None:
            body["facts"] = {
                "role": facts.role,
                "calls": facts.calls,
                "denied": facts.denied,
                "now_ms": facts.now_ms,
            }
        if decision.observed:
            body["observed"] = True
        if decision.obligations:
            body["obligations"] = sorted({bound.id for bound in decision.obligations})
        if decision.irreversible:
            body["irreversible"] = True
        intent, judged = self._intents.pop(call.id)
        if decision.effect is _DENY and not decision.observed:
            denial = Denial(call=call, intent=intent, judged=judged, decision=body)
            if self._denials.counts(denial):
                return
        durability = _durability(decision)
        if self._denials.waiting:
            self._denials.try_flush()
        # One write(2) for both, and where it is durable one fdatasync(2).
        append, session = self._writer.append, self.session
        document: dict[str, Json | bytes] = {"document": judged}
        try:
            append(_INTENT, intent, session=session, committed=document, more=True)
            append(_DECISION, body, session=session, durability=durability)
        except TraceInvalid:
            self._denials.unrecorded()
            raise
        # Its end goes with the next group commit where its intent was durable.
        self._open[call.id] = _VOLATILE if durability is _VOLATILE else Durability.BATCH

    def approval(self, call: Call, decision: Decision, *, answer: str, by: str) -> None:
        """Record a person's answer to an asked Call, as durably as the intent."""
        body: dict[str, Json] = {"call": call.id, "answer": answer, "by": clear_name(by)}
        said_yes = answer == "yes"
        durability = decision.durability if said_yes else Durability.VOLATILE
        self._append(EntryKind.APPROVAL, body, durability=durability)

    def before_effect(self, decision: Decision) -> None:
        """Have what was recorded signed where the Call cannot be undone, and witnessed if it must.

        Raises TraceInvalid; then it must not run.
        """
        if self.watched is not None:
            covering = self._writer.checkpoint().size if decision.irreversible else 0
            self.watched(covering=covering)
        elif decision.irreversible:
            self._writer.sign()

    def outcome(self, call: Call, outcome: Outcome) -> None:
        """Record what came of a Call that ran."""
        self._write_held(call)
        status = "limit" if outcome.limit else "ok" if outcome.ok else "failed"
        body: dict[str, Json] = {
            "call": call.id,
            "status": status,
            "code": f"limit.{outcome.limit}" if outcome.limit else None,
            "exit_code": outcome.exit_code,
            "signal": outcome.signal,
            "limit": outcome.limit,
            "truncated": outcome.truncated,
            "usage": bodies.usage(outcome.usage),
            **self._confinement(outcome.confinement),
        }
        if outcome.refused:
            body["refused"] = bodies.refused(outcome.refused)
        if outcome.changes:
            body["changes"] = [bodies.counts(one) for one in outcome.changes[: bodies.SETS_MAX]]
        committed: dict[str, Json | bytes] = {}
        if outcome.stdout:
            committed["stdout"] = outcome.stdout
        if outcome.stderr:
            committed["stderr"] = outcome.stderr
        if outcome.changes:
            committed["changed"] = bodies.sets(outcome.changes)
        if outcome.value is not None:
            committed["value"] = outcome.value
        self._end(call, body, committed)

    def failure(self, call: Call, error: Error) -> None:
        """Record that a Call was refused or broke: there is no Outcome.

        Of a Call whose end is recorded nothing more is said.
        """
        if self._denials.swallowed(call.id):
            return
        self._write_held(call)
        if call.id not in self._open:
            return
        status = "error"
        if isinstance(error, Denied):
            status = "denied"
        elif isinstance(error, LimitExceeded):
            status = "limit"
        elif isinstance(error, ToolFailed):
            status = "failed"
        body: dict[str, Json] = {"call": call.id, "status": status, "code": clear_name(error.code)}
        if isinstance(error, ToolFailed) and error.refused:
            body["refused"] = bodies.refused(error.refused)
        self._end(call, body)

    def close(self) -> None:
        """End the session; what was recorded is then signed."""
        try:
            self._denials.flush()
        finally:
            self._writer.close_session(self.session)

    def _append(
        self,
        kind: EntryKind,
        body: Mapping[str, Json],
        *,
        committed: Mapping[str, Json | bytes] | None = None,
        durability: Durability = Durability.VOLATILE,
        more: bool = False,
    ) -> None:
        if self._denials.waiting:
            self._denials.try_flush()
        self._writer.append(
            kind,
            body,
            session=self.session,
            committed=committed,
            durability=durability,
            more=more,
        )

    def _end(
        self,
        call: Call,
        body: Mapping[str, Json],
        committed: Mapping[str, Json | bytes] | None = None,
    ) -> None:
        """Record what came of a Call. The quota refuses no end of what it let begin."""
        durability = self._open.get(call.id, _VOLATILE)
        self._append(EntryKind.CALL_OUTCOME, body, committed=committed, durability=durability)
        self._open.pop(call.id, None)

    def _write_held(self, call: Call) -> None:
        """Record the intent of a Call that ends without having been judged."""
        held = self._intents.pop(call.id, None)
        if held is not None:
            committed: dict[str, Json | bytes] = {"document": held[1]}
            self._append(EntryKind.CALL_INTENT, held[0], committed=committed, more=True)
            self._open[call.id] = _VOLATILE

    def _write_denial(self, counted: Counted) -> None:
        """Record a denied Call that stands for so many identical ones, itself the last.

        It passes the quota: the log has counted on it since the first was not written out.
        """
        denial = counted.last
        body: dict[str, Json] = {
            "call": denial.call.id,
            "status": "denied",
            "code": denial.decision["code"],
        }
        if counted.count > 1:
            body["repeats"] = counted.count
        document: dict[str, Json | bytes] = {"document": denial.judged}
        entries: tuple[tuple[EntryKind, dict[str, Json], dict[str, Json | bytes] | None], ...] = (
            (_INTENT, denial.intent, document),
            (_DECISION, denial.decision, None),
            (_OUTCOME, body, None),
        )
        for kind, said, committed in entries[counted.written :]:
            self._writer.append(
                kind, said, session=self.session, committed=committed,
                more=kind is not _OUTCOME, beyond_quota=True,
            )  # fmt: skip
            counted.written += 1

    def _confinement(self, confinement: Confinement) -> dict[str, Json]:
        """Return it as it stands in a body; calls of one profile share the value, mostly."""
        known = self._confined
        if known is not None and known[0] is confinement:
            return known[1]
        body = bodies.confinement(confinement)
        self._confined = confinement, body
        return body


def _durability(decision: Decision) -> Durability:
    """Return how durable a Decision must be: a denied Call has no effect to wait for it."""
    if decision.effect is Effect.DENY and not decision.observed:
        return Durability.VOLATILE
    return decision.durability
