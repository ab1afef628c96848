"""The path of one Call, on one screen.

    Call → canonical document → decide → record → reserve → (ask) → execute → record → result

INVARIANT: nothing runs without a recorded intent, and nothing irreversible before that is signed;
nothing is decided on one spelling of a path and executed on another; every failure on the way is a
refusal, and is recorded as one. This is the only module that joins policies, sandbox and trace.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from safeconduct.call import Call, Decision, Document, Effect, Facts, Outcome, Profile
from safeconduct.errors import ApprovalRequired, Denied, Error, SandboxFailed, TraceInvalid
from safeconduct.policies import Canonical, Judged, canonicalize, hidden_by

from .ledger import Ledger, Tab
from .record import Recorder
from .standing import Delegated, Standing
from .tools.task import Sink, Task
from .tools.toolbox import Toolbox

# Asks a person about a Call: who said yes, or None for no. Raises ApprovalRequired if nobody is
# there to be asked.
Approver = Callable[[Call, Decision], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A Call that was allowed and whose intent is recorded: it may run now, once."""

    call: Call
    decision: Decision
    profile: Profile
    canonical: Canonical
    tab: Tab = field(default_factory=Tab)

    @property
    def document(self) -> Document:
        """The one spelling of the Call that was judged."""
        return self.canonical.document


