"""What a person hands to a verb in a file, as text or on stdin: read once and bounded."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safeconduct.call import Json
from safeconduct.errors import Error, Exit, ProtocolError

# LIMIT: what a Call's arguments may hold at most; see policies/arguments.py.
SOURCE_BYTES_MAX = 1 << 20

_Value = TypeVar("_Value")


class UsageError(Error):
    """The command line is wrong. Exit code 2."""

    default_code = "usage"
    exit_code = Exit.USAGE


def read_source(name: str) -> bytes:
    """Read a regular file, or stdin where the name is ``-``. UsageError where that fails."""
    if name == "-":
        data = sys.stdin.buffer.read(SOURCE_BYTES_MAX + 1)
    else:
        data = read_file(Path(name), SOURCE_BYTES_MAX + 1)
    if len(data) > SOURCE_BYTES_MAX:
        raise UsageError(
            f"{_called(name)} holds more than {SOURCE_BYTES_MAX} bytes", hint="send less"
        )
    return data


def read_file(path: Path, limit: int) -> bytes:
    """Return at most ``limit`` bytes of a regular file. Never waits for a FIFO or a device."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{path} is not a regular file", hint="use - to read from stdin")
            return file.read(limit)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: {why}", hint="name a file you can read") from error


def parse_source(name: str, data: bytes, parse: Callable[[bytes], _Value]) -> _Value:
    """Parse strictly what a person handed in: what is wrong with it is a usage error."""
    try:
        return parse(data)
    except ProtocolError as error:
        raise UsageError(
            f"{_called(name)}: {error.message}", code=error.code, hint=error.hint
        ) from error


def parse_arguments(data: bytes) -> dict[str, Json]:
    """Parse a Call's arguments as the policy does."""
    from safeconduct.policies import decode_arguments

    return decode_arguments(data)


def _called(name: str) -> str:
    return "stdin" if name == "-" else name
