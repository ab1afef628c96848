"""Have one's own signer sign a statement about a call or a session of a trace.

The signer signs it only if the entries lie in the tree it signed last for that log.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import prove_inclusion
from safeconduct.attestation.proofs.proof import StoredTree
from safeconduct.attestation.proofs.statement import Envelope
from safeconduct.attestation.reader import Stored, read_checkpoint
from safeconduct.errors import TraceInvalid

if TYPE_CHECKING:
    from safeconduct.attestation import SignerClient


def sign_statement(folder: Folder, entries: Sequence[Stored], signer: SignerClient) -> Envelope:
    """Return a signed statement about these entries of a trace.

    Raise TraceInvalid ``statement.head`` where the signer has not signed this very log, or has
    signed more of it than is stored yet; ``signer.*``.
    """
    from safeconduct.attestation.signing.signer_request import Place

    origin = read_checkpoint(folder)[1].origin
    head = signer.last(origin)
    stored = read_checkpoint(folder)[1]  # read after: the log may be growing
    tree = StoredTree(folder, stored.size)
    _require_same_log(head, stored, tree)
    places = [
        Place(
            index=one.index,
            proof=tuple(prove_inclusion(one.index, head.size, tree.node)),
            entry=one.data,
        )
        for one in entries
    ]
    return signer.attest(origin, places)


def _require_same_log(head: Checkpoint, stored: Checkpoint, tree: StoredTree) -> None:
    if not 0 < head.size <= stored.size:
        raise TraceInvalid(
            f"your signer signed {head.size} entries of {stored.origin}; {stored.size} are here",
            code="statement.head",
            hint="only the key that signed a log states things about it; is the log being written?",
        )
    if tree.root(head.size) != head.root:
        raise TraceInvalid(
            f"this is not the log {stored.origin} that your signer signed",
            code="statement.head",
            hint="state things about the trace itself, not about a copy that was changed",
        )


def trace_signer(trace: Path) -> SignerClient:
    """Start the signer of this user's log key."""
    import os

    from safeconduct.runtime.places import Places
    from safeconduct.runtime.signing import start_signer

    return start_signer(Places.of(os.environ), os.environ, forbidden=(trace,))
