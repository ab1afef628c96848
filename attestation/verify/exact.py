"""Step "verify": read bundles entry by entry, and name the first one that is wrong.

The slow way, taken where the fast one is in doubt. It is the definition of what is accepted.
"""

from __future__ import annotations

from safeconduct.attestation.chain import Chains
from safeconduct.attestation.entry import parse_entry
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import HASH_BYTES, leaf_hash
from safeconduct.attestation.reader import Stored
from safeconduct.attestation.tiles import (
    TILE_WIDTH,
    bundle_path,
    read_bundle,
    read_tile,
    split_bundle,
)
from safeconduct.errors import TraceInvalid

from .summary import Summary, full_root
from .tree import Tell


class ExactReader:
    """Reads ranges into the same summaries, telling what is wrong with them.

    ``sound`` is False once anything was: then entries are hashed and no longer parsed, as
    chains after a bad entry say nothing new.
    """

    def __init__(self, folder: Folder, size: int, chains: Chains, tell: Tell) -> None:
        self._folder, self._size, self._chains, self._tell = folder, size, chains, tell
        self.sound = True

    def read(self, bundles: range) -> Summary:
        """Read a range. A summary with ``fault`` ends at a bundle that cannot be read."""
        summary = Summary()
        for number in bundles:
            width = min(TILE_WIDTH, self._size - number * TILE_WIDTH)
            try:
                leaves = self._read_bundle(number, width, summary)
            except TraceInvalid as error:  # what follows has no place in the tree
                summary.fault = number
                self._bad(error, bundle_path(number, width), error.offset, summary.at(bundles))
                break
            if width == TILE_WIDTH:
                summary.roots.append(full_root(leaves))
            else:
                summary.leaves = leaves
        return summary

    def _read_bundle(self, number: int, width: int, summary: Summary) -> bytes:
        path = bundle_path(number, width)
        bundle = read_bundle(self._folder, number, width)
        hashes = read_tile(self._folder, 0, number, width)
        leaves: list[bytes] = []
        end = 0
        for at, (offset, data) in enumerate(split_bundle(bundle, width=width, path=path)):
            index = number * TILE_WIDTH + at
            stored = Stored(index=index, data=data, path=path, offset=offset + 2)
            expected = hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES]
            leaves.append(self._read_entry(stored, expected, summary))
            summary.size += 1
            end = offset + 2 + len(data)
        # A full bundle read in place of a partial one goes on with later entries, rightly.
        if end != len(bundle) and self._folder.exists(path):
            error = TraceInvalid(f"{path} goes on after its last entry", code="trace.tile")
            self._bad(error, path, end, -1)
        return b"".join(leaves)

    def _read_entry(self, stored: Stored, expected: bytes, summary: Summary) -> bytes:
        leaf = leaf_hash(stored.data)
        if leaf != expected:
            message = f"entry {stored.index} does not have the hash the tree has for it"
            error = TraceInvalid(message, code="entry.hash")
            self._bad(error, stored.path, stored.offset, stored.index)
        if not self.sound:
            return leaf
        try:
            entry = parse_entry(stored.data)
            self._chains.follow(stored.index, entry, leaf.hex())
        except TraceInvalid as error:
            inside = error.offset if error.code == "trace.encoding" and error.offset >= 0 else 0
            self._bad(error, stored.path, stored.offset + inside, stored.index)
            return leaf
        summary.see_times(stored.index, [entry.time])
        summary.tell(stored.index, entry.kind, entry.body, stored.data)
        return leaf

    def _bad(self, error: TraceInvalid, path: str, offset: int, index: int) -> None:
        self.sound = False
        self._tell(error, path, offset, index)
