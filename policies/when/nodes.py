"""Policy matching: what a `when` condition is made of, and how it is evaluated. Pure and total.

Evaluation is *strict*: every operand of `and` and `or` is evaluated, whatever the others were, and
every element that `in` looks at. An error anywhere is an error of the whole. A short circuit
would let `true or ERROR` grant and let `false and ERROR` slip past a deny; so would three-valued
logic. It also keeps the meaning free of order. What may be missing is written `default(…)`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Protocol, TypeGuard

from safeconduct.call import Json

# LIMIT: elements and members that one condition looks at; its length bounds its other steps.
MAX_STEPS: Final = 20_000
# `call.NAME` is an argument; the steps behind it lead through the members of objects.
_WITHIN_ARGUMENT: Final = 2


class WhenError(ValueError):
    """A condition that cannot be answered for this Call. ``code`` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Type(StrEnum):
    """The types of values. ``UNKNOWN`` is what only the Call tells."""

    TEXT = "text"
    NUMBER = "number"
    BOOLEAN = "boolean"
    NULL = "null"
    LIST = "list"
    OBJECT = "object"
    UNKNOWN = "unknown"


class Run:
    """One evaluation: the facts, and how many elements may still be looked at."""

    __slots__ = ("facts", "steps")

    def __init__(self, facts: Mapping[str, Json]) -> None:
        self.facts = facts
        self.steps = MAX_STEPS

    def look(self, count: int) -> None:
        """Count elements that are looked at; WhenError where none are left."""
        self.steps -= count
        if self.steps < 0:
            raise WhenError("when.steps", f"the condition looks at more than {MAX_STEPS} elements")


class Node(Protocol):
    """A part of a condition."""

    @property
    def type(self) -> Type:
        """What this evaluates to, as far as that is known."""
        ...

    def evaluate(self, run: Run) -> Json:
        """Return the value, or raise WhenError."""
        ...


def type_of(value: Json) -> Type:
    """Return the type of a value. A boolean is not a number; no number is infinite."""
    if isinstance(value, str):
        return Type.TEXT
    if isinstance(value, bool):
        return Type.BOOLEAN
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise WhenError("when.type", "a number is not finite")
        return Type.NUMBER
    if value is None:
        return Type.NULL
    return Type.OBJECT if isinstance(value, Mapping) else Type.LIST


@dataclass(frozen=True, slots=True)
class Literal:
    """A value, or a list of values of one type, that stands in the condition."""

    value: Json
    type: Type

    def evaluate(self, run: Run) -> Json:
        return self.value


@dataclass(frozen=True, slots=True)
class Fact:
    """A value looked up by name: `call.path`, `session.calls`. It must be there."""

    path: tuple[str, ...]
    type: Type

    def evaluate(self, run: Run) -> Json:
        try:
            return self.look_up(run)
        except KeyError:
            raise WhenError("when.missing", f"there is no {'.'.join(self.path)}") from None

    def look_up(self, run: Run) -> Json:
        """Return the value; KeyError where it is missing.

        WhenError where a step has no members, or one that may be taken for the one that is meant.
        """
        value: Json = run.facts
        for depth, name in enumerate(self.path):
            if not _is_mapping(value):
                raise WhenError("when.type", f"{'.'.join(self.path)} leads through a plain value")
            # The names of arguments themselves are compared where a Call becomes a Document.
            if depth >= _WITHIN_ARGUMENT:
                _refuse_namesake(run, value, name)
            value = value[name]
        return value


@dataclass(frozen=True, slots=True)
class Default:
    """`default(FACT, LITERAL)`: the literal where the fact is missing. `null` is not missing."""

    fact: Fact
    literal: Literal

    @property
    def type(self) -> Type:
        """Tell what is known of both."""
        return self.fact.type

    def evaluate(self, run: Run) -> Json:
        try:
            return self.fact.look_up(run)
        except KeyError:
            return self.literal.value


@dataclass(frozen=True, slots=True)
class Length:
    """`len(…)`: characters of a text, items of a list, members of an object."""

    operand: Node
    type: Type = Type.NUMBER

    def evaluate(self, run: Run) -> Json:
        value = self.operand.evaluate(run)
        if isinstance(value, str | Mapping) or _is_list(value):
            return len(value)
        raise WhenError("when.type", f"a {type_of(value)} has no length")


