"""Policy lattice: terms of the log: does the new policy keep less of it, or later, than the old?"""

from __future__ import annotations

from collections.abc import Iterator

from safeconduct.policies.trace_terms import TraceTerms, most_durable


def trace_gains(old: TraceTerms, new: TraceTerms) -> Iterator[str]:
    """Yield in words each way in which the second terms are weaker.

    What is irreversible is compared rule by rule (difference_rules.py).
    """
    for what, before, after in (
        ("our local tools", old.local, new.local),
        ("other tools", old.other, new.other),
    ):
        if most_durable((before, after)) is not after:
            yield f"calls of {what} are recorded {after}, no longer {before}"
    if old.batch_ms is not None and (new.batch_ms is None or new.batch_ms > old.batch_ms):
        yield "entries may wait longer for the disk"
    if old.quota_bytes is not None and (
        new.quota_bytes is None or new.quota_bytes > old.quota_bytes
    ):
        yield "the log may grow further"
    if new.retain_days is not None and (
        old.retain_days is None or new.retain_days < old.retain_days
    ):
        yield f"what was recorded is erased after {new.retain_days} days"
    if old.witness is not None:
        if new.witness is None or new.witness.policy != old.witness.policy:
            yield f"the witnesses of {old.witness.policy!a} are no longer asked"
        elif old.witness.require and not new.witness.require:
            yield "calls no longer need witnesses"
