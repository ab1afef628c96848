"""Step "execute": the text that `/bin/sh` is given for commands that were judged one by one.

INVARIANT: it is made of what was judged and of nothing else. Every word and path stands in single
quotes, inside which POSIX shells read no character but the closing quote (Shell Command Language
§2.2.2), so a word is never a variable, a pattern, an operator or a word of the grammar.

Each command is `(exec …)`: `exec` looks for a program in PATH and takes neither a builtin nor a
function nor an alias of that name (§2.15, exec), which differ from shell to shell. So `echo` is
the program that the same argv would have run, and no command changes the shell of the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, cast

from safeconduct.call import Json

SHELL: Final = "/bin/sh"
_JOINS: Final[Mapping[Json, str]] = {"": "", ";": "; ", "&&": " && ", "||": " || ", "|": " | "}
_OPENS: Final[Mapping[Json, frozenset[Json]]] = {
    "<": frozenset({0}),
    ">": frozenset({1, 2}),
    ">>": frozenset({1, 2}),
}
_COPIES: Final[frozenset[tuple[Json, Json]]] = frozenset({(1, "2"), (2, "1")})


def script(commands: Sequence[Json]) -> str:
    """Write the text for the ``commands`` of a Document.

    Raises ValueError for what the canonical form cannot hold.
    """
    written: list[str] = []
    for item in commands:
        command = cast("Mapping[str, Json]", item)
        join = command["join"]
        if join not in _JOINS or (join == "") is bool(written):
            raise ValueError(f"commands are not joined by {join!a}")
        written.append(_JOINS[join] + _command(command))
    return "".join(written)


def _command(command: Mapping[str, Json]) -> str:
    words = cast("Sequence[str]", command["argv"])
    # A leading `-` would be an option of exec.
    if not words or words[0][:1] in ("", "-"):
        raise ValueError("a command names no program")
    opened = [_redirect(one) for one in cast("Sequence[Mapping[str, Json]]", command["redirects"])]
    return f"(exec {' '.join([*map(_quoted, words), *opened])})"


def _redirect(one: Mapping[str, Json]) -> str:
    descriptor, operator, target = one["fd"], one["operator"], one["target"]
    if operator == ">&" and (descriptor, target) in _COPIES:
        return f"{descriptor}>&{target}"
    if descriptor not in _OPENS.get(operator, ()) or not isinstance(target, str):
        raise ValueError(f"there is no redirection {descriptor!a}{operator!a}")
    if not target.startswith("/"):
        raise ValueError("the path of a redirection is not absolute")
    return f"{descriptor}{operator}{_quoted(target)}"


def _quoted(word: str) -> str:
    if "\0" in word:
        raise ValueError("a word holds a NUL")
    return "'" + word.replace("'", "'\\''") + "'"
