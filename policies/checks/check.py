"""What `safeconduct policy check` says about a policy that loads: findings, not verdicts.

An error is a policy that does not do what it says; a warning is one that probably grants
more, or less, than its author thinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from safeconduct.errors import PolicyError
from safeconduct.policies.lattice.inclusion import Effort, bounded
from safeconduct.policies.load import load_policy
from safeconduct.policies.rules import Judged, Policy

from .dead import denied_together, hidden, protected
from .findings import Finding, Level
from .overlaps import reach_of_all, shadowed
from .reach import added_calls, folders_outside, reach_of_rules, runners, shown
from .rules import (
    broad,
    empty,
    literal_patterns,
    narrowed_away,
    no_engine,
    no_overlay,
    swallowed,
    unmarked,
    unreachable,
)

# LIMIT: steps of all comparisons of rules: under 1 s. A policy that came with a project may be made
# to cost; what is not compared is not found.
MAX_EFFORT = 3_000_000

__all__ = ["Finding", "Level", "check_file", "check_policy"]


def check_file(path: Path, *, workspace: Path | None = None) -> tuple[Finding, ...]:
    """Check a file; one that does not load gives the one finding that says why."""
    try:
        policy = load_policy(path, workspace=workspace)
    except PolicyError as error:
        finding = Finding(
            level=Level.ERROR,
            code=error.code,
            file=error.file or str(path),
            line=error.line,
            column=error.column,
            message=error.message,
            fix=error.hint,
        )
        return (finding,)
    return check_policy(policy)


def check_policy(policy: Judged) -> tuple[Finding, ...]:
    """Return what is doubtful about a policy, in the order of its lines."""
    with bounded(Effort(MAX_EFFORT)):
        return _findings(policy)


def _findings(policy: Judged) -> tuple[Finding, ...]:
    found: set[Finding] = set()
    for part in policy.parts:
        found |= {*folders_outside(part), *added_calls(part), *empty(part), *unmarked(part)}
        found |= {*literal_patterns(part)}
        for view in _views(part):
            found |= {*_of_view(view)}
            if view.role is not None:
                found |= {*narrowed_away(part.for_role(view.role).parts)}
    found |= {*narrowed_away(policy.parts)}
    return tuple(
        sorted(found, key=lambda item: (item.file, item.line, item.column, item.code, item.message))
    )


def _views(part: Policy) -> Iterator[Policy]:
    """Yield what the sessions without a role meet, and what those in each role do."""
    yield part
    for role in part.roles.values():
        yield replace(part, tools=role.tools, wildcards=role.wildcards, role=role.name)


def _of_view(view: Policy) -> Iterator[Finding]:
    for name, tool in view.each():
        yield from no_overlay(view, name, tool)
        yield from no_engine(view, name, tool)
        yield from swallowed(view, tool)
        yield from unreachable(view, tool)
        yield from shadowed(view, name, tool)
        yield from denied_together(view, name, tool)
        yield from hidden(view, name, tool)
        yield from protected(view, name, tool)
        yield from runners(view, tool)
    yield from broad(view)
    yield from reach_of_all(view)
    yield from shown(view)
    yield from reach_of_rules(view)
