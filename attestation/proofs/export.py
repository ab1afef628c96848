"""Step "verify": the public part of a trace as a folder of its own, to hand on.

The copy holds what docs/trace-format.md §1 calls public, cut at one signed head, so that it
verifies although the log may be growing while it is copied. Nothing here is verified or believed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import MAX_NOTE_BYTES, Note
from safeconduct.attestation.reader import CHECKPOINT
from safeconduct.attestation.tiles import (
    TILE_WIDTH,
    bundle_path,
    join_bundle,
    read_bundle,
    read_tile,
    split_bundle,
    tile_path,
)
from safeconduct.errors import TraceInvalid

from .search import Progress

_CHECKPOINTS = "checkpoints"
# LIMIT: README and origin of a foreign folder.
_MAX_TEXT_BYTES = 64 << 10
_SIZE_DIGITS = 19


@contextmanager
def fresh_folder(path: Path) -> Generator[Folder]:
    """Make a new folder that appears under its name only when the block has ended well.

    Raise TraceInvalid ``export.exists`` where something has that name, ``export.io`` where the
    folder cannot be made.
    """
    if os.path.lexists(path) or not path.name:
        raise TraceInvalid(f"{path} exists already", code="export.exists", hint="name a new folder")
    temporary = path.with_name(f".{path.name}.part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise TraceInvalid(f"{path}: {why}", code="export.io", hint="name a new folder") from error
    try:
        with Folder(temporary) as folder:
            yield folder
        os.rename(temporary, path)
    except OSError as error:
        raise TraceInvalid(f"{path}: {error.strerror}", code="export.io") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_public(
    source: Folder, target: Folder, *, on_progress: Progress | None = None
) -> Checkpoint:
    """Copy the public part of a trace, as of its newest signed head, and return that head.

    Raise TraceInvalid ``trace.*`` where the source cannot be read, OSError where the target
    cannot be written.
    """
    note = source.read(CHECKPOINT, limit=MAX_NOTE_BYTES)
    head = Checkpoint.parse(Note.parse(note).text)
    for name in ("README", "origin"):
        if source.exists(name):
            target.write(name, source.read(name, limit=_MAX_TEXT_BYTES), durable=False)
    _copy_tiles(source, target, head.size, on_progress)
    _copy_heads(source, target, head.size)
    target.write(CHECKPOINT, note, durable=False)
    return head


def _copy_tiles(source: Folder, target: Folder, size: int, on_progress: Progress | None) -> None:
    """Copy tiles and bundles of a tree of this size, each exactly as wide as that tree has it."""
    for number, width in _parts(size):
        whole = read_bundle(source, number, width)
        path = bundle_path(number, width)
        entries = [entry for _, entry in split_bundle(whole, width=width, path=path)]
        target.write(path, join_bundle(entries), durable=False)
        if on_progress is not None:
            on_progress(number * TILE_WIDTH, size)
    level = 0
    while size >> 8 * level:
        for number, width in _parts(size >> 8 * level):
            tile = read_tile(source, level, number, width)
            target.write(tile_path(level, number, width), tile, durable=False)
        level += 1


def _parts(count: int) -> Generator[tuple[int, int]]:
    """Yield (index, width) of the tiles that ``count`` hashes or entries fill."""
    for number in range(count // TILE_WIDTH):
        yield number, TILE_WIDTH
    if count % TILE_WIDTH:
        yield count // TILE_WIDTH, count % TILE_WIDTH


def _copy_heads(source: Folder, target: Folder, size: int) -> None:
    for name in source.names(_CHECKPOINTS):
        if name.isascii() and name.isdigit() and len(name) <= _SIZE_DIGITS and int(name) <= size:
            path = f"{_CHECKPOINTS}/{name}"
            target.write(path, source.read(path, limit=MAX_NOTE_BYTES), durable=False)
