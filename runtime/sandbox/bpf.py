"""Step "sandbox": classic BPF as seccomp(2) reads it: made shorter, and run by hand.

What libseccomp exports names every system call in a jump of its own. Loading such a program is the
dearest part of starting a sandbox after its namespaces (the kernel checks, translates and compiles
it, and tries it with every system call number), so here runs of numbers that end alike become one
comparison. No rule is added, dropped or changed: the new program returns for every input what
the old one returns, which the tests hold one against the other.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

# linux/bpf_common.h: the instructions that libseccomp emits.
_LOAD, _AND, _JUMP = 0x20, 0x54, 0x05
RETURN = 0x06
_JUMP_EQUAL, _JUMP_GREATER, _JUMP_NOT_LESS, _JUMP_ANY = 0x15, 0x25, 0x35, 0x45
_COMPARISONS = frozenset([_JUMP_EQUAL, _JUMP_GREATER, _JUMP_NOT_LESS, _JUMP_ANY])
_INSTRUCTION = struct.Struct("=HBBI")
_WORD, _ALL = struct.Struct("=I"), 0xFFFF_FFFF
# LIMIT: a conditional jump reaches 255 instructions; what is further is reached in two steps.
_REACH = 248
# LIMIT: single numbers compared one after the other before a tree of comparisons is better.
_CHAIN = 5


class Unsupported(ValueError):
    """The program holds an instruction that libseccomp was never seen to emit."""


class Instruction(NamedTuple):
    """``struct sock_filter``."""

    code: int
    yes: int
    no: int
    value: int


class _Field(NamedTuple):
    """What a comparison looks at: a word of ``struct seccomp_data``, and which bits of it."""

    offset: int
    mask: int


class _Return(NamedTuple):
    action: int


class _Switch(NamedTuple):
    """Which node follows, by ranges of a field: (first value, node) in ascending order."""

    field: _Field
    ranges: tuple[tuple[int, int], ...]


_Node: TypeAlias = _Return | _Switch
_State: TypeAlias = tuple[int, _Field | None]


def decode(program: bytes) -> list[Instruction]:
    """Return the instructions of a program in native byte order."""
    return [Instruction(*fields) for fields in _INSTRUCTION.iter_unpack(program)]


def encode(instructions: Sequence[Instruction]) -> bytes:
    """Return instructions as ``struct sock_filter[]`` in native byte order."""
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


def execute(instructions: Sequence[Instruction], data: bytes) -> int:
    """Return what a program returns for a ``struct seccomp_data``, as the kernel would run it."""
    index = accumulator = 0
    for _ in instructions:  # LIMIT: jumps only lead forward
        code, yes, no, value = instructions[index]
        index += 1
        if code == RETURN:
            return value
        if code == _LOAD:
            (accumulator,) = _WORD.unpack_from(data, value)
        elif code == _AND:
            accumulator &= value
        elif code == _JUMP:
            index += value
        else:
            index += yes if _holds(code, accumulator, value) else no
    raise Unsupported("the program does not return")


def _holds(code: int, accumulator: int, value: int) -> bool:
    if code == _JUMP_EQUAL:
        return accumulator == value
    if code == _JUMP_GREATER:
        return accumulator > value
    if code == _JUMP_NOT_LESS:
        return accumulator >= value
    if code == _JUMP_ANY:
        return accumulator & value != 0
    raise Unsupported(f"instruction {code:#x}")


def shorten(program: bytes) -> bytes:
    """Return a program that returns the same for every input in fewer instructions.

    A program with unknown instructions is returned as it is.
    """
    try:
        graph = _Graph(decode(program))
    except Unsupported:
        return program
    shorter = _Assembler(graph).assemble()
    return shorter if len(shorter) < len(program) else program


class _Graph:
    """A program as what it decides: switches over fields, ending in actions. Equal nodes are one.

    ``nodes`` holds each node after those it leads to; ``root`` is the one to start at.
    """

    def __init__(self, program: Sequence[Instruction]) -> None:
        self._program = program
        self.nodes: list[_Node] = []
        self._numbers: dict[_Node, int] = {}
        self._found: dict[_State, int] = {}
        # Jumps lead forward, so what a state leads to is known when it is looked at from the end.
        for state in sorted(self._states(), key=lambda state: state[0], reverse=True):
            self._found[state] = self._node(state)
        self.root = self._found[0, None]

    def _states(self) -> set[_State]:
        """Find what the accumulator may hold at each instruction."""
        waiting: list[_State] = [(0, None)]
        states: set[_State] = set()
        while waiting:
            state = waiting.pop()
            if state not in states:
                states.add(state)
                waiting += self._following(state)
        return states

    def _following(self, state: _State) -> list[_State]:
        index, field = state
        if index >= len(self._program):
            raise Unsupported("the program does not return")
        code, yes, no, value = self._program[index]
        if code == RETURN:
            return []
        if code == _LOAD:
            return [(index + 1, _Field(value, _ALL))]
        if code == _JUMP:
            return [(index + 1 + value, field)]
        if field is None:
            raise Unsupported("nothing was loaded")
        if code == _AND:
            return [(index + 1, _Field(field.offset, field.mask & value))]
        if code in _COMPARISONS:
            return [(index + 1 + yes, field), (index + 1 + no, field)]
        raise Unsupported(f"instruction {code:#x}")

    def _node(self, state: _State) -> int:
        index, field = state
        code, _, _, value = self._program[index]
        if code == RETURN:
            return self._number(_Return(value))
        following = [self._found[item] for item in self._following(state)]
        if field is None or code not in _COMPARISONS:
            return following[0]
        yes, no = following
        if code == _JUMP_ANY:
            return self._switch(_Field(field.offset, field.mask & value), [(0, no), (1, yes)])
        if code == _JUMP_EQUAL:
            ranges = [(0, no), (value, yes), (value + 1, no)]
        else:
            ranges = [(0, no), (value + (code == _JUMP_GREATER), yes)]
        return self._switch(field, ranges)

    def _switch(self, field: _Field, ranges: Sequence[tuple[int, int]]) -> int:
        """Number a switch; what a range leads to is taken in where it looks at the same field."""
        if field.mask == 0:
            return self._at(ranges, 0)
        joined: list[tuple[int, int]] = []
        for place, (start, node) in enumerate(ranges):
            end = ranges[place + 1][0] if place + 1 < len(ranges) else _ALL + 1
            for first, target in self._within(field, node, start, end):
                if not joined or joined[-1][1] != target:
                    joined.append((first, target))
        return joined[0][1] if len(joined) == 1 else self._number(_Switch(field, tuple(joined)))

    def _within(self, field: _Field, node: int, start: int, end: int) -> list[tuple[int, int]]:
        """Return the ranges of a node between two values, ``end`` not included."""
        if start >= end:
            return []
        switch = self.nodes[node]
        if isinstance(switch, _Return) or switch.field != field:
            return [(start, node)]
        inside = [item for item in switch.ranges if start < item[0] < end]
        return [(start, self._at(switch.ranges, start)), *inside]

    @staticmethod
    def _at(ranges: Sequence[tuple[int, int]], value: int) -> int:
        return [node for start, node in ranges if start <= value][-1]

    def _number(self, node: _Node) -> int:
        if node not in self._numbers:
            self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return self._numbers[node]


class _Assembler:
    """Writes a graph as instructions from the last to the first, so every jump's end is known.

    A place is a number of instructions from the end.
    """

    def __init__(self, graph: _Graph) -> None:
        self._graph = graph
        self._backwards: list[Instruction] = []
        self._places: dict[int, int] = {}

    def assemble(self) -> bytes:
        for number in sorted(self._needed()):
            node = self._graph.nodes[number]
            if isinstance(node, _Return):
                self._places[number] = self._put(Instruction(RETURN, 0, 0, node.action))
            else:
                self._places[number] = self._write(node)
        return encode(self._backwards[::-1])

    def _needed(self) -> set[int]:
        needed: set[int] = set()
        waiting = [self._graph.root]
        while waiting:
            number = waiting.pop()
            node = self._graph.nodes[number]
            if number not in needed and isinstance(node, _Switch):
                waiting += [target for _, target in node.ranges]
            needed.add(number)
        return needed

    def _write(self, switch: _Switch) -> int:
        self._tree(switch.ranges, self._places)
        if switch.field.mask != _ALL:
            self._put(Instruction(_AND, 0, 0, switch.field.mask))
        return self._put(Instruction(_LOAD, 0, 0, switch.field.offset))

    def _tree(self, ranges: Sequence[tuple[int, int]], places: Mapping[int, int]) -> int:
        """Write the comparisons of a switch, the first of them last; return its place."""
        singles, rest = _singles(ranges)
        if len(rest) > 2 or len(singles) > _CHAIN:
            # Split where no single value is torn from the range around it.
            starts = [start for start, _ in (rest if len(rest) > 2 else ranges)]
            middle = [start for start, _ in ranges].index(starts[len(starts) // 2])
            above = self._tree(ranges[middle:], places)
            below = self._tree(ranges[:middle], places)
            return self._compare(_JUMP_NOT_LESS, ranges[middle][0], above, below)
        place = places[rest[0][1]]
        if len(rest) == 2:
            above = places[rest[1][1]]
            place = self._compare(_JUMP_NOT_LESS, rest[1][0], above, place)
        for value, target in reversed(singles):
            place = self._compare(_JUMP_EQUAL, value, places[target], place)
        return place

    def _compare(self, code: int, value: int, yes: int, no: int) -> int:
        yes, no = self._near(yes), self._near(no)
        here = len(self._backwards)
        return self._put(Instruction(code, here - yes - 1, here - no - 1, value))

    def _near(self, place: int) -> int:
        """Return a place that a conditional jump reaches and that leads to the given one."""
        distance = len(self._backwards) - place
        if distance <= _REACH:
            return place
        there = self._backwards[place]
        return self._put(there if there.code == RETURN else Instruction(_JUMP, 0, 0, distance - 1))

    def _put(self, instruction: Instruction) -> int:
        self._backwards.append(instruction)
        return len(self._backwards) - 1


def _singles(
    ranges: Sequence[tuple[int, int]],
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Split ranges into single values that lie in another range, and what is left without them."""
    singles: list[tuple[int, int]] = []
    rest: list[tuple[int, int]] = []
    for place, (start, node) in enumerate(ranges):
        follows = place + 1 < len(ranges) and ranges[place + 1]
        if rest and rest[-1][1] == node:
            continue
        if rest and follows and follows[0] == start + 1 and follows[1] == rest[-1][1]:
            singles.append((start, node))
        else:
            rest.append((start, node))
    return singles, rest
