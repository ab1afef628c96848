"""Step "verify": which keys the brought ones handed the log over to, and which they ended.

A key is its public half here: a verifier may bring it under another name than a ``key.rotate``
entry has for it, or under several. docs/trace-format.md, "Key rotation", is the rule.
"""

from __future__ import annotations

import re
from bisect import bisect_right

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.entry import parse_entry
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import verify_consistency
from safeconduct.attestation.note import MAX_NOTE_BYTES, Note, VerifierKey
from safeconduct.attestation.rotation import follow_rotation
from safeconduct.attestation.tiles import TileStore
from safeconduct.errors import TraceInvalid

_HEADS = "checkpoints"
_SIZE = re.compile(r"[1-9][0-9]{0,18}")


class Handovers:
    """Adds to ``trusted`` the keys that those in it handed the log over to."""

    def __init__(
        self, folder: Folder, note: Note, head: Checkpoint, trusted: list[VerifierKey]
    ) -> None:
        self._folder, self._note, self._head = folder, note, head
        self._trusted = trusted
        self._sizes: list[int] | None = None
        self._successors: dict[bytes, bytes] = {}
        self.count = 0

    def ended(self, key: VerifierKey) -> bool:
        """Tell whether a key handed the log over: it signs nothing alone any more."""
        return key.public in self._successors

    def leads_to(self, old: VerifierKey, new: VerifierKey) -> bool:
        """Tell whether the log went from one key to another one, in any number of steps."""
        at: bytes | None = old.public
        for _ in range(len(self._successors)):
            at = self._successors.get(at) if at is not None else None
            if at == new.public:
                return True
        return False

    def signed_anew(self) -> bool:
        """Tell whether a trusted key that is in force signed the head."""
        return any(signs(key, self._note) for key in self._trusted if not self.ended(key))

    def follow(self, index: int, data: bytes) -> None:
        """Follow one ``key.rotate`` entry. Raise TraceInvalid ``rotation.*``."""
        body = parse_entry(data).body
        new = follow_rotation(body, self._trusted, self._head.origin)
        old = VerifierKey.parse(str(body["old"]))
        if self._successors.get(old.public, new.public) != new.public:
            message = f"{old.name} hands the log over a second time, to {new.name}"
            raise TraceInvalid(message, code="rotation.retired")
        path, note, head = self._covering(index)
        if not signs(old, note):
            raise TraceInvalid(
                f"{path} covers the handing over to {new.name} and is not signed by {old.name}",
                code="rotation.uncovered",
            )
        what = f"{path}, signed by {old.name},"
        require_extends(self._folder, self._head, head, "rotation.fork", what)
        self.count += 1
        self._successors[old.public] = new.public
        if all(new.public != key.public for key in self._trusted):
            self._trusted.append(new)

    def _covering(self, index: int) -> tuple[str, Note, Checkpoint]:
        """Return the smallest stored checkpoint that covers an entry; at last the newest one."""
        if self._sizes is None:  # read once: a log may be handed over thousands of times
            names = [name for name in self._folder.names(_HEADS) if _SIZE.fullmatch(name)]
            self._sizes = sorted(size for size in map(int, names) if size < self._head.size)
        at = bisect_right(self._sizes, index)
        if at == len(self._sizes):
            return "checkpoint", self._note, self._head
        path = f"{_HEADS}/{self._sizes[at]}"
        note = Note.parse(self._folder.read(path, limit=MAX_NOTE_BYTES))
        head = Checkpoint.parse(note.text)
        if head.size != self._sizes[at] or head.origin != self._head.origin:
            raise TraceInvalid(f"{path} is of another log", code="rotation.uncovered")
        return path, note, head


def require_extends(
    folder: Folder, head: Checkpoint, old: Checkpoint, code: str, what: str
) -> None:
    """Prove, from hashes that need not be believed, that the head extends an older one."""
    tiles = TileStore.load(folder, head.size)
    proof = tiles.prove_consistency(old.size, head.size)
    if not verify_consistency(old.size, old.root, head.size, head.root, proof):
        raise TraceInvalid(
            f"{what} is of another history of this log: the two were signed apart",
            code=code,
            hint="keep both checkpoints: together they prove that the log was forked",
        )


def signs(key: VerifierKey, note: Note) -> bool:
    """Tell whether a key signed a note. Raise ``checkpoint.signature`` where its line is false."""
    found = False
    named = key.of_log(note.text.partition("\n")[0])
    for line in note.signatures:
        if not named.made(line):
            continue
        if not named.verifies(line, note.text):
            raise TraceInvalid(
                f"the signature of {key.name} on the checkpoint of {note.text.split()[1]} entries"
                " is false",
                code="checkpoint.signature",
            )
        found = True
    return found
