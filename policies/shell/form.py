"""Step 2, shell text: what a text is read into, and its one spelling for people and records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

_PLAIN: Final = re.compile(r"[A-Za-z0-9_@%+=:,./-]+", re.ASCII)


class Join(StrEnum):
    """What stands between two commands. A line's end is `;`."""

    FIRST = ""
    THEN = ";"
    AND = "&&"
    OR = "||"
    PIPE = "|"


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """`<`, `>` or `>>` of a descriptor to a path as written, or `>&` to a descriptor."""

    descriptor: int
    operator: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Simple:
    """One simple command, and what joins it to the one before it."""

    join: Join
    argv: tuple[str, ...]
    redirects: tuple[Redirect, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShellText:
    """A whole text. ``folder`` is that of a leading `cd FOLDER &&`, which holds for all of it."""

    commands: tuple[Simple, ...]
    folder: str | None = None


def write_shell(commands: Sequence[Simple]) -> str:
    """Write commands in the one spelling that is shown and recorded; reading it gives them."""
    return "".join(_shown_join(command.join) + _shown(command) for command in commands)


def _shown_join(join: Join) -> str:
    return {Join.FIRST: "", Join.THEN: "; "}.get(join, f" {join} ")


def _shown(command: Simple) -> str:
    words = [quote(word) for word in command.argv]
    for redirect in command.redirects:
        implied = redirect.descriptor == (0 if redirect.operator == "<" else 1)
        operator = ("" if implied else str(redirect.descriptor)) + redirect.operator
        if redirect.operator == ">&":
            words.append(operator + redirect.target)
        else:
            words.append(f"{operator} {quote(redirect.target)}")
    return " ".join(words)


def quote(word: str) -> str:
    """Write one word so that any shell reads it back."""
    return word if _PLAIN.fullmatch(word) else "'" + word.replace("'", "'\\''") + "'"
