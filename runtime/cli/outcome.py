"""How a Call ended, as `exec`, `run` and `call` tell it: an exit code, JSON and a file of it."""

from __future__ import annotations

import errno
import json
import os
import secrets
import signal
import stat
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safeconduct.call import KeptChanges, Outcome
from safeconduct.errors import Denied, Error, Exit, LimitExceeded, ToolFailed

from .source import UsageError
from .terminal import tell

if TYPE_CHECKING:
    from safeconduct.runtime.supervisor import Runtime

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


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


def tell_end(outcome: Outcome, written: OutcomeFile) -> int:
    """Tell and write how a program ended, and return the code that says so."""
    tell_refused(outcome)
    tell_changes(outcome.changes)
    code = exit_code(outcome)
    written.write(outcome_json(outcome, code))
    return code


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


def _broken_json(error: BaseException) -> dict[str, object]:
    """Return what ended us before the Call's own end could be told, as plain JSON."""
    if isinstance(error, Error):
        return error_json(error, error_code(error))
    code, word = int(Exit.BUG), "bug"
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code, word = error.code, "interrupted"
    elif isinstance(error, KeyboardInterrupt):
        code, word = Exit.SIGNAL + signal.SIGINT, "interrupted"
    elif isinstance(error, BrokenPipeError):
        code, word = Exit.SIGNAL + signal.SIGPIPE, "output.unread"
    elif isinstance(error, OSError):
        code, word = int(Exit.FAILURE), "system"
    said = str(error) or type(error).__name__
    told = {"code": word, "message": said if word != "interrupted" else "Ended by a signal."}
    return {"ok": False, "status": "error", "exit": int(code), "error": told}


def output_json(data: bytes) -> dict[str, str]:
    """Return output as text where it is UTF-8, else in base64."""
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"base64": b64encode(data).decode("ascii")}


class OutcomeFile:
    """The file that tells apart what exit codes cannot; a context manager.

    Made before anything runs, and written when all that ran is gone. It may lie in a folder that
    an agent writes to and there replaces, links or still holds open what we made: so its name is
    given to another file, which nobody else has seen, once that one is whole. Whatever ends the
    block, the file says so. Without a path nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._folder, self._mode = (-1, 0) if path is None else _open(path)

    def __enter__(self) -> OutcomeFile:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self.write(_broken_json(error))
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    def write(self, value: dict[str, object]) -> None:
        """Write the one document; only the first one counts."""
        path, self._path = self._path, None
        if path is None:
            return
        try:
            _replace(path, self._folder, self._mode, (json.dumps(value, indent=2) + "\n").encode())
        except OSError as error:
            raise Error(
                f"--outcome {path}: {error.strerror}",
                code="outcome.unwritten",
                hint="what lies there is not ours; name a file that the program cannot write",
            ) from error


def _open(path: Path) -> tuple[int, int]:
    """Make or empty the file; return its folder and its mode. UsageError where it is no file."""
    fd = folder = -1
    try:
        folder = os.open(path.parent, _FOLDER)
        fd = os.open(path.name, _FLAGS, 0o600, dir_fd=folder)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise ValueError("not a plain file with one name")
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=folder, effective_ids=True):
            raise ValueError("its folder is not yours to write")
        os.ftruncate(fd, 0)
    except (OSError, ValueError) as error:
        if folder >= 0:
            os.close(folder)
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--outcome {path}: {why}", hint="name a plain file") from error
    finally:
        if fd >= 0:
            os.close(fd)
    return folder, stat.S_IMODE(status.st_mode) & 0o666


def _replace(path: Path, folder: int, mode: int, data: bytes) -> None:
    """Put a new file with ``data`` in the place of ``path``. Raises OSError; then nothing is new.

    A folder that was moved away since it was opened is not what ``path`` names any more.
    """
    if not os.path.samestat(os.stat(path.parent), os.fstat(folder)):
        raise OSError(errno.ESTALE, "its folder was replaced")
    name = f".safeconduct-{secrets.token_hex(8)}"
    fd = os.open(name, _FLAGS | os.O_EXCL, 0o600, dir_fd=folder)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
        os.rename(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        os.unlink(name, dir_fd=folder)
        raise


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
