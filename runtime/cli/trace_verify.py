"""``safeconduct trace verify``: check a trace against keys that the verifier brings.

Nothing of the runtime is loaded. The key of this user's own logs is never used silently: a
person who verifies says whose key it must be.
"""

from __future__ import annotations

import os
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.attestation.note import VerifierKey
from safeconduct.attestation.verify import verify_trace
from safeconduct.errors import TraceInvalid

from .options import JsonOption, TraceArgument
from .places import find_trace
from .source import UsageError, read_file
from .terminal import print_json, print_line

# LIMIT: keys of one verification, as in attestation/verify.py.
_KEYS_MAX = 64
_KEY_FILE_BYTES_MAX = 64 << 10
# LIMIT: how far up a path is followed when looking for the trace above it.
_PATH_DEPTH_MAX = 256


def verify(
    trace: TraceArgument,
    key: Annotated[
        list[str] | None, typer.Option("--key", help="A public key line you trust. Repeatable.")
    ] = None,
    trust: Annotated[
        Path | None, typer.Option("--trust", help="A folder of *.pub files with such lines.")
    ] = None,
    origin: Annotated[
        str | None, typer.Option("--origin", help="The log it must be, not just any of the key.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Verify a trace, offline, and say what was not checked.

    Exits with 0 verified, 10 tampered, 11 incomplete, 12 trust not established (no key of yours
    signed it), 13 unreadable. Keys inside the trace are never trusted.
    """
    path = find_trace(trace, os.environ)
    keys = list(key or [])
    if trust is not None:
        keys += _trusted_lines(trust, path)
    _require_keys(keys)
    report = verify_trace(path, keys, origin=origin)
    if as_json:
        fields = {**asdict(report), "status": int(report.status), "verdict": report.status.name}
        print_json({**fields, "integrity": report.integrity, "complete": report.complete})
    else:
        for line in report.lines():
            print_line(line)
    return report.status


def _require_keys(lines: list[str]) -> None:
    if len(lines) > _KEYS_MAX:
        raise UsageError(f"{len(lines)} keys are too many", hint=f"bring at most {_KEYS_MAX}")
    for line in lines:
        try:
            VerifierKey.parse(line.strip())
        except TraceInvalid as error:
            raise UsageError(
                f"a key line is wrong: {error.message}",
                code=error.code,
                hint="a key line is NAME+HASH+BASE64, as `safeconduct keys show` prints it",
            ) from error


def _trusted_lines(folder: Path, trace: Path) -> list[str]:
    """Read the key lines of a folder of the verifier's own. Empty lines and # lines are skipped."""
    _refuse_inside(folder, trace)
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".pub"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--trust {folder}: {why}", hint="name a folder of *.pub files") from error
    lines: list[str] = []
    for name in names[: _KEYS_MAX + 1]:
        lines += _lines(folder / name)
    if not lines:
        raise UsageError(f"--trust {folder} holds no *.pub file with a key", hint="put one there")
    return lines


def _lines(file: Path) -> list[str]:
    # A link could lead back into the trace.
    if not stat.S_ISREG(os.lstat(file).st_mode):
        raise UsageError(f"{file} is a link or no plain file", hint="put a copy there")
    try:
        text = read_file(file, _KEY_FILE_BYTES_MAX).decode("ascii")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} holds no key line", hint="remove it from there") from error
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _refuse_inside(folder: Path, trace: Path) -> None:
    """Refuse a trust folder below the trace, compared by identity: links do not help."""
    forbidden = _identity(trace)
    above = Path(os.path.realpath(folder))
    for _ in range(_PATH_DEPTH_MAX):
        if forbidden is not None and _identity(above) == forbidden:
            raise UsageError(
                f"--trust {folder} lies inside the trace: keys that came with a log prove nothing",
                hint="get the key from the operator and keep it in a folder of yours",
            )
        if above == above.parent:
            return
        above = above.parent
    raise UsageError(f"--trust {folder} lies too deep", hint="name another folder")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
