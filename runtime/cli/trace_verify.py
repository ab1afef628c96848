"""``safeconduct trace verify``: check a trace against keys that the verifier brings.

Nothing of the runtime is loaded. The key of this user's own logs is never used silently: a
person who verifies says whose key it must be.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.attestation.verify.bringing import ProgressLine, Wish, verify_wish
from safeconduct.attestation.verify.remembered import Memory, memory_folder
from safeconduct.attestation.verify.report import Report
from safeconduct.errors import TraceInvalid

from .options import (
    JsonOption,
    KeysOption,
    OperatorOption,
    OriginOption,
    TraceArgument,
    TrustOption,
    WitnessPolicyOption,
)
from .places import find_trace
from .source import UsageError
from .terminal import print_json, print_line


def verify(
    trace: TraceArgument,
    key: KeysOption = None,
    trust: TrustOption = None,
    origin: OriginOption = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", help="A checkpoint of this log that you kept. Repeatable."),
    ] = None,
    policy: WitnessPolicyOption = None,
    operator: OperatorOption = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes (default: one a processor).")
    ] = None,
    remember: Annotated[
        bool,
        typer.Option("--remember/--no-remember", help="Hold it against what was verified before."),
    ] = True,
    as_json: JsonOption = False,
) -> int:
    """Verify a trace, offline, and say what was not checked.

    Exits with 0 verified, 10 tampered, 11 incomplete, 12 trust not established (no key of yours
    signed it, or the quorum is not reached), 13 unreadable. Keys inside the trace are never
    trusted. The checkpoint of a verified log is remembered in your state folder: a later copy
    that is shorter, or another history, is found out.
    """
    wish = Wish(
        trace=find_trace(trace, os.environ),
        keys=key or [],
        trust=trust,
        origin=origin,
        checkpoints=checkpoint or [],
        policy=policy,
        operators=operator or [],
        memory=Memory(memory_folder(os.environ)) if remember else None,
        jobs=jobs,
    )
    report = _verified(wish)
    if as_json:
        fields = {**asdict(report), "status": int(report.status), "verdict": report.status.name}
        print_json({**fields, "integrity": report.integrity, "complete": report.complete})
    else:
        for line in report.lines():
            print_line(line)
    return report.status


def _verified(wish: Wish) -> Report:
    progress = ProgressLine()
    try:
        return verify_wish(wish, progress)
    except TraceInvalid as error:
        raise UsageError(error.message, code=error.code, hint=error.hint) from error
    finally:
        progress.clear()
