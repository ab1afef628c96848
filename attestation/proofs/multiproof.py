"""Step "verify": one proof for many entries of a tree (RFC 6962 §2.1), each hash in it once.

The hashes stand in the order in which a walk through the tree, left before right, meets the
largest parts that hold none of the entries. So neither levels nor positions need to be written
down, and an honest proof has exactly one form. Pure arithmetic, without recursion.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from safeconduct.attestation.merkle import (
    EMPTY_ROOT,
    MAX_SIZE,
    CompactRange,
    NodeReader,
    node_hash,
    range_hash,
)


@dataclass(frozen=True, slots=True)
class _Part:
    """The tree over [start, end); the entries looked at in it are those from ``low`` to ``high``.

    ``joined`` stands for: both halves of it have been walked through.
    """

    start: int
    end: int
    low: int
    high: int
    joined: bool = False

    @property
    def known(self) -> bool:
        return self.end - self.start == self.high - self.low


def _halves(part: _Part, indices: Sequence[int]) -> tuple[_Part, _Part]:
    middle = part.start + (1 << (part.end - part.start - 1).bit_length() - 1)  # RFC 6962: k
    cut = bisect_left(indices, middle, part.low, part.high)
    return (
        _Part(part.start, middle, part.low, cut),
        _Part(middle, part.end, cut, part.high),
    )


def prove_many(indices: Sequence[int], size: int, node: NodeReader) -> list[bytes]:
    """Return the proof that all these entries (strictly ascending) are in the tree."""
    _require_indices(indices, size)
    proof: list[bytes] = []
    waiting = [_Part(0, size, 0, len(indices))]
    while waiting:
        part = waiting.pop()
        if part.low == part.high:
            proof.append(range_hash(part.start, part.end, node))
        elif not part.known:
            left, right = _halves(part, indices)
            waiting += (right, left)
    return proof


def root_of_many(
    indices: Sequence[int], leaves: Sequence[bytes], size: int, proof: Iterable[bytes]
) -> bytes | None:
    """Return the root that the proof and the leaf hashes lead to; None if it is no such proof."""
    try:
        _require_indices(indices, size)
    except ValueError:
        return None
    hashes = iter(proof)
    roots: list[bytes] = []
    waiting = [_Part(0, size, 0, len(indices))]
    while waiting:
        part = waiting.pop()
        if part.joined:
            right = roots.pop()
            roots.append(node_hash(roots.pop(), right))
        elif part.low == part.high:
            outside = next(hashes, None)
            if outside is None:
                return None
            roots.append(outside)
        elif part.known:
            roots.append(_root(leaves[part.low : part.high]))
        else:
            joined = _Part(part.start, part.end, part.low, part.high, joined=True)
            waiting += (joined, *reversed(_halves(part, indices)))
    return roots[0] if next(hashes, None) is None else None


def _root(leaves: Sequence[bytes]) -> bytes:
    edge = CompactRange()
    for leaf in leaves:
        edge.push(leaf)
    return edge.root() if leaves else EMPTY_ROOT


def _require_indices(indices: Sequence[int], size: int) -> None:
    before = -1
    for index in indices:
        if not before < index < size <= MAX_SIZE:
            raise ValueError(f"no ascending entries of a tree of {size}")
        before = index
    if not indices:
        raise ValueError("a proof of nothing")
