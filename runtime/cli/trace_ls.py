"""``safeconduct trace ls``: the traces in the state folder. Nothing in them is believed."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safeconduct.attestation import read_entries
from safeconduct.call import EntryKind
from safeconduct.errors import Exit, TraceInvalid
from safeconduct.runtime.places import Places

from .options import JsonOption
from .terminal import print_json, print_table, tell

# LIMIT: traces in one listing, entries read of each and files measured of each.
_TRACES_MAX = 1000
_ENTRIES_MAX = 20_000
_FILES_MAX = 20_000


@dataclass(slots=True, kw_only=True)
class Row:
    """One trace. ``more`` says that it was not read to its end, ``error`` why it could not be."""

    name: str
    time: str = ""
    sessions: int = 0
    entries: int = 0
    more: bool = False
    size_bytes: int = 0
    policies: list[str] = field(default_factory=list[str])
    error: str = ""


def list_traces(as_json: JsonOption = False) -> int:
    """List the traces in your state folder, newest first."""
    folder = Places.of(os.environ).traces
    rows = [_row(path) for path in _traces(folder)]
    if as_json:
        print_json([asdict(row) for row in rows])
        return Exit.OK
    if not rows:
        tell(f"there are no traces in {folder}", "record one with: safeconduct exec -- COMMAND")
        return Exit.OK
    columns = ("name", "time", "sessions", "entries", "size", "policy")
    print_table(columns, [_cells(row) for row in rows])
    return Exit.OK


def _traces(folder: Path) -> list[Path]:
    """Return the folders in the traces folder, newest name first; links are left out."""
    try:
        with os.scandir(folder) as found:
            names = [one.name for one in found if one.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TraceInvalid(
            f"{folder}: {error.strerror}", code="trace.io", hint="check its mode and owner"
        ) from error
    return [folder / name for name in sorted(names, reverse=True)[:_TRACES_MAX]]


def _row(path: Path) -> Row:
    row = Row(name=path.name, size_bytes=_size(path))
    try:
        for _, entry in read_entries(path):
            if row.entries == _ENTRIES_MAX:
                row.more = True
                break
            row.time = row.time or clock(entry.time)
            row.entries += 1
            row.sessions += entry.kind is EntryKind.SESSION_OPEN
            if entry.kind is EntryKind.POLICY_LOAD:
                file = str(entry.body.get("file") or entry.body["policy"])
                row.policies += [file] if file not in row.policies else []
    except TraceInvalid as error:
        row.error = f"{error.code}: {error.message}"
    return row


def _size(path: Path) -> int:
    total = count = 0
    for folder, _, names in os.walk(path):
        for name in names:
            count += 1
            if count > _FILES_MAX:
                return total
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue  # a file that has just gone has no size
    return total


def clock(time_ms: int) -> str:
    """Write milliseconds since the epoch as UTC; a hostile number stays a number."""
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_ms // 1000))
    except (OverflowError, ValueError, OSError):
        return str(time_ms)


def _cells(row: Row) -> list[str]:
    more = "+" if row.more else ""
    said = row.error or ", ".join(row.policies)
    size = f"{row.size_bytes / 1024:.0f} KiB"
    return [row.name, row.time, f"{row.sessions}{more}", f"{row.entries}{more}", size, said]
