"""``safeconduct trace verify-proof``: check a proof, a session bundle or a statement.

Nothing of the runtime is loaded, and no trace is needed. A person who verifies brings the trust.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.attestation.proofs.handed_on import Handed, check_handed
from safeconduct.errors import TraceInvalid

from .options import (
    JsonOption,
    KeysOption,
    OperatorOption,
    OriginOption,
    TrustOption,
    WitnessPolicyOption,
)
from .source import UsageError
from .terminal import print_json, print_line


def verify_proof(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A proof, a session bundle or a statement.")
    ],
    key: KeysOption = None,
    trust: TrustOption = None,
    policy: WitnessPolicyOption = None,
    operator: OperatorOption = None,
    entry: Annotated[
        Path | None,
        typer.Option(
            "--entry",
            help="The entry it must be about, or hold (a proof's default: the file beside it).",
        ),
    ] = None,
    origin: OriginOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check a proof, a session bundle or a statement, offline, and say what was not checked.

    Exits with 0 verified, 10 not true, 11 the session was not over, 12 trust not established (no
    key of yours signed it, or the quorum is not reached), 13 unreadable.
    """
    handed = Handed(
        file=file,
        keys=key or [],
        trust=trust,
        origin=origin,
        policy=policy,
        operators=operator or [],
        entry=entry,
    )
    try:
        found = check_handed(handed)
    except TraceInvalid as error:
        raise UsageError(error.message, code=error.code, hint=error.hint) from error
    if as_json:
        print_json({**asdict(found), "status": int(found.status), "verdict": found.status.name})
    else:
        for line in found.lines():
            print_line(line)
    return found.status
