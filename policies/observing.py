"""Step 3 where a session only observes: what nothing grants runs, as bound as what is granted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from safeconduct.call import Decision, Document, Durability, Effect, Profile

from .decision import counted_apart
from .rules import Judged
from .trace_terms import most_durable


def as_observed(
    policy: Judged,
    document: Document,
    decision: Decision,
    verdicts: Sequence[Decision],
    profile: Profile | None,
) -> Decision:
    """Return the Decision that lets a Call run whatever it says.

    ``verdicts`` are those of the policy's parts. The Call counts against the bounds of all, and
    keeps the marks of all: what one part says is lost by no other that does not grant it.
    """
    terms = policy.trace
    marked = terms.is_irreversible(document.tool) or any(one.irreversible for one in verdicts)
    # What is denied has no effect to wait for, and says nothing of it.
    ran = [one.durability for one in verdicts if one.effect is not Effect.DENY]
    return replace(
        decision,
        profile=profile,
        obligations=counted_apart(one.obligations for one in verdicts),
        durability=Durability.SYNC
        if marked
        else most_durable([terms.durability_of(document.tool), *ran]),
        irreversible=marked,
        observed=True,
    )
