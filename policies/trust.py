"""Which project policies a person has read and trusts: real path → digest of the bytes.

A changed file has another digest, so it is untrusted again. The store lies in the user's
state folder, never in a workspace, and is believed only if nobody else could have written it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast

from safeconduct.errors import PolicyError

# LIMIT: about 10,000 projects.
MAX_BYTES: Final = 4 << 20
_VERSION: Final = 1
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FOLDER: Final = "safeconduct"
_FILE: Final = "trust.json"


def state_folder(environment: Mapping[str, str]) -> Path:
    """Return `$XDG_STATE_HOME/safeconduct`, by default `~/.local/state/safeconduct`.

    A relative value is ignored, as the XDG Base Directory Specification says.
    """
    state = Path(environment.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        home = Path(environment.get("HOME", ""))
        if not home.is_absolute():
            raise PolicyError(
                "there is no home folder to keep trust in",
                code="trust.no_home",
                hint="set HOME or XDG_STATE_HOME to an absolute path",
            )
        state = home / ".local" / "state"
    return state / _FOLDER


class TrustStore:
    """The digests that a person has pinned. Every method reads the file anew."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> TrustStore:
        """Return the store of the user whose environment this is."""
        return cls(state_folder(environment) / _FILE)

    def is_trusted(self, policy_path: Path, digest: str) -> bool:
        """Tell whether these very bytes are pinned for this file."""
        return self._read().get(_real(policy_path)) == digest

    def pin(self, policy_path: Path, digest: str) -> None:
        """Trust these bytes of this file; on disk when it returns."""
        if _DIGEST.fullmatch(digest) is None:
            raise ValueError("a digest is sha256:<64 hex digits>")
        with self._locked():
            self._write({**self._read(), _real(policy_path): digest})

    def unpin(self, policy_path: Path) -> bool:
        """Withdraw the trust in a file; tell whether there was any."""
        with self._locked():
            pins = self._read()
            found = pins.pop(_real(policy_path), None)
            if found is not None:
                self._write(pins)
            return found is not None

    def _refuse(self, message: str, hint: str) -> PolicyError:
        return PolicyError(message, file=str(self.path), code="trust.store", hint=hint)

    @contextmanager
    def _locked(self) -> Generator[None]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
            os.fsync(fd)
        finally:
            os.close(fd)

    def _read(self) -> dict[str, str]:
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self.path, flags)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._refuse(f"cannot be opened: {error.strerror}", "remove it") from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise self._refuse("not a file of yours", "remove it and trust again")
            if status.st_mode & 0o077:
                raise self._refuse("open to others", f"chmod 600 {self.path}, after reading it")
            if status.st_size > MAX_BYTES:
                raise self._refuse("too large", "remove it and trust again")
            data = os.read(fd, MAX_BYTES + 1)
        finally:
            os.close(fd)
        return self._parse(data)

    def _parse(self, data: bytes) -> dict[str, str]:
        damaged = self._refuse("damaged", "remove it and trust again")
        try:
            found: object = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise damaged from error
        if not isinstance(found, dict):
            raise damaged
        document = cast("dict[str, object]", found)
        pins = document.get("trusted")
        if set(document) != {"version", "trusted"} or document["version"] != _VERSION:
            raise damaged
        if not isinstance(pins, dict):
            raise damaged
        trusted: dict[str, str] = {}
        for path, digest in cast("dict[str, object]", pins).items():
            if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
                raise damaged
            trusted[path] = digest
        return trusted

    def _write(self, pins: Mapping[str, str]) -> None:
        """Replace the file in one step; a reader sees the old or the new one, whole."""
        document = {"version": _VERSION, "trusted": dict(sorted(pins.items()))}
        data = (json.dumps(document, indent=1) + "\n").encode()
        temporary = self.path.with_name(f".{_FILE}.new")
        # The folder's lock is held, so a leftover is from a crash.
        temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(temporary, flags, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def _real(path: Path) -> str:
    return os.path.realpath(path)
