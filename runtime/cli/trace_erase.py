"""``safeconduct trace erase``: destroy what sessions of a trace can be opened with, and log that.

The entries stay, and every proof of them. What stands in them in clear text stays too.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.attestation import TraceWriter
from safeconduct.attestation.encoding import MAX_INTEGER
from safeconduct.attestation.entry import is_name
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.privacy.elapsed import DAY_MS
from safeconduct.attestation.privacy.erasure import (
    Erased,
    erase_closed_before,
    erase_sessions,
    order_erasure,
)
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.attestation.proofs.bundle import find_session
from safeconduct.attestation.reader import read_checkpoint
from safeconduct.errors import Exit, TraceInvalid
from safeconduct.runtime.places import Places
from safeconduct.runtime.retention import kept_traces

from .options import JsonOption
from .places import find_trace, refuse_inside_sandbox
from .source import UsageError
from .terminal import print_json, print_line, tell
from .trace_statement import trace_signer

# LIMIT: 27 years, so that no sum of milliseconds overflows.
_AGE = re.compile(r"([1-9][0-9]{0,3})d")
_SESSIONS_MAX = 1000


def erase(
    trace: Annotated[
        str | None,
        typer.Argument(
            metavar="[TRACE]",
            help="A trace folder, or a name from `trace ls`; by age, without it, all of those.",
        ),
    ] = None,
    session: Annotated[
        list[str] | None,
        typer.Option("--session", help="A session (its id, or how it begins). Repeatable."),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", help="All sessions closed before that, such as 90d."),
    ] = None,
    reason: Annotated[
        str, typer.Option("--reason", help="Why, in the log in clear text, for ever.")
    ] = "",
    as_json: JsonOption = False,
) -> int:
    """Destroy keys, arguments and outputs of sessions, and record a redaction for each.

    The log still verifies; replay calls these sessions undecidable. Copies of the trace cannot be
    read any more either; what was exported in plain, and what others kept, can. Exits with 125
    where another runtime writes the trace: it erases when it ends, as does the next one.
    """
    refuse_inside_sandbox("trace erase")
    _require_choice(trace, session or [], older_than, reason)
    if older_than is not None:
        days = _days(older_than)
        # A copied file is younger than what is in it: here all that have any are looked through.
        kept = kept_traces(Places.of(os.environ), before_ms=MAX_INTEGER)
        paths = [find_trace(trace, os.environ)] if trace else kept
        done, failed = _erase_each(paths, days, reason)
    else:
        path = find_trace(trace or "", os.environ)
        named = _named(path, session or [])
        done, failed = [(path, one) for one in _erase(path, named, 0, reason)], False
    _print(done, as_json=as_json)
    return Exit.FAILURE if failed else Exit.OK


def _require_choice(
    trace: str | None, sessions: list[str], older_than: str | None, reason: str
) -> None:
    if bool(sessions) == bool(older_than) or len(sessions) > _SESSIONS_MAX:
        raise UsageError("name what to erase", hint="give --session ID, or --older-than 90d")
    if sessions and not trace:
        raise UsageError("name the trace", hint="safeconduct trace erase TRACE --session ID")
    if reason and not is_name(reason):
        raise UsageError(
            "--reason is too long, or no plain text", hint="write at most 200 printable ASCII"
        )


def _named(path: Path, sessions: list[str]) -> list[str]:
    with Folder(path) as folder:
        return [_find(folder, one) for one in sessions]


def _print(done: list[tuple[Path, Erased]], *, as_json: bool) -> None:
    if as_json:
        print_json([{"trace": path.name, **asdict(one)} for path, one in done])
        return
    for path, one in done:
        what = f"{one.blobs} blobs" if one.found else "nothing was left of it"
        print_line(f"{path.name} {one.session}: erased, {what}; entry {one.index} says so")
    if not done:
        print_line("there is nothing that old")


def _erase_each(
    paths: list[Path], days: int, reason: str
) -> tuple[list[tuple[Path, Erased]], bool]:
    """Erase by age in each trace; tell of those that cannot be, and whether there were any."""
    done: list[tuple[Path, Erased]] = []
    failed = False
    for path in paths:
        try:
            done += [(path, one) for one in _erase(path, [], days, reason)]
        except TraceInvalid as error:
            if len(paths) == 1:
                raise
            failed = True
            tell(f"{path.name} was not erased: {error.message}", error.hint)
    return done, failed


def _erase(path: Path, named: list[str], age_days: int, reason: str) -> list[Erased]:
    with Folder(path) as folder:
        read_checkpoint(folder)  # a trace to be, or none at all, must not be begun here
    vault = Vault.open(Places.of(os.environ).vault_key, forbidden=[path])
    signer = trace_signer(path)
    try:
        with TraceWriter.open(path, signer=signer, vault=vault) as writer:
            if named:
                return erase_sessions(writer, named, reason=reason)
            before_ms = time.time_ns() // 1_000_000 - age_days * DAY_MS
            why = reason or f"older than {age_days} days"
            return erase_closed_before(writer, before_ms, by="operator", reason=why)
    except TraceInvalid as error:
        if error.code == "trace.locked" and named:
            _order(path, named, reason)
            raise TraceInvalid(
                "a runtime is writing this trace; nothing is erased yet",
                code="erase.pending",
                hint="it is ordered, and done when that runtime ends; or run this again then",
            ) from error
        if error.code == "trace.locked":  # one of many: the others must not wait for it
            tell(f"{path.name} is being written and was left out", "run this again later")
            return []
        raise
    finally:
        signer.close()


def _order(path: Path, named: list[str], reason: str) -> None:
    with Folder(path) as folder:
        for one in named:
            order_erasure(folder, one, by="operator", reason=reason)


def _find(folder: Folder, named: str) -> str:
    try:
        found = find_session(folder, named)
    except TraceInvalid as error:
        if error.code != "bundle.session":
            raise
        raise UsageError(
            error.message, code="erase.unknown", hint="safeconduct trace show names the sessions"
        ) from error
    if found != named:
        tell(f"{named} is the session {found}")
    return found


def _days(text: str) -> int:
    match = _AGE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no age", hint="write days, such as 90d")
    return int(match[1])
