"""Policy matching: what one argument may be. Pure, bounded, precompiled; no I/O.

A matcher sees one canonical value. Whether a list is judged whole or element by element is
the rule's business (`rules.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from safeconduct.call import Json

from .globs import Glob, walk_steps
from .signatures import Kind
from .work import spend

# LIMIT: more digits than any 64-bit number; parsing stays linear.
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,18})", re.ASCII)
# A number in a spelling of JSON that `scalar_text` does not write. LIMIT: longer than any double.
_NUMBER = re.compile(
    r"(?=.{1,32}\Z)(?:-0|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+))",
    re.ASCII,
)
# Words that cannot be taken for a list, a wildcard or the end of one.
_PLAIN = re.compile(r"(?!any\Z|\.\.\.\Z)[^\s,\"'{}\[\]]+")


class Matcher(Protocol):
    """What one argument may be."""

    @property
    def kind(self) -> Kind:
        """What the argument must be for this to make sense."""
        ...

    def matches(self, value: Json) -> bool:
        """Tell whether the canonical value matches."""
        ...

    @property
    def words(self) -> tuple[str, ...]:
        """Return every pattern or text that is listed, as `spell` writes them."""
        ...

    def describe(self) -> str:
        """Say what would match, in full: a person agrees to what this says."""
        ...


def _all_match(elements: Sequence[str | Callable[[str], bool]], words: Sequence[Json]) -> bool:
    for element, word in zip(elements, words, strict=False):
        if not isinstance(word, str):
            return False
        if element != word if isinstance(element, str) else not element(word):
            return False
    return True


def parse_integer(text: str) -> int | None:
    """Parse the one spelling of an integer; None for any other text."""
    return int(text) if _INTEGER.fullmatch(text) else None


def spell(word: str) -> str:
    """Write a word of a policy so that no other word, nor two of them, look the same."""
    return word if _PLAIN.fullmatch(word) else json.dumps(word, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class AnyValue:
    """`any`: whatever the signature admits."""

    kind: Kind = Kind.JSON

    def matches(self, value: Json) -> bool:
        return True

    @property
    def words(self) -> tuple[str, ...]:
        return ()

    def describe(self) -> str:
        return "any value"


@dataclass(frozen=True, slots=True)
class PathMatcher:
    """`path`: one of the patterns matches the real path of the object.

    Whole folders and literal paths, which are most patterns, are answered without a walk.
    """

    patterns: tuple[str, ...]
    exact: frozenset[str]
    folders: tuple[str, ...]
    globs: tuple[Glob, ...]
    kind: Kind = Kind.PATH
    _steps: tuple[int, int] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_steps", walk_steps(self.globs) if self.globs else (0, 0))

    def matches(self, value: Json) -> bool:
        if not isinstance(value, str) or not value.startswith("/"):
            return False
        # With the slash a folder itself begins as what it holds does.
        if value in self.exact or f"{value}/".startswith(self.folders):
            return True
        if not self.globs:
            return False
        components = value[1:].split("/")
        by_component, by_character = self._steps
        spend(by_component * len(components) + by_character * len(value))
        return any(glob.matches(components) for glob in self.globs)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(spell(pattern) for pattern in self.patterns)

    def describe(self) -> str:
        return f"a path in {', '.join(self.words)}"


def path_matcher(globs: Sequence[Glob]) -> PathMatcher:
    """Sort the patterns by the cheapest way to answer them."""
    exact: set[str] = set()
    folders: list[str] = []
    walked: list[Glob] = []
    for glob in globs:
        if glob.literal is not None:
            exact.add(glob.literal)
        elif glob.folder is not None:
            folders.append(glob.folder.rstrip("/") + "/")
        else:
            walked.append(glob)
    patterns = tuple(glob.pattern for glob in globs)
    return PathMatcher(patterns, frozenset(exact), tuple(folders), tuple(walked))


@dataclass(frozen=True, slots=True)
class Literals:
    """`in` or a bare list: the value is one of the texts, or the number, boolean it spells."""

    texts: frozenset[str]

    def matches(self, value: Json) -> bool:
        text = scalar_text(value)
        return text is not None and text in self.texts

    @property
    def kind(self) -> Kind:
        """What it takes an argument for."""
        return Kind.SCALAR

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(spell(text) for text in sorted(self.texts))

    def describe(self) -> str:
        return f"one of {', '.join(self.words)}"


def scalar_text(value: Json) -> str | None:
    """Spell a scalar the way a policy writes it: `true`, `3`, `text`; 3.0 is `3`."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    return "null" if value is None else None


