"""Witness step 0: the witness's own key as a file, read and made as the log's key is."""

from __future__ import annotations

import os
from pathlib import Path

from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.note import require_key_name
from safeconduct.attestation.signing.key import (
    MAX_KEY_FILE_BYTES,
    open_key,
    require_private,
    sync_folder,
    write_private,
)
from safeconduct.errors import TraceInvalid


def load_witness_key(path: Path) -> CosigningKey:
    """Read a witness's private key line.

    Raise TraceInvalid ``key.permissions`` where others can read it, ``key.missing``, ``key.io``
    or ``key.invalid`` (also for a log's key: one key must not be both).
    """
    fd = open_key(path)
    try:
        require_private(path, os.fstat(fd))
        text = os.pread(fd, MAX_KEY_FILE_BYTES + 1, 0).decode("ascii")
    except OSError as error:
        raise TraceInvalid(f"{path}: {error.strerror}", code="key.io") from error
    except UnicodeDecodeError as error:
        raise TraceInvalid(f"{path} is no key file", code="key.invalid") from error
    finally:
        os.close(fd)
    return CosigningKey.parse(text.removesuffix("\n"))


def write_witness_key(path: Path, name: str) -> CosigningKey:
    """Make a key in a new file, mode 0600. Raise TraceInvalid ``key.exists`` or ``key.io``."""
    key = CosigningKey(require_key_name(name), os.urandom(32))
    # INVARIANT: a key file is whole or not there: written under another name, then linked.
    made = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        write_private(made, f"{key.line}\n")
        try:
            os.link(made, path)
        finally:
            os.unlink(made)
        sync_folder(path)
    except FileExistsError as error:
        raise TraceInvalid(
            f"{path} exists already", code="key.exists", hint="leave --name out to use it"
        ) from error
    except OSError as error:
        raise TraceInvalid(f"{path}: {error.strerror}", code="key.io") from error
    return key
