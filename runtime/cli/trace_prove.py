"""``safeconduct trace prove``: a proof that one entry is in the signed log, to hand on.

Nothing of the runtime is loaded. Nothing is verified but that the stored tree leads to its head.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import leaf_hash
from safeconduct.attestation.proofs.proof import ENTRY_SUFFIX, PROOF_SUFFIX, prove_entry
from safeconduct.attestation.proofs.search import entries_of_call
from safeconduct.attestation.verify.bringing import ProgressLine
from safeconduct.errors import Exit

from .files import require_new, write_new
from .options import JsonOption, TraceArgument
from .places import find_trace
from .source import UsageError
from .terminal import print_json, print_line
from .trace_refusals import refusing


def prove(
    trace: TraceArgument,
    index: Annotated[
        int | None, typer.Option("--index", min=0, help="The entry, counted from 0.")
    ] = None,
    call: Annotated[
        str | None,
        typer.Option("--call", help="The outcome of this call (its id, or how it begins)."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write (default: ENTRY.tlog-proof, here)."),
    ] = None,
    with_entry: Annotated[
        bool,
        typer.Option("--with-entry", help="Put the entry into the proof, not into a file beside."),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Write a proof that an entry is in the log, which others check without having the log.

    The proof is a C2SP tlog-proof. The entry itself is written beside it, as `….entry`: hand both
    on. Checking it needs the log's key line, or a policy of log and witnesses, and nothing else.
    """
    if (index is None) == (call is None):
        raise UsageError("name one entry", hint="give either --index N or --call ID")
    path = find_trace(trace, os.environ)
    with refusing() as progress, Folder(path) as folder:
        chosen = index if index is not None else _outcome(folder, call or "", progress)
        proof, stored = prove_entry(folder, chosen, with_entry=with_entry)
    target = out or Path(f"{chosen}{PROOF_SUFFIX}")
    data = proof.encode()
    require_new(target)
    beside = None if with_entry else target.with_suffix(ENTRY_SUFFIX)
    if beside is not None:
        if beside == target:
            raise UsageError(f"{target} is the entry's file", hint="name it ….tlog-proof")
        write_new(beside, stored.data)
    write_new(target, data)
    if as_json:
        print_json(
            {
                "index": chosen,
                "leaf": leaf_hash(stored.data).hex(),
                "proof": str(target),
                "entry": None if beside is None else str(beside),
                "bytes": len(data),
            }
        )
        return Exit.OK
    also = "" if beside is None else f", the entry itself in {beside}"
    print_line(f"{target}: proof of entry {chosen}, {len(data)} bytes{also}")
    return Exit.OK


def _outcome(folder: Folder, call: str, progress: ProgressLine) -> int:
    return entries_of_call(folder, call, on_progress=progress)[-1].index