class Pipeline:
    """Takes Calls of one session along the path. Safe to use from several threads."""

    def __init__(
        self, standing: Standing | Delegated, recorder: Recorder, ledger: Ledger,
        toolbox: Toolbox, approver: Approver,
    ) -> None:  # fmt: skip
        self._standing, self._recorder, self._ledger = standing, recorder, ledger
        self._toolbox, self._approver = toolbox, approver

    def of(self, standing: Delegated) -> Pipeline:
        """Return the same path for a sub-agent of this session."""
        return Pipeline(standing, self._recorder, self._ledger, self._toolbox, self._approver)

    def perform(self, call: Call, *, sink: Sink | None = None) -> Outcome:
        """Judge, run and record one Call of a tool we execute. Blocks until it is over.

        ``sink`` receives a program's output as it comes. Raises Denied, ApprovalRequired,
        ToolFailed, LimitExceeded, SandboxFailed, SandboxUnavailable or TraceInvalid; then the
        Call had no effect or was ended.
        """
        with self.admit(call) as admitted:
            outcome = self._toolbox.run(self._task(admitted, sink))
            self.settle(admitted, outcome)
            return outcome

    @contextmanager
    def admit(self, call: Call) -> Generator[Admitted]:
        """Judge and record one Call; inside the block it may run. For tools others execute.

        Whoever enters records the Outcome with ``settle``; an Error that leaves the block is
        recorded as the outcome. Raises as ``perform`` does before anything ran.
        """
        with self._judged(call) as (canonical, decision, tab):
            if decision.profile is None:
                raise Denied("No profile to run in.", code="policy.error", rules=decision.rules)
            yield Admitted(
                call=call, decision=decision, profile=decision.profile, canonical=canonical, tab=tab
            )

    def settle(self, admitted: Admitted, outcome: Outcome) -> None:
        """Record the Outcome of a Call and count what it used."""
        admitted.tab.settle(outcome)
        self._recorder.outcome(admitted.call, outcome)

    @contextmanager
    def operate(self, call: Call, profile: Profile) -> Generator[Admitted]:
        """Record a program that the operator's own command line starts; no rule judges it.

        Its decision has the code ``operator.command``. It waits for no witness: what an overlay
        holds would be lost where it cannot be kept. Otherwise as ``admit``.
        """
        policy = self._standing.policy
        document = Document(tool=call.tool, arguments=call.arguments, workspace=policy.workspace)
        decision = Decision(
            effect=Effect.ALLOW,
            policy=policy.version,
            code="operator.command",
            reason="The operator's command line names it.",
            profile=profile,
        )
        self._recorder.intent(call, document)
        self._recorder.decision(call, decision)
        with self._failures_of(call):
            yield Admitted(
                call=call, decision=decision, profile=profile, canonical=Canonical(document, {})
            )

    @contextmanager
    def _judged(self, call: Call) -> Generator[tuple[Canonical, Decision, Tab]]:
        policy, facts = self._standing.begin(call)
        try:
            closed = self._toolbox.functions.close_arguments(call)
            canonical = canonicalize(policy, closed, unknown=self._standing.unknown)
        except Denied as refusal:
            self._refuse(call, policy, refusal)
            raise
        with canonical:
            decision = self._decide(policy, canonical, facts)
            self._recorder.intent(call, canonical.document)
            self._recorder.decision(call, decision, facts)
            with self._failures_of(call):
                decision = self._allowed(call, policy, canonical.document, decision, facts)
                with self._ledger.reserved(decision.obligations) as tab:
                    self._recorder.before_effect(decision)
                    yield canonical, decision, tab

    @contextmanager
    def _failures_of(self, call: Call) -> Generator[None]:
        """Record what ends a Call early as its outcome. Always raises what ended it."""
        try:
            yield
        except Error as error:
            if isinstance(error, Denied):
                self._standing.refused()
            self._record_failure(call, error, error)
            raise
        except BaseException as error:
            self._record_failure(call, SandboxFailed("Interrupted.", step="interrupted"), error)
            raise

    def _record_failure(self, call: Call, failure: Error, under_way: BaseException) -> None:
        """Record it; what the writer is kept from, the next call meets before it has an effect."""
        try:
            self._recorder.failure(call, failure)
        except TraceInvalid as error:
            under_way.add_note(f"The trace does not say so: {error.message} ({error.code})")

    def _decide(self, policy: Judged, canonical: Canonical, facts: Facts) -> Decision:
        """Judge; keys, traces and the policies in force are out of reach of every policy."""
        shields = self._toolbox.shields
        paths = [item.path for item in canonical.descriptors.values()]
        code = None
        if any(shields.refuses(path) for path in paths):
            code = "path.hidden"
        elif any(shields.freezes(path) for path in canonical.written):
            code = "path.protected"
        if code is None:
            return self._standing.decide(policy, canonical.document, facts)
        return Decision(
            effect=Effect.DENY,
            policy=policy.version,
            code=code,
            reason=f"Denied ({code}): no tool may go there, whatever the policy says.",
        )

    def _allowed(
        self, call: Call, policy: Judged, document: Document, decision: Decision, facts: Facts
    ) -> Decision:
        """Return the decision if it allows, asking a person where the policy says so.

        What has no budget left is not asked about. A person takes their time: what the Call
        reserved is given back then, as it counts when it runs, and it is judged again, as a
        Capability may have ended meanwhile.
        """
        if decision.effect is Effect.ALLOW or decision.observed:
            return decision
        _refuse_denied(decision)
        with self._ledger.reserved(decision.obligations) as tab:
            try:
                self._ask(call, decision)
            finally:
                tab.release()
        _refuse_denied(self._standing.decide(policy, document, self._standing.later(facts)))
        return replace(decision, effect=Effect.ALLOW)

    def _ask(self, call: Call, decision: Decision) -> None:
        """Have a person say yes; raises ApprovalRequired or Denied where nobody does."""
        try:
            by = self._approver(call, decision)
        except ApprovalRequired:
            self._recorder.approval(call, decision, answer="none", by="nobody")
            raise
        answer = "yes" if by else "no"
        self._recorder.approval(call, decision, answer=answer, by=by or "operator")
        if not by:
            raise Denied("The operator said no.", rules=decision.rules, code="approval.refused")

    def _refuse(self, call: Call, policy: Judged, refusal: Denied) -> None:
        """Record a Call that has no canonical form: it is denied as it stands."""
        self._standing.refused()
        decision = Decision(
            effect=Effect.DENY,
            policy=policy.version,
            code=refusal.code,
            reason=refusal.message,
        )
        self._recorder.intent(call, None)
        self._recorder.decision(call, decision)
        self._recorder.failure(call, refusal)

    def _task(self, admitted: Admitted, sink: Sink | None) -> Task:
        return Task(
            call=admitted.call.id,
            document=admitted.document,
            profile=admitted.profile,
            objects=admitted.canonical.descriptors,
            hides=partial(hidden_by, admitted.profile.hide),
            sink=sink,
        )


def _refuse_denied(decision: Decision) -> None:
    if decision.effect is Effect.DENY:
        raise Denied(decision.reason, rules=decision.rules, code=decision.code)


def nobody(call: Call, decision: Decision) -> str | None:
    """Answer an ask when no person is there: the Call can be resumed later by its id."""
    raise ApprovalRequired(decision.reason, call=call.id, rules=decision.rules)
