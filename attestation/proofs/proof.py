"""Step "verify": a proof that one entry is in the log (C2SP tlog-proof), to be kept in a file.

It is checked offline, with the keys of log and witnesses and nothing else. Its ``extra`` line says
which entry it is about: the entry's leaf hash, so that the proof stays small, or the entry itself.
Nobody need believe that line: the proof is good only if it leads from there to the signed root.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.encoding import MAX_ENTRY_BYTES
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import (
    HASH_BYTES,
    MAX_PROOF_HASHES,
    MAX_SIZE,
    CompactRange,
    leaf_hash,
    prove_inclusion,
    tile_root,
    verify_inclusion,
)
from safeconduct.attestation.note import MAX_NOTE_BYTES, Note, decode_base64, encode_base64
from safeconduct.attestation.reader import CHECKPOINT, Stored, read_checkpoint
from safeconduct.attestation.tiles import (
    TILE_WIDTH,
    bundle_path,
    read_bundle,
    read_tile,
    split_bundle,
)
from safeconduct.errors import TraceInvalid

FIRST_LINE = "c2sp.org/tlog-proof@v1"
PROOF_SUFFIX = ".tlog-proof"
ENTRY_SUFFIX = ".entry"  # the entry itself lies beside its proof
# LIMIT: an entry in base64, 126 hashes, a note, and the few words around them.
MAX_PROOF_BYTES = (MAX_ENTRY_BYTES * 4) // 3 + MAX_PROOF_HASHES * 45 + MAX_NOTE_BYTES + 1024
CHECKPOINTS = "checkpoints"

_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
_LEAF, _ENTRY = b"\x00", b"\x01"  # what follows in the extra data: a leaf hash, or an entry
# LIMIT: a cosignature line holds a time and a signature after the key's id.
_COSIGNATURE_BYTES = 8 + 64
# LIMIT: earlier heads that are looked at for one with more cosignatures.
_MAX_HEADS = 1024
_TILE_HEIGHT = 8
_TILES_HELD = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProof:
    """A proof as a file holds it: nothing about it is believed yet.

    ``checkpoint`` is the signed note, verbatim. ``leaf`` and ``entry`` are what the extra line
    says; both are None where there is none.
    """

    index: int
    hashes: tuple[bytes, ...]
    checkpoint: bytes
    leaf: bytes | None = None
    entry: bytes | None = None

    def encode(self) -> bytes:
        """Return the file's bytes."""
        extra = b""
        if self.entry is not None:
            extra = _ENTRY + self.entry
        elif self.leaf is not None:
            extra = _LEAF + self.leaf
        lines = [FIRST_LINE]
        lines += [f"extra {encode_base64(extra)}"] if extra else []
        lines += [f"index {self.index}", *map(encode_base64, self.hashes), "", ""]
        return "\n".join(lines).encode() + self.checkpoint

    @classmethod
    def parse(cls, data: bytes) -> LogProof:
        """Parse a proof strictly. Raise TraceInvalid ``proof.invalid``."""
        head, separator, checkpoint = data.partition(b"\n\n")
        if len(data) > MAX_PROOF_BYTES or not separator or not head.isascii():
            raise invalid("it is not one")
        first, *lines = head.decode("ascii").split("\n")
        extra = b""
        if lines and lines[0].startswith("extra "):
            extra = decode_base64(lines.pop(0).removeprefix("extra "), code="proof.invalid")
            if not extra:  # "If no extra data is present, this line is omitted"
                raise invalid("its extra line is empty")
        if first != FIRST_LINE or not lines or not lines[0].startswith("index "):
            raise invalid("it does not begin as one")
        number = lines.pop(0).removeprefix("index ")
        if _NUMBER.fullmatch(number) is None or int(number) > MAX_SIZE:
            raise invalid("its index is no number")
        leaf, entry = _parse_extra(extra)
        return cls(
            index=int(number),
            hashes=parse_hashes(lines),
            checkpoint=checkpoint,
            leaf=leaf,
            entry=entry,
        )

    def holds(self, leaf: bytes, head: Checkpoint) -> bool:
        """Tell whether the proof leads from this leaf hash to that head."""
        return verify_inclusion(leaf, self.index, head.size, self.hashes, head.root)


def _parse_extra(extra: bytes) -> tuple[bytes | None, bytes | None]:
    kind, data = extra[:1], extra[1:]
    if kind == _LEAF and len(data) == HASH_BYTES:
        return data, None
    if kind == _ENTRY:
        return None, data
    if extra:
        raise invalid("what stands in its extra line is not known")
    return None, None


def parse_hashes(lines: list[str]) -> tuple[bytes, ...]:
    """Parse lines of base64 hashes. Raise TraceInvalid ``proof.invalid``."""
    hashes = tuple(decode_base64(line, code="proof.invalid") for line in lines)
    if any(len(one) != HASH_BYTES for one in hashes):
        raise invalid("a hash in it has the wrong length")
    return hashes


