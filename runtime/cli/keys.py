"""``safeconduct keys``: the public line of this user's log key, and new keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.attestation import VerifierKey, write_key
from safeconduct.errors import Exit, TraceInvalid
from safeconduct.runtime.places import Places

from .options import JsonOption
from .places import refuse_inside_sandbox
from .source import UsageError, read_file
from .terminal import print_json, print_line, tell

_LINE_BYTES_MAX = 4096


def show(as_json: JsonOption = False) -> int:
    """Print the line that others verify your traces with. Makes no key."""
    path = Places.of(os.environ).public_key
    if not path.exists():
        raise TraceInvalid(
            "there is no log key yet",
            code="key.missing",
            hint="the first `safeconduct exec` or `call` makes one",
        )
    key = VerifierKey.parse(_text(path))
    if as_json:
        print_json({"name": key.name, "id": key.id.hex(), "line": key.line, "file": str(path)})
    else:
        print_line(key.line)
    return Exit.OK


def new(
    path: Annotated[Path, typer.Argument(help="A file that does not exist yet.")],
    name: Annotated[str, typer.Option("--name", help="Who signs, for example example.org/alice.")],
    as_json: JsonOption = False,
) -> int:
    """Make a private log key in a new file, mode 0600, and print its public line."""
    refuse_inside_sandbox("keys new")
    try:
        line = write_key(path, name)
    except TraceInvalid as error:
        raise UsageError(error.message, code=error.code, hint=error.hint or _HINT) from error
    if as_json:
        print_json({"name": name, "line": line, "file": str(path)})
    else:
        print_line(line)
    tell(f"{path} is private; hand out only the line above", "who holds the file can sign")
    return Exit.OK


_HINT = "name a new file in a folder of yours"


def _text(path: Path) -> str:
    try:
        return read_file(path, _LINE_BYTES_MAX).decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise TraceInvalid(
            f"{path} is no key line", code="key.invalid", hint="restore it from a copy"
        ) from error
