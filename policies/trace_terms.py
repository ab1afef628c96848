"""Policy step 3: what a policy asks of the log: how durable an intent is before its effect.

Terms only get stricter where policies are joined. What takes evidence away or names who is asked
over the network (`retain`, `witness`) is the operator's word alone: a policy that only narrows
has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from safeconduct.call import Durability
from safeconduct.errors import PolicyError

from .signatures import BUILT_IN
from .syntax import Position
from .wildcards import ToolPattern

# Tools of ours whose effect stays on this machine. What others do, nobody here knows.
LOCAL_TOOLS: Final = frozenset(BUILT_IN) - {"http.get", "agent.run"}
_ORDER: Final = (Durability.VOLATILE, Durability.BATCH, Durability.SYNC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Witnesses:
    """The file that names the witnesses and their quorum, and whether calls wait for them."""

    policy: str
    require: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceTerms:
    """How the log of a session is kept. ``local`` is for our own tools that reach no network.

    ``irreversible`` are tools whose intent is on disk and signed before the effect. The rest
    holds for the whole log; None is what the writer does by itself.
    """

    local: Durability = Durability.VOLATILE
    other: Durability = Durability.SYNC
    batch_ms: int | None = None
    irreversible: tuple[ToolPattern, ...] = ()
    quota_bytes: int | None = None
    retain_days: int | None = None
    witness: Witnesses | None = None
    position: Position = field(default=Position(0, 0))

    def durability_of(self, tool: str) -> Durability:
        """Return how durable the intent of a call is before its effect."""
        if self.is_irreversible(tool):
            return Durability.SYNC
        return self.local if tool in LOCAL_TOOLS else self.other

    def is_irreversible(self, tool: str) -> bool:
        """Tell whether the tool is listed as irreversible."""
        return any(pattern.matches(tool) for pattern in self.irreversible)

    @property
    def of_the_log(self) -> tuple[object, ...]:
        """What the writer of a log is put up with, and no call changes."""
        return (self.batch_ms, self.quota_bytes, self.retain_days, self.witness)


DEFAULT_TERMS: Final = TraceTerms()


def most_durable(durabilities: Iterable[Durability]) -> Durability:
    """Return the strictest of some durabilities."""
    return max(durabilities, key=_ORDER.index)


def join_terms(wide: TraceTerms, narrow: TraceTerms, *, operators: bool = True) -> TraceTerms:
    """Join the terms of two policies that must both agree: the strictest of each.

    The wider one says how long is kept and who cosigns, where it says so. Without ``operators``
    the narrower one says nothing of that.
    """
    lists = dict.fromkeys((*wide.irreversible, *narrow.irreversible))
    joined = replace(
        wide,
        local=most_durable((wide.local, narrow.local)),
        other=most_durable((wide.other, narrow.other)),
        batch_ms=_least(wide.batch_ms, narrow.batch_ms),
        irreversible=tuple(lists),
        quota_bytes=_least(wide.quota_bytes, narrow.quota_bytes),
    )
    if not operators:
        return joined
    retain_days = wide.retain_days if wide.retain_days is not None else narrow.retain_days
    witness = wide.witness or narrow.witness
    if witness is not None and narrow.witness is not None and narrow.witness.require:
        witness = replace(witness, require=True)
    return replace(joined, retain_days=retain_days, witness=witness)


def _least(one: int | None, other: int | None) -> int | None:
    found = [value for value in (one, other) if value is not None]
    return min(found, default=None)


def refuse_weaker(wide: TraceTerms, narrow: TraceTerms, file: str) -> None:
    """Raise PolicyError where a file that extends another says less than that one does.

    The stricter of both would count in any case, so what is written would not be true.
    """
    if narrow == DEFAULT_TERMS:
        return
    checks = (
        ("durability", _looser(wide, narrow)),
        ("batch", _more(wide.batch_ms, narrow.batch_ms)),
        ("quota", _more(wide.quota_bytes, narrow.quota_bytes)),
        ("retain", _other(wide.retain_days, narrow.retain_days)),
        ("witness", _fewer(wide.witness, narrow.witness)),
    )
    for name, weaker in checks:
        if weaker:
            raise PolicyError(
                f"trace.{name} is weaker than, or other than, in the policy that this one extends",
                file=file,
                line=narrow.position.line,
                column=narrow.position.column,
                code="policy.trace",
                hint=f"leave {name} out: the wider policy says it",
            )


def _looser(wide: TraceTerms, narrow: TraceTerms) -> bool:
    if (narrow.local, narrow.other) == (DEFAULT_TERMS.local, DEFAULT_TERMS.other):
        return False  # it says nothing of it
    pairs = ((wide.local, narrow.local), (wide.other, narrow.other))
    return any(_ORDER.index(mine) < _ORDER.index(theirs) for theirs, mine in pairs)


def _more(wide: int | None, narrow: int | None) -> bool:
    return wide is not None and narrow is not None and narrow > wide


def _other(wide: int | None, narrow: int | None) -> bool:
    return wide is not None and narrow is not None and narrow != wide


def _fewer(wide: Witnesses | None, narrow: Witnesses | None) -> bool:
    if wide is None or narrow is None:
        return False
    return wide.policy != narrow.policy or (wide.require and not narrow.require)
