"""``safeconduct trace export``: hand a trace on, or a part of it, without what is private.

Nothing of the runtime is loaded. What is written verifies on its own: a whole public copy as a
trace, one session as a bundle, a call or a session as a signed statement (docs/trace-format.md).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.attestation.folder import Folder
from safeconduct.attestation.proofs.bundle import find_session, write_bundle
from safeconduct.attestation.proofs.export import copy_public, fresh_folder
from safeconduct.attestation.proofs.search import ends_of_session, entries_of_call
from safeconduct.attestation.verify.bringing import ProgressLine
from safeconduct.errors import Exit

from .files import new_file, require_new, write_new
from .options import TraceArgument
from .places import find_trace, own_vault
from .source import UsageError
from .terminal import print_line, tell
from .trace_refusals import refusing


def export(
    trace: TraceArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder or file to write.")],
    session: Annotated[
        str | None,
        typer.Option("--session", help="Only this session (its id, or how it begins), as a file."),
    ] = None,
    statement: Annotated[
        bool,
        typer.Option("--statement", help="A signed in-toto statement about a session or a call."),
    ] = False,
    call: Annotated[
        str | None, typer.Option("--call", help="With --statement: the call it is about.")
    ] = None,
    openings: Annotated[
        bool,
        typer.Option("--openings", help="Also arguments and outputs, readable by who gets them."),
    ] = False,
    redact: Annotated[
        list[str] | None,
        typer.Option(
            "--redact",
            help="With openings, but not of this session, field, or SESSION/FIELD. Repeatable.",
        ),
    ] = None,
) -> int:
    """Write the public part of a trace to a new folder: entries, tree and signed heads.

    Openings, blobs and the unsigned journal stay behind; everything else still verifies. With
    --openings those go along in plain, with --redact all but those it names; erasing a session
    later does not reach such a copy. With --session only that session, in one file that proves that
    none of its entries is missing; with --statement what your own signer states about it. Check
    these with: trace verify-proof FILE.
    """
    path = find_trace(trace, os.environ)
    _require_choice(session, call, statement)
    if openings or redact:
        _require_whole(session, statement)
        return _write_opened(path, out, redact or [])
    with refusing() as progress, Folder(path) as source:
        if statement:
            _write_statement(source, path, out, session, call, progress)
        elif session is not None:
            _write_session(source, session, out, progress)
        else:
            with fresh_folder(out) as target:
                head = copy_public(source, target, on_progress=progress)
            progress.clear()
            print_line(f"{out}: the public part of {head.origin}, {head.size} entries")
    return Exit.OK


def _require_choice(session: str | None, call: str | None, statement: bool) -> None:
    if call is not None and not statement:
        raise UsageError("--call needs --statement", hint="for one entry: safeconduct trace prove")
    if statement and (session is None) == (call is None):
        raise UsageError("name what to state", hint="give --session ID or --call ID")


def _require_whole(session: str | None, statement: bool) -> None:
    if session is not None or statement:
        raise UsageError(
            "openings go with a whole trace only",
            hint="leave out --session and --statement, and --redact what is to stay here",
        )


def _write_opened(trace: Path, out: Path, redact: list[str]) -> int:
    from safeconduct.attestation.privacy.redaction import export_opened

    with refusing():
        done = export_opened(trace, out, redact=redact, vault=own_vault(os.environ))
    print_line(
        f"{out}: {done.head.origin}, {done.head.size} entries; {done.opened} openings in plain,"
        f" {done.redacted} redacted, {done.missing} not there"
    )
    return Exit.OK


def _write_session(source: Folder, named: str, out: Path, progress: ProgressLine) -> None:
    with new_file(out) as file:
        session = find_session(source, named, on_progress=progress)
        bundle = write_bundle(source, session, file, on_progress=progress)
    progress.clear()
    print_line(f"{out}: session {session}, {len(bundle.indices)} entries, with their proof")
    if not bundle.closed:
        tell("the session is not over in the signed log", "export it again when it is closed")


def _write_statement(
    source: Folder,
    trace: Path,
    out: Path,
    session: str | None,
    call: str | None,
    progress: ProgressLine,
) -> None:
    from .trace_statement import sign_statement, trace_signer  # starts a signer

    require_new(out)
    if session is not None:
        found = find_session(source, session, on_progress=progress)
        entries = ends_of_session(source, found, on_progress=progress)
    else:
        entries = entries_of_call(source, call or "", on_progress=progress)
    progress.clear()
    signer = trace_signer(trace)
    try:
        envelope = sign_statement(source, entries, signer)
    finally:
        signer.close()
    write_new(out, envelope.encode() + b"\n")
    which = ", ".join(str(one.index) for one in entries)
    print_line(f"{out}: a statement of {signer.name} about the entries {which}")
