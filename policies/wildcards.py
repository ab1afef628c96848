"""Policy matching: tool names with `*`, which stands for any part of one word between dots.

A grant by wildcard never covers our own tools: `*.read` in a file written for some server must
not hand out `fs.read`. A deny does.
"""

from __future__ import annotations

from dataclasses import dataclass

from .globs import Glob
from .signatures import BUILT_IN, RESERVED

# LIMIT: of one file. Every tool name that is new is held against all that are in force.
MAX_WILDCARDS = 128


@dataclass(frozen=True, slots=True)
class ToolPattern:
    """A compiled tool name with wildcards."""

    pattern: str

    def matches(self, tool: str) -> bool:
        """Tell whether a tool name matches. The time is linear, whatever the pattern."""
        return Glob(self.pattern, tuple(self.pattern.split("."))).matches(tool.split("."))

    @property
    def ours(self) -> tuple[str, ...]:
        """The tools of ours that match."""
        return tuple(tool for tool in BUILT_IN if self.matches(tool))

    @property
    def only_ours(self) -> bool:
        """Tell whether every name that matches lies under our own prefixes."""
        return self.pattern.partition(".")[0] in RESERVED

    def names(self, first: str) -> bool:
        """Tell whether the pattern itself begins with this word."""
        return self.pattern.partition(".")[0] == first

    def overlaps(self, other: str) -> bool:
        """Tell whether some tool name matches both this and another pattern or name."""
        mine, theirs = self.pattern.split("."), other.split(".")
        return len(mine) == len(theirs) and all(
            _share(one, two) for one, two in zip(mine, theirs, strict=True)
        )


def is_wildcard(name: str) -> bool:
    """Tell whether the name of a tool in a policy stands for several."""
    return "*" in name


def is_ours(tool: str) -> bool:
    """Tell whether a tool name lies under our own prefixes, which no grant by wildcard covers."""
    return tool.partition(".")[0] in RESERVED


def compile_tool_pattern(pattern: str) -> ToolPattern:
    """Compile a tool name with wildcards; raise ValueError saying what is wrong with it."""
    if "**" in pattern:
        raise ValueError("has ** in it; * never crosses a dot, so write *.* for two words")
    return ToolPattern(pattern)


def _share(one: str, two: str) -> bool:
    """Tell whether some text matches both words.

    A bit for each part of ``two`` that agrees with what was read of ``one``, so that a step takes a
    few operations on whole integers: a file may make 8,128 pairs of long names.
    """
    places: dict[str, int] = {}
    for at, character in enumerate(two):
        places[character] = places.get(character, 0) | 1 << at
    stars = places.get("*", 0)
    every = (2 << len(two)) - 1
    # A star may stand for nothing, and no two are neighbours (compile_tool_pattern).
    reached = 1 | (stars & 1) << 1
    for character in one:
        if character == "*":
            # It stands for whatever the next parts of `two` do.
            reached = every & -(reached & -reached)
            continue
        reached = (reached & places.get(character, 0)) << 1 | reached & stars
        reached |= (reached & stars) << 1
    return bool(reached >> len(two))
