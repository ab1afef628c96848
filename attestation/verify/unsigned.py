"""Step "verify": what lies in a trace's journal after the signed head: nobody vouches for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from safeconduct.attestation.folder import Folder
from safeconduct.attestation.journal import JournalTail, read_journal
from safeconduct.errors import TraceInvalid


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsigned:
    """How many entries follow the signed ones. ``closed``: only the log's owner may look."""

    entries: int = 0
    closed: bool = False


def look_at_journal(
    folder: Folder, size: int, accuse: Callable[[TraceInvalid, str, int], None]
) -> Unsigned:
    """Count the entries after the first ``size``.

    The journal is no public part of a trace, and without it everything else verifies: so it does
    for who may not look into it.
    """
    tail, entries = JournalTail.bounded(), 0
    try:
        for index, _ in read_journal(folder, tail, size=size):
            entries += index >= size
    except TraceInvalid as error:
        if isinstance(error.__cause__, PermissionError):
            return Unsigned(closed=True)
        accuse(error, "", -1)
    if tail.dropped_bytes:
        message = f"the journal ends in {tail.dropped_bytes} bytes that are no entry"
        accuse(_unsigned(message), "", -1)
    if entries or tail.cut:
        least = "at least " if tail.cut else ""
        message = f"{least}{entries} entries after the checkpoint are not signed"
        if tail.cut:
            message += ": the journal is longer than what is read of one"
        accuse(_unsigned(message), "", size)
    return Unsigned(entries=entries)


def _unsigned(message: str) -> TraceInvalid:
    return TraceInvalid(message, code="log.unsigned")
