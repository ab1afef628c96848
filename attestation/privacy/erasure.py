"""Step "record": erase what a session's commitments stand for, and say so in the log.

What is erased are openings and blobs; entries stay, and so does every proof. An erasure is
ordered by a file, recorded as a ``redaction``, then done: key first, as without it nothing of the
session can be read in any copy of the trace. Whatever a crash leaves is done at the next open.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from safeconduct.attestation.entry import clear_name, committed_digest, parse_entry
from safeconduct.attestation.files import read_some
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.journal import JOURNAL
from safeconduct.attestation.reader import stored_entries
from safeconduct.attestation.writing.writer import TraceWriter
from safeconduct.call import EntryKind, Json
from safeconduct.errors import TraceInvalid

from .elapsed import DAY_MS, refuse_jump
from .openings import BLOBS, OPENINGS

_ORDER = re.compile(r"([0-9a-z-]{1,64})\.erase")
_MAX_ORDER_BYTES = 4096
_CHUNK_BYTES = 1 << 20
# The end of every entry: its keys stand in this order, and none of the body's come after them.
_HEADER = re.compile(rb'"session":"([0-9a-z-]{1,64})","sseq":[0-9]+,"time":([0-9]+),"v":1\}\Z')
_HEADER_BYTES = 256
_CLOSED = b'"kind":"session.close"'
# Stands in every line of openings that is not encrypted, and in no entry.
_PLAIN = b'"salt":"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased:
    """A session whose openings are gone. ``index`` is the redaction in the log.

    ``found`` tells whether there was a key or an opening file, ``blobs`` how many of its blobs.
    """

    session: str
    index: int
    found: bool
    blobs: int


class _Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An erasure that is not done yet. ``index`` is its redaction, once there is one."""

    by: str
    reason: str = ""
    index: int | None = None


_order_decoder = msgspec.json.Decoder(_Order)


def erase_sessions(
    writer: TraceWriter, sessions: Collection[str], *, by: str = "operator", reason: str = ""
) -> list[Erased]:
    """Destroy keys, openings and blobs of sessions of this log; each gets a ``redaction`` entry.

    A session that is still open goes on, and nothing more of it can be opened. Erasures that were
    ordered before are done too. Raise TraceInvalid ``erase.unknown`` (then nothing is erased),
    ``erase.no_vault``, ``trace.write_failed``, and what recording raises.
    """
    require_sessions(writer.openings.folder, writer.empty_journal().size, sessions)
    for session in sessions:
        order_erasure(writer.openings.folder, session, by=by, reason=reason)
    return finish_erasures(writer)


def erase_closed_before(
    writer: TraceWriter, time_ms: int, *, by: str = "retention", reason: str = ""
) -> list[Erased]:
    """Erase the sessions that were closed before a time and still have openings."""
    old = _old_sessions(writer, time_ms)
    return erase_sessions(writer, list(old), by=by, reason=reason) if old else []


