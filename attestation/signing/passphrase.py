"""Step "record": where the passphrase of a protected key comes from, in the order it is tried.

``SAFECONDUCT_KEY_PASSPHRASE_FD`` (an open descriptor, read to its end),
``SAFECONDUCT_KEY_PASSPHRASE_FILE`` (a file that only we can read), the kernel's keyring
(``safeconduct keys unlock``), the terminal. Never an argument or the value of a variable: these
stand in /proc for others to read.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from safeconduct.errors import TraceInvalid

from . import kernel_keyring
from .key import Ask, open_key, require_outside, require_private
from .protected_key import MAX_PASSPHRASE_BYTES, require_passphrase

FILE = "SAFECONDUCT_KEY_PASSPHRASE_FILE"
DESCRIPTOR = "SAFECONDUCT_KEY_PASSPHRASE_FD"


def ask_from(environment: Mapping[str, str], *, forbidden: Sequence[Path] = ()) -> Ask:
    """Return what finds a passphrase when a key turns out to need one.

    A passphrase file inside one of the ``forbidden`` folders (trace, workspace) is refused.
    """

    def ask(line: str) -> bytes:
        given = given_passphrase(environment, forbidden=forbidden)
        return given or kernel_keyring.kept(line) or ask_terminal(f"Passphrase of {line}: ")

    return ask


def given_passphrase(
    environment: Mapping[str, str], *, forbidden: Sequence[Path] = ()
) -> bytes | None:
    """Return the passphrase that the environment points to; None where it names no place.

    Raise TraceInvalid ``key.passphrase`` or ``key.permissions``.
    """
    if descriptor := environment.get(DESCRIPTOR):
        if not descriptor.isdecimal():
            raise _none(f"{DESCRIPTOR} is no number")
        try:
            os.set_inheritable(int(descriptor), False)
            return _line(_read(int(descriptor)))
        except OSError as error:
            raise _none(f"descriptor {descriptor}: {error.strerror}") from error
    if name := environment.get(FILE):
        path = Path(name)
        fd = open_key(path)
        try:
            require_private(path, os.fstat(fd))
            require_outside(path, forbidden)
            return _line(_read(fd))
        except OSError as error:
            raise _none(f"{path}: {error.strerror}") from error
        finally:
            os.close(fd)
    return None


def ask_terminal(prompt: str) -> bytes:
    """Ask the person at the controlling terminal, without echo. Raise ``key.passphrase``."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError as error:
        raise _none("the key file is under a passphrase, and there is no terminal") from error
    try:
        typed = getpass.getpass(prompt).encode("utf-8", "surrogateescape")
    except EOFError as error:
        raise _none("no passphrase was typed") from error
    require_passphrase(typed)
    return typed


def _read(fd: int) -> bytes:
    data = b""
    while len(data) <= MAX_PASSPHRASE_BYTES + 1 and (part := os.read(fd, MAX_PASSPHRASE_BYTES)):
        data += part
    return data


def _line(data: bytes) -> bytes:
    """Take the newline away that an editor puts at the end."""
    passphrase = data.removesuffix(b"\n")
    require_passphrase(passphrase)
    return passphrase


def _none(why: str) -> TraceInvalid:
    return TraceInvalid(
        why,
        code="key.passphrase",
        hint=f"set {FILE}, or run this on a terminal",
    )
