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

from .options import JsonOption
from .source import UsageError
from .terminal import print_json, print_line


def verify_proof(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A proof, a session bundle or a statement.")
    ],
    key: Annotated[
        list[str] | None, typer.Option("--key", help="A public key line you trust. Repeatable.")
    ] = None,
    trust: Annotated[
        Path | None, typer.Option("--trust", help="A folder of *.pub files with such lines.")
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="A tlog-policy file of yours: logs, witnesses, quorum."),
    ] = None,
    operator: Annotated[
        list[str] | None,
        typer.Option("--operator", help="A witness of that file that is the operator's own."),
    ] = None,
    entry: Annotated[
        Path | None,
        typer.Option("--entry", help="The entry a proof is about (default: the file beside it)."),
    ] = None,
    origin: Annotated[
        str | None, typer.Option("--origin", help="The log it must be, not just any of the key.")
    ] = None,
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
