"""Policy matching: `when`, a condition on a rule. Small, total, typed where types are known.

    when: "call.amount <= 100 and session.calls < 50"
    when: 'time.weekday in ["mon", "tue", "wed", "thu", "fri"] and time.hour >= 8'
    when: 'default(call.dry_run, false) or session.role == "release"'

What may be named: `call.NAME` (canonical arguments and the members of objects among them;
`call["odd-name"]`), `session.role`, `.caller`, `.origin`, `.calls`, `.denied`, `time.hour` and
`time.weekday` (`mon` to `sun`), both UTC. There are `and`, `or`, `not`, comparisons, `in`,
literals, lists of literals, `len(…)` and `default(FACT, LITERAL)`; no loops, no functions of
the user's, no arithmetic, no I/O.

**Errors.** A missing fact, a comparison of unlike types ("3" < 10, 1 == true), a value that is
neither true nor false, or too many steps is a WhenError of the *whole* condition: nothing is cut
short, neither `true or …` nor `false and …` hides an error (when_nodes.py says why). The
caller fails closed: an allow or ask whose condition is false or fails does not grant, an ask
or deny whose condition is true *or fails* restricts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from safeconduct.call import Facts, Json

from .nodes import Node, Run, WhenError, truth
from .syntax import WEEKDAYS, parse_when
from .tokens import WhenSyntaxError

__all__ = ["When", "WhenError", "WhenSyntaxError", "compile_when", "when_facts"]

_HOUR_MS = 3_600_000
_DAY_MS = 24 * _HOUR_MS
# 1970-01-01 was a Thursday.
_EPOCH_WEEKDAY = 3


@dataclass(frozen=True, slots=True)
class When:
    """One compiled condition. ``arguments`` are the arguments of the Call that it names."""

    text: str
    arguments: frozenset[str] = field(compare=False)
    root: Node = field(compare=False, repr=False)

    def holds(self, facts: Mapping[str, Json]) -> bool:
        """Answer for the facts, as `when_facts` makes them; WhenError where there is no answer."""
        return truth(self.root.evaluate(Run(facts)))


def compile_when(text: str) -> When:
    """Compile a condition; raise WhenSyntaxError, a ValueError, with the position of the fault."""
    root, arguments = parse_when(text)
    return When(text, arguments, root)


def when_facts(arguments: Mapping[str, Json], facts: Facts) -> Mapping[str, Json]:
    """Return what a condition may name.

    A session without a role has no `session.role`; without a clock (``now_ms`` is 0) there is no
    time. Both are missing, so a condition on them is a WhenError.
    """
    session: dict[str, Json] = {
        "caller": facts.caller,
        "origin": facts.origin,
        "calls": facts.calls,
        "denied": facts.denied,
    }
    if facts.role is not None:
        session["role"] = facts.role
    time: dict[str, Json] = {}
    if facts.now_ms > 0:
        time["hour"] = facts.now_ms % _DAY_MS // _HOUR_MS
        time["weekday"] = WEEKDAYS[(facts.now_ms // _DAY_MS + _EPOCH_WEEKDAY) % 7]
    return {"call": arguments, "session": session, "time": time}
