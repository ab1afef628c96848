"""Step "verify": check a trace that may have been prepared by an enemy.

Trust comes from the verifier: a key found inside the folder is a claim and nothing else. Every
entry is hashed from its stored bytes and carried up to the signed root; hash tiles only help to
name the first bad entry. Reading is streaming, in constant memory, and follows no link. Nothing
of runtime, policies or wasmtime is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from safeconduct.call import EntryKind
from safeconduct.errors import Exit, TraceInvalid

from .chain import Chains
from .checkpoint import Checkpoint
from .entry import Entry, parse_entry
from .folder import Folder
from .journal import JournalTail, read_journal
from .merkle import HASH_BYTES, CompactRange, leaf_hash, tile_root
from .note import Note, VerifierKey
from .reader import CHECKPOINT, Stored, read_checkpoint
from .report import Finding, Report, command
from .tiles import TILE_WIDTH, bundle_path, read_bundle, read_tile, split_bundle, tile_path

# LIMIT: findings kept; the first is the one that matters.
_MAX_FINDINGS = 20
# LIMIT: keys a verifier may bring.
_MAX_KEYS = 64
# LIMIT: unsigned journal entries that are counted.
_MAX_UNSIGNED = 1_000_000

# These say that bytes are not what was signed; other findings say that something is not there.
_ABSENT = frozenset({"trace.missing", "session.open", "call.open", "call.unknown", "log.unsigned"})
_UNREADABLE = frozenset({"trace.io"})

_ALWAYS_UNCHECKED: Final[tuple[str, ...]] = (
    "a dropped tail would not be noticed: compare the size with a checkpoint you hold",
    "whether everything that happened was recorded, and recorded truthfully",
    "times are the recording machine's own",
    "openings and blobs (they are outside the signed tree; replay checks each it uses)",
)


def verify_trace(directory: Path, keys: Sequence[str], *, origin: str | None = None) -> Report:
    """Verify a trace against public key lines that the verifier brings.

    ``origin`` pins which log it must be; without it, any log of the key will do, and the report
    says so. Hostile folders end in a Report, never in an exception; only a key line that is no
    key raises TraceInvalid ``key.invalid``.
    """
    trusted = [VerifierKey.parse(line.strip()) for line in keys[:_MAX_KEYS]]
    try:
        folder = Folder(directory)
    except TraceInvalid as error:
        return Report(
            status=Exit.TRACE_IO, findings=(Finding(code=error.code, message=error.message),)
        )
    with folder:
        return _Verification(folder, directory, trusted, origin).run()


class _Verification:
    """The state of one run: the tree built so far, the chains, the findings."""

    def __init__(
        self, folder: Folder, directory: Path, trusted: Sequence[VerifierKey], origin: str | None
    ) -> None:
        self._folder, self._directory = folder, directory
        self._trusted, self._origin = trusted, origin
        self._findings: list[Finding] = []
        self._chains = Chains()
        self._edge = CompactRange()
        self._levels: list[list[bytes]] = [[]]
        self._signed_by = ""
        self._claimed: tuple[str, ...] = ()
        self._claimed_line = ""
        self._isolation = ""
        self._recoveries = 0
        self._unsigned = 0

    def run(self) -> Report:
        """Check signature, tree, entries, chains and journal, in this order."""
        head: Checkpoint | None = None
        try:
            note, head = read_checkpoint(self._folder)
            self._check_signature(note, head)
            self._check_tree(head)
        except TraceInvalid as error:
            self._add(error, path=CHECKPOINT if head is None else "", offset=error.offset)
        if head is not None and not self._findings:
            self._check_ends()
            self._check_journal(head.size)
        return self._report(head)

    def _check_signature(self, note: Note, head: Checkpoint) -> None:
        self._claimed = tuple(f"{one.name}+{one.id.hex()}" for one in note.signatures)
        if self._origin not in (None, head.origin):
            message = f"this is the log {head.origin}, not {self._origin}"
            raise TraceInvalid(message, code="trace.origin")
        for key in self._trusted:
            for signature in note.signatures:
                if not key.made(signature):
                    continue
                if not key.verifies(signature, note.text):
                    message = f"the signature of {key.name} on the checkpoint is false"
                    raise TraceInvalid(message, code="checkpoint.signature")
                self._signed_by = key.name

    def _check_tree(self, head: Checkpoint) -> None:
        """Hash every entry up to the root. Tiles that disagree name the first bad entry."""
        for number in range((head.size + TILE_WIDTH - 1) // TILE_WIDTH):
            width = min(TILE_WIDTH, head.size - number * TILE_WIDTH)
            path = bundle_path(number, width)
            try:
                self._check_bundle(number, width, path)
            except TraceInvalid as error:  # what follows has no place in the tree
                self._add(error, path, error.offset, self._edge.size)
                return
            self._check_full_tiles()
        self._check_partial_tiles()
        if self._edge.root() != head.root:
            message = f"the {head.size} entries do not hash to the checkpoint's root"
            self._add(_bad("trace.root", message), CHECKPOINT, -1)

    def _check_bundle(self, number: int, width: int, path: str) -> None:
        bundle = read_bundle(self._folder, number, width)
        hashes = read_tile(self._folder, 0, number, width)
        end = 0
        for at, (offset, data) in enumerate(split_bundle(bundle, width=width, path=path)):
            index = number * TILE_WIDTH + at
            stored = Stored(index=index, data=data, path=path, offset=offset + 2)
            self._check_entry(stored, hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES])
            end = offset + 2 + len(data)
        # A full bundle read in place of a partial one goes on with later entries, rightly.
        if end != len(bundle) and self._folder.exists(path):
            self._add(_bad("trace.tile", f"{path} goes on after its last entry"), path, end)

    def _check_entry(self, stored: Stored, expected: bytes) -> None:
        leaf = leaf_hash(stored.data)
        self._edge.push(leaf)
        self._levels[0].append(leaf)
        if leaf != expected:
            message = f"entry {stored.index} does not have the hash the tree has for it"
            self._add(_bad("entry.hash", message), stored.path, stored.offset, stored.index)
        if self._findings:
            return  # the rest only has to hash: chains after a bad entry say nothing new
        try:
            entry = parse_entry(stored.data)
            self._chains.follow(stored.index, entry, leaf.hex())
            self._note_facts(entry)
        except TraceInvalid as error:
            inside = error.offset if error.code == "trace.encoding" and error.offset >= 0 else 0
            self._add(error, stored.path, stored.offset + inside, stored.index)

    def _note_facts(self, entry: Entry) -> None:
        if entry.kind is EntryKind.LOG_OPEN:
            self._isolation = str(entry.body["signer_isolation"])[:80]
            self._claimed_line = str(entry.body["key"])[:512]
        elif entry.kind is EntryKind.LOG_RECOVERED:
            self._recoveries += 1

    def _check_full_tiles(self) -> None:
        """Compare the hash tiles that have just become full, lowest level first."""
        level, index = 0, self._edge.size // TILE_WIDTH - 1
        while len(self._levels[level]) == TILE_WIDTH:
            hashes = self._levels[level]
            self._levels[level] = []
            if level:
                self._compare_tile(level, index, hashes)
            if len(self._levels) == level + 1:
                self._levels.append([])
            self._levels[level + 1].append(tile_root(hashes))
            level, index = level + 1, index // TILE_WIDTH

    def _check_partial_tiles(self) -> None:
        size = self._edge.size
        for level, hashes in enumerate(self._levels):
            if level and hashes:
                self._compare_tile(level, size >> 8 * (level + 1), hashes)

    def _compare_tile(self, level: int, index: int, hashes: list[bytes]) -> None:
        stored = read_tile(self._folder, level, index, len(hashes))
        for at, computed in enumerate(hashes):
            if stored[at * HASH_BYTES : (at + 1) * HASH_BYTES] != computed:
                path = tile_path(level, index, len(hashes))
                first = (index * TILE_WIDTH + at) << 8 * level
                message = f"the tree differs from its tile within {1 << 8 * level} entries"
                self._add(_bad("tile.hash", message), path, at * HASH_BYTES, first)
                return

    def _check_ends(self) -> None:
        """Report what the signed entries leave open."""
        for session in self._chains.open.values():
            for call, intent in session.calls.items():
                self._add(_bad("call.open", f"call {call!r} has no outcome"), index=intent)
            what = "this run of the log" if session.is_log else "a session"
            self._add(_bad("session.open", f"{what} is not closed"), index=session.opened_at)

    def _check_journal(self, size: int) -> None:
        """Count entries after the checkpoint: nobody vouches for them."""
        tail = JournalTail()
        try:
            for index, _ in read_journal(self._folder, tail):
                self._unsigned += index >= size
                if self._unsigned >= _MAX_UNSIGNED:
                    break
        except TraceInvalid as error:
            self._add(error)
        if tail.dropped_bytes:
            message = f"the journal ends in {tail.dropped_bytes} bytes that are no entry"
            self._add(_bad("log.unsigned", message))
        if self._unsigned:
            message = f"{self._unsigned} entries after the checkpoint are not signed"
            self._add(_bad("log.unsigned", message), index=size)

    def _add(self, error: TraceInvalid, path: str = "", offset: int = -1, index: int = -1) -> None:
        if len(self._findings) < _MAX_FINDINGS:
            self._findings.append(
                Finding(
                    code=error.code, message=error.message, index=index, path=path, offset=offset
                )
            )

    def _report(self, head: Checkpoint | None) -> Report:
        status = self._status()
        return Report(
            status=status,
            level=1 if self._signed_by and status in (Exit.OK, Exit.INCOMPLETE) else 0,
            origin=head.origin if head else "",
            signed_by=self._signed_by,
            claimed_keys=self._claimed,
            claimed_key_line=self._claimed_line,
            size=head.size if head else 0,
            root=head.root.hex() if head else "",
            sessions=self._chains.sessions,
            calls=self._chains.calls,
            open_sessions=sum(not one.is_log for one in self._chains.open.values()),
            open_calls=self._chains.open_calls,
            unsigned=self._unsigned,
            recoveries=self._recoveries,
            findings=tuple(self._findings),
            not_checked=self._not_checked(),
            next_step=self._next_step(status),
        )

    def _status(self) -> Exit:
        """A broken hash accuses whoever signed; absence does not; without a key nothing counts."""
        codes = {one.code for one in self._findings}
        if codes & _UNREADABLE:
            return Exit.TRACE_IO
        if codes - _ABSENT - {"trace.origin"}:
            return Exit.TAMPERED
        if (not self._signed_by and self._claimed) or "trace.origin" in codes:
            return Exit.UNTRUSTED
        return Exit.INCOMPLETE if codes else Exit.OK

    def _not_checked(self) -> tuple[str, ...]:
        unchecked: list[str] = list(_ALWAYS_UNCHECKED)
        if self._origin is None:
            unchecked.append("that it is the log you meant: any log of that key passes")
        if self._isolation:
            unchecked.append(
                f"the signer's isolation: the log says {self._isolation!r} (same user id as the "
                "recorder)"
            )
        if self._recoveries:
            unchecked.append(f"what {self._recoveries} crash(es) took before it was recorded")
        return tuple(unchecked)

    def _next_step(self, status: Exit) -> str:
        if status is not Exit.UNTRUSTED:
            return ""
        return f"get the key line from the operator, then: {command(str(self._directory))}"


def _bad(code: str, message: str) -> TraceInvalid:
    return TraceInvalid(message, code=code)
