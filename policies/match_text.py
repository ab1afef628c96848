"""Policy matching: texts by regular expression, hosts, mail addresses, and exceptions from them.

A matcher is compiled for what it is used for. Where it *grants* (allow) it matches only what
surely is meant; where it *restricts* (ask, deny) it matches whatever may be meant. `restricts`
says so; the matcher after `not` has the opposite sense of the one it stands beside.
INVARIANT: what the granting form matches, the restricting form matches too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from safeconduct.call import Json

from .host_table import HostTable, table_of
from .hosts import EmailPattern, HostPattern, compile_email, compile_host
from .match import Argv, Matcher, spell
from .signatures import Kind
from .work import HOST_STEPS, spend

MAX_REGEX_CHARACTERS: Final = 1024
# LIMIT: instructions of the compiled program, either direction. A class such as \pL has 1,200.
MAX_PROGRAM: Final = 16_000
# LIMIT: memory of one program and its lazily built automaton.
MAX_REGEX_MEMORY: Final = 2 << 20
# LIMIT: instructions times bytes of text. RE2 takes 1 to 3 ns each where its automaton does not
# fit into the memory and it walks all states at once, so this is under a second.
MAX_WORK: Final = 1 << 28
# A program that matches nothing is one instruction, which fails.
_NEVER: Final = 1
# What a class of Unicode takes to compile, as many steps as 0.1 ms, although it may come to nothing
# (`(?i)[\pL\PL]`). So may what is repeated and then dropped: `(a{1000}){0}`.
_CLASS_STEPS: Final = 256
_CLASS = re.compile(r"\\[pP]")
_REPEATED = re.compile(r"\{([0-9]{1,4})(?:,([0-9]{0,4}))?\}")
# `\C` is one byte, perhaps of a longer character.
_BYTE = re.compile(r"(?<!\\)(?:\\\\)*\\C")


class Program(Protocol):
    """A compiled pattern of RE2."""

    @property
    def programsize(self) -> int:
        """The instructions of the program."""
        ...

    def fullmatch(self, text: bytes) -> object | None:
        """Match the whole text; None where it does not match."""
        ...


@dataclass(frozen=True, slots=True)
class Regex:
    """`regex`: the whole text matches one of the patterns, in time linear in the text.

    `.` is any character but a line feed where it grants, and any character where it
    restricts: a deny of `.*secret.*` must not end at the first line. What cannot be judged, a
    text too long for the pattern or one that is not Unicode, does not match where it grants and
    matches where it restricts.
    """

    patterns: tuple[str, ...]
    restricts: bool = False
    programs: tuple[Program, ...] = field(default=(), compare=False, repr=False)
    kind: Kind = Kind.TEXT

    def matches(self, value: Json) -> bool:
        if not isinstance(value, str):
            return False
        try:
            text = value.encode()
        except UnicodeEncodeError:
            return self.restricts
        size = len(text)
        for program in self.programs:
            steps = program.programsize * size
            if steps > MAX_WORK:
                if self.restricts:
                    return True
                continue
            spend(steps)
            if program.fullmatch(text) is not None:
                return True
        return False

    @property
    def effort(self) -> int:
        """What it took to compile the patterns, in steps of programs."""
        together = zip(self.patterns, self.programs, strict=True)
        return sum(_effort(pattern, program.programsize) for pattern, program in together)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(spell(pattern) for pattern in self.patterns)

    def describe(self) -> str:
        return f"a text that is all of the pattern {' or '.join(self.words)}"


def _effort(pattern: str, steps: int) -> int:
    repeated = sum(int(most or least) for least, most in _REPEATED.findall(pattern))
    return max(steps, repeated) + _CLASS_STEPS * len(_CLASS.findall(pattern))


def compile_regex(patterns: str | Sequence[str], *, restricts: bool = False) -> Regex:
    """Compile one or several patterns of RE2; raise ValueError saying what is wrong."""
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not listed:
        raise ValueError("an empty list never matches")
    programs = tuple(_compile(pattern, restricts=restricts) for pattern in listed)
    return Regex(listed, restricts, programs)


def _compile(pattern: str, *, restricts: bool) -> Program:
    # Loading RE2 takes 8 ms, which a policy without expressions does not pay.
    import re2

    if not 0 < len(pattern) <= MAX_REGEX_CHARACTERS:
        raise ValueError(f"must have 1 to {MAX_REGEX_CHARACTERS} characters")
    if _BYTE.search(pattern):
        raise ValueError(r"has \C, which is a part of a character")
    options = re2.Options()
    options.max_mem = MAX_REGEX_MEMORY
    options.log_errors = False
    options.never_capture = True
    options.dot_nl = restricts
    try:
        program = re2.compile(pattern.encode(), options)
    except UnicodeEncodeError as error:
        raise ValueError("is not Unicode") from error
    except re2.error as error:
        reason = error.args[0] if error.args else "refused"
        said = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"is not a pattern of RE2: {said}") from error
    if program.programsize == _NEVER:
        raise ValueError("matches no text at all")
    backward = program.reverseprogramsize
    # RE2 gives -1 for a program that did not fit into the memory.
    if backward < 0 or max(program.programsize, backward) > MAX_PROGRAM:
        raise ValueError(f"becomes more than {MAX_PROGRAM} steps; use smaller repetitions")
    return program


@dataclass(frozen=True, slots=True)
class Host:
    """`host`: the canonical host matches a pattern; no patterns are any valid host."""

    patterns: tuple[HostPattern, ...] = ()
    kind: Kind = Kind.HOST
    _table: HostTable[HostPattern] | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        table = table_of([(pattern.labels, pattern) for pattern in self.patterns])
        object.__setattr__(self, "_table", table)

    def matches(self, value: Json) -> bool:
        if not isinstance(value, str):
            return False
        if not self.patterns:
            return True
        found = self.patterns if self._table is None else self._table.find(value)
        spend(len(found) * HOST_STEPS)
        return any(pattern.covers(value) for pattern in found)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(spell(pattern.pattern) for pattern in self.patterns)

    def describe(self) -> str:
        return f"a host in {', '.join(self.words)}" if self.patterns else "any host"


@dataclass(frozen=True, slots=True)
class Email:
    """`email`: the canonical address matches a pattern; no patterns are any valid address."""

    patterns: tuple[EmailPattern, ...] = ()
    kind: Kind = Kind.EMAIL

    def matches(self, value: Json) -> bool:
        if not isinstance(value, str):
            return False
        local, at, host = value.partition("@")
        if not at:
            return False
        spend(len(self.patterns) * HOST_STEPS)
        return not self.patterns or any(x.covers(local, host) for x in self.patterns)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(spell(pattern.pattern) for pattern in self.patterns)

    def describe(self) -> str:
        return f"an address in {', '.join(self.words)}" if self.patterns else "any mail address"


def host_matcher(patterns: Sequence[str]) -> Host:
    """Compile host patterns; raise ValueError for a wrong one. An empty list is `host: any`."""
    return Host(tuple(compile_host(pattern) for pattern in patterns))


def email_matcher(patterns: Sequence[str]) -> Email:
    """Compile address patterns; raise ValueError for a wrong one. An empty list is `email: any`."""
    return Email(tuple(compile_email(pattern) for pattern in patterns))


@dataclass(frozen=True, slots=True)
class Excluding:
    """A matcher with `not` beside it: what ``base`` matches and ``exclude`` does not.

    INVARIANT: ``exclude`` was compiled with the opposite sense of ``base``, so a doubt about
    the exception is a doubt about the whole.
    """

    base: Matcher
    exclude: Matcher

    @property
    def kind(self) -> Kind:
        """What the argument must be: what ``base`` says."""
        return self.base.kind

    @property
    def whole(self) -> bool:
        """Whether a list is judged as one value, not element by element."""
        return isinstance(self.base, Argv) or bool(getattr(self.base, "whole", False))

    def matches(self, value: Json) -> bool:
        return self.base.matches(value) and not self.exclude.matches(value)

    @property
    def words(self) -> tuple[str, ...]:
        return self.base.words

    def describe(self) -> str:
        return f"{self.base.describe()}, but not {self.exclude.describe()}"
