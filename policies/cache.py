"""Compiled policies kept between processes, so that a large file is compiled once.

A kept policy is as trusted as the file it came from: it lies in the user's state folder, which
is absent in every sandbox, is read only if nobody else could have written it, and is found
under the digest of all that went into it, our own code included. Whatever is wrong with it, it
is as if it were not there; it is never the reason of an error.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import secrets
import stat
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from safeconduct.errors import PolicyError

from .codec import NotPlain, decode_policy, encode_policy
from .rules import Policy
from .trust import state_folder

# A smaller file is compiled in the time that finding it here takes.
MIN_BYTES: Final = 32 << 10
# LIMIT: of one kept policy, and how many are kept.
MAX_BYTES: Final = 16 << 20
MAX_FILES: Final = 32
_FORM: Final = b"safeconduct policy 1\n"
_DIGEST_BYTES: Final = 32
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def cache_of(environment: Mapping[str, str]) -> PolicyCache | None:
    """Return the cache of the user whose environment this is; None without a home."""
    try:
        return PolicyCache(state_folder(environment) / "policies")
    except PolicyError:
        return None


class PolicyCache:
    """The policies kept in one folder, which is made with the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def lies_in(self, folder: str) -> bool:
        """Tell whether it lies inside a folder, where sandboxes might write to it."""
        return Path(os.path.realpath(self._folder)).is_relative_to(folder)

    def find(self, inputs: Sequence[bytes]) -> Policy | None:
        """Return the policy that was compiled of these inputs, or None."""
        if len(inputs[0]) < MIN_BYTES:
            return None
        with suppress(OSError, ValueError, ImportError):
            return decode_policy(self._read(_name(inputs)))
        return None

    def keep(self, inputs: Sequence[bytes], policy: Policy) -> None:
        """Keep what was compiled of these inputs. That it cannot be kept is no error."""
        if len(inputs[0]) < MIN_BYTES:
            return
        with suppress(OSError, NotPlain, ImportError):
            data = encode_policy(policy)
            if len(data) <= MAX_BYTES:
                self._write(_name(inputs), data)

    def _read(self, name: str) -> bytes:
        """Read a file that only we can have written; OSError or ValueError where there is none."""
        folder = self._open()
        try:
            fd = os.open(name, _READ, dir_fd=folder)
        finally:
            os.close(folder)
        with os.fdopen(fd, "rb") as file:
            _refuse_foreign(os.fstat(fd), stat.S_IFREG)
            data = file.read(len(_FORM) + _DIGEST_BYTES + MAX_BYTES + 1)
        head, digest = data[: len(_FORM)], data[len(_FORM) : len(_FORM) + _DIGEST_BYTES]
        body = data[len(_FORM) + _DIGEST_BYTES :]
        # A crash may leave a file with holes in it: nothing here waits for the disk.
        if head != _FORM or len(body) > MAX_BYTES or hashlib.sha256(body).digest() != digest:
            raise ValueError("damaged")
        return body

    def _write(self, name: str, body: bytes) -> None:
        """Put a file in place in one step; a reader sees the old or the new one, whole."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = self._open()
        temporary = f".{name[:16]}.{secrets.token_hex(8)}"
        try:
            fd = os.open(temporary, _WRITE, 0o600, dir_fd=folder)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(_FORM + hashlib.sha256(body).digest() + body)
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            _forget_oldest(folder)
        finally:
            os.close(folder)

    def _open(self) -> int:
        folder = os.open(self._folder, _FOLDER)
        try:
            _refuse_foreign(os.fstat(folder), stat.S_IFDIR)
        except ValueError:
            os.close(folder)
            raise
        return folder


def _refuse_foreign(status: os.stat_result, form: int) -> None:
    if stat.S_IFMT(status.st_mode) != form or status.st_uid != os.geteuid():
        raise ValueError("not ours")
    if status.st_mode & 0o077:
        raise ValueError("open to others")


def _forget_oldest(folder: int) -> None:
    """Keep the newest files, leftovers of a crash counted with them."""
    ages = {
        name: os.stat(name, dir_fd=folder, follow_symlinks=False) for name in os.listdir(folder)
    }
    newest_first = sorted(ages, key=lambda name: ages[name].st_mtime_ns, reverse=True)
    for name in newest_first[MAX_FILES:]:
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)


def _name(inputs: Sequence[bytes]) -> str:
    """Name the file by all that decides what is in it."""
    digest = hashlib.sha256(_code())
    for part in inputs:
        # The length keeps two parts from being read as two others.
        digest.update(b"%d\n" % len(part))
        digest.update(part)
    return digest.hexdigest()


@functools.cache
def _code() -> bytes:
    """Return the digest of the code that compiles policies: another version never reads ours."""
    digest = hashlib.sha256(sys.version.encode())
    # It puts the hosts and paths of URL patterns in their one spelling.
    digest.update(importlib.metadata.version("ada-url").encode())
    here = Path(__file__).parent
    for path in sorted([*here.rglob("*.py"), *here.glob("presets/*"), here.parent / "call.py"]):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()
