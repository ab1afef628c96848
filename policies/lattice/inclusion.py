"""Policy lattice: what sets of glob patterns have in common, answered exactly or not at all.

A pattern is a regular language over components, so "does every path of these lie in those" is
decided by walking all patterns at once, character by character. The walk ends with a path as
proof, with the proof that there is none, or at a bound: then nobody may rely on the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, TypeAlias

# LIMIT: states of one walk, and steps of single states. Patterns that people write need tens to
# hundreds of states; those that are made to cost would need millions.
MAX_STATES: Final = 4_000
MAX_STEPS: Final = 400_000
# LIMIT: components of all patterns of one walk together; a longer list is not walked.
MAX_TOTAL: Final = 2_000
# LIMIT: steps that one language remembers.
MAX_REMEMBERED: Final = 20_000
_SEPARATOR: Final = "/"
_FILLERS: Final = "xyzabcdefghijklmnopqrstuvw0123456789_"

Components: TypeAlias = tuple[str, ...]
_State: TypeAlias = tuple[int, int, int]
_States: TypeAlias = frozenset[_State]
# The column of a state that stands in `**` instead of in a component.
_ANYTHING: Final = -1


@dataclass(frozen=True, slots=True)
class Answer:
    """What a walk found. ``sure`` is False where it ended at a bound."""

    example: Components | None
    sure: bool = True

    @property
    def none(self) -> bool:
        """Tell whether there surely is no such path."""
        return self.sure and self.example is None


class Effort:
    """How many steps several comparisons may still take together; a million are about 0.2 s."""

    def __init__(self, steps: int) -> None:
        self.left = steps


_EFFORT: Final[ContextVar[Effort | None]] = ContextVar("effort", default=None)


@contextmanager
def bounded(effort: Effort) -> Generator[None]:
    """Let all comparisons inside share an effort; when it is spent, no answer is sure any more.

    A policy may be made to cost: whoever compares the rules of one that nobody trusts bounds it.
    """
    token = _EFFORT.set(effort)
    try:
        yield
    finally:
        _EFFORT.reset(token)


def afford(steps: int) -> bool:
    """Take some steps off the effort that is bounded here, if any; False where it is spent."""
    effort = _EFFORT.get()
    if effort is None:
        return True
    effort.left -= steps
    return effort.left >= 0


class Language:
    """The union of some patterns, each a tuple of components as `Glob` holds them."""

    def __init__(self, patterns: Iterable[Components]) -> None:
        self.patterns = tuple(dict.fromkeys(patterns))
        self._tokens = tuple(
            tuple(_tokens(component) for component in pattern) for pattern in self.patterns
        )
        self._steps: dict[tuple[_States, str], _States] = {}

    @property
    def size(self) -> int:
        """How many components all patterns have together."""
        return sum(len(pattern) for pattern in self.patterns)

    @property
    def letters(self) -> set[str]:
        """Return the characters that stand for themselves."""
        return {
            letter
            for pattern in self.patterns
            for component in pattern
            for letter in component
            if letter not in "*?"
        }

    def start(self) -> _States:
        """Return the states before the first component."""
        return frozenset(
            state for which in range(len(self.patterns)) for state in self._begin(which, 0)
        )

    def step(self, states: _States, letter: str) -> _States:
        """Return the states after one more character."""
        key = (states, letter)
        if key not in self._steps:
            if len(self._steps) >= MAX_REMEMBERED:
                self._steps.clear()
            self._steps[key] = frozenset(
                after for state in states for after in self._after(state, letter)
            )
        return self._steps[key]

    def accepts(self, states: _States) -> bool:
        """Tell whether a path may end here."""
        return any(self._ends(*state) for state in states)

    def _begin(self, which: int, row: int) -> set[_State]:
        """Return the states in which a component begins that component ``row`` may match."""
        pattern, found = self.patterns[which], set[_State]()
        while row < len(pattern) and pattern[row] == "**":
            found.add((which, row, _ANYTHING))
            row += 1
        if row < len(pattern):
            found |= self._at(which, row, 0)
        return found

    def _at(self, which: int, row: int, column: int) -> set[_State]:
        found = {(which, row, column)}
        tokens = self._tokens[which][row]
        while column < len(tokens) and tokens[column] == "*":
            column += 1
            found.add((which, row, column))
        return found

    def _after(self, state: _State, letter: str) -> set[_State]:
        which, row, column = state
        if column == _ANYTHING:
            return self._begin(which, row) if letter == _SEPARATOR else {state}
        tokens = self._tokens[which][row]
        if letter == _SEPARATOR:
            return self._begin(which, row + 1) if column == len(tokens) else set()
        if column == len(tokens):
            return set()
        if tokens[column] == "*":
            return self._at(which, row, column)
        matches = tokens[column] in ("?", letter)
        return self._at(which, row, column + 1) if matches else set()

    def _ends(self, which: int, row: int, column: int) -> bool:
        if column not in (_ANYTHING, len(self._tokens[which][row])):
            return False
        return all(rest == "**" for rest in self.patterns[which][row + 1 :])


def _tokens(component: str) -> str:
    # `*` alone stands for a name, so it needs one character (globs.py).
    return "?*" if component == "*" else component


def search(
    musts: Sequence[Language], nots: Sequence[Language], *, empty_names: bool = False
) -> Answer:
    """Find a shortest path that lies in every one of ``musts`` and in none of ``nots``.

    ``empty_names``: components may be empty, as in URLs; else only `/` itself has one.
    """
    languages = (*musts, *nots)
    if sum(language.size for language in languages) > MAX_TOTAL:
        return Answer(None, sure=False)
    letters = set[str]().union(*(language.letters for language in languages)) - {_SEPARATOR}
    walk = _Walk(languages, _alphabet(letters), needed=len(musts), empty_names=empty_names)
    for states, text in walk.paths():
        ends = empty_names or not text.endswith(_SEPARATOR)
        if ends and _is_found(states, musts, nots):
            return Answer(tuple(text.split(_SEPARATOR)))
    return Answer(None, sure=walk.complete)


def _alphabet(letters: set[str]) -> tuple[str, ...]:
    """Return the letters that make a difference, and one that stands for all others."""
    filler = next((letter for letter in _FILLERS if letter not in letters), "\uf8ff")
    return (filler, *sorted(letters), _SEPARATOR)


class _Walk:
    """Walk several languages at once, shortest paths first, each combination of states once."""

    def __init__(
        self,
        languages: Sequence[Language],
        alphabet: Sequence[str],
        *,
        needed: int = 0,
        empty_names: bool = False,
    ) -> None:
        self._languages, self._alphabet = languages, alphabet
        # So many of the first languages must still be able to accept.
        self._needed, self._empty_names = needed, empty_names
        self.complete = True
        self._steps = MAX_STEPS

    def paths(self) -> Iterator[tuple[tuple[_States, ...], str]]:
        """Yield states with the text that leads to them; ``complete`` tells if a bound ended it."""
        first = tuple(language.start() for language in self._languages)
        seen = {(first, True)}
        waiting = deque([(first, "")])
        while waiting:
            states, text = waiting.popleft()
            yield states, text
            if not self._spend(sum(map(len, states)) * len(self._alphabet)):
                return
            for letter in self._alphabet:
                after = self._after(states, text, letter)
                key = (after, letter == _SEPARATOR)
                if after is None or key in seen:
                    continue
                if len(seen) >= MAX_STATES:
                    self.complete = False
                    return
                seen.add((after, letter == _SEPARATOR))
                waiting.append((after, text + letter))

    def _spend(self, steps: int) -> bool:
        self._steps -= steps
        self.complete = afford(steps) and self._steps >= 0
        return self.complete

    def _after(
        self, states: Sequence[_States], text: str, letter: str
    ) -> tuple[_States, ...] | None:
        if letter == _SEPARATOR and not self._empty_names and text[-1:] in ("", _SEPARATOR):
            return None
        pairs = zip(self._languages, states, strict=True)
        after = tuple(language.step(one, letter) for language, one in pairs)
        return after if all(after[: self._needed]) else None


def _is_found(
    states: Sequence[_States], musts: Sequence[Language], nots: Sequence[Language]
) -> bool:
    inside = zip(musts, states, strict=False)
    outside = zip(nots, states[len(musts) :], strict=True)
    return all(language.accepts(one) for language, one in inside) and not any(
        language.accepts(one) for language, one in outside
    )


def classes(languages: Sequence[Language]) -> tuple[list[Components], bool]:
    """Return one shortest path for each way to lie in some of the languages and not in others.

    The second value tells whether there surely is no other way.
    """
    letters = set[str]().union(*(language.letters for language in languages)) - {_SEPARATOR}
    found: dict[tuple[bool, ...], Components] = {}
    walk = _Walk(languages, _alphabet(letters))
    for states, text in walk.paths():
        if text and not text.endswith(_SEPARATOR):
            vector = tuple(
                language.accepts(one) for language, one in zip(languages, states, strict=True)
            )
            found.setdefault(vector, tuple(text.split(_SEPARATOR)))
    return [*found.values()], walk.complete
