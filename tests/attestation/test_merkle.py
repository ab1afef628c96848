"""The tree agrees with a plain reading of RFC 6962, and proofs hold exactly where they should."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.attestation.merkle import (
    EMPTY_ROOT,
    CompactRange,
    leaf_hash,
    prove_consistency,
    prove_inclusion,
    verify_consistency,
    verify_inclusion,
)
from safeconduct.attestation.tiles import bundle_path, edge_widths, tile_path

SIZES = st.integers(1, 70)


def plain_root(leaves: list[bytes]) -> bytes:
    """Return MTH(D) as RFC 6962 §2.1 defines it."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return sha256(b"\x01" + plain_root(leaves[:split]) + plain_root(leaves[split:])).digest()


def entries(size: int) -> list[bytes]:
    return [b"entry %d" % number for number in range(size)]


def node(level: int, index: int) -> bytes:
    return plain_root(entries((index + 1) << level)[index << level :])


@given(st.integers(0, 70))
def test_compact_range_has_the_plain_root(size: int) -> None:
    edge = CompactRange()
    for entry in entries(size):
        edge.push(leaf_hash(entry))
    assert edge.root() == plain_root(entries(size))
    assert CompactRange.at(size, node).root() == edge.root()


@given(SIZES, st.data())
def test_inclusion(size: int, choice: st.DataObject) -> None:
    index = choice.draw(st.integers(0, size - 1))
    root, leaf = plain_root(entries(size)), leaf_hash(entries(size)[index])
    proof = prove_inclusion(index, size, node)
    assert verify_inclusion(leaf, index, size, proof, root)
    assert not verify_inclusion(leaf_hash(b"other"), index, size, proof, root)
    assert not verify_inclusion(leaf, index, size, [*proof, root], root)
    other = choice.draw(st.integers(0, size - 1))
    assert verify_inclusion(leaf, other, size, proof, root) == (other == index)
    if proof:
        assert not verify_inclusion(leaf, index, size, proof[:-1], root)
        assert not verify_inclusion(leaf, index, size, [bytes(32), *proof[1:]], root)


@given(SIZES, SIZES, st.data())
def test_consistency(one: int, other: int, choice: st.DataObject) -> None:
    old, new = sorted((one, other))
    old_root, new_root = plain_root(entries(old)), plain_root(entries(new))
    proof = prove_consistency(old, new, node)
    assert verify_consistency(old, old_root, new, new_root, proof)
    assert not verify_consistency(old, bytes(32), new, new_root, proof)
    assert not verify_consistency(old, old_root, new, bytes(32), proof)
    assert not verify_consistency(new, new_root, old, old_root, proof) or old == new
    assert not verify_consistency(old, old_root, new, new_root, [*proof, bytes(32)])
    if proof:
        at = choice.draw(st.integers(0, len(proof) - 1))
        forged = [*proof[:at], bytes(32), *proof[at + 1 :]]
        assert not verify_consistency(old, old_root, new, new_root, forged)


def test_empty_tree_extends_to_anything_and_huge_proofs_are_refused() -> None:
    assert verify_consistency(0, EMPTY_ROOT, 5, plain_root(entries(5)), [])
    assert not verify_consistency(0, bytes(32), 5, plain_root(entries(5)), [])
    assert not verify_inclusion(bytes(32), 0, 2, [bytes(32)] * 10_000, bytes(32))
    with pytest.raises(ValueError, match="no leaf"):
        prove_inclusion(5, 5, node)


def test_paths_are_those_of_tlog_tiles() -> None:
    assert tile_path(0, 1_234_067) == "tile/0/x001/x234/067"
    assert tile_path(3, 0, 7) == "tile/3/000.p/7"
    assert bundle_path(1_000, 255) == "tile/entries/x001/000.p/255"
    # The specification's own example of a tree of 70,000 entries.
    assert list(edge_widths(70_000)) == [(0, 273, 112), (1, 1, 17), (2, 0, 1)]
    assert list(edge_widths(256)) == [(1, 0, 1)]
