"""Step "record": which sessions and calls are open where a journal file begins.

``journal/<first index>.sessions`` lets the writer take up a log after a crash from its journal
alone, however long the log is. It is the writer's own note: the verifier never reads it, and where
it is missing or damaged the whole log is read instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from safeconduct.attestation.chain import MAX_OPEN, Chains, OpenSession
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.journal import JOURNAL, JournalTail
from safeconduct.call import Json
from safeconduct.errors import TraceInvalid

_FILE_NAME = re.compile(r"([0-9]{16})\.sessions")
# LIMIT: as many open sessions and calls as there may be, with names of full length.
_MAX_BYTES = MAX_OPEN * 600


class _Noted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An open session, as the file holds it."""

    sseq: int
    prev: str | None
    opened_at: int
    is_log: bool
    calls: dict[str, int]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(dict[str, _Noted])


def note_sessions(chains: Chains) -> bytes:
    """Return the file's bytes for what is open now."""
    return _encoder.encode(
        {
            name: _Noted(
                sseq=one.sseq,
                prev=one.prev,
                opened_at=one.opened_at,
                is_log=one.is_log,
                calls=one.calls,
            )
            for name, one in chains.open.items()
        }
    )


def keep_sessions(folder: Folder, first: int, data: bytes) -> None:
    """Write the file of a journal file, durably."""
    folder.write(_path(first), data, mode=0o600)


def noted_sessions(folder: Folder, first: int) -> Chains | None:
    """Return what was open where a journal file begins, or None where no file says so."""
    try:
        noted = _decoder.decode(folder.read(_path(first), limit=_MAX_BYTES))
    except (TraceInvalid, msgspec.DecodeError, ValueError, RecursionError):
        return None
    return Chains.resume(
        {
            name: OpenSession(
                sseq=one.sseq,
                prev=one.prev,
                opened_at=one.opened_at,
                is_log=one.is_log,
                calls=one.calls,
            )
            for name, one in noted.items()
        }
    )


def forget_sessions(folder: Folder, *, before: int) -> None:
    """Remove the files of journal files that are gone."""
    for name in folder.names(JOURNAL):
        match = _FILE_NAME.fullmatch(name)
        if match and int(match[1]) < before:
            folder.remove(f"{JOURNAL}/{name}")


def lost_facts(tail: JournalTail, lost: Mapping[str, OpenSession]) -> dict[str, Json]:
    """Return the body of ``log.recovered``: what the crash tore off and what it left open."""
    return {
        "dropped_bytes": tail.dropped_bytes,
        "dropped_sha256": tail.dropped_sha256,
        "sessions": sum(not one.is_log for one in lost.values()),
        "calls": sum(len(one.calls) for one in lost.values()),
    }


def _path(first: int) -> str:
    return f"{JOURNAL}/{first:016d}.sessions"
