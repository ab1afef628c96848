"""Step "record": the tree as files, laid out as C2SP tlog-tiles.

``tile/<L>/<N>[.p/<W>]`` holds hashes, ``tile/entries/<N>[.p/<W>]`` the entries themselves. Only
the right edge is in memory: one bundle and at most 255 hashes for each of the eight levels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from safeconduct.errors import TraceInvalid

from .folder import Folder
from .merkle import (
    HASH_BYTES,
    CompactRange,
    prove_consistency,
    prove_inclusion,
    tile_root,
)

TILE_WIDTH = 256
_TILE_HEIGHT = 8
_TILE_BYTES = TILE_WIDTH * HASH_BYTES
# LIMIT: 256 entries of 65,535 bytes, each behind a 16-bit length.
MAX_BUNDLE_BYTES = TILE_WIDTH * (65_535 + 2)
# Partial files of a growing tile that stay: somebody may just have read an older checkpoint.
_PARTIALS_KEPT = 4
# LIMIT: hashes of complete subtrees that are kept for the next proofs.
_NODES_KEPT = 512
_WIDTH = re.compile(r"[1-9][0-9]{0,2}")


def tile_path(level: int, index: int, width: int = TILE_WIDTH) -> str:
    """Return the path of a hash tile (tlog-tiles, "Merkle Tree")."""
    return f"tile/{level}/{_numbered(index, width)}"


def bundle_path(index: int, width: int = TILE_WIDTH) -> str:
    """Return the path of an entry bundle (tlog-tiles, "Log entries")."""
    return f"tile/entries/{_numbered(index, width)}"


def _numbered(index: int, width: int) -> str:
    path = f"{index % 1000:03d}"
    while index >= 1000:
        index //= 1000
        path = f"x{index % 1000:03d}/{path}"
    return path if width == TILE_WIDTH else f"{path}.p/{width}"


def split_bundle(bundle: bytes, *, width: int, path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, entry) for the first ``width`` entries of a bundle.

    Raise TraceInvalid ``trace.tile`` with the offset where the framing breaks.
    """
    offset = 0
    for _ in range(width):
        end = offset + 2 + int.from_bytes(bundle[offset : offset + 2], "big")
        if offset + 2 > len(bundle) or end > len(bundle):
            raise TraceInvalid(f"{path} ends inside an entry", code="trace.tile", offset=offset)
        yield offset, bundle[offset + 2 : end]
        offset = end


def join_bundle(entries: Sequence[bytes]) -> bytes:
    """Return entries as a bundle holds them."""
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def read_part(folder: Folder, partial: str, full: str, width: int, *, limit: int) -> bytes:
    """Read a tile or bundle of a given width, from a wider one where the partial is gone.

    The full one comes last: a power cut may have torn it before the partial ones, which were
    published, were removed.
    """
    try:
        return folder.read(partial, limit=limit)
    except TraceInvalid as error:
        if error.code != "trace.missing" or width == TILE_WIDTH:
            raise
    wider = [one for one in _widths(folder, full) if one > width]
    try:
        return folder.read(f"{full}.p/{wider[0]}" if wider else full, limit=limit)
    except TraceInvalid as error:
        if error.code == "trace.missing":
            raise TraceInvalid(f"{partial} is missing", code="trace.missing") from error
        raise


def _widths(folder: Folder, full: str) -> list[int]:
    """Return the widths of a tile's partial files, ascending."""
    return sorted(int(name) for name in folder.names(f"{full}.p") if _WIDTH.fullmatch(name))


def read_tile(folder: Folder, level: int, index: int, width: int) -> bytes:
    """Return the first ``width`` hashes of a tile, concatenated."""
    path = tile_path(level, index, width)
    full = tile_path(level, index)
    tile = read_part(folder, path, full, width, limit=_TILE_BYTES)
    fits = len(tile) == width * HASH_BYTES
    wider = len(tile) % HASH_BYTES == 0 and width * HASH_BYTES < len(tile) <= _TILE_BYTES
    if not fits and not (wider and not folder.exists(path)):
        raise TraceInvalid(f"{path} has not {width} hashes", code="trace.tile", offset=len(tile))
    return tile[: width * HASH_BYTES]


def read_bundle(folder: Folder, index: int, width: int) -> bytes:
    """Return an entry bundle that holds at least ``width`` entries."""
    path, full = bundle_path(index, width), bundle_path(index)
    return read_part(folder, path, full, width, limit=MAX_BUNDLE_BYTES)


