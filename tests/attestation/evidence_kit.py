"""What the tests of proofs, bundles and statements share."""

from __future__ import annotations

import io
from pathlib import Path

from safeconduct.attestation import read_entries
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.proofs.bundle import write_bundle
from safeconduct.attestation.proofs.evidence import check_file
from safeconduct.attestation.proofs.evidence_report import Evidence
from safeconduct.attestation.proofs.search import entries_of_call
from safeconduct.attestation.proofs.statement import Envelope
from safeconduct.attestation.verify.vouching import Brought
from safeconduct.call import EntryKind
from safeconduct.runtime.cli.trace_statement import sign_statement

from .kit import Bench  # noqa: TID251 - the tests' own kit

CALLS = 12


def sessions(trace: Path) -> list[str]:
    """Return the sessions of a trace in the order of their opening; the log's own is not one."""
    return [one.session for _, one in read_entries(trace) if one.kind is EntryKind.SESSION_OPEN]


def log_session(trace: Path) -> str:
    """Return the log's own session."""
    return next(one.session for _, one in read_entries(trace) if one.kind is EntryKind.LOG_OPEN)


def bundle(trace: Path, session: str) -> bytes:
    out = io.BytesIO()
    with Folder(trace) as folder:
        write_bundle(folder, session, out)
    return out.getvalue()


def check(data: bytes, trust: Brought, entry: bytes | None = None) -> Evidence:
    return check_file(io.BytesIO(data), trust, entry=entry)


def state(trace: Path, bench: Bench, call: str = "c7") -> Envelope:
    with Folder(trace) as folder:
        signer = bench.signer()
        try:
            return sign_statement(folder, entries_of_call(folder, call), signer)
        finally:
            signer.close()
