"""Policy step 2d: the text of a `when` condition becomes words. One pass, each word read once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

MAX_CHARACTERS: Final = 1024

_WORD = re.compile(
    r"""[ \t\n]*(?:
      (?P<number>-?(?:0|[1-9][0-9]{0,15})(?:\.[0-9]{1,15})?)(?![\w.])
    | (?P<text>"(?:[^"\\\x00-\x1f\x7f]|\\["\\])*"|'(?:[^'\\\x00-\x1f\x7f]|\\['\\])*')
    | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<sign>==|!=|<=|>=|[<>()\[\],.])
    | (?P<end>\Z)
    )""",
    re.ASCII | re.VERBOSE,
)


class WhenSyntaxError(ValueError):
    """A condition that is not one. ``position`` counts characters from 1."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"at character {position}: {message}")
        self.position = position


@dataclass(frozen=True, slots=True)
class Token:
    """A word of a condition. ``position`` counts characters from 1."""

    kind: str
    text: str
    position: int


def read_tokens(text: str) -> list[Token]:
    """Split a condition into words, the last of kind `end`; WhenSyntaxError where it has others."""
    if len(text) > MAX_CHARACTERS:
        raise WhenSyntaxError(f"a condition has at most {MAX_CHARACTERS} characters", 1)
    tokens: list[Token] = []
    at = 0
    while True:
        found = _WORD.match(text, at)
        kind = found.lastgroup if found else None
        if found is None or kind is None:
            start = at + len(text[at:]) - len(text[at:].lstrip(" \t\n"))
            raise WhenSyntaxError(f"cannot read {text[start : start + 10]!r}", start + 1)
        tokens.append(Token(kind, found[kind], found.start(kind) + 1))
        if kind == "end":
            return tokens
        at = found.end()


def unquote(token: Token) -> str:
    """Return what a quoted text says."""
    return re.sub(r"\\(.)", r"\1", token.text[1:-1])
