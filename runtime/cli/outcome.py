"""How a Call ended, as `exec` and `call` tell it: an exit code, JSON, and output that streams."""

from __future__ import annotations

import codecs
import json
import os
import stat
import sys
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safeconduct.call import KeptChanges, Outcome
from safeconduct.errors import Denied, Error, Exit, LimitExceeded, ToolFailed

from .source import UsageError
from .terminal import printable, tell

if TYPE_CHECKING:
    from safeconduct.runtime.supervisor import Runtime

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def exit_code(outcome: Outcome) -> int:
    """Return the code of an Outcome: the program's own, 124 for a limit, 128+n for a signal."""
    if outcome.limit is not None:
        tell(f"ended by its {outcome.limit} limit", f"raise limits.{outcome.limit} of the profile")
        return Exit.LIMIT
    if outcome.signal is not None:
        return Exit.SIGNAL + outcome.signal
    return outcome.exit_code or Exit.OK


def tell_refused(ended: Outcome | ToolFailed) -> None:
    """Tell which system calls were refused, where ``--explain`` asked for it."""
    for one in ended.refused:
        times = "once" if one.count == 1 else f"{one.count} times"
        tell(f"refused {times}: the system call {one.syscall}", one.remedy)


def tell_changes(changes: Sequence[KeptChanges]) -> None:
    """Tell what a Call left in overlays, and how to decide about it."""
    for kept in changes:
        notes = [
            f"{count} {what}"
            for count, what in (
                (kept.later, "with effect later"),
                (kept.refused, "refused"),
                (kept.conflicts, "in conflict"),
            )
            if count
        ]
        said = f" ({', '.join(notes)})" if notes else ""
        tell(
            f"{kept.count} changes of {kept.workspace} are kept as {kept.id}{said}",
            f"safeconduct changes diff {kept.id} (then commit or rollback)",
        )


def error_code(error: Error) -> int:
    """Return the code of a Call without an Outcome."""
    if isinstance(error, ToolFailed) and error.code == "tool.not_found":
        return Exit.NOT_FOUND
    return int(error.exit_code)


def outcome_json(outcome: Outcome, code: int) -> dict[str, object]:
    """Return an Outcome without its output as plain JSON."""
    fields = asdict(outcome)
    for stream in ("stdout", "stderr"):
        del fields[stream]
    status = "limit" if outcome.limit else "ok" if outcome.ok else "failed"
    return {"ok": outcome.ok, "status": status, "exit": int(code), **fields}


def error_json(error: Error, code: int) -> dict[str, object]:
    """Return the end of a Call that has no Outcome as plain JSON."""
    status = "error"
    for kind, word in ((Denied, "denied"), (LimitExceeded, "limit"), (ToolFailed, "failed")):
        if isinstance(error, kind):
            status = word
    found: dict[str, object] = {"ok": False, "status": status, "exit": int(code)}
    found["error"] = {"code": error.code, "message": error.message}
    if isinstance(error, ToolFailed) and error.refused:
        found["refused"] = [asdict(one) for one in error.refused]
    return found


def output_json(data: bytes) -> dict[str, str]:
    """Return output as text where it is UTF-8, else in base64."""
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"base64": b64encode(data).decode("ascii")}


class OutcomeFile:
    """The file that tells apart what exit codes cannot. Made before anything runs.

    It may lie in a folder that an agent writes to, so no link is followed and only a plain file
    with one name is replaced. Without a path nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self._fd = -1 if path is None else _open(path)

    def write(self, value: dict[str, object]) -> None:
        """Write the one document and close the file."""
        if self._fd < 0:
            return
        with os.fdopen(self._fd, "w", encoding="ascii") as file:
            file.write(json.dumps(value, indent=2) + "\n")
        self._fd = -1


def _open(path: Path) -> int:
    fd = -1
    try:
        fd = os.open(path, _FLAGS, 0o600)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise ValueError("not a plain file with one name")
        os.ftruncate(fd, 0)
    except (OSError, ValueError) as error:
        if fd >= 0:
            os.close(fd)
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--outcome {path}: {why}", hint="name a plain file") from error
    return fd


class Output:
    """Hands a program's output on as it comes: raw into files and pipes, escaped to a terminal."""

    def __init__(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {name: decoder("backslashreplace") for name in ("stdout", "stderr")}

    def show(self, stream: str, data: bytes) -> None:
        """Write one piece of one stream."""
        target = sys.stdout if stream == "stdout" else sys.stderr
        if target.isatty():
            target.write(printable(self._decoders[stream].decode(data), keep="\n\t"))
        else:
            target.flush()
            target.buffer.write(data)
        target.flush()


def announce(runtime: Runtime, *, explicit: bool) -> None:
    """Tell which policy counts, unless the operator named it and it counts as it stands.

    Also which broken commit was ended.
    """
    for path, recovery in runtime.recovered.items():
        tell(f"a commit of changes to {path} had been broken off; it is {recovery.done} now")
        for kept in recovery.kept:
            tell(
                f"{kept} was written meanwhile", "the other version lies beside it: .safeconduct-*"
            )
    if not explicit or not runtime.resolution.trusted:
        tell(runtime.resolution.why)
