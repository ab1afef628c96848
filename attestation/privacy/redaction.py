"""Step "verify": hand a trace on with chosen openings only.

The copy is the public part of the trace, which verifies as before, and beside it, in plain, those
openings that were not held back. Only openings that hash to their commitment are handed on. A
copy holds no keys: what it opens stays open when the session is erased at home.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.entry import Entry, committed_digest, parse_entry
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.proofs.export import copy_public, fresh_folder
from safeconduct.attestation.reader import stored_entries
from safeconduct.errors import TraceInvalid

from .opened import Opening, Openings
from .openings import BLOBS, OPENINGS, OpeningStore, plain_line
from .vault import Vault

# LIMIT: what one export may hold back by name.
MAX_WORDS = 1000
# LIMIT: how short the beginning of a session's id may be that stands for it.
_PREFIX_CHARACTERS = 4
_FIELD = re.compile(r"[!-~]{1,200}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What went into a copy: its head, how many openings, how many were held back or not there."""

    head: Checkpoint
    opened: int
    redacted: int
    missing: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Redactions:
    """What is held back: whole sessions, fields of every session, and fields of one session."""

    sessions: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    pairs: frozenset[tuple[str, str]] = frozenset()

    def covers(self, session: str, name: str) -> bool:
        """Tell whether an opening is held back."""
        return session in self.sessions or name in self.fields or (session, name) in self.pairs


@dataclass(slots=True)
class _Counts:
    opened: int = 0
    redacted: int = 0
    missing: int = 0


@dataclass(slots=True)
class _Word:
    """One ``SESSION``, ``FIELD`` or ``SESSION/FIELD``, and what of the log it was found to name."""

    text: str
    session: str
    name: str
    sessions: set[str] = field(default_factory=set[str])
    is_field: bool = False


def export_opened(
    directory: Path, out: Path, *, redact: Sequence[str] = (), vault: Vault | None = None
) -> Exported:
    """Copy a trace to a new folder with all openings but those that ``redact`` names.

    Each word is a session (its id, or how it begins), a field, or ``SESSION/FIELD``. A word that
    names nothing, or not just one thing, is refused: a slip must not hand out what was meant to
    stay. Raise TraceInvalid ``redact.unknown``, ``redact.ambiguous``, ``export.*``, ``trace.*``.
    """
    with Folder(directory) as source, fresh_folder(out) as target:
        head = copy_public(source, target)
        hidden = find_redactions(source, head.size, redact)
        counts = _copy_openings(source, target, head.size, hidden, vault)
    return Exported(
        head=head, opened=counts.opened, redacted=counts.redacted, missing=counts.missing
    )


def find_redactions(folder: Folder, size: int, words: Sequence[str]) -> Redactions:
    """Find what words name in a log. Raise as ``export_opened`` does."""
    if not words:
        return Redactions()
    parsed = [_parse(word) for word in words[: MAX_WORDS + 1]]
    if len(parsed) > MAX_WORDS:
        raise TraceInvalid("too much to redact by name", code="redact.unknown")
    for stored in stored_entries(folder, size):
        entry = parse_entry(stored.data)
        for word in parsed:
            _match(word, entry)
    return _decide(parsed)


def _parse(text: str) -> _Word:
    session, slash, name = text.partition("/")
    if _FIELD.fullmatch(text) is None or (slash and not (session and name)):
        raise _unknown(text)
    return _Word(text=text, session=session, name=name if slash else "")


def _match(word: _Word, entry: Entry) -> None:
    known = len(word.session) >= _PREFIX_CHARACTERS and entry.session.startswith(word.session)
    if len(word.sessions) > 1:  # one too many already
        return
    if word.name:
        if known and committed_digest(entry.body.get(word.name)) is not None:
            word.sessions.add(entry.session)
    else:
        if known:
            word.sessions.add(entry.session)
        is_field = committed_digest(entry.body.get(word.session)) is not None
        word.is_field = word.is_field or is_field


def _decide(words: Collection[_Word]) -> Redactions:
    sessions: set[str] = set()
    fields: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    for word in words:
        if not word.sessions and not word.is_field:
            raise _unknown(word.text)
        if len(word.sessions) + word.is_field > 1:
            raise TraceInvalid(
                f"{word.text!r} names more than one thing in this log",
                code="redact.ambiguous",
                hint="write the whole id of the session, as `safeconduct trace show` prints it",
            )
        if word.is_field:
            fields.add(word.session)
        elif word.name:
            pairs.update((session, word.name) for session in word.sessions)
        else:
            sessions |= word.sessions
    return Redactions(
        sessions=frozenset(sessions), fields=frozenset(fields), pairs=frozenset(pairs)
    )


def _unknown(text: str) -> TraceInvalid:
    return TraceInvalid(
        f"{text[:80]!r} names nothing that could be redacted in this log",
        code="redact.unknown",
        hint="name a session, a field such as stdout, or SESSION/FIELD",
    )


def _copy_openings(
    source: Folder, target: Folder, size: int, hidden: Redactions, vault: Vault | None
) -> _Counts:
    target.make(OPENINGS, mode=0o700)
    target.make(BLOBS, mode=0o700)
    openings, store, counts = Openings(source, vault=vault), OpeningStore(target), _Counts()
    for stored in stored_entries(source, size):
        entry = parse_entry(stored.data)
        lines: list[bytes] = []
        for name, item in openings.of(stored.index, entry).items():
            if hidden.covers(entry.session, name):
                counts.redacted += 1
            elif isinstance(item, Opening):
                counts.opened += 1
                lines.append(_copied(target, entry, item))
            else:
                counts.missing += 1
        if lines:
            store.put(entry.session, b"".join(lines))
        if entry.kind == "session.close":
            openings.close_session(entry.session)
            store.close_session(entry.session)
    store.close()
    return counts


def _copied(target: Folder, entry: Entry, item: Opening) -> bytes:
    line, blob = plain_line(item.field, item.data, item.salt, index=item.index)
    if blob is not None:
        digest = committed_digest(entry.body[item.field])
        target.write(f"{BLOBS}/{digest}", blob, mode=0o600, durable=False)
    return line
