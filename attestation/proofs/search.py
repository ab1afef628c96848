"""Step "verify": find the entries of one session or one call in a large log.

Most entries are not what is looked for: a whole bundle is passed over at the speed of a byte
search, and only what may fit is parsed. Nothing is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from safeconduct.attestation.entry import Entry, parse_entry
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.reader import Stored, read_checkpoint
from safeconduct.attestation.tiles import TILE_WIDTH, bundle_path, read_bundle, split_bundle
from safeconduct.call import EntryKind
from safeconduct.errors import TraceInvalid

OF_A_CALL = frozenset(
    {
        EntryKind.CALL_INTENT,
        EntryKind.CALL_DECISION,
        EntryKind.APPROVAL,
        EntryKind.CALL_OUTCOME,
    }
)


Progress: TypeAlias = Callable[[int, int], None]
"""Is told, now and then, how many entries of how many were looked at."""


def entries_with(
    folder: Folder, text: str, *, on_progress: Progress | None = None
) -> Iterator[tuple[Stored, Entry]]:
    """Yield the signed entries whose bytes contain this text, parsed.

    Raise TraceInvalid ``trace.*`` where the log cannot be read, or one of them is no entry.
    """
    wanted = text.encode()
    size = read_checkpoint(folder)[1].size
    for number in range((size + TILE_WIDTH - 1) // TILE_WIDTH):
        first = number * TILE_WIDTH
        if on_progress is not None:
            on_progress(first, size)
        width = min(TILE_WIDTH, size - first)
        bundle = read_bundle(folder, number, width)
        if wanted not in bundle:
            continue
        path = bundle_path(number, width)
        for at, (offset, data) in enumerate(split_bundle(bundle, width=width, path=path)):
            if wanted in data:
                stored = Stored(index=first + at, data=data, path=path, offset=offset + 2)
                yield stored, parse_entry(data)


def entries_of_session(
    folder: Folder, session: str, *, on_progress: Progress | None = None
) -> Iterator[tuple[Stored, Entry]]:
    """Yield the signed entries of a session.

    Raise TraceInvalid ``chain.twice`` where the log goes on with its id after its end: one part of
    that would look like a whole session.
    """
    wanted = f'"session":"{session}"'
    over = False
    for stored, entry in entries_with(folder, wanted, on_progress=on_progress):
        if entry.session != session:
            continue
        if over:
            raise TraceInvalid(
                f"entry {stored.index} uses the id of session {session} again, after its end",
                code="chain.twice",
                offset=stored.index,
                hint="the log breaks its own rules: see `safeconduct trace verify`",
            )
        yield stored, entry
        over = entry.kind is EntryKind.SESSION_CLOSE


def ends_of_session(
    folder: Folder, session: str, *, on_progress: Progress | None = None
) -> list[Stored]:
    """Return the signed first and last entry of a session that is over.

    Raise TraceInvalid ``session.open`` where it is not.
    """
    entries = list(entries_of_session(folder, session, on_progress=on_progress))
    if not entries or entries[-1][1].kind is not EntryKind.SESSION_CLOSE:
        raise TraceInvalid(
            f"the session {session} is not over in the signed log",
            code="session.open",
            hint="close it first, or state something about one of its calls",
        )
    return [entries[0][0], entries[-1][0]]


def entries_of_call(
    folder: Folder, named: str, *, on_progress: Progress | None = None
) -> list[Stored]:
    """Return the signed entries of the one call whose id begins so, from intent to outcome.

    Raise TraceInvalid ``call.unknown`` where there is none or several, ``call.open`` where it has
    no outcome.
    """
    found: dict[tuple[str, str], list[Stored]] = {}
    ended: set[tuple[str, str]] = set()
    for stored, entry in entries_with(folder, f'"call":"{named}', on_progress=on_progress):
        call = str(entry.body.get("call", ""))
        if entry.kind in OF_A_CALL and call.startswith(named):
            key = (entry.session, call)
            found.setdefault(key, []).append(stored)
            ended |= {key} if entry.kind is EntryKind.CALL_OUTCOME else set()
    exact = [key for key in found if key[1] == named]
    if len(exact) != 1 and len(found) != 1:
        raise TraceInvalid(
            f"{len(found) or 'no'} calls of the signed log begin with {named[:80]!r}",
            code="call.unknown",
            hint="safeconduct trace show lists them with their ids",
        )
    key = exact[0] if len(exact) == 1 else next(iter(found))
    if key not in ended:
        raise TraceInvalid(
            f"call {key[1]} has no outcome in the signed log",
            code="call.open",
            hint="wait for its end",
        )
    return found[key]
