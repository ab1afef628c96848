"""Step "record": signed heads: asking the signer, and putting on disk what strangers read.

``sign`` works on the tree in memory and waits for the signer alone. ``publish`` then writes the
tiles and, when they are on disk, the note that speaks of them. In between only the journal and
the signer's memory know of a head: that is enough to take the log up again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TypeAlias

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import MAX_NOTE_BYTES
from safeconduct.attestation.reader import CHECKPOINT
from safeconduct.attestation.signing.signer import SignerClient
from safeconduct.attestation.tiles import TileStore, drop_partial
from safeconduct.errors import TraceInvalid

from .cosigned import merge_cosignatures

CHECKPOINTS = "checkpoints"
# LIMIT: heads that stay only because witnesses cosigned them. The newest one is what counts.
_COSIGNED_MAX = 16

OnCheckpoint: TypeAlias = Callable[[Checkpoint, bytes], None]
"""Is told each published head and its note, in the thread that published it. Must be quick."""


@dataclass(frozen=True, slots=True)
class News:
    """A head that is not published yet: its note (empty where it is), its tiles, heads to keep."""

    head: Checkpoint
    note: bytes
    files: dict[str, bytes]
    keep: dict[str, bytes]


class Heads:
    """The tree of one log and its signatures. Thread-safe; ``sign`` does not wait for ``publish``.

    INVARIANT: what is passed to ``sign`` is on disk in the journal, and stays there until a
    ``publish`` covers it.
    """

    def __init__(
        self,
        folder: Folder,
        signer: SignerClient,
        *,
        origin: str,
        tiles: TileStore,
        signed: Checkpoint,
        on_checkpoint: OnCheckpoint | None,
    ) -> None:
        self._folder, self._signer, self._origin = folder, signer, origin
        self._tiles, self._signed = tiles, signed
        self._on_checkpoint = on_checkpoint
        self._note = b""
        self._published = -1
        self._keep: dict[str, bytes] = {}
        self._kept: set[str] = set()
        self._cosigned: deque[str] = deque()
        self._publishing = Lock()
        self._lock = Lock()  # order: _publishing before _lock

    @property
    def signed(self) -> Checkpoint:
        """Return the head signed last."""
        return self._signed

    @property
    def size(self) -> int:
        """Return how many entries the tree has; they are all signed, but for those recovered."""
        return self._tiles.size

    @property
    def published(self) -> int:
        """Return the size of the head published last, -1 when there is none of this run."""
        return self._published

    def sign(self, entries: Iterable[tuple[bytes, bytes]], *, keep: bool = False) -> Checkpoint:
        """Add (entry, leaf hash) to the tree and have its head signed.

        ``keep`` puts the head among the ``checkpoints/`` that stay; the first one that covers a
        key rotation, which bears two signatures, does so anyway.
        """
        with self._lock:
            self._tiles.append(entries)
            size = self._tiles.size
            if size == self._signed.size and self._note and not keep:
                return self._signed
            head = Checkpoint(origin=self._origin, size=size, root=self._tiles.root())
            proof = self._tiles.prove_consistency(self._signed.size, size)
            lines = self._signer.sign(head, old_size=self._signed.size, proof=proof)
            self._note = f"{head.text()}\n{lines}".encode()
            self._signed = head
            if keep or lines.count("\n") > 1:
                self._keep[f"{CHECKPOINTS}/{size}"] = self._note
                self._kept.add(f"{CHECKPOINTS}/{size}")
            return head

    def news(self) -> News:
        """Return what a reader of the newest head needs and has not yet."""
        with self._lock:
            fresh = self._signed.size != self._published and bool(self._note)
            keep, self._keep = self._keep, {}
            files = self._tiles.files() if fresh else {}
            return News(self._signed, self._note if fresh else b"", files, keep)

    def add_cosignatures(self, note: bytes, lines: Sequence[str]) -> None:
        """Put witnesses' lines beside the log's own in what is stored of a published note."""
        with self._publishing:
            path = merge_cosignatures(self._folder, note, lines)
            if path not in self._cosigned:
                self._cosigned.append(path)
            if len(self._cosigned) > _COSIGNED_MAX:
                old = self._cosigned.popleft()
                if old not in self._kept:
                    self._folder.remove(old)

    def publish(self, news: News) -> None:
        """Put a head and its tree on disk for everybody to read: the note when all else is."""
        with self._publishing:
            keep = {path: note for path, note in news.keep.items() if not self._stands(path, note)}
            self._folder.write_all({**news.files, **keep}.items())
            if not news.note:
                return
            self._folder.write(CHECKPOINT, news.note)
            self._published = news.head.size
            with self._lock:
                self._tiles.written(news.files)
            drop_partial(self._folder, news.files)
        if self._on_checkpoint is not None:
            self._on_checkpoint(news.head, news.note)

    def _stands(self, path: str, note: bytes) -> bool:
        """Tell whether a head is kept already: it may bear cosignatures by now."""
        try:
            return self._folder.read(path, limit=MAX_NOTE_BYTES).startswith(note)
        except TraceInvalid:
            return False