_ORDER: Final[Mapping[str, Callable[[int | float, int | float], bool]]] = MappingProxyType(
    {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
)
# Types whose values of the same type are all comparable; a float may be infinite.
_PLAIN: Final = frozenset({str, int, bool})
_SCALARS: Final = frozenset({Type.TEXT, Type.NUMBER, Type.BOOLEAN, Type.NULL})


@dataclass(frozen=True, slots=True)
class Compare:
    """`== != < <= > >=`. Values of unlike types are an error, never merely unequal."""

    sign: str
    left: Node
    right: Node
    type: Type = Type.BOOLEAN

    def evaluate(self, run: Run) -> Json:
        left, right = self.left.evaluate(run), self.right.evaluate(run)
        compare = _ORDER.get(self.sign)
        if compare is not None:
            return compare(_number(left), _number(right))
        # A written null asks whether the other is null, which no type is an error for.
        asks_null = Type.NULL in (self.left.type, self.right.type)
        same = (left is None and right is None) if asks_null else equal(left, right)
        return same if self.sign == "==" else not same


@dataclass(frozen=True, slots=True)
class Member:
    """`in` and `not in`: every element of the list is compared, so each must be of one type."""

    item: Node
    container: Node
    negated: bool
    type: Type = Type.BOOLEAN

    def evaluate(self, run: Run) -> Json:
        item, container = self.item.evaluate(run), self.container.evaluate(run)
        if not _is_list(container):
            raise WhenError("when.type", f"in looks into a list, not a {type_of(container)}")
        run.look(len(container))
        # A list, not a generator: `any` would stop before an element of another type.
        found = any([equal(item, element) for element in container])
        return found is not self.negated


@dataclass(frozen=True, slots=True)
class Not:
    """`not`."""

    operand: Node
    type: Type = Type.BOOLEAN

    def evaluate(self, run: Run) -> Json:
        return not truth(self.operand.evaluate(run))


@dataclass(frozen=True, slots=True)
class Joined:
    """`and` (``every``) or `or` of two or more. Every operand is evaluated; see above."""

    operands: tuple[Node, ...]
    every: bool
    type: Type = Type.BOOLEAN

    def evaluate(self, run: Run) -> Json:
        values = [truth(operand.evaluate(run)) for operand in self.operands]
        return all(values) if self.every else any(values)


def truth(value: Json) -> bool:
    """Return a boolean as it is; nothing else is true or false."""
    if value is True or value is False:
        return value
    raise WhenError("when.type", f"a {type_of(value)} is neither true nor false")


def equal(left: Json, right: Json) -> bool:
    """Compare two scalars of one type; WhenError for any others."""
    if type(left) is type(right) and type(left) in _PLAIN:
        return left == right
    one, other = type_of(left), type_of(right)
    if one is not other or one not in _SCALARS:
        raise WhenError("when.type", f"a {one} is not compared with a {other}")
    return left == right


def _refuse_namesake(run: Run, members: Mapping[str, Json], name: str) -> None:
    # Go's encoding/json takes `Amount` for `amount` (https://pkg.go.dev/encoding/json#Unmarshal),
    # so where both may be meant, or only the other is there, nobody can say what a tool reads.
    run.look(len(members))
    read = name.casefold()
    if any(other != name and other.casefold() == read for other in members):
        raise WhenError("when.ambiguous", f"a tool may take another member for {name}")


def _number(value: Json) -> int | float:
    if type(value) is int:
        return value
    if type_of(value) is not Type.NUMBER or not isinstance(value, int | float):
        raise WhenError("when.type", f"only numbers have an order, not a {type_of(value)}")
    return value


def _is_mapping(value: Json) -> TypeGuard[Mapping[str, Json]]:
    # Arguments are plain dicts; asking for the abstract class takes longer.
    return type(value) is dict or isinstance(value, Mapping)


def _is_list(value: Json) -> TypeGuard[Sequence[Json]]:
    return isinstance(value, list | tuple)
