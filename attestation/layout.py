"""Step "record": the folder of a trace: what is in it, whose it is, who may write it."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from safeconduct.errors import TraceInvalid

from .checkpoint import require_origin
from .folder import Folder
from .journal import JOURNAL
from .privacy.openings import BLOBS, OPENINGS
from .readme import readme

_MAX_ORIGIN_BYTES = 256
_KNOWN = frozenset(
    {
        "README",
        "origin",
        "checkpoint",
        "checkpoints",
        "tile",
        JOURNAL,
        OPENINGS,
        BLOBS,
        "anchors",
        "proofs",
    }
)


def open_ours(directory: Path) -> Folder:
    """Open the folder of a trace, or make a new one. Raise ``trace.foreign`` where it is none."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = Folder(directory)
    try:
        require_ours(folder, directory)
        folder.make(JOURNAL, mode=0o700)
    except BaseException:
        folder.close()
        raise
    return folder


def stored_bytes(folder: Folder) -> int:
    """Return how many bytes the files of a trace have, its journal not counted."""
    total, level = 0, ["tile", "checkpoints", OPENINGS, BLOBS]
    while level:
        below: list[str] = []
        for path in level:
            for name, status in folder.statuses(path):
                if stat.S_ISDIR(status.st_mode):
                    below.append(f"{path}/{name}")
                else:
                    total += status.st_size
        level = below
    return total


def require_ours(folder: Folder, directory: Path) -> None:
    """Refuse to mix a trace into a folder that holds anything else."""
    names = {name for name in folder.names("") if not name.startswith(".")}
    if directory.stat().st_uid != os.geteuid():
        raise _foreign(directory, "it belongs to somebody else")
    if names - _KNOWN:
        raise _foreign(directory, f"it holds {sorted(names - _KNOWN)[0][:80]!r}")
    if names - {JOURNAL, "origin"} and "origin" not in names:
        raise _foreign(directory, "it is no trace")


def _foreign(directory: Path, why: str) -> TraceInvalid:
    return TraceInvalid(
        f"{directory} cannot hold a trace: {why}",
        code="trace.foreign",
        hint="name a new folder, an empty one or a trace",
    )


def lock_trace(folder: Folder) -> int:
    """Take the trace's only writing place; closing the descriptor and the folder gives it back.

    The folder is locked too: ``journal/lock`` can be removed or replaced under the writer.
    """
    fd = folder.open_lock(f"{JOURNAL}/lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.lock()
    except BlockingIOError as error:
        os.close(fd)
        raise TraceInvalid(
            "somebody else is writing this trace",
            code="trace.locked",
            hint="end the other runtime, or give this one a trace of its own",
        ) from error
    return fd


def prepare(folder: Folder, origin: str | None, fresh: str) -> str:
    """Read the log's origin, or name a new log and lay out its folder."""
    if folder.exists("origin"):
        known = folder.read("origin", limit=_MAX_ORIGIN_BYTES).decode("ascii", "replace")
        known = require_origin(known.removesuffix("\n"))
        if origin not in (None, known):
            raise TraceInvalid(f"this trace is the log {known}", code="trace.origin")
    else:
        known = require_origin(origin or fresh)
        folder.write("origin", f"{known}\n".encode())
    folder.make("tile/entries")
    folder.make("checkpoints")
    folder.make(OPENINGS, mode=0o700)
    folder.make(BLOBS, mode=0o700)
    if not folder.exists("README"):
        folder.write("README", readme(known))
    return known