def edge_widths(size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (level, tile index, width) of each partial tile of a tree of this size."""
    level = 0
    while size:
        if size % TILE_WIDTH:
            yield level, size // TILE_WIDTH, size % TILE_WIDTH
        size //= TILE_WIDTH
        level += 1


class TileStore:
    """The tiles of one log, growing at the right. Not for use by two threads at once.

    ``append`` works in memory: what became full waits in there until ``files`` was written and
    ``written`` says so. The journal has those entries until then.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._edge = CompactRange()
        self._bundle: list[bytes] = []
        self._levels: list[list[bytes]] = [[]]
        self._full: dict[str, bytes] = {}
        # Complete subtrees never change: the next proof needs most of those of the one before.
        self._nodes: dict[tuple[int, int], bytes] = {}

    @classmethod
    def load(cls, folder: Folder, size: int) -> TileStore:
        """Read the right edge of a stored tree; what lies right of ``size`` is ignored."""
        store = cls(folder)
        for level, index, width in edge_widths(size):
            store._grow_to(level)
            tile = read_tile(folder, level, index, width)
            store._levels[level] = _split_tile(tile)
        index, width = divmod(size, TILE_WIDTH)
        if width:
            bundle = read_bundle(folder, index, width)
            path = bundle_path(index, width)
            store._bundle = [entry for _, entry in split_bundle(bundle, width=width, path=path)]
        store._edge.size = size
        store._edge = CompactRange.at(size, store.node)
        return store

    @property
    def size(self) -> int:
        """Return how many entries the tree has."""
        return self._edge.size

    def root(self) -> bytes:
        """Return the tree's root hash."""
        return self._edge.root()

    def append(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Add (entry, its leaf hash), in memory."""
        bundle, levels, push = self._bundle, self._levels, self._edge.push_into
        for entry, leaf in entries:
            bundle.append(entry)
            push(levels, leaf)
            if len(bundle) == TILE_WIDTH:
                self._set_aside()
                bundle = self._bundle

    def files(self) -> dict[str, bytes]:
        """Return what a reader of the tree as it stands needs and has not yet: path and bytes.

        Bundles and tiles that became full, lowest level first, then the partial ones.
        """
        files = dict(self._full)
        for level, index, width in edge_widths(self.size):
            if level == 0:
                files[bundle_path(index, width)] = join_bundle(self._bundle)
            files[tile_path(level, index, width)] = b"".join(self._levels[level])
        return files

    def written(self, files: Iterable[str]) -> None:
        """Forget what is on disk now."""
        for path in files:
            self._full.pop(path, None)

    def flush(self) -> None:
        """Write everything, durably."""
        files = self.files()
        self._folder.write_all(files.items())
        self.written(files)
        drop_partial(self._folder, files)

    def node(self, level: int, index: int) -> bytes:
        """Return the hash of a complete subtree, read from its tile."""
        known = self._nodes.get((level, index))
        if known is not None:
            return known
        tile_level, height = divmod(level, _TILE_HEIGHT)
        first = index << height
        tile_index, position = divmod(first, TILE_WIDTH)
        count = 1 << height
        hashes = self._tile(tile_level, tile_index)[position : position + count]
        if len(hashes) != count:
            raise TraceInvalid(f"no complete subtree {level}/{index}", code="trace.tile")
        if len(self._nodes) >= _NODES_KEPT:
            self._nodes.clear()
        made = self._nodes[level, index] = tile_root(hashes)
        return made

    def prove_inclusion(self, index: int, size: int) -> list[bytes]:
        """Return the audit path of an entry in the tree of an earlier or the present size."""
        return prove_inclusion(index, size, self.node)

    def prove_consistency(self, old_size: int, new_size: int) -> list[bytes]:
        """Return the proof that one of this log's trees extends another."""
        return prove_consistency(old_size, new_size, self.node)

    def root_at(self, size: int) -> bytes:
        """Return the root the tree had at an earlier size."""
        return CompactRange.at(size, self.node).root()

    def _tile(self, level: int, index: int) -> list[bytes]:
        if index == self.size >> _TILE_HEIGHT * (level + 1):
            self._grow_to(level)
            return self._levels[level]
        waiting = self._full.get(tile_path(level, index))
        return _split_tile(waiting or read_tile(self._folder, level, index, TILE_WIDTH))

    def _grow_to(self, level: int) -> None:
        while len(self._levels) <= level:
            self._levels.append([])

    def _set_aside(self) -> None:
        """Put what has just become full where ``files`` finds it, lowest level first."""
        index = self.size // TILE_WIDTH - 1
        self._full[bundle_path(index)] = join_bundle(self._bundle)
        self._bundle = []
        level = 0
        while len(self._levels[level]) == TILE_WIDTH:
            self._full[tile_path(level, index)] = b"".join(self._levels[level])
            self._levels[level] = []
            self._grow_to(level + 1)
            level, index = level + 1, index // TILE_WIDTH


def drop_partial(folder: Folder, files: Iterable[str]) -> None:
    """Remove the partial files that newly written ones replace.

    A full one replaces all of them; of partial ones the newest few stay for who has just read an
    older checkpoint. ``read_part`` takes the first hashes of a wider one.
    """
    for path in files:
        stem, partial, width = path.rpartition(".p/")
        if not partial:
            folder.remove_folder(f"{path}.p")
            continue
        older = [one for one in _widths(folder, stem) if one <= int(width)]
        for old in older[:-_PARTIALS_KEPT]:
            folder.remove(f"{stem}.p/{old}")


def _split_tile(tile: bytes) -> list[bytes]:
    return [tile[at : at + HASH_BYTES] for at in range(0, len(tile), HASH_BYTES)]
