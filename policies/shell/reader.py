"""Step 2, shell text: a text is read whole into simple commands of literal words, or refused.

This file meets hostile text. INVARIANT: the tokens lie end to end and each is one of those
below, so no byte is skipped; what no token takes refuses the whole text. What is read is what
runs: the text itself is never given to a shell (`runtime/tools/shell.py` writes a new one), so
a word that we took for something else than the writer meant is still the word that was judged.

Read are the parts that POSIX shells and bash take alike: POSIX.1-2024, Shell Command Language
§2.2 (quoting), §2.3 (tokens), §2.7 (redirection), §2.9 (commands). Why no parser of others is
used: docs/design/0006-shell-text.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from safeconduct.errors import Denied

from .form import Join, Redirect, ShellText, Simple

# LIMIT: what is read is written anew with quotes, and must fit one argument (MAX_ARG_STRLEN).
MAX_TEXT_BYTES: Final = 16 << 10
MAX_COMMANDS: Final = 64
MAX_WORDS: Final = 1024
MAX_REDIRECTS: Final = 16

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# A continued line only after a blank: glued to a word it would join two of them.
_BLANK: Final = re.compile(r"[ \t]+(?:\\\n[ \t]*)*")
_COMMENT: Final = re.compile(r"#[^\n]*")
_JOIN: Final = re.compile(r"&&|\|\||[;|\n]")
# Not `<<`, `<>`, `<&`, `>|`, `&>`; no process substitution; descriptors 0 to 2 only.
_FILE: Final = re.compile(r"(?:0?<|[12]?>>?)(?![<>&|(])")
_COPY: Final = re.compile(r"(?:2>&1|1?>&2)(?=[ \t\n;|&]|\Z)")
_BEGINS_REDIRECT: Final = frozenset("<>012")
# `~` only behind a character after which no shell expands it; braces only where there is nothing
# to expand, and no name of a descriptor (`{x}>f` in bash). A word does not begin with `#`.
# What comes next tells the alternatives apart, so nothing is gone back for. Possessive repeats
# match wrongly, or without end, before Python 3.11.5: github.com/python/cpython/issues/106052.
_PIECE: Final = re.compile(
    r"""
    (?P<bare>(?: [\w@%+=:,./^!-] | (?<=[\w./^@-])~ | \{[A-Za-z0-9_-]*\}(?![<>]) | \# )+)
    | '(?P<single>[^']*)'
    | "(?P<double>(?: [^"\\$`] | \\[^\n] )*)"
    | \\(?P<escaped>[^\n])
    """,
    re.VERBOSE,
)
# Behind `$`, '`', '"' and itself alone a backslash in double quotes quotes (§2.2.3).
_QUOTED: Final = re.compile(r'\\([$`"\\])')
# LIMIT: of POSIX and bash; what another shell adds is looked for as a program, like any word.
_GRAMMAR: Final = """
! { } [[ ]] case coproc do done elif else esac fi for function if in select then time until while
"""
_RESERVED: Final = frozenset(_GRAMMAR.split())
# Known to a shell alone: a program of that name could not do it. `echo`, `test`, `kill` … are
# programs too, and it is those that run.
_BUILTINS: Final = """
. : alias bg bind break builtin caller chdir command compgen complete compopt continue declare dirs
disown enable eval exec exit export fc fg getopts hash help history jobs let local logout mapfile
popd pushd read readarray readonly return set shift shopt source suspend times trap type typeset
ulimit umask unalias unset wait
"""
_SHELL_ONLY: Final = frozenset(_BUILTINS.split())
_REASONS: Final = {
    "$": "$ expands or substitutes",
    "`": "a backquote substitutes",
    "*": "* is a pattern",
    "?": "? is a pattern",
    "[": "[ is a pattern or a test",
    "]": "] is part of a pattern or a test",
    "(": "( begins a subshell or a function",
    ")": ") ends a subshell",
    "{": "{ begins a group or an expansion",
    "}": "} ends a group or an expansion",
    "~": "~ stands for a home folder",
    "&": "& starts in the background or redirects both outputs",
    "<": "this redirection is not <, with the path of a file",
    ">": "this redirection is not >, >> or 2>&1, with the path of a file",
    "'": "a quote is not closed",
    '"': "a quote is not closed, or holds $ or a backquote",
    "\\": "a backslash ends a line inside a word, or the text",
    "#": "# follows what ends no word",
}
_QUOTE_HINT: Final = "put what is meant literally into single quotes, or give argv"
_SPLIT_HINT: Final = "run them as two calls, each with argv"


