"""Step "record": the witnesses a trust policy names: who is asked, and what is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from safeconduct.attestation import TrustPolicy, VerifierKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.verify.trust import of_operator
from safeconduct.attestation.verify.trust_file import MAX_FILE_BYTES, NONE
from safeconduct.attestation.witness.client import Answered, Asked, Endpoint
from safeconduct.errors import TraceInvalid

# LIMIT: witnesses that are asked; a policy may name more for verifiers.
MAX_WITNESSES = 32
FORKS = "anchors/forks"


@dataclass(frozen=True, slots=True, kw_only=True)
class WitnessStanding:
    """One witness, how it answered last (None: not yet) and the size it cosigned (-1: none)."""

    name: str
    endpoint: Endpoint
    operator: bool
    answered: Answered | None = None
    why: str = ""
    cosigned: int = -1

    def after(self, asked: Asked) -> WitnessStanding:
        """Return its standing after it was asked."""
        size = asked.size if asked.cosignature is not None else self.cosigned
        return replace(self, answered=asked.answered, why=asked.why, cosigned=size)

    def told(self) -> str:
        """Say in one line what its answer means for the log."""
        if self.answered in (Answered.AHEAD, Answered.FORK):
            return (
                f"witness {self.name} has seen another history of this log: {self.why};"
                f" what it showed is kept in the trace under {FORKS}"
            )
        return (
            f"witness {self.name} did not cosign ({self.answered}: {self.why});"
            " until it does, verifiers find a lower level"
        )


def load_trust(path: Path) -> TrustPolicy:
    """Read a trust policy whose witnesses can be asked.

    Raise TraceInvalid ``trust.invalid`` where it is none, or names no witness with an address.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TraceInvalid(
            f"the trust policy {path} cannot be read: {error.strerror}",
            code="trust.invalid",
            hint="name a C2SP tlog-policy file under trace: {witness: {policy: FILE}}",
        ) from error
    policy = TrustPolicy.parse(data)
    if policy.quorum == NONE or not any(one.key and one.url for one in policy.witnesses):
        raise TraceInvalid(
            f"the trust policy {path} names nobody who could be asked",
            code="trust.invalid",
            hint="write: witness NAME VKEY https://ADDRESS, and a quorum of them",
        )
    return policy


def witnesses_of(
    policy: TrustPolicy, origin: str, log_keys: Sequence[VerifierKey]
) -> list[WitnessStanding]:
    """Return the witnesses of a policy that can be asked about a log.

    Raise TraceInvalid ``witness.url`` for an address that is none.
    """
    return [
        WitnessStanding(
            name=one.name,
            endpoint=Endpoint.of(one.key, one.url),
            operator=of_operator(one.key, origin, log_keys),
        )
        for one in policy.witnesses
        if one.key is not None and one.url
    ][:MAX_WITNESSES]


def keep_evidence(directory: Path, data: bytes) -> None:
    """Keep a note that a witness showed, once, in the trace: it is signed with the log's own key.

    A full disk loses it here; the witness still has it.
    """
    name = sha256(data).hexdigest()[:32]
    with suppress(OSError, TraceInvalid), Folder(directory) as folder:
        if not folder.exists(f"{FORKS}/{name}"):
            folder.write(f"{FORKS}/{name}", data)
