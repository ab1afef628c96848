"""Step "verify": what a person brings to a verification, read from files of their own.

Both commands, ``safeconduct trace verify`` and ``safeconduct-verify``, read it here. What is
wrong with it is TraceInvalid ``brought.*`` or ``key.*``: a usage error, never a verdict.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safeconduct.attestation.note import MAX_NOTE_BYTES, VerifierKey
from safeconduct.errors import TraceInvalid

from .remembered import Memory
from .report import Report
from .trust import TrustPolicy
from .trust_file import MAX_FILE_BYTES
from .verification import MAX_KEYS, verify_trace

_KEY_FILE_BYTES = 64 << 10
# LIMIT: how far up a path is followed when looking for the trace above it.
_PATH_DEPTH = 256
# LIMIT: checkpoints held against one log.
_MAX_HELD = 64
_TOLD_EVERY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A verification as a person asks for it: which trace, and what they bring."""

    trace: Path
    keys: Sequence[str] = ()
    trust: Path | None = None
    origin: str | None = None
    checkpoints: Sequence[Path] = ()
    policy: Path | None = None
    operators: Sequence[str] = ()
    memory: Memory | None = None
    jobs: int | None = None


def verify_wish(wish: Wish, on_progress: Callable[[int, int], None] | None = None) -> Report:
    """Verify a trace with what a person brought, and remember its checkpoint if it holds."""
    keys = keys_said(wish.keys, wish.trace)
    if wish.trust is not None:
        keys += key_lines(wish.trust, wish.trace)
    _require_keys(keys)
    if len(wish.checkpoints) > _MAX_HELD:
        raise _unfit(f"{len(wish.checkpoints)} checkpoints", f"bring at most {_MAX_HELD}")
    held = [(f"in {path}", _note(path, wish.trace)) for path in wish.checkpoints]
    policy = None
    if wish.policy is not None:
        _refuse_inside(wish.policy, wish.trace)
        policy = TrustPolicy.parse(read_whole(wish.policy, MAX_FILE_BYTES))
    require_operators(wish.operators, policy)
    report = verify_trace(
        wish.trace,
        keys,
        origin=wish.origin,
        held=held,
        recall=wish.memory.recall if wish.memory else None,
        policy=policy,
        operators=wish.operators,
        now=int(time.time()),
        jobs=wish.jobs,
        on_progress=on_progress,
    )
    if wish.memory is not None:
        wish.memory.keep(wish.trace, report)
    return report


def require_operators(names: Sequence[str], policy: TrustPolicy | None) -> None:
    """Refuse a name that is no witness of the policy: a slip would let the operator's own count."""
    known = {one.name for one in policy.witnesses} if policy else set[str]()
    for name in names:
        if name not in known:
            raise _unfit(
                f"--operator {name[:80]!r} is no witness of the policy",
                "write the name that follows `witness` in the --policy file",
            )


def read_whole(path: Path, limit: int) -> bytes:
    """Return a regular file of at most ``limit`` bytes. Never waits for a FIFO or a device."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise _unfit(f"{path} is not a regular file", "name a file of yours")
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise _unfit(f"{path}: {why}", "name a file you can read") from error
    if len(data) > limit:
        raise _unfit(f"{path} has more than {limit} bytes", "name the right file")
    return data


def _note(path: Path, trace: Path) -> bytes:
    _refuse_inside(path, trace)
    return read_whole(path, MAX_NOTE_BYTES)


def keys_said(words: Sequence[str], trace: Path) -> list[str]:
    """Return the key lines that a command line names, itself or in files."""
    return [line for said in words for line in _key(said, trace)]


def _key(said: str, trace: Path) -> list[str]:
    """Return a key line, or those of the file that was named in its place: no line lacks a +."""
    if "+" in said or not os.path.isfile(said):
        return [said]
    _refuse_inside(Path(said), trace)
    return _lines(Path(said))


def _require_keys(lines: Sequence[str]) -> None:
    if len(lines) > MAX_KEYS:
        raise _unfit(f"{len(lines)} keys are too many", f"bring at most {MAX_KEYS}")
    for line in lines:
        try:
            VerifierKey.parse(line.strip())
        except TraceInvalid as error:
            raise TraceInvalid(
                f"a key line is wrong: {error.message}",
                code=error.code,
                hint="a key line is NAME+HASH+BASE64, as `safeconduct keys show` prints it",
            ) from error


def key_lines(folder: Path, trace: Path) -> list[str]:
    """Read the key lines of a folder of the verifier's own. Empty lines and # lines are skipped."""
    _refuse_inside(folder, trace)
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".pub"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise _unfit(f"--trust {folder}: {why}", "name a folder of *.pub files") from error
    lines: list[str] = []
    for name in names[: MAX_KEYS + 1]:
        lines += _lines(folder / name)
    if not lines:
        raise _unfit(f"--trust {folder} holds no *.pub file with a key", "put one there")
    return lines


def _lines(file: Path) -> list[str]:
    # A link could lead back into the trace.
    try:
        plain = stat.S_ISREG(os.lstat(file).st_mode)
    except (OSError, ValueError):  # gone since it was listed
        plain = False
    if not plain:
        raise _unfit(f"{file} is a link or no plain file", "put a copy there")
    try:
        text = read_whole(file, _KEY_FILE_BYTES).decode("ascii")
    except UnicodeDecodeError as error:
        raise _unfit(f"{file} holds no key line", "remove it from there") from error
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _refuse_inside(path: Path, trace: Path) -> None:
    """Refuse what lies below the trace, compared by identity: links do not help."""
    forbidden = _identity(trace)
    above = Path(os.path.realpath(path))
    for _ in range(_PATH_DEPTH):
        if forbidden is not None and _identity(above) == forbidden:
            raise _unfit(
                f"{path} lies inside the trace: what came with a log proves nothing about it",
                "get it from the operator and keep it in a folder of yours",
            )
        if above == above.parent:
            return
        above = above.parent
    raise _unfit(f"{path} lies too deep", "name another folder")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _unfit(message: str, hint: str) -> TraceInvalid:
    return TraceInvalid(message, code="brought.invalid", hint=hint)


class ProgressLine:
    """One line on a terminal that is written anew while entries are checked; else nothing."""

    def __init__(self) -> None:
        self._shown = False
        self._next = time.monotonic() + _TOLD_EVERY_S
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, whole: int) -> None:
        """Tell how far it is."""
        if not self._terminal or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _TOLD_EVERY_S
        self._shown = True
        print(f"\r{done:,} of {whole:,} entries", end="\x1b[K", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            print("\r", end="\x1b[K", file=sys.stderr, flush=True)