def read_shell(text: str) -> ShellText:
    """Read a text whole, or raise Denied ``shell.*``. Linear in its length."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _unparsed("it is not valid Unicode", "send UTF-8") from error
    if size > MAX_TEXT_BYTES:
        message = f"the text is longer than {MAX_TEXT_BYTES} bytes"
        raise Denied(message, code="shell.too_large", hint=_SPLIT_HINT)
    if found := _CONTROL.search(text):
        raise _unparsed(f"a control character stands at {found.start()}", _QUOTE_HINT)
    commands = _Reader(text).read()
    return _entered(commands)


class _Reader:
    """Walks over one text, token by token."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._words = self._redirects = 0

    def read(self) -> list[Simple]:
        commands: list[Simple] = []
        join = Join.FIRST
        self._skip(lines=True)
        while self._at < len(self._text) or join in (Join.AND, Join.OR, Join.PIPE):
            commands.append(self._command(join))
            if len(commands) > MAX_COMMANDS:
                message = f"the text holds more than {MAX_COMMANDS} commands"
                raise Denied(message, code="shell.too_large", hint=_SPLIT_HINT)
            found = self._take(_JOIN)
            if found is None:
                break
            join = Join.THEN if found == "\n" else Join(found)
            self._skip(lines=True)
        if self._at < len(self._text):
            raise self._refused()
        if not commands:
            raise _unparsed("it holds no command", "name a program")
        return commands

    def _take(self, token: re.Pattern[str]) -> str | None:
        found = token.match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found[0]

    def _skip(self, *, lines: bool) -> None:
        """Pass over blanks and a comment; with ``lines`` over empty lines too."""
        while True:
            self._take(_BLANK)
            if self._text.startswith("#", self._at):
                self._take(_COMMENT)
            if not lines or self._text[self._at : self._at + 1] != "\n":
                return
            self._at += 1

    def _command(self, join: Join) -> Simple:
        """Read up to what ends a simple command."""
        argv: list[str] = []
        redirects: list[Redirect] = []
        while True:
            self._skip(lines=False)
            redirect = self._redirect()
            if redirect is not None:
                redirects.append(redirect)
                continue
            word = self._word()
            if word is None:
                break
            argv.append(word)
        self._words += len(argv)
        self._redirects += len(redirects)
        if self._words > MAX_WORDS or self._redirects > MAX_REDIRECTS:
            message = f"the text has over {MAX_WORDS} words or {MAX_REDIRECTS} redirections"
            raise Denied(message, code="shell.too_large", hint=_SPLIT_HINT)
        if not argv:
            raise self._refused()
        _check_program(argv)
        return Simple(join=join, argv=tuple(argv), redirects=tuple(redirects))

    def _redirect(self) -> Redirect | None:
        if self._text[self._at : self._at + 1] not in _BEGINS_REDIRECT:
            return None
        copied = self._take(_COPY)
        if copied is not None:
            source, goal = (2, "1") if copied == "2>&1" else (1, "2")
            return Redirect(descriptor=source, operator=">&", target=goal)
        found = self._take(_FILE)
        if found is None:
            return None
        operator = found.lstrip("012")
        digits = found[: len(found) - len(operator)]
        self._take(_BLANK)
        target = self._word()
        if not target:
            raise self._refused()
        implied = 0 if operator == "<" else 1
        return Redirect(
            descriptor=int(digits) if digits else implied, operator=operator, target=target
        )

    def _word(self) -> str | None:
        """Read the adjoining pieces of one word, None where there is none."""
        text, start = self._text, self._at
        if text.startswith("#", start):
            return None
        pieces: list[str] = []
        while found := _PIECE.match(text, self._at):
            self._at = found.end()
            kind = found.lastgroup or ""
            pieces.append(_QUOTED.sub(r"\1", found[kind]) if kind == "double" else found[kind])
        raw = text[start : self._at]
        if raw.isdigit() and text[self._at : self._at + 1] in ("<", ">"):
            raise _unparsed(f"{raw[:9]} at {start} names a descriptor", _SPLIT_HINT)
        return "".join(pieces) if pieces else None

    def _refused(self) -> Denied:
        """Say what no token takes, and where."""
        if self._at >= len(self._text):
            return _unparsed("the text ends where a command or a path is missing", _SPLIT_HINT)
        character = self._text[self._at]
        why = _REASONS.get(character, f"{character!a} is not read outside of quotes")
        if character in ";|\n":
            why = "a command or a path is missing before an operator"
        hint = _SPLIT_HINT if character in ";|\n&(){}<>" else _QUOTE_HINT
        return _unparsed(f"{why}, at {self._at}", hint)


def _check_program(argv: Sequence[str]) -> None:
    """Refuse as program what a shell would not look for as one."""
    name = argv[0]
    if not name or name.startswith("-") or "=" in name:
        message = f"a command begins with {name[:40]!a}, which names no program"
        raise _unparsed(message, "give argv; a variable cannot be set for one command")
    if name in _RESERVED:
        raise _unparsed(f"{name} is a word of the shell's own grammar", _SPLIT_HINT)
    if name in _SHELL_ONLY:
        message = f"{name} changes or asks the shell itself, and each command runs as a program"
        raise Denied(message, code="shell.builtin", hint=_SPLIT_HINT)


def _entered(commands: list[Simple]) -> ShellText:
    """Take a leading `cd FOLDER` as the folder of all that follows; refuse any other `cd`.

    Nothing runs in the old folder, also behind `;`: where there is no FOLDER the Call is refused.
    """
    first, *others = commands
    folder = None
    if first.argv[0] == "cd" and others and others[0].join in (Join.AND, Join.THEN):
        if len(first.argv) != 2 or first.redirects or first.argv[1][:1] in ("", "-"):
            raise _cd("cd is not given one folder")
        folder = first.argv[1]
        commands = [replace(others[0], join=Join.FIRST), *others[1:]]
    if any(command.argv[0] == "cd" for command in commands):
        raise _cd("cd would change what the paths after it mean")
    return ShellText(commands=tuple(commands), folder=folder)


def _cd(message: str) -> Denied:
    hint = "begin with cd FOLDER && …, or name the folder in cwd"
    return Denied(f"shell text: {message}", code="shell.builtin", hint=hint)


def _unparsed(message: str, hint: str) -> Denied:
    return Denied(f"shell text: {message}", code="shell.unparsed", hint=hint)
