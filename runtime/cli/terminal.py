"""What the verbs print: results on stdout, messages on stderr, and nothing a terminal obeys.

Names, paths, arguments and output of tools are hostile: whatever is not printable (control
characters, escape sequences, bidirectional marks, lone surrogates) is written as an escape.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Mapping, Sequence

from safeconduct.errors import (
    ApprovalRequired,
    Denied,
    Error,
    LimitExceeded,
    PolicyError,
    ProtocolError,
    SandboxFailed,
    SandboxUnavailable,
    ToolFailed,
    TraceInvalid,
)

# LIMIT: characters of one message; a hostile name may be a megabyte.
_MESSAGE_CHARACTERS = 4000

# What to do, where the error itself does not say it. The most special class comes first.
_HINTS: Mapping[type[Error], str] = {
    ApprovalRequired: "nothing ran; a person must allow it in the policy or run it themselves",
    Denied: "nothing ran; the operator sees why with: safeconduct policy explain",
    PolicyError: "look at it with: safeconduct policy check",
    LimitExceeded: "give the profile a larger limit, or the tool less to do",
    SandboxUnavailable: "see what this machine gives with: safeconduct doctor",
    SandboxFailed: "nothing of the call is left running; try: safeconduct doctor",
    ToolFailed: "the call was allowed; check its arguments",
    TraceInvalid: "look at it with: safeconduct trace verify TRACE",
    ProtocolError: "check what was sent",
}


def printable(text: str, *, keep: str = "") -> str:
    """Return text that no terminal obeys; characters in ``keep`` stay as they are."""
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() or mark in keep else _escape(mark) for mark in text)


def _escape(mark: str) -> str:
    code = ord(mark)
    # U+DC80 to U+DCFF stand for bytes that were not UTF-8 (PEP 383).
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def clip(text: str, limit: int) -> str:
    """Return text of at most ``limit`` characters and a note of how many are left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … ({len(text) - limit} more characters)"


def print_line(text: str = "") -> None:
    """Print one line of a result."""
    print(printable(text))


def print_json(value: object) -> None:
    """Print a result as JSON, in ASCII, so that no string in it reaches the terminal raw."""
    print(json.dumps(value, indent=2, ensure_ascii=True))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a listing: a table on a terminal, else lines with tabs under a line of names."""
    shown = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in [list(columns), *shown]:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in shown:
        table.add_row(*(Text(cell) for cell in row))
    Console(markup=False, highlight=False).print(table)


def tell(message: str, hint: str = "") -> None:
    """Tell a person something on stderr: one line, and one on what to do."""
    print(f"safeconduct: {_message(message)}", file=sys.stderr)
    if hint:
        print(f"  {_message(hint)}", file=sys.stderr)


def tell_error(error: Error) -> None:
    """Tell what went wrong, with its stable code, and what to do about it."""
    what, _, said = str(error).partition("\n")
    general = (hint for kind, hint in _HINTS.items() if isinstance(error, kind))
    code = "" if error.code == "usage" else f" [{error.code}]"
    tell(what + code, said.strip() or next(general, ""))


def _message(text: str) -> str:
    return printable(clip(text, _MESSAGE_CHARACTERS))


def prepare_streams() -> None:
    """Make stdin, stdout and stderr safe to use, whatever the caller left of them.

    A closed one is opened on /dev/null: otherwise the next file, perhaps a trace, would get its
    number and our output. A character that the encoding lacks is printed as its escape.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