def with_numbers(texts: frozenset[str]) -> frozenset[str]:
    """Add what a Call's number is spelled as where a text writes it in another way: 1.0 is `1`."""
    numbers = (float(text) for text in texts if _NUMBER.fullmatch(text))
    spelled = {scalar_text(number) for number in numbers if math.isfinite(number)}
    return texts | {text for text in spelled if text is not None}


@dataclass(frozen=True, slots=True)
class NumberRange:
    """`range`: an integer between the two ends, both included.

    Where it restricts, any number between them: a tool may round it to one.
    """

    low: int
    high: int
    restricts: bool = False
    kind: Kind = Kind.NUMBER

    def matches(self, value: Json) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not self.low <= value <= self.high:
            return False
        return self.restricts or type(value) is int or float(value).is_integer()

    @property
    def words(self) -> tuple[str, ...]:
        return ()

    def describe(self) -> str:
        return f"a number from {self.low} to {self.high}"


@dataclass(frozen=True, slots=True)
class TextLength:
    """`text`: any text of at most so many bytes of UTF-8."""

    max_bytes: int
    kind: Kind = Kind.TEXT

    def matches(self, value: Json) -> bool:
        return isinstance(value, str) and len(value.encode("utf-8", "replace")) <= self.max_bytes

    @property
    def words(self) -> tuple[str, ...]:
        return ()

    def describe(self) -> str:
        return f"a text of at most {self.max_bytes} bytes"


@dataclass(frozen=True, slots=True)
class SpelledNumber:
    """An argv element that spells a number in a range.

    Where it restricts, any other word with a digit in it too: programs read `-05`, `0x5`, `5 `.
    """

    range: NumberRange

    def matches(self, word: str) -> bool:
        number = parse_integer(word)
        if number is None:
            return self.range.restricts and any(map(str.isnumeric, word))
        return self.range.matches(number)


@dataclass(frozen=True, slots=True)
class SpelledPath:
    """An argv element that spells a path in the patterns, relative to the workspace.

    This judges the spelling, not the object: what the program opens is bounded by its
    profile alone. `..` and leading `-` never match.
    """

    paths: PathMatcher
    workspace: str

    def matches(self, word: str) -> bool:
        if not word or word.startswith("-") or "\0" in word:
            return False
        components = word.removeprefix("/").split("/")
        if not {"", ".", ".."}.isdisjoint(components):
            return False
        return self.paths.matches(word if word.startswith("/") else f"{self.workspace}/{word}")


@dataclass(frozen=True, slots=True)
class Argv:
    """`argv`: a list that matches element by element; ``rest`` is a final `...`.

    A literal element is a plain text, so that the common case is one comparison. ``shown`` holds
    the elements as they are described.
    """

    elements: tuple[str | Callable[[str], bool], ...]
    rest: bool
    shown: tuple[str, ...]
    judges_spelling: bool = False
    kind: Kind = Kind.ARGV

    def matches(self, value: Json) -> bool:
        # Not `Sequence`: a question about an abstract type takes as long as all the rest.
        if not isinstance(value, (list, tuple)):
            return False
        # Not by `cast`, which is a call.
        words: Sequence[Json] = value
        elements = self.elements
        count = len(elements)
        # All literal: one comparison instead of one for each word.
        if self.shown is elements:
            if tuple(words[:count]) != elements:
                return False
        elif len(words) < count or not _all_match(elements, words):
            return False
        if len(words) == count:
            return True
        if not self.rest:
            return False
        for word in words[count:]:  # noqa: SIM110 a generator takes three times as long
            if not isinstance(word, str):
                return False
        return True

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.shown, "...") if self.rest else self.shown

    def describe(self) -> str:
        return f"argv [{', '.join(self.words)}]"

    @property
    def programs(self) -> frozenset[str]:
        """The programs this names literally."""
        first = self.elements[0] if self.elements else None
        return frozenset({first}) if isinstance(first, str) else frozenset()
