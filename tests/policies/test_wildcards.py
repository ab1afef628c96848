"""Names of tools with `*`: which of them some name has in common, however long they are."""

from __future__ import annotations

import itertools
import re
import time

import pytest

from safeconduct.policies.wildcards import compile_tool_pattern

WORDS = ["".join(word) for size in range(1, 5) for word in itertools.product("ab*", repeat=size)]
PATTERNS = [word for word in WORDS if "**" not in word]
NAMES = ["".join(word) for size in range(9) for word in itertools.product("ab", repeat=size)]
# What bit by bit takes 0.05 s took 5 s place by place.
SECONDS_MAX = 1.0


@pytest.mark.parametrize("one", PATTERNS)
def test_two_patterns_overlap_where_some_name_has_both(one: str) -> None:
    # Two of at most four characters that share a name share one of at most eight.
    compiled = compile_tool_pattern(one)
    mine = {name for name in NAMES if _fits(one, name)}
    for other in PATTERNS:
        shared = any(_fits(other, name) for name in mine)
        assert compiled.overlaps(other) is shared, other


def test_many_long_patterns_are_soon_compared() -> None:
    names = [f"{'a*' * 55}{at:03d}" for at in range(128)]
    started = time.process_time()
    for one, other in itertools.combinations(names, 2):
        assert not compile_tool_pattern(one).overlaps(other)
    assert time.process_time() - started < SECONDS_MAX


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern.replace("*", ".*"), name) is not None
