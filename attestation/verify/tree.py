"""Step "verify": the tree over the entries, carried up from hashes of bundles to the root.

Only the right edge is in memory. Every stored hash tile above the entries is compared on the way:
one that differs names the stretch of entries where the tree and the files part.
"""

from __future__ import annotations

from collections.abc import Callable

from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import EMPTY_ROOT, HASH_BYTES, fold
from safeconduct.attestation.tiles import TILE_WIDTH, read_tile, tile_path
from safeconduct.errors import TraceInvalid

from .summary import full_root

_TILE_HEIGHT = 8
_TILE_BYTES = TILE_WIDTH * HASH_BYTES

Tell = Callable[[TraceInvalid, str, int, int], None]
"""Take what is wrong, in which file, at which byte of it, and at which entry."""


class Tree:
    """Grows by the hashes of full bundles, and at last by those of a partial one's entries."""

    def __init__(self, folder: Folder, tell: Tell) -> None:
        self._folder, self._tell = folder, tell
        # INVARIANT: level 0 are the entries, 1 the full bundles; each shorter than one tile.
        self._levels: list[bytes] = [b"", b""]
        self._bundles = 0
        self._told = False

    def push(self, bundle_root: bytes) -> None:
        """Add one full bundle."""
        self._bundles += 1
        self._levels[1] += bundle_root
        level, index = 1, self._bundles
        while len(self._levels[level]) == _TILE_BYTES:
            hashes, self._levels[level] = self._levels[level], b""
            index //= TILE_WIDTH
            self._compare(level, index - 1, hashes)
            if len(self._levels) == level + 1:
                self._levels.append(b"")
            level += 1
            self._levels[level] += full_root(hashes)

    def finish(self, leaves: bytes) -> bytes:
        """Add the hashes of the entries that fill no bundle, and return the root."""
        self._levels[0] = leaves
        size = self._bundles * TILE_WIDTH + len(leaves) // HASH_BYTES
        for level in range(1, len(self._levels)):
            if self._levels[level]:
                self._compare(level, size >> _TILE_HEIGHT * (level + 1), self._levels[level])
        parts = [part for hashes in reversed(self._levels) for part in _complete(hashes)]
        return fold(parts) if parts else EMPTY_ROOT

    def _compare(self, level: int, index: int, hashes: bytes) -> None:
        """Hold computed hashes against the stored tile; only the first difference is told."""
        if self._told:
            return
        width = len(hashes) // HASH_BYTES
        path = tile_path(level, index, width)
        try:
            stored = read_tile(self._folder, level, index, width)
        except TraceInvalid as error:
            self._told = True
            self._tell(error, path, error.offset, (index * TILE_WIDTH) << _TILE_HEIGHT * level)
            return
        if stored == hashes:
            return
        self._told = True
        at = next(at for at in range(0, len(hashes), HASH_BYTES) if _part(stored, at, hashes))
        first = (index * TILE_WIDTH + at // HASH_BYTES) << _TILE_HEIGHT * level
        message = f"the tree differs from its tile within {1 << _TILE_HEIGHT * level} entries"
        self._tell(TraceInvalid(message, code="tile.hash"), path, at, first)


def _part(stored: bytes, at: int, hashes: bytes) -> bool:
    return stored[at : at + HASH_BYTES] != hashes[at : at + HASH_BYTES]


def _complete(hashes: bytes) -> list[bytes]:
    """Return the roots of the complete subtrees over some siblings, largest first."""
    parts: list[bytes] = []
    count, at = len(hashes) // HASH_BYTES, 0
    for height in range(count.bit_length() - 1, -1, -1):
        if count >> height & 1:
            end = at + (HASH_BYTES << height)
            parts.append(full_root(hashes[at:end]))
            at = end
    return parts
