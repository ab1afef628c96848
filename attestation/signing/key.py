"""Step "record": the log's private key as a file, and when it must not be used.

Only the signer process loads a key. A file others can read, that is not ours, or that lies where
the agent works or next to what it signs is refused before a byte of it is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import EIO
from pathlib import Path
from typing import TypeAlias

from safeconduct.attestation.note import SigningKey, require_key_name
from safeconduct.errors import TraceInvalid
from safeconduct.mounts import Mounts

from .protected_key import is_protected, protect, protected_line, unprotect

MAX_KEY_FILE_BYTES = 4096
# LIMIT: how far up a path is followed when looking for a forbidden folder above it.
_MAX_PATH_DEPTH = 256

Ask: TypeAlias = Callable[[str], bytes]
"""Returns the passphrase of the key with this public line, or raises ``key.passphrase``."""


def generate_key(name: str) -> SigningKey:
    """Make a new key with the kernel's randomness."""
    return SigningKey(require_key_name(name), os.urandom(32))


def write_key(path: Path, name: str, *, passphrase: bytes | None = None) -> str:
    """Generate a key into a new file, mode 0600, and return its public key line.

    On return file and name are durable. Raise TraceInvalid ``key.exists`` rather than overwrite:
    a lost key cannot be made again.
    """
    key = generate_key(name)
    # INVARIANT: a key file is whole or not there: written under another name, then linked.
    made = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        write_private(made, key_text(key, passphrase))
        try:
            os.link(made, path)
        finally:
            with suppress(FileNotFoundError):  # a signer that has just started took it away
                os.unlink(made)
    except FileExistsError as error:
        raise TraceInvalid(
            f"{path} exists already", code="key.exists", hint="name another file"
        ) from error
    except OSError as error:
        raise TraceInvalid(f"{path}: {error.strerror}", code="key.io") from error
    sync_folder(path)
    return key.verifier.line


def write_private(path: Path, text: str) -> None:
    """Write a new file that only we can read, durable in itself (its name is not yet)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)


def write_at(fd: int, data: bytes, at: int) -> None:
    """Write all bytes at an offset or raise OSError.

    pwrite(2) writes less where the disk or RLIMIT_FSIZE, which our caller may have set, ends
    between: only the call after that fails.
    """
    done = 0
    while done < len(data):
        count = os.pwrite(fd, data[done:], at + done)
        if count == 0:
            raise OSError(EIO, os.strerror(EIO))
        done += count


def key_text(key: SigningKey, passphrase: bytes | None) -> str:
    """Return what a key file holds: the private key line, or the key under a passphrase."""
    return f"{key.line}\n" if passphrase is None else protect(key, passphrase)


def load_key(path: Path, *, forbidden: Sequence[Path] = (), ask: Ask | None = None) -> SigningKey:
    """Read a private key file after looking at the file itself, not at its name.

    Raise TraceInvalid ``key.permissions`` (others can read it, not ours, not a plain file, or
    inside one of the ``forbidden`` folders), ``key.missing``, ``key.io``, ``key.invalid`` or
    ``key.passphrase`` (it has one, and ``ask`` does not give it).
    """
    fd = open_key(path)
    try:
        return read_key(fd, path, forbidden=forbidden, ask=ask)
    finally:
        os.close(fd)


def open_key(path: Path) -> int:
    """Open a private key file without reading it; the descriptor is the caller's to close."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError as error:
        raise TraceInvalid(
            f"{path} does not exist", code="key.missing", hint="make one: safeconduct keys new"
        ) from error
    except OSError as error:
        raise _refused(path, f"it cannot be opened ({error.strerror})") from error


def read_key(
    fd: int, path: Path, *, forbidden: Sequence[Path] = (), ask: Ask | None = None
) -> SigningKey:
    """Read an open key file as ``load_key`` does."""
    require_private(path, os.fstat(fd))
    require_outside(path, forbidden)
    try:
        text = os.pread(fd, MAX_KEY_FILE_BYTES + 1, 0).decode("ascii")
    except OSError as error:
        raise TraceInvalid(f"{path}: {error.strerror}", code="key.io") from error
    except UnicodeDecodeError as error:
        raise TraceInvalid(f"{path} is no key file", code="key.invalid") from error
    if not is_protected(text):
        return SigningKey.parse(text.removesuffix("\n"))
    if ask is None:
        raise TraceInvalid(
            f"{path} is under a passphrase",
            code="key.passphrase",
            hint="set SAFECONDUCT_KEY_PASSPHRASE_FILE, or run this on a terminal",
        )
    return unprotect(text, ask(protected_line(text)))


def sync_folder(path: Path) -> None:
    """Make the names in the folder of a file durable (fsync(2) on the folder)."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def require_private(path: Path, status: os.stat_result) -> None:
    """Refuse an open file that others could read, that is not ours, or has a second name.

    The refusal is ``key.permissions``.
    """
    if not stat.S_ISREG(status.st_mode):
        raise _refused(path, "it is not a regular file")
    if status.st_uid != os.geteuid():
        raise _refused(path, "it belongs to somebody else")
    if status.st_mode & 0o077:
        raise _refused(path, "others can read it")
    if status.st_nlink != 1:
        # A second name may lie anywhere, inside the workspace too.
        raise _refused(path, "it has a second name (hard link)")


def require_outside(path: Path, forbidden: Sequence[Path]) -> None:
    """Refuse a file below one of the folders, compared by identity: links do not help.

    Neither do bind mounts: what can be reached through a folder, by whatever name, lies in it.
    """
    closed = {identity for folder in forbidden if (identity := _identity(folder)) is not None}
    above = Path(os.path.realpath(path))
    for _ in range(_MAX_PATH_DEPTH):
        if _identity(above) in closed:
            raise _refused(path, "it lies inside the trace or the workspace")
        if above == above.parent:
            break
        above = above.parent
    else:
        raise _refused(path, "its path is too deep")
    if not forbidden:
        return
    mounts = Mounts()
    for folder in forbidden:
        if names := mounts.names_below(str(folder), str(path)):
            raise _refused(path, f"trace or workspace lead to it, as {names[0]}")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _refused(path: Path, why: str) -> TraceInvalid:
    return TraceInvalid(
        f"the key file {path} is refused: {why}",
        code="key.permissions",
        hint=f"keep it outside workspace and trace, and run: chmod 600 {path}",
    )
