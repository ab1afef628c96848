"""Step "verify": a session bundle: all entries of one session, and the proof that the log has them.

One file (docs/trace-format.md, "Handing on a part"): the session's entries as they are stored, one
proof for all of them, a signed head. The entries number themselves and name each other, from the
first to ``session.close``: one from which any is missing does not verify. Reading is streaming.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from safeconduct.attestation.chain import Chains
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.encoding import MAX_ENTRY_BYTES
from safeconduct.attestation.entry import Entry, parse_entry
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import MAX_SIZE, leaf_hash
from safeconduct.attestation.note import MAX_NOTE_BYTES, encode_base64
from safeconduct.attestation.reader import read_checkpoint
from safeconduct.attestation.verify import story
from safeconduct.errors import TraceInvalid

from .multiproof import prove_many, root_of_many
from .proof import StoredTree, best_head, broken, parse_hashes
from .search import Progress, entries_of_session, entries_with

FIRST_LINE = "safeconduct/bundle@v1"
# LIMIT: entries of one bundle; of each, 32 bytes and a number are held.
MAX_ENTRIES = 1_000_000
# LIMIT: hashes of one proof: even every fourth entry of a log needs no more than two for each.
_MAX_HASHES = 4 * MAX_ENTRIES
_MAX_LINE_BYTES = MAX_ENTRY_BYTES + 32
_HASH_LINE_BYTES = 45  # a hash in base64, and the newline
_ENTRY_LINE = re.compile(rb"(0|[1-9][0-9]{0,18}) (\{.*\})", re.DOTALL)
_SESSION = re.compile(r"[0-9a-z-]{1,64}")
_CLOSE = "session.close"


@dataclass(slots=True, kw_only=True)
class Bundle:
    """What a bundle holds: its entries' places and hashes, not the entries. Nothing is believed.

    ``closed`` tells that the last entry ends the session, ``forgot`` that it has more calls than
    whose ids could be compared.
    """

    session: str
    indices: list[int] = field(default_factory=list[int])
    leaves: list[bytes] = field(default_factory=list[bytes])
    proof: tuple[bytes, ...] = ()
    checkpoint: bytes = b""
    calls: int = 0
    open_calls: int = 0
    closed: bool = False
    forgot: bool = False

    def holds(self, head: Checkpoint) -> bool:
        """Tell whether the proof leads from all entries to that head."""
        return root_of_many(self.indices, self.leaves, head.size, self.proof) == head.root


def find_session(folder: Folder, named: str, *, on_progress: Progress | None = None) -> str:
    """Return the one session whose id begins so. Raise TraceInvalid ``bundle.session``."""
    if _SESSION.fullmatch(named) is None:
        raise _no_session(named)
    found: set[str] = set()
    for _, entry in entries_with(folder, f'"session":"{named}', on_progress=on_progress):
        if entry.session == named:
            return named
        if entry.session.startswith(named):
            found.add(entry.session)
    if not found:
        raise _no_session(named)
    if len(found) > 1:
        raise TraceInvalid(
            f"{len(found)} sessions begin with {named!r}",
            code="bundle.session",
            hint="write more of its id",
        )
    return found.pop()


def write_bundle(
    folder: Folder, session: str, out: BinaryIO, *, on_progress: Progress | None = None
) -> Bundle:
    """Write the bundle of a session to a binary file, and return what it holds.

    The head is the one with the most cosignatures that covers the session. Raise TraceInvalid
    ``bundle.session`` where the signed log has no such session, ``chain.twice`` where it has two of
    that id, ``trace.*`` where it is damaged.
    """
    bundle = Bundle(session=session)
    reading = _Reading(bundle)
    out.write(f"{FIRST_LINE}\nsession {session}\n".encode())
    for stored, entry in entries_of_session(folder, session, on_progress=on_progress):
        reading.take(stored.index, stored.data, entry)
        out.write(b"%d %s\n" % (stored.index, stored.data))
    if not bundle.indices:
        raise _no_session(session)
    note, head = best_head(folder, bundle.indices[-1] + 1)
    tree = StoredTree(folder, read_checkpoint(folder)[1].size)
    bundle.proof = tuple(prove_many(bundle.indices, head.size, tree.node))
    bundle.checkpoint = note
    if not bundle.holds(head):
        raise broken(bundle.indices[0])
    out.write("\n".join(["", *map(encode_base64, bundle.proof), "", ""]).encode() + note)
    return bundle


def read_bundle_file(stream: BinaryIO) -> Bundle:
    """Read a bundle and follow its session, line by line.

    Raise TraceInvalid ``bundle.invalid``, or what the first bad entry breaks (``chain.*``,
    ``call.*``, ``trace.*``): ``offset`` is then the entry's index.
    """
    if _line(stream) != FIRST_LINE.encode():
        raise _invalid("it does not begin as one")
    word, _, session = _line(stream).decode("utf-8", "replace").partition(" ")
    if word != "session" or _SESSION.fullmatch(session) is None:
        raise _invalid("it names no session")
    reading = _Reading(Bundle(session=session))
    while line := _line(stream):
        match = _ENTRY_LINE.fullmatch(line)
        if match is None or int(match[1]) > MAX_SIZE:
            raise _invalid("a line in it is no entry")
        reading.take(int(match[1]), match[2], parse_entry(match[2]))
    bundle = reading.bundle
    if not bundle.indices:
        raise _invalid("it has no entries")
    bundle.proof = parse_hashes([line.decode("ascii", "replace") for line in _hashes(stream)])
    bundle.checkpoint = stream.read(MAX_NOTE_BYTES + 1)
    return bundle


class _Reading:
    """Takes the entries of a session one after the other, by the rules every log keeps."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._chains = Chains()
        self._barred: story.Barred = {}

    def take(self, index: int, data: bytes, entry: Entry) -> None:
        bundle = self.bundle
        if entry.session != bundle.session:
            raise _invalid(f"entry {index} is of another session", index)
        if bundle.indices and index <= bundle.indices[-1]:
            raise _invalid(f"entry {index} does not come after the one before", index)
        if bundle.closed:
            raise _invalid(f"entry {index} comes after the session's end", index)
        if len(bundle.indices) == MAX_ENTRIES:
            raise _invalid(f"it has more than {MAX_ENTRIES} entries", index)
        leaf = leaf_hash(data)
        self._chains.follow(index, entry, leaf.hex())
        story.follow(self._barred, index, entry)
        bundle.indices.append(index)
        bundle.leaves.append(leaf)
        bundle.calls, bundle.open_calls = self._chains.calls, self._chains.open_calls
        bundle.closed, bundle.forgot = entry.kind == _CLOSE, self._chains.forgot


def _hashes(stream: BinaryIO) -> Iterator[bytes]:
    for _ in range(_MAX_HASHES):
        line = _line(stream, _HASH_LINE_BYTES)
        if not line:
            return
        yield line
    raise _invalid(f"its proof has more than {_MAX_HASHES} hashes")


def _line(stream: BinaryIO, limit: int = _MAX_LINE_BYTES) -> bytes:
    line = stream.readline(limit)
    if not line.endswith(b"\n"):
        raise _invalid("it is cut off, or a line is too long")
    return line[:-1]


def _invalid(why: str, index: int = -1) -> TraceInvalid:
    return TraceInvalid(
        f"the bundle cannot be believed: {why}",
        code="bundle.invalid",
        offset=index,
        hint="ask for the file again",
    )


def _no_session(named: str) -> TraceInvalid:
    return TraceInvalid(
        f"the signed log has no session {named[:80]!r}",
        code="bundle.session",
        hint="safeconduct trace show lists what it has; what is not signed yet is when it closes",
    )
