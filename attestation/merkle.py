"""Step "record": the Merkle tree of RFC 6962 (proofs as RFC 9162 §2.1.3 and §2.1.4 verify them).

Pure arithmetic over SHA-256: no file, no key. Every loop is bounded by the 64 bits of a tree size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import TypeAlias

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()
# LIMIT: a tree of 2**63 entries has 63 levels; no honest proof is longer than twice that.
MAX_PROOF_HASHES = 126
MAX_SIZE = 2**63 - 1

NodeReader: TypeAlias = Callable[[int, int], bytes]
"""Return the hash of the complete subtree at (level, index): leaves index<<level and on."""


def leaf_hash(data: bytes) -> bytes:
    """Hash an entry into a leaf (RFC 6962 §2.1: prefix 0x00)."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash two children into their parent (RFC 6962 §2.1: prefix 0x01)."""
    return sha256(b"\x01" + left + right).digest()


class CompactRange:
    """The right edge of a growing tree: at most 64 hashes, whatever the size."""

    def __init__(self) -> None:
        self.size = 0
        self._complete: list[bytes] = []  # roots of complete subtrees, largest first

    def push(self, leaf: bytes) -> None:
        """Add one leaf hash."""
        carry = self.size
        while carry & 1:
            leaf = node_hash(self._complete.pop(), leaf)
            carry >>= 1
        self._complete.append(leaf)
        self.size += 1

    def push_into(self, levels: list[list[bytes]], leaf: bytes) -> None:
        """Add one leaf hash, and the roots of full tiles it completes to the levels above.

        ``levels[0]`` takes the leaf, ``levels[n]`` the root of each 256 hashes of the level below:
        they arise here anyway, so that no hash is made twice.
        """
        levels[0].append(leaf)
        carry, complete, height = self.size, self._complete, 0
        while carry & 1:
            leaf = sha256(b"\x01" + complete.pop() + leaf).digest()
            carry >>= 1
            height += 1
            if not height & 7:
                if len(levels) == height >> 3:
                    levels.append([])
                levels[height >> 3].append(leaf)
        complete.append(leaf)
        self.size += 1

    def root(self) -> bytes:
        """Return the root of the tree so far."""
        return fold(self._complete) if self._complete else EMPTY_ROOT

    @classmethod
    def at(cls, size: int, node: NodeReader) -> CompactRange:
        """Rebuild the edge of a stored tree from its complete subtrees."""
        edge = cls()
        edge.size = size
        edge._complete = [node(level, index) for level, index in _complete_parts(0, size)]
        return edge


def fold(hashes: Sequence[bytes]) -> bytes:
    """Join roots of complete subtrees, largest first, into the root above them."""
    *left, root = hashes
    for part in reversed(left):
        root = node_hash(part, root)
    return root


def tile_root(hashes: Sequence[bytes]) -> bytes:
    """Return the root of a full tile: a power of two of sibling hashes."""
    while len(hashes) > 1:
        hashes = [node_hash(hashes[at], hashes[at + 1]) for at in range(0, len(hashes), 2)]
    return hashes[0]


def _complete_parts(start: int, end: int) -> list[tuple[int, int]]:
    """Cut [start, end) into complete subtrees (level, index), largest first.

    INVARIANT: start is a multiple of the largest power of two that fits, as every subtree that
    RFC 6962 forms is.
    """
    parts: list[tuple[int, int]] = []
    while start < end:
        level = (end - start).bit_length() - 1
        parts.append((level, start >> level))
        start += 1 << level
    return parts


def range_hash(start: int, end: int, node: NodeReader) -> bytes:
    """Return MTH(D[start:end]) of a subtree that RFC 6962 forms."""
    return fold([node(level, index) for level, index in _complete_parts(start, end)])


def _split(width: int) -> int:
    """Return the largest power of two smaller than the width (RFC 6962 §2.1: k)."""
    return 1 << (width - 1).bit_length() - 1


def prove_inclusion(index: int, size: int, node: NodeReader) -> list[bytes]:
    """Return the audit path of one leaf, lowest hash first (RFC 9162 §2.1.3.1)."""
    if not 0 <= index < size:
        raise ValueError(f"no leaf {index} in a tree of {size}")
    start, end = 0, size
    ranges: list[tuple[int, int]] = []
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((start, middle))
            start = middle
    return [range_hash(*part, node) for part in reversed(ranges)]


def prove_consistency(old_size: int, new_size: int, node: NodeReader) -> list[bytes]:
    """Return the proof that a tree extends an older one (RFC 9162 §2.1.4.1)."""
    if not 0 <= old_size <= new_size:
        raise ValueError(f"a tree of {new_size} cannot extend one of {old_size}")
    if old_size in (0, new_size):
        return []
    start, end, left = 0, new_size, old_size
    ranges: list[tuple[int, int]] = []
    while left != end - start:
        split = _split(end - start)
        if left <= split:
            ranges.append((start + split, end))
            end = start + split
        else:
            ranges.append((start, start + split))
            start += split
            left -= split
    if start:  # the old root itself is not sent when the old tree is a whole left subtree
        ranges.append((start, end))
    return [range_hash(*part, node) for part in reversed(ranges)]


def _are_hashes(*values: bytes) -> bool:
    return all(len(value) == HASH_BYTES for value in values)


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> bool:
    """Tell whether the proof leads from the leaf at index to the root (RFC 9162 §2.1.3.2)."""
    if not 0 <= index < size <= MAX_SIZE or len(proof) > MAX_PROOF_HASHES:
        return False
    if not _are_hashes(leaf, root, *proof):
        return False
    position, last = index, size - 1
    for sibling in proof:
        if last == 0:
            return False
        if position & 1 or position == last:
            leaf = node_hash(sibling, leaf)
            while position and not position & 1:
                position >>= 1
                last >>= 1
        else:
            leaf = node_hash(leaf, sibling)
        position >>= 1
        last >>= 1
    return last == 0 and leaf == root


def _needs_no_proof(old_size: int, old_root: bytes, new_size: int, new_root: bytes) -> bool:
    """Tell whether trees agree of which the old one is empty or as large as the new one."""
    if old_size:
        return old_root == new_root
    grown = _are_hashes(new_root) if new_size else new_root == EMPTY_ROOT
    return old_root == EMPTY_ROOT and grown


def verify_consistency(
    old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]
) -> bool:
    """Tell whether the new tree extends the old one (RFC 9162 §2.1.4.2)."""
    if not 0 <= old_size <= new_size <= MAX_SIZE or len(proof) > MAX_PROOF_HASHES:
        return False
    if old_size in (0, new_size):
        return not proof and _needs_no_proof(old_size, old_root, new_size, new_root)
    if not _are_hashes(old_root, new_root, *proof):
        return False
    path = list(proof)
    if old_size & (old_size - 1) == 0:
        path.insert(0, old_root)
    if not path:
        return False
    position, last = old_size - 1, new_size - 1
    shift = (~position & position + 1).bit_length() - 1  # position's trailing ones
    position, last = position >> shift, last >> shift
    old = new = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if position & 1 or position == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while position and not position & 1:
                position >>= 1
                last >>= 1
        else:
            new = node_hash(new, sibling)
        position >>= 1
        last >>= 1
    return last == 0 and old == old_root and new == new_root
