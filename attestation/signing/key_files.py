"""Step "record": the signer's key file through a rotation, with no moment at which a key is lost.

Beside ``log.key`` lie, while keys change: ``log.key.next``, the new key from before anything is
signed about it; ``log.key.old``, the old one from just before the new one takes its place until
it is overwritten. Every step is one rename, link or unlink, and the folder is synced before the
next; ``open`` finishes or takes back what a crash left.

Every signer holds a shared flock(2) on the key file; who rotates holds it alone, so that no other
process keeps signing with a key that is destroyed.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from safeconduct.attestation.note import SigningKey, VerifierKey
from safeconduct.errors import TraceInvalid

from .key import Ask, key_text, open_key, read_key, sync_folder, write_at, write_private

# LIMIT: how long a signer waits for another one that is about to change the key.
_WAIT_S, _PAUSE_S = 5.0, 0.05
_MAX_LINE_BYTES = 1024
_CHUNK = 4096


class KeyFiles:
    """The key in force and, while a rotation is under way, the next one. For one thread."""

    def __init__(
        self,
        path: Path,
        fd: int,
        current: SigningKey,
        next_key: SigningKey | None,
        passphrase: bytes | None,
    ) -> None:
        """Take over an open, locked key file; use ``open``."""
        self._path, self._fd, self._passphrase = path, fd, passphrase
        self.current = current
        self.next = next_key

    @classmethod
    def open(
        cls, path: Path, *, forbidden: Sequence[Path] = (), ask: Ask | None = None
    ) -> KeyFiles:
        """Repair what a crash left, read the key, and hold it against rotation by others.

        Raise TraceInvalid as ``load_key`` does, and ``key.busy`` while somebody else rotates it.
        """
        given: list[bytes] = []

        def once(line: str) -> bytes:
            if not given and ask is not None:
                given.append(ask(line))
            return given[0]

        once_or_never = None if ask is None else once
        fd = _open_shared(path)
        try:
            _repair(path, fd)
            current = read_key(fd, path, forbidden=forbidden, ask=once_or_never)
            next_key = _read_next(path, current, once_or_never)
            files = cls(path, fd, current, next_key, given[0] if given else None)
        except BaseException:
            os.close(fd)
            raise
        files.publish()
        return files

    def begin(self) -> VerifierKey:
        """Make the next key, or find it made, and return its public half once it is durable.

        From then on this process alone may use the key file. Raise TraceInvalid ``key.busy``
        while other signers use it.
        """
        self._hold_alone()
        if self.next is None:
            made = SigningKey(self.current.name, os.urandom(32))
            temporary = _beside(self._path, ".making")
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            write_private(temporary, key_text(made, self._passphrase))
            os.rename(temporary, _beside(self._path, ".next"))
            sync_folder(self._path)
            self.next = made
        return self.next.verifier

    def finish(self) -> None:
        """Put the next key in the old one's place and destroy the old one.

        After an OSError the object must not be used any more: ``open`` finds out what holds.
        Overwriting reaches the blocks of the file only where the file system writes in place;
        copies that it or the disk keeps are out of reach.
        """
        assert self.next is not None  # noqa: S101 - INVARIANT: the signer calls begin first
        new, old = _beside(self._path, ".next"), _beside(self._path, ".old")
        new_fd = open_key(new)
        try:
            # Whoever opens the new file under its old or its final name has to wait for us.
            fcntl.flock(new_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.link(self._path, old)
            sync_folder(self._path)
            os.rename(new, self._path)
            # INVARIANT: not a byte of the old key is touched before the new name is durable.
            sync_folder(self._path)
            _erase(old)
        except BaseException:
            os.close(new_fd)
            raise
        os.close(self._fd)
        self._fd, self.current, self.next = new_fd, self.next, None
        fcntl.flock(new_fd, fcntl.LOCK_SH)
        self.publish()

    def publish(self) -> None:
        """Keep ``log.pub`` beside ``log.key`` true, where it is ours to keep."""
        public = self._path.with_suffix(".pub")
        line = f"{self.current.verifier.line}\n"
        if public == self._path:
            return
        # A folder that cannot be written, or a link there, only means that nothing is published.
        with suppress(OSError):
            known = _known_line(public, self.current.name)
            if known in (None, line):
                return
            temporary = _beside(public, ".making")
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            write_private(temporary, line)
            os.chmod(temporary, 0o644)
            os.rename(temporary, public)
            sync_folder(public)

    def close(self) -> None:
        """Let go of the key file."""
        os.close(self._fd)

    def _hold_alone(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        # flock(2): a failed conversion has given the shared lock away.
        _lock_shared(self._fd)
        if not _is_still(self._path, self._fd):
            raise _busy("it was changed meanwhile; start again")
        raise _busy("another runtime signs with it: end that one first, or rotate from there")


def _open_shared(path: Path) -> int:
    until = time.monotonic() + _WAIT_S
    while True:
        fd = open_key(path)
        try:
            _lock_shared(fd)
            if _is_still(path, fd):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() > until:
            raise _busy("it changes all the time")


def _lock_shared(fd: int) -> None:
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise _busy("somebody is changing it; try again") from error
        time.sleep(_PAUSE_S)


def _is_still(path: Path, fd: int) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(fd))


def _repair(path: Path, fd: int) -> None:
    """Finish or take back what a crash left half done. Whoever runs it holds the shared lock."""
    status = os.fstat(fd)
    old = _beside(path, ".old")
    try:
        left = os.stat(old, follow_symlinks=False)
    except FileNotFoundError:
        left = None
    if left is not None and os.path.samestat(left, status):
        # The crash came before the rename: one file, two names. The rotation is still to be done.
        with suppress(FileNotFoundError):  # another signer that has just started did it
            os.unlink(old)
        sync_folder(path)
    elif left is not None:
        _erase(old)
    if status.st_nlink > 1:
        _drop_made(path, status)


def _drop_made(path: Path, status: os.stat_result) -> None:
    """Remove the name under which write_key made the key, if a crash left it."""
    for name in os.listdir(path.parent):
        if name.startswith(f".{path.name}."):
            made = path.with_name(name)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(made, follow_symlinks=False), status):
                    os.unlink(made)


def _read_next(path: Path, current: SigningKey, ask: Ask | None) -> SigningKey | None:
    new = _beside(path, ".next")
    if not os.path.lexists(new):
        return None
    fd = open_key(new)
    try:
        found = read_key(fd, new, ask=ask)
    finally:
        os.close(fd)
    if found.name != current.name:
        raise TraceInvalid(
            f"{new} is not a key of {current.name}",
            code="key.invalid",
            hint="it is not this program's: move it away",
        )
    return found


def _erase(path: Path) -> None:
    """Overwrite a key file and remove it. Done again after a crash, it does the rest."""
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            for at in range(0, size, _CHUNK):
                write_at(fd, os.urandom(min(_CHUNK, size - at)), at)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.unlink(path)
    sync_folder(path)


def _known_line(public: Path, name: str) -> str | None:
    """Return the line published now, "" where there is none, None where the file is not ours."""
    try:
        fd = os.open(public, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    with os.fdopen(fd, "rb") as file:
        text = file.read(_MAX_LINE_BYTES + 1).decode("ascii", "replace")
    try:
        return text if VerifierKey.parse(text.strip()).name == name else None
    except TraceInvalid:
        return None


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _busy(why: str) -> TraceInvalid:
    return TraceInvalid(
        f"the key file is in use: {why}", code="key.busy", hint="one runtime at a time can rotate"
    )
