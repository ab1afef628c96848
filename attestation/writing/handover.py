"""Step "record": hand a log over to a new key, from the recorder's side.

Everything here may be broken off at any point and done again: the signer keeps the new key, gives
the same ``key.rotate`` body, and destroys the old key only when the log shows that entry.
"""

from __future__ import annotations

from pathlib import Path

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import leaf_hash
from safeconduct.attestation.note import MAX_NOTE_BYTES, Note, VerifierKey
from safeconduct.attestation.signing.signer import SignerClient
from safeconduct.attestation.tiles import (
    TILE_WIDTH,
    TileStore,
    bundle_path,
    read_bundle,
    split_bundle,
)
from safeconduct.call import EntryKind
from safeconduct.errors import TraceInvalid

from .writer import TraceWriter


def rotate_key(writer: TraceWriter, signer: SignerClient, directory: Path) -> VerifierKey:
    """Record in the open log in ``directory`` that it goes on under a new key, and end the old one.

    On return the log has a ``key.rotate`` entry, a durable checkpoint that covers it has the
    signatures of both keys, and the old private key is gone. Raise TraceInvalid ``key.busy``
    while other signers use the key, and what recording and signing raise; then both keys are
    still there, or only the new one is in force, and this may be called again.
    """
    old = signer.key
    body = signer.rotate(writer.origin)
    index = writer.append_own(EntryKind.KEY_ROTATE, dict(body))
    # A head signed meanwhile would make the proof one of an older tree.
    with Folder(directory) as folder, writer.held() as head:
        _require_covered(folder, index, old)
        entry, proof = _proven(folder, head, index)
        return signer.finish_rotation(writer.origin, index=index, entry=entry, proof=proof)


def _require_covered(folder: Folder, index: int, old: VerifierKey) -> None:
    """Make the head that carries trust over durable before the old key ends.

    A verifier looks for the smallest stored checkpoint that covers the entry.
    """
    sizes = sorted(int(name) for name in folder.names("checkpoints") if name.isdecimal())
    for size in sizes:
        if size <= index:
            continue
        path = f"checkpoints/{size}"
        data = folder.read(path, limit=MAX_NOTE_BYTES)
        note = Note.parse(data)
        head = Checkpoint.parse(note.text)
        named = old.of_log(head.origin)
        signed = any(named.made(one) and named.verifies(one, note.text) for one in note.signatures)
        if signed and head.size == size:
            folder.write(path, data)
            return
        break
    raise TraceInvalid(
        "no stored checkpoint with the old key's signature covers the rotation",
        code="trace.corrupt",
        hint="keep the trace as it is and rotate in a new one",
    )


def _proven(folder: Folder, head: Checkpoint, index: int) -> tuple[bytes, list[bytes]]:
    """Return the entry's bytes and its proof in the tree of the head."""
    tiles = TileStore.load(folder, head.size)
    number, at = divmod(index, TILE_WIDTH)
    width = min(TILE_WIDTH, head.size - number * TILE_WIDTH)
    path = bundle_path(number, width)
    bundle = read_bundle(folder, number, width)
    entries = [entry for _, entry in split_bundle(bundle, width=width, path=path)]
    proof = tiles.prove_inclusion(index, head.size)
    assert leaf_hash(entries[at]) == tiles.node(0, index)  # noqa: S101 - INVARIANT: our own tiles
    return entries[at], proof
