"""Step "record": keys of sessions, so that what commitments stand for can be destroyed for good.

The openings and blobs of each session are encrypted with a key of its own (AES-256-GCM). That key
lies beside the log key and never in the trace, wrapped with the vault's own key: whoever destroys
one small file makes the session unreadable in every copy of the trace. The bytes are described in
docs/trace-format.md, "Sealed openings and erasure".
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from safeconduct.attestation.files import shred, write_whole
from safeconduct.attestation.note import decode_base64, encode_base64
from safeconduct.attestation.signing.key import require_outside
from safeconduct.errors import TraceInvalid

KEY_BYTES = 32
# Nonces are random. LIMIT: 2**32 messages with one key (NIST SP 800-38D §8.3), beyond any session.
_NONCE_BYTES = 12
_TAG_BYTES = 16
_VAULT_KEY = "SAFECONDUCT-VAULT-KEY-1 "
_WRAPPED_KEY = b"safeconduct/session-key/v1\n"
_WRAPPED_BYTES = len(_WRAPPED_KEY) + _NONCE_BYTES + KEY_BYTES + _TAG_BYTES
_MAX_KEY_FILE_BYTES = 256
_SESSION = re.compile(r"[0-9a-z-]{1,64}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


class SessionKey:
    """The key of one session's openings and blobs.

    Each message is bound to its session and to its place in it, so that none can stand elsewhere.
    """

    def __init__(self, secret: bytes, session: str) -> None:
        self._cipher = AESGCM(secret)
        name = session.encode("ascii")
        self._lines = b"safeconduct/openings/v1\n%b\n" % name
        self._blob = b"safeconduct/blob/v1\n%b\n" % name

    def seal_lines(self, index: int, lines: bytes) -> bytes:
        """Encrypt what is said about one Entry."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, lines, b"%b%d" % (self._lines, index))

    def open_lines(self, index: int, sealed: bytes) -> bytes:
        """Decrypt it. Raise TraceInvalid ``opening.false`` for what was not made with this key."""
        return self._open(sealed, b"%b%d" % (self._lines, index))

    def seal_blob(self, digest: str, data: bytes) -> bytes:
        """Encrypt the file that holds the committed bytes of one commitment."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, data, self._blob + digest.encode("ascii"))

    def open_blob(self, digest: str, sealed: bytes) -> bytes:
        """Decrypt it. Raise TraceInvalid ``opening.false`` for what was not made with this key."""
        return self._open(sealed, self._blob + digest.encode("ascii"))

    def _open(self, sealed: bytes, place: bytes) -> bytes:
        nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        if len(rest) < _TAG_BYTES:
            raise TraceInvalid("the opening is cut off", code="opening.false")
        try:
            return self._cipher.decrypt(nonce, rest, place)
        except InvalidTag as error:
            raise TraceInvalid(
                "the opening was not sealed with its session's key", code="opening.false"
            ) from error


class LogKeys:
    """The keys of one log's sessions: a folder in the vault, named after the log."""

    def __init__(self, wrap: AESGCM, folder: Path, origin: str) -> None:
        self._wrap, self._folder, self._origin = wrap, folder, origin

    def obtain(self, session: str) -> SessionKey:
        """Return the session's key, made when absent; it is on disk then. Raise OSError."""
        with _locked(self._folder.parent) as vault:
            key = self.find(session)
            if key is not None:
                return key
            secret = os.urandom(KEY_BYTES)
            _make(vault, self._folder.name)
            with _opened(self._folder.name, vault) as fd:
                _write_new(fd, session, self._wrapped(session, secret))
        return SessionKey(secret, session)

    def find(self, session: str) -> SessionKey | None:
        """Return the session's key, or None where it was destroyed or never was here.

        Raise TraceInvalid ``key.permissions`` for a file that others can read.
        """
        path = self._path(session)
        try:
            data = _read_private(path)
        except OSError as error:
            raise _failed(path, error) from error
        if data is None or len(data) != _WRAPPED_BYTES or not data.startswith(_WRAPPED_KEY):
            return None  # nothing, or the zeros that a broken off destruction left
        nonce = data[len(_WRAPPED_KEY) :][:_NONCE_BYTES]
        wrapped = data[len(_WRAPPED_KEY) + _NONCE_BYTES :]
        try:
            secret = self._wrap.decrypt(nonce, wrapped, self._place(session))
        except InvalidTag:
            return None  # of another vault
        return SessionKey(secret, session)

    def has(self, session: str) -> bool:
        """Tell whether there is a key file of the session, whatever it holds."""
        return os.path.lexists(self._path(session))

    def destroy(self, session: str) -> bool:
        """Overwrite and remove the session's key, durably; tell whether there was one."""
        name = self._path(session).name
        try:
            folder = os.open(self._folder, _DIRECTORY)
        except FileNotFoundError:
            return False
        try:
            shred(folder, _temporary(name))
            return shred(folder, name)
        finally:
            os.close(folder)

    def _wrapped(self, session: str, secret: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return _WRAPPED_KEY + nonce + self._wrap.encrypt(nonce, secret, self._place(session))

    def _place(self, session: str) -> bytes:
        return _WRAPPED_KEY + f"{self._origin}\n{session}".encode()

    def _path(self, session: str) -> Path:
        if _SESSION.fullmatch(session) is None:
            raise TraceInvalid(f"{session[:80]!r} is no session id", code="trace.entry")
        return self._folder / session


class Vault:
    """The key-encryption key, ``vault.key``, and the folder ``vault`` with wrapped keys beside it.

    It is loaded by the process that records and by those that read: the signer needs none of it.
    """

    def __init__(self, secret: bytes, folder: Path) -> None:
        self._wrap = AESGCM(secret)
        self._folder = folder

    @classmethod
    def open(cls, path: Path, *, forbidden: Sequence[Path] = ()) -> Vault:
        """Load the vault of a key file, made when absent.

        Raise TraceInvalid ``key.permissions`` (others can read it or its folder, it is not ours,
        or lies in one of the ``forbidden`` folders), ``key.invalid`` or ``key.io``.
        """
        try:
            require_outside(path, forbidden)
            with _locked(path.parent) as folder:
                if not os.path.lexists(path):
                    line = f"{_VAULT_KEY}{encode_base64(os.urandom(KEY_BYTES))}\n"
                    _write_new(folder, path.name, line.encode())
                _make(folder, path.stem)
        except OSError as error:
            raise _failed(path, error) from error
        found = cls.find(path, forbidden=forbidden)
        if found is None:
            raise TraceInvalid(f"{path} went away", code="key.missing", hint="try again")
        return found

    @classmethod
    def find(cls, path: Path, *, forbidden: Sequence[Path] = ()) -> Vault | None:
        """Load the vault of a key file, or None where there is none. Raise as ``open`` does."""
        try:
            data = _read_private(path)
            if data is None:
                return None
            require_outside(path, forbidden)
            folder = path.with_suffix("")
            _require_private(folder, os.lstat(folder), stat.S_ISDIR)
        except OSError as error:
            raise _failed(path, error) from error
        return cls(_parse(path, data), folder)

    def log(self, origin: str) -> LogKeys:
        """Return the keys of one log's sessions."""
        name = sha256(origin.encode()).hexdigest()[:32]
        return LogKeys(self._wrap, self._folder / name, origin)


def _parse(path: Path, data: bytes) -> bytes:
    text = data.decode("ascii", "replace").removesuffix("\n")
    if not text.startswith(_VAULT_KEY):
        raise TraceInvalid(f"{path} is no vault key", code="key.invalid")
    secret = decode_base64(text.removeprefix(_VAULT_KEY), code="key.invalid")
    if len(secret) != KEY_BYTES:
        raise TraceInvalid(f"{path} is no vault key", code="key.invalid")
    return secret


def _read_private(path: Path) -> bytes | None:
    """Read a key file after looking at the file itself; None where there is none."""
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        _require_private(path, os.fstat(fd), stat.S_ISREG)
        return file.read(_MAX_KEY_FILE_BYTES + 1)


def _require_private(path: Path, status: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    why = ""
    if not is_kind(status.st_mode):
        why = "it is a link or of another kind"
    elif status.st_uid != os.geteuid():
        why = "it belongs to somebody else"
    elif status.st_mode & 0o077:
        why = "others can read it"
    elif stat.S_ISREG(status.st_mode) and status.st_nlink != 1:
        why = "it has a second name (hard link)"  # which may lie inside the workspace
    if why:
        raise TraceInvalid(
            f"the vault's {path} is refused: {why}",
            code="key.permissions",
            hint=f"keep it outside workspace and trace, and run: chmod go= {path}",
        )


@contextmanager
def _locked(folder: Path) -> Generator[int]:
    """Let one process at a time make keys here: two that make one must agree on it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _opened(name: str, parent: int) -> Generator[int]:
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


def _make(parent: int, name: str) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return
    os.fsync(parent)


def _temporary(name: str) -> str:
    return f".{name}.tmp"


def _write_new(folder: int, name: str, data: bytes) -> None:
    """Write a key file whole and durably: data, then name, then folder."""
    fd = os.open(_temporary(name), _CREATE, 0o600, dir_fd=folder)
    try:
        write_whole(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(_temporary(name), name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


def _failed(path: Path, error: OSError) -> TraceInvalid:
    return TraceInvalid(
        f"the vault key {path} cannot be used: {error.strerror}",
        code="key.io",
        hint="check the folder it lies in, or name another state folder",
    )