class StoredTree:
    """The tree of a trace folder, read tile by tile; ``size`` is that of its newest head.

    Every complete subtree of a smaller tree is one of this tree too, so it proves for earlier
    heads as well. A few tiles are kept: entries that are proved one after the other share them.
    """

    def __init__(self, folder: Folder, size: int) -> None:
        self._folder, self._size = folder, size
        self._tile = lru_cache(maxsize=_TILES_HELD)(self._read_tile)

    def node(self, level: int, index: int) -> bytes:
        """Return the hash of a complete subtree. Raise TraceInvalid ``trace.*``."""
        tile_level, height = divmod(level, _TILE_HEIGHT)
        number, position = divmod(index << height, TILE_WIDTH)
        tile = self._tile(tile_level, number)
        part = tile[position * HASH_BYTES : (position + (1 << height)) * HASH_BYTES]
        if len(part) != HASH_BYTES << height:
            raise TraceInvalid(f"there is no subtree {level}/{index}", code="trace.tile")
        return tile_root([part[at : at + HASH_BYTES] for at in range(0, len(part), HASH_BYTES)])

    def root(self, size: int) -> bytes:
        """Return the root that the tiles give a tree of this size."""
        return CompactRange.at(size, self.node).root()

    def entry(self, index: int) -> Stored:
        """Read one entry of the signed log. Raise TraceInvalid ``trace.*``."""
        number, at = divmod(index, TILE_WIDTH)
        width = min(TILE_WIDTH, self._size - number * TILE_WIDTH)
        path = bundle_path(number, width)
        for count, (offset, data) in enumerate(
            split_bundle(read_bundle(self._folder, number, width), width=width, path=path)
        ):
            if count == at:
                return Stored(index=index, data=data, path=path, offset=offset + 2)
        raise TraceInvalid(f"{path} ends before entry {index}", code="trace.tile")

    def _read_tile(self, level: int, number: int) -> bytes:
        hashes = (self._size >> _TILE_HEIGHT * level) - number * TILE_WIDTH
        if hashes <= 0:
            return b""
        return read_tile(self._folder, level, number, min(hashes, TILE_WIDTH))


def prove_entry(folder: Folder, index: int, *, with_entry: bool = False) -> tuple[LogProof, Stored]:
    """Prove that an entry is in the tree of a signed head; return the proof and the entry.

    The head is the one with the most cosignatures, the newest of these. Nothing is verified but
    that the stored tree leads to it. Raise TraceInvalid ``proof.range``, ``trace.*``.
    """
    note, head = best_head(folder, index + 1)
    # The newest head is read last: the log may be growing, and the tree must hold both.
    tree = StoredTree(folder, read_checkpoint(folder)[1].size)
    stored = tree.entry(index)
    leaf = leaf_hash(stored.data)
    proof = LogProof(
        index=index,
        hashes=tuple(prove_inclusion(index, head.size, tree.node)),
        checkpoint=note,
        leaf=None if with_entry else leaf,
        entry=stored.data if with_entry else None,
    )
    if not proof.holds(leaf, head):
        raise broken(index)
    return proof, stored


def best_head(folder: Folder, size: int) -> tuple[bytes, Checkpoint]:
    """Return the signed head of at least this size that most witnesses cosigned.

    Cosignatures are counted, not verified: a false one makes the proof fail, never pass.
    """
    best: tuple[int, int, bytes, Checkpoint] | None = None
    for data, note in _heads(folder, size):
        head = Checkpoint.parse(note.text)
        count = sum(len(one.signature) == _COSIGNATURE_BYTES for one in note.signatures)
        if head.size >= size and (best is None or (count, head.size) > best[:2]):
            best = (count, head.size, data, head)
    if best is None:
        raise TraceInvalid(
            f"no signed head has {size} entries or more",
            code="proof.range",
            hint="entries are counted from 0; what is not signed yet is when the log is closed",
        )
    return best[2], best[3]


def _heads(folder: Folder, size: int) -> Iterator[tuple[bytes, Note]]:
    data = folder.read(CHECKPOINT, limit=MAX_NOTE_BYTES)
    yield data, Note.parse(data)
    sizes = [int(name) for name in folder.names(CHECKPOINTS) if _NUMBER.fullmatch(name)]
    for earlier in sorted((one for one in sizes if one >= size), reverse=True)[:_MAX_HEADS]:
        data = folder.read(f"{CHECKPOINTS}/{earlier}", limit=MAX_NOTE_BYTES)
        try:
            note = Note.parse(data)
            Checkpoint.parse(note.text)
        except TraceInvalid:
            continue  # another head will do; what is wrong here is the verifier's to say
        yield data, note


def broken(index: int) -> TraceInvalid:
    """Return the error for a stored tree that does not lead to its own signed head."""
    return TraceInvalid(
        f"entry {index} and its tree do not lead to the signed head",
        code="trace.root",
        offset=index,
        hint="the trace is damaged or was changed: safeconduct trace verify says where",
    )


def invalid(why: str) -> TraceInvalid:
    """Return the error for bytes that are no proof of ours."""
    return TraceInvalid(
        f"the proof cannot be read: {why}", code="proof.invalid", hint="ask for the file again"
    )
