"""Step "record": the signer's part in statements: it makes them itself, of entries it has signed.

The seam: ``SignerClient.attest(origin, places)`` gives the signer entries with their inclusion
proofs in the tree it signed last (``SignerClient.last``), and returns the signed envelope. The
signer checks each proof, makes the statement by ``Statement.about`` with the head it signed last,
and signs its pre-authentication encoding. So nothing but the log's own entries is ever stated, and
no statement is about a tree that the log's checkpoints do not lead to.
"""

from __future__ import annotations

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.merkle import leaf_hash, verify_inclusion
from safeconduct.errors import TraceInvalid

from .signer_request import Attest


def stated(last: Checkpoint, request: Attest) -> bytes:
    """Return the payload of the statement about these entries.

    Raise TraceInvalid ``signer.refused`` where one is not in the tree signed last, and what
    ``Statement.about`` raises for a set of entries that tells no whole story.
    """
    from safeconduct.attestation.proofs.statement import (
        Statement,
    )  # loads the decoder of entries, which signing heads never needs

    for place in request.places:
        leaf = leaf_hash(place.entry)
        if not verify_inclusion(leaf, place.index, last.size, place.proof, last.root):
            raise TraceInvalid(
                f"the signer refuses: entry {place.index} is not in the tree signed last",
                code="signer.refused",
                hint="prove it in the tree of SignerClient.last",
            )
    entries = [(place.index, place.entry) for place in request.places]
    return Statement.about(last, entries).payload()


def signed_part(payload: bytes) -> bytes:
    """Return the bytes that are signed (DSSE v1, "PAE"): they look like no checkpoint's text."""
    from safeconduct.attestation.proofs.statement import pre_authentication

    return pre_authentication(payload)
