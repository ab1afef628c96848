"""What the tests of key rotation share: a log of two entries by hand, and a look at the keys."""

from __future__ import annotations

from safeconduct.attestation import SignerClient
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.entry import Entry, encode_entry
from safeconduct.attestation.merkle import leaf_hash, node_hash
from safeconduct.call import EntryKind

from .kit import Bench  # noqa: TID251 - the tests' own kit

ORIGIN = "example.org/log"


def key_folder(bench: Bench) -> list[str]:
    return sorted(path.name for path in bench.root.iterdir() if path.name.startswith("alice"))


class Log:
    """A log of at most two entries, signed by hand."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.leaves: list[bytes] = []

    @staticmethod
    def entry(body: dict[str, str]) -> bytes:
        made = Entry(
            body=dict(body), kind=EntryKind.KEY_ROTATE, mono_ns=2, prev="0" * 64, session="a",
            sseq=1, time=1,
        )  # fmt: skip
        return encode_entry(made)

    def head(self) -> Checkpoint:
        root = self.leaves[0] if len(self.leaves) == 1 else node_hash(*self.leaves[:2])
        return Checkpoint(origin=ORIGIN, size=len(self.leaves), root=root)

    def sign(self, client: SignerClient, entry: bytes) -> str:
        old = len(self.leaves)
        self.leaves.append(leaf_hash(entry))
        return client.sign(self.head(), old_size=old, proof=self.leaves[1:] if old else [])
