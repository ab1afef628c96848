"""Step "record": the log's private key as a file, and when it must not be used.

Only the signer process loads a key. A file others can read, that is not ours, or that lies where
the agent works or next to what it signs is refused before a byte of it is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from safeconduct.errors import TraceInvalid

from .note import SigningKey, require_key_name

_MAX_KEY_FILE_BYTES = 4096
# LIMIT: how far up a path is followed when looking for a forbidden folder above it.
_MAX_PATH_DEPTH = 256


def generate_key(name: str) -> SigningKey:
    """Make a new key with the kernel's randomness."""
    return SigningKey(require_key_name(name), os.urandom(32))


def write_key(path: Path, name: str) -> str:
    """Generate a key into a new file, mode 0600, and return its public key line.

    Raise TraceInvalid ``key.exists`` rather than overwrite: a lost key cannot be made again.
    """
    key = generate_key(name)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise TraceInvalid(
            f"{path} exists already", code="key.exists", hint="name another file"
        ) from error
    except OSError as error:
        raise TraceInvalid(f"{path}: {error.strerror}", code="key.io") from error
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(key.line + "\n")
        file.flush()
        os.fsync(fd)
    return key.verifier.line


def load_key(path: Path, *, forbidden: Sequence[Path] = ()) -> SigningKey:
    """Read a private key file after looking at the file itself, not at its name.

    Raise TraceInvalid ``key.permissions`` (others can read it, not ours, not a plain file, or
    inside one of the ``forbidden`` folders), ``key.missing``, ``key.io`` or ``key.invalid``.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError as error:
        raise TraceInvalid(
            f"{path} does not exist", code="key.missing", hint="make one: safeconduct keys new"
        ) from error
    except OSError as error:
        raise _refused(path, f"it cannot be opened ({error.strerror})") from error
    with os.fdopen(fd, "rb") as file:
        _require_private(path, os.fstat(fd))
        require_outside(path, forbidden)
        data = file.read(_MAX_KEY_FILE_BYTES + 1)
    try:
        line = data.decode("ascii")
    except UnicodeDecodeError as error:
        raise TraceInvalid(f"{path} is no key file", code="key.invalid") from error
    return SigningKey.parse(line.removesuffix("\n"))


def _require_private(path: Path, status: os.stat_result) -> None:
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
    """Refuse a file below one of the folders, compared by identity: links do not help."""
    closed = {identity for folder in forbidden if (identity := _identity(folder)) is not None}
    above = Path(os.path.realpath(path))
    for _ in range(_MAX_PATH_DEPTH):
        if _identity(above) in closed:
            raise _refused(path, "it lies inside the trace or the workspace")
        if above == above.parent:
            return
        above = above.parent
    raise _refused(path, "its path is too deep")


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
