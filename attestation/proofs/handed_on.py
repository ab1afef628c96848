"""Step "verify": check a file that somebody handed on, with what a person brings.

Both commands, ``safeconduct trace verify-proof`` and ``safeconduct-verify``, check it here. What is
wrong with what the person brings is TraceInvalid ``brought.*``, ``key.*`` or ``trust.*``: a usage
error. What is wrong with the file ends in an Evidence.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safeconduct.attestation.encoding import MAX_ENTRY_BYTES
from safeconduct.attestation.verify.bringing import (
    key_lines,
    keys_said,
    read_whole,
    require_operators,
)
from safeconduct.attestation.verify.report import Finding
from safeconduct.attestation.verify.trust import TrustPolicy
from safeconduct.attestation.verify.trust_file import MAX_FILE_BYTES
from safeconduct.attestation.verify.vouching import Brought
from safeconduct.errors import Exit

from .evidence import check_file, trusted_keys
from .evidence_report import Evidence
from .proof import ENTRY_SUFFIX, PROOF_SUFFIX

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """A file as a person asks about it, and what they bring.

    ``entry`` is the file of the entry that a proof is about, or that a bundle or statement holds;
    without it, the one beside a proof.
    """

    file: Path
    keys: Sequence[str] = ()
    trust: Path | None = None
    origin: str | None = None
    policy: Path | None = None
    operators: Sequence[str] = ()
    entry: Path | None = None


def check_handed(handed: Handed) -> Evidence:
    """Check a proof, session bundle or statement."""
    lines = keys_said(handed.keys, handed.file)
    if handed.trust is not None:
        lines += key_lines(handed.trust, handed.file)
    policy = None
    if handed.policy is not None:
        policy = TrustPolicy.parse(read_whole(handed.policy, MAX_FILE_BYTES))
    require_operators(handed.operators, policy)
    brought = Brought(
        keys=trusted_keys(lines),
        policy=policy,
        operators=handed.operators,
        origin=handed.origin,
        now=int(time.time()),
    )
    try:
        entry = _entry(handed)
    except OSError as error:  # the file beside it came with it, as what is in it did
        return _unreadable(f"the {ENTRY_SUFFIX} file beside {handed.file}: {error.strerror}")
    try:
        fd = os.open(handed.file, _READ)  # never waits for a FIFO or a device
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        return _unreadable(f"{handed.file}: {why}")
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)  # fdopen would refuse it
        return _unreadable(f"{handed.file} is a folder: check it with safeconduct trace verify")
    with os.fdopen(fd, "rb") as stream:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return _unreadable(f"{handed.file} is not a regular file")
        try:
            return check_file(stream, brought, entry=entry, name=str(handed.file))
        except OSError as error:  # a disk that fails, a network share that went away
            return _unreadable(f"{handed.file}: {error.strerror}")


def _entry(handed: Handed) -> bytes | None:
    if handed.entry is not None:
        return read_whole(handed.entry, MAX_ENTRY_BYTES)
    if handed.file.suffix != PROOF_SUFFIX:
        return None
    beside = handed.file.with_suffix(ENTRY_SUFFIX)
    if not os.path.isfile(beside):
        return None
    with os.fdopen(os.open(beside, _READ), "rb") as stream:
        # One byte more than an entry has is another entry than the one it is about.
        return stream.read(MAX_ENTRY_BYTES + 1)


def _unreadable(why: str) -> Evidence:
    finding = Finding(code="proof.io", message=why)
    return Evidence(kind="file", status=Exit.TRACE_IO, findings=(finding,))
