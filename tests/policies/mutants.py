"""Policies with one thing changed: what a policy's own tests must notice.

A mutant widens (a matcher becomes `any`, a `not`, a `when`, a deny or what a role narrows is gone,
an ask allows, an argument that nobody named passes, something is no longer hidden) or narrows (a
rule or a pattern is gone, a range is shorter, an allow asks). Folders, limits, rates and budgets
are left alone: a test of a policy sees the effect of a decision, and they are no part of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias, cast

import yaml

from safeconduct.policies import BUILT_IN

# A policy file as data.
Node: TypeAlias = "str | list[Node] | dict[str, Node]"
Steps: TypeAlias = tuple[str | int, ...]
# What to put in the place of a node; None takes it away.
Change: TypeAlias = "Callable[[Node], Node | None]"
UNCHANGED: Final = "unchanged"
_EFFECTS: Final = ("allow", "ask", "deny")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A changed policy and what was changed in it."""

    what: str
    data: bytes


def mutants(data: bytes) -> Iterator[Mutant]:
    """Yield a policy file in another spelling, unchanged, and then every mutant of it."""
    # BaseLoader makes nothing but texts, lists and maps.
    tree = cast("Node", yaml.load(data, Loader=yaml.BaseLoader))  # noqa: S506
    yield Mutant(what=UNCHANGED, data=_write(tree))
    for steps, node in _walk(tree, ()):
        for what, change in _changes(steps, node):
            place = ".".join(str(step) for step in steps)
            yield Mutant(what=f"{what} {place}", data=_write(_edited(tree, steps, change)))


def _write(tree: Node | None) -> bytes:
    """Write a policy in JSON, which is YAML; `any` and `...` are words only without quotes."""
    return json.dumps(tree).replace('"any"', "any").replace('"..."', "...").encode()


def _walk(node: Node, steps: Steps) -> Iterator[tuple[Steps, Node]]:
    """Yield every node of a policy with the steps to it."""
    yield steps, node
    if isinstance(node, dict):
        for name, inner in node.items():
            yield from _walk(inner, (*steps, name))
    elif isinstance(node, list):
        for at, inner in enumerate(node):
            yield from _walk(inner, (*steps, at))


def _edited(node: Node, steps: Steps, change: Change) -> Node | None:
    if not steps:
        return change(node)
    if isinstance(node, dict):
        pairs = [
            (name, _edited(inner, steps[1:], change) if name == steps[0] else inner)
            for name, inner in node.items()
        ]
        return {name: inner for name, inner in pairs if inner is not None}
    items = [
        _edited(inner, steps[1:], change) if at == steps[0] else inner
        for at, inner in enumerate(node)
    ]
    return [inner for inner in items if inner is not None]


def _changes(steps: Steps, node: Node) -> Iterator[tuple[str, Change]]:
    at = next((index for index, step in enumerate(steps) if step in _EFFECTS), None)
    if at is not None:
        yield from _of_grant(steps[: at + 1], steps[at + 1 :], node)
    elif "hide" in steps[:-1] or steps[-1:] in (("narrows",), ("when",)):
        yield "remove", _remove
    elif isinstance(node, dict) and (effect := _effect(node)):
        yield "remove", _remove
        other = {"allow": "ask", "ask": "allow"}.get(effect)
        if other:
            yield f"{other} in", _renamed(other)


def _of_grant(rule: Steps, inside: Steps, node: Node) -> Iterator[tuple[str, Change]]:
    """Yield changes of what a rule names; ``inside`` are the steps below its effect."""
    tool = next(step for step in reversed(rule[:-1]) if isinstance(step, str))
    # Our own tools have a closed signature: what their rules do not name is not there.
    others = rule[-1] != "deny" and tool not in BUILT_IN
    closed = isinstance(node, dict) and "rest" not in node
    if closed and ((not inside and others) or "properties" in node):
        yield "rest: any in", _open
    if node in ("any", "...") or not inside:
        return
    last = inside[-1]
    if len(inside) == 1 or (inside[-2] == "argv" and isinstance(last, int)):
        yield "any instead of", lambda _: "any"
    elif inside[-2] == "range":
        yield "narrow", lambda end: str(int(str(end)) + (1 if last == 0 else -1))
    elif isinstance(last, int) or last in ("not", "required"):
        yield "remove", _remove


def _effect(node: dict[str, Node]) -> str | None:
    return next((name for name in node if name in _EFFECTS), None)


def _remove(_: Node) -> None:
    return None


def _open(node: Node) -> Node:
    assert isinstance(node, dict)
    return {**node, "rest": "any"}


def _renamed(effect: str) -> Change:
    def rename(node: Node) -> Node:
        assert isinstance(node, dict)
        return {effect if name in _EFFECTS else name: inner for name, inner in node.items()}

    return rename
