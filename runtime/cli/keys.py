"""``safeconduct keys``: this user's log key: its public line, new keys, rotation, passphrases."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.attestation import TraceWriter, VerifierKey, write_key
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.attestation.signing.kernel_keyring import forget, keep
from safeconduct.attestation.signing.key import MAX_KEY_FILE_BYTES
from safeconduct.attestation.signing.passphrase import ask_terminal, given_passphrase
from safeconduct.attestation.signing.protected_key import is_protected, protected_line, unprotect
from safeconduct.attestation.writing.handover import rotate_key
from safeconduct.errors import Exit, TraceInvalid
from safeconduct.runtime.places import Places
from safeconduct.runtime.signing import has_own_user, start_signer

from .options import JsonOption
from .places import find_trace, refuse_inside_sandbox
from .source import UsageError, read_file
from .terminal import print_json, print_line, tell

_LINE_BYTES_MAX = 4096
# LIMIT: a day; a passphrase that is to be there longer belongs into a file.
_MINUTES_MAX = 24 * 60


def show(as_json: JsonOption = False) -> int:
    """Print the line that others verify your traces with. Makes no key."""
    key, place = _public()
    if as_json:
        print_json({"name": key.name, "id": key.id.hex(), "line": key.line, "file": place})
    else:
        print_line(key.line)
    pending = Places.of(os.environ).key
    if os.path.lexists(pending.with_name(pending.name + ".next")):
        tell("a rotation of this key was broken off", "finish it with: safeconduct keys rotate")
    return Exit.OK


def new(
    path: Annotated[Path, typer.Argument(help="A file that does not exist yet.")],
    name: Annotated[str, typer.Option("--name", help="Who signs, for example example.org/alice.")],
    passphrase: Annotated[
        bool,
        typer.Option("--passphrase", help="Keep it under a passphrase, asked for on the terminal."),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Make a private log key in a new file, mode 0600, and print its public line."""
    refuse_inside_sandbox("keys new")
    secret = _new_passphrase() if passphrase else None
    try:
        line = write_key(path, name, passphrase=secret)
    except TraceInvalid as error:
        raise UsageError(error.message, code=error.code, hint=error.hint or _HINT) from error
    if as_json:
        print_json({"name": name, "line": line, "file": str(path), "protected": passphrase})
    else:
        print_line(line)
    tell(f"{path} is private; hand out only the line above", "who holds the file can sign")
    return Exit.OK


def rotate(
    trace: Annotated[
        str | None,
        typer.Option("--trace", help="Record it in this trace of yours (default: a new one)."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Make a new log key, have the old one sign it in a trace, and destroy the old one.

    Whoever has the old line is carried over to the new one by that trace, and by no other: hand
    out the new line for traces to come. Broken off, it is finished by running it again. No other
    runtime may use the key meanwhile.
    """
    refuse_inside_sandbox("keys rotate")
    places = Places.of(os.environ)
    places.prepare()
    path = places.new_trace() if trace is None else find_trace(trace, os.environ)
    if trace is not None and not (path / "origin").is_file():
        raise UsageError(f"{path} is no trace", hint="see: safeconduct trace ls")
    with ExitStack() as stack:
        signer = start_signer(places, os.environ, forbidden=[path], rotates=True)
        stack.callback(signer.close)
        vault = Vault.open(places.vault_key, forbidden=[path])
        old = signer.key
        with TraceWriter.open(path, signer=signer, vault=vault) as writer:
            made = rotate_key(writer, signer, path)
    if as_json:
        print_json({"old": old.line, "line": made.line, "trace": str(path)})
    else:
        print_line(made.line)
    tell(
        f"the old key is destroyed; {path} says that this one follows it",
        f"check with: safeconduct trace verify {path} --key '{old.line}'",
    )
    return Exit.OK


def unlock(
    minutes: Annotated[
        int, typer.Option("--minutes", min=1, max=_MINUTES_MAX, help="How long it is kept.")
    ] = 60,
) -> int:
    """Keep the passphrase of your log key in the kernel's keyring for a while."""
    refuse_inside_sandbox("keys unlock")
    text = _protected_text()
    line = protected_line(text)
    secret = given_passphrase(os.environ) or ask_terminal(f"Passphrase of {line}: ")
    unprotect(text, secret)
    keep(line, secret, seconds=60 * minutes)
    tell(f"kept for {minutes} minutes", "forget it sooner with: safeconduct keys lock")
    return Exit.OK


def lock() -> int:
    """Forget the passphrase that ``keys unlock`` keeps."""
    refuse_inside_sandbox("keys lock")
    kept = forget(protected_line(_protected_text()))
    tell("forgotten" if kept else "no passphrase was kept")
    return Exit.OK


_HINT = "name a new file in a folder of yours"


def _public() -> tuple[VerifierKey, str]:
    """Return the key in force and where its line stands; ask the signer that has its own user."""
    places = Places.of(os.environ)
    if has_own_user(os.environ):
        signer = start_signer(places, os.environ)
        signer.close()
        return signer.key, ""
    path = places.public_key
    if not path.exists():
        raise TraceInvalid(
            "there is no log key yet",
            code="key.missing",
            hint="the first `safeconduct exec` or `call` makes one",
        )
    return VerifierKey.parse(_text(path)), str(path)


def _protected_text() -> str:
    path = Places.of(os.environ).key
    try:
        text = read_file(path, MAX_KEY_FILE_BYTES).decode("ascii", "replace")
    except UsageError as error:
        raise TraceInvalid(error.message, code="key.missing", hint=error.hint) from error
    if not is_protected(text):
        raise TraceInvalid(
            "your log key is under no passphrase",
            code="key.passphrase",
            hint="nothing needs to be unlocked",
        )
    return text


def _new_passphrase() -> bytes:
    given = given_passphrase(os.environ)
    if given is not None:
        return given
    first = ask_terminal("New passphrase: ")
    if ask_terminal("The same again: ") != first:
        raise UsageError("the two differ; no key was made")
    return first


def _text(path: Path) -> str:
    try:
        return read_file(path, _LINE_BYTES_MAX).decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise TraceInvalid(
            f"{path} is no key line", code="key.invalid", hint="restore it from a copy"
        ) from error