def keep_retention(
    writer: TraceWriter, *, days: int, now_ms: int, seen_ms: Callable[[], Iterable[int]] = tuple
) -> list[Erased]:
    """Erase what is older than so many days; quick where no opening file is that old.

    Raise TraceInvalid ``retention.clock`` where the clock seems to have jumped since: neither an
    entry of this log nor the times of others, ``seen_ms``, bear out that so much time went by.
    """
    before_ms = now_ms - days * DAY_MS
    if not _has_file_before(writer.openings.folder, before_ms):
        return []
    old = _old_sessions(writer, before_ms)
    if not old:
        return []
    headers = _headers(writer.openings.folder, writer.checkpoint().size)
    seen = {time // DAY_MS * DAY_MS for _, _, time, _ in headers}.union(seen_ms())
    refuse_jump(seen, since_ms=min(old.values()), now_ms=now_ms, days=days)
    return erase_sessions(writer, list(old), by="retention", reason=f"older than {days} days")


def has_openings(directory: Path, *, before_ms: int) -> bool:
    """Tell whether a trace has an opening file that was last written before a time."""
    try:
        with Folder(directory) as folder:
            return _has_file_before(folder, before_ms)
    except TraceInvalid:  # opening the trace says why
        return True


def require_sessions(folder: Folder, size: int, sessions: Collection[str]) -> None:
    """Raise TraceInvalid ``erase.unknown`` unless the log has each of these sessions."""
    missing = set(sessions)
    for _, session, _, _ in _headers(folder, size):
        missing.discard(session)
        if not missing:
            return
    if missing:
        raise TraceInvalid(
            f"the log has no session {sorted(missing)[0][:80]!r}",
            code="erase.unknown",
            hint="safeconduct trace show names the sessions",
        )


def order_erasure(folder: Folder, session: str, *, by: str, reason: str = "") -> None:
    """Order an erasure durably; whoever writes the trace does it. Keep an order that stands."""
    path = f"{JOURNAL}/{session}.erase"
    if not folder.exists(path):
        _write_order(folder, path, _Order(by=clear_name(by), reason=reason and clear_name(reason)))


def finish_erasures(writer: TraceWriter) -> list[Erased]:
    """Do every erasure that was ordered. Can be repeated after a crash at any step.

    Nothing is done in a fork. Raise TraceInvalid ``erase.no_vault`` where the writer could not
    destroy a key.
    """
    store = writer.openings
    if store.is_fork or not (sessions := _ordered(store.folder)):
        return []
    if not store.has_vault:
        raise TraceInvalid(
            "openings are erased with the vault that keeps their keys",
            code="erase.no_vault",
            hint="open the trace with its vault",
        )
    try:
        indices = {session: _redact(writer, session) for session in sessions}
        found = {session: store.erase_session(session) for session in sessions}
        blobs = _destroy_blobs(store.folder, writer.empty_journal().size, sessions)
        if not _plain_in_journal(store.folder):  # else the next open does it once more
            for session in sessions:
                store.folder.destroy(f"{JOURNAL}/{session}.erase")
    except OSError as error:
        raise TraceInvalid(
            f"the erasure could not be finished: {error.strerror}",
            code="trace.write_failed",
            hint="repair the disk, then erase again: nothing is lost by repeating it",
        ) from error
    return [
        Erased(session=one, index=indices[one], found=found[one], blobs=blobs[one])
        for one in sessions
    ]


def _redact(writer: TraceWriter, session: str) -> int:
    """Record an ordered erasure, unless that was done before a crash; return its index."""
    folder, path = writer.openings.folder, f"{JOURNAL}/{session}.erase"
    order = _read_order(folder, path)
    if order.index is not None and _is_redaction(writer, order.index, session):
        return order.index
    body: dict[str, Json] = {"session": session, "what": "openings", "by": order.by}
    if order.reason:
        body["reason"] = order.reason
    index = writer.append_own(EntryKind.REDACTION, body)
    _write_order(folder, path, msgspec.structs.replace(order, index=index))
    return index


def _is_redaction(writer: TraceWriter, index: int, session: str) -> bool:
    """Tell whether an entry says that this session was erased: an order can name any."""
    for at, _, _, data in _headers(writer.openings.folder, writer.checkpoint().size):
        if at == index:
            entry = parse_entry(data)
            return entry.kind == EntryKind.REDACTION and entry.body.get("session") == session
    return False


def _ordered(folder: Folder) -> list[str]:
    matches = (_ORDER.fullmatch(name) for name in folder.names(JOURNAL))
    return [match[1] for match in matches if match]


def _read_order(folder: Folder, path: str) -> _Order:
    """Read an order; one that cannot be read still orders the erasure of the session it names."""
    try:
        order = _order_decoder.decode(folder.read(path, limit=_MAX_ORDER_BYTES))
    except (msgspec.DecodeError, ValueError, RecursionError):
        return _Order(by="unknown")
    return msgspec.structs.replace(
        order, by=clear_name(order.by), reason=order.reason and clear_name(order.reason)
    )


def _write_order(folder: Folder, path: str, order: _Order) -> None:
    try:
        folder.write(path, msgspec.json.encode(order), mode=0o600)
    except OSError as error:
        raise TraceInvalid(
            f"the erasure cannot be ordered: {error.strerror}", code="trace.write_failed"
        ) from error


def _headers(folder: Folder, size: int) -> Iterator[tuple[int, str, int, bytes]]:
    """Yield (index, session, time, bytes) of signed entries, without decoding each."""
    for stored in stored_entries(folder, size):
        match = _HEADER.search(stored.data[-_HEADER_BYTES:])
        if match is None:
            raise TraceInvalid(f"entry {stored.index} cannot be read", code="trace.entry")
        yield stored.index, match[1].decode("ascii"), int(match[2]), stored.data


def _old_sessions(writer: TraceWriter, before_ms: int) -> dict[str, int]:
    """Return the sessions that were closed before a time and have openings: when that was."""
    return {
        session: time
        for _, session, time, data in _headers(writer.openings.folder, writer.checkpoint().size)
        if time < before_ms and _CLOSED in data and parse_entry(data).kind == "session.close"
        and writer.openings.holds(session)
    }  # fmt: skip


def _destroy_blobs(folder: Folder, size: int, sessions: Sequence[str]) -> dict[str, int]:
    """Destroy the blobs that entries of these sessions commit to; return how many there were."""
    count = dict.fromkeys(sessions, 0)
    if not _has_any(folder, BLOBS):
        return count
    for _, session, _, data in _headers(folder, size):
        if session not in count:
            continue
        for value in parse_entry(data).body.values():
            digest = committed_digest(value)
            if digest is not None:
                folder.destroy(f"{BLOBS}/.{digest}.tmp")
                count[session] += folder.destroy(f"{BLOBS}/{digest}")
    return count


def _has_any(folder: Folder, path: str) -> bool:
    with folder.scan(path) as entries:
        return next(entries, None) is not None


def _has_file_before(folder: Folder, time_ms: int) -> bool:
    try:
        with folder.scan(OPENINGS) as entries:
            return any(one.stat(follow_symlinks=False).st_mtime * 1000 < time_ms for one in entries)
    except (OSError, TraceInvalid):  # it went, or cannot be looked at: opening the trace says why
        return folder.exists(OPENINGS)


def _plain_in_journal(folder: Folder) -> bool:
    """Tell whether the journal holds openings of a run that had no vault."""
    for name in folder.names(JOURNAL):
        if not name.endswith(".wal"):
            continue
        path = f"{JOURNAL}/{name}"
        with folder.open(path) as fd:
            end = b""
            while part := read_some(fd, path, _CHUNK_BYTES):
                if _PLAIN in end + part:
                    return True
                end = part[-len(_PLAIN) :]
    return False
