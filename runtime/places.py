"""Where a user's log key, signer memory and traces lie. Loads nothing of the runtime."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safeconduct.attestation import write_key
from safeconduct.errors import TraceInvalid


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where this user's key, signer memory and traces lie. Absent in every sandbox."""

    state: Path

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Places:
        """Find them through XDG_STATE_HOME, else below HOME."""
        from safeconduct.policies import state_folder  # loads pydantic, which verify never needs

        return cls(state=state_folder(environment))

    @property
    def key(self) -> Path:
        """The private log key, mode 0600."""
        return self.state / "keys" / "log.key"

    @property
    def public_key(self) -> Path:
        """The key line that others verify with."""
        return self.state / "keys" / "log.pub"

    @property
    def vault_key(self) -> Path:
        """What the keys of sessions are wrapped with; they lie in the folder ``vault`` beside."""
        return self.state / "keys" / "vault.key"

    @property
    def signer(self) -> Path:
        """What the signer remembers having signed."""
        return self.state / "signer"

    @property
    def traces(self) -> Path:
        """The traces of runs that named no other place."""
        return self.state / "traces"

    def lock(self, workspace: str) -> Path:
        """The file that counts the runtimes which use a workspace."""
        return self.state / "locks" / hashlib.sha256(os.fsencode(workspace)).hexdigest()[:32]

    def prepare(self) -> None:
        """Make the folders and, the first time, a key. Raises TraceInvalid where it cannot."""
        folders = (self.state, self.key.parent, self.signer, self.traces, self.state / "locks")
        try:
            for folder in folders:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self.key.exists():
                self._make_key()
        except OSError as error:
            raise TraceInvalid(
                f"{error.filename or self.state} cannot be made: {error.strerror}.",
                code="trace.state",
                hint="Set XDG_STATE_HOME to a folder of your own, outside every workspace.",
            ) from error

    def _make_key(self) -> None:
        try:
            line = write_key(self.key, f"safeconduct-{secrets.token_hex(4)}")
        except TraceInvalid as error:
            if error.code != "key.exists":  # another runtime was faster, and publishes its line
                raise
        else:
            self.public_key.write_text(line + "\n")

    @property
    def changes(self) -> Path:
        """What sandboxed calls changed in an overlay and nobody has decided about."""
        return self.state / "changes"

    @property
    def budgets(self) -> Path:
        """What calls have used of rates and daily budgets."""
        return self.state / "budgets.db"

    def commits(self, workspace: str) -> Path:
        """Where commits of changes to a workspace keep their journal."""
        return self.state / "commits" / hashlib.sha256(os.fsencode(workspace)).hexdigest()[:32]

    def new_trace(self) -> Path:
        """Name a folder for a new trace: by time, for people, and unique."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        return self.traces / f"{stamp}-{secrets.token_hex(3)}"
