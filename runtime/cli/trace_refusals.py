"""How the verbs that take a trace apart end when it is not there, or has not what was asked for."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import typer

from safeconduct.attestation.verify.bringing import ProgressLine
from safeconduct.errors import Exit, TraceInvalid

from .source import UsageError
from .terminal import tell_error

# The trace is fine, and the command line asks for something that it has not, or in a wrong place.
_ASKED = frozenset(
    {
        "bundle.session",
        "call.open",
        "call.unknown",
        "export.exists",
        "proof.range",
        "redact.ambiguous",
        "redact.unknown",
        "session.open",
        "statement.invalid",
    }
)
_UNREADABLE = ("trace.", "note.", "checkpoint.", "chain.")


@contextmanager
def refusing() -> Generator[ProgressLine]:
    """Turn what is wrong with a trace into exit 13, and what was asked wrongly into exit 2.

    What it gives shows how far a long search is, on a terminal.
    """
    progress = ProgressLine()
    try:
        yield progress
    except TraceInvalid as error:
        progress.clear()
        if error.code in _ASKED:
            raise UsageError(error.message, code=error.code, hint=error.hint) from error
        if not error.code.startswith(_UNREADABLE):
            raise  # the signer, or the key
        tell_error(error)
        raise typer.Exit(Exit.TRACE_IO) from error
    finally:
        progress.clear()
