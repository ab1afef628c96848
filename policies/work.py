"""Step 3 of the path of one Call: what one decision may cost. A bound on work, not on time.

Calls hold lists and long texts, policies thousands of patterns, and each product of the two is
work that the caller chooses. So what is more than a little is counted, in steps of RE2 (1 to 3 ns
each), and beyond the bound the Call is denied: less work in a doubt, never less judging.
"""

from __future__ import annotations

import threading
from typing import Final

from safeconduct.call import Decision, Effect

# LIMIT: steps of all restrictions of one decision; under two seconds.
MAX_STEPS: Final = 1 << 29
# LIMIT: steps of each grant; under half a second. What takes no more in all is judged in one go.
MAX_GRANT_STEPS: Final = 1 << 27
# What a matcher does below this is not counted: counting would take as long.
FREE_STEPS: Final = 1 << 12
# What a pair of components takes, what more where one holds a wildcard beside other characters, a
# pair of characters in these, and a host or an address and a pattern.
COMPONENT_STEPS: Final = 128
WILDCARD_STEPS: Final = 512
CHARACTER_STEPS: Final = 32
HOST_STEPS: Final = 1 << 11

# Outside of decisions (check, diff, explain) others bound the work, or nobody hostile asks.
NO_BOUND: Final = float("inf")


class TooMuchWork(Exception):
    """A Call that takes more work to judge than a decision may."""


class _Work(threading.local):
    left: float = NO_BOUND


# What the decision that this thread makes may still do. `decide` sets it itself: a call of a
# function would take longer than that.
WORK: Final = _Work()


def spend(steps: int) -> None:
    """Count work before it is done; TooMuchWork where a decision has none left for it."""
    if steps > FREE_STEPS:
        left = WORK.left - steps
        if left < 0:
            raise TooMuchWork
        WORK.left = left


def unjudged(policy: str, error: Exception) -> Decision:
    """Deny a Call that could not be judged, under the policy of this version."""
    if isinstance(error, TooMuchWork):
        return Decision(
            effect=Effect.DENY,
            policy=policy,
            code="policy.too_much_work",
            reason="Denied (policy.too_much_work): the call has too many or too long values.",
            advises="send fewer or shorter values in one call, or write fewer, plainer patterns",
        )
    return Decision(
        effect=Effect.DENY,
        policy=policy,
        code="policy.error",
        reason="Denied: the call could not be judged.",
        advises=f"this is a bug of ours, please report it: {type(error).__name__}",
    )
