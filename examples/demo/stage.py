"""Where the demo plays: a temporary folder with a workspace, a decoy home, keys and policies.

Everything lies in one folder, which is gone afterwards, however the demo ends. Only the trace
and its public key stay.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import repository

from safeconduct import Runtime, Tier
from safeconduct.attestation import write_key

PREFIX = "safeconduct-demo-"
# It begins the origin of every trace made here, which tells ours from others.
_KEY_NAME = "safeconduct-demo"
_TRACE_PARTS = frozenset(
    [
        "README",
        "origin",
        "checkpoint",
        "checkpoints",
        "tile",
        "journal",
        "openings",
        "blobs",
        ".checkpoint.tmp",
    ]
)
_POLICIES = Path(__file__).with_name("policies")
_SYSTEM_PYTHON = Path("/usr/bin/python3")
_NODE_SECONDS = 20


class Refused(Exception):
    """The demo cannot start here; the text says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program by its real path, and the folder a sandbox must see to run it."""

    path: str
    folder: str

    @classmethod
    def of(cls, path: str, prefix: str) -> Program:
        """Name a program; one in /usr needs no grant of its own, and a harmless one is given."""
        real = os.path.realpath(path)
        inside = real.startswith("/usr/") and not real.startswith("/usr/local/")
        return cls(path=real, folder="/usr" if inside else os.path.realpath(prefix))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The demo's places. ``key`` is the public key line of its trace."""

    root: Path
    trace: Path
    tier: Tier | None
    python: Program
    secret: str
    key: str

    @property
    def workspace(self) -> Path:
        """The repository the agent works on."""
        return self.root / "basket"

    @property
    def home(self) -> Path:
        """A decoy home: nobody's real one is ever looked at."""
        return self.root / "home"

    @property
    def vault_key(self) -> Path:
        """What opens the arguments and outputs in the trace; gone with the rest afterwards."""
        return self.root / "state" / "safeconduct" / "keys" / "vault.key"

    @property
    def environment(self) -> Mapping[str, str]:
        """Where a runtime of the demo looks for keys, state and policies."""
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.home),
            "TMPDIR": str(self.root / "tmp"),
            "XDG_STATE_HOME": str(self.root / "state"),
            "XDG_CONFIG_HOME": str(self.root / "config"),
        }

    def policy(self, name: str, grants: Mapping[str, str] | None = None) -> Path:
        """Write a policy of this folder into the workspace, with the real paths of programs.

        The templates are valid where Python and Node live in /usr; ``grants`` replaces more.
        """
        text = (_POLICIES / name).read_text()
        spelled = {"/usr/bin/python3": self.python.path, "/usr/**": f"{self.python.folder}/**"}
        for usual, real in (spelled | dict(grants or {})).items():
            text = text.replace(usual, real)
        file = self.workspace / ".safeconduct" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    def runtime(self, policy: Path) -> Runtime:
        """Start a runtime that records into the demo's trace."""
        return Runtime.from_policy(
            policy,
            workspace=self.workspace,
            trace=self.trace,
            tier=self.tier,
            caller="demo-agent",
            environment=self.environment,
        )


@contextmanager
def set_stage(trace: Path, tier: Tier | None) -> Generator[Stage]:
    """Make everything the demo needs; on leaving, all but the trace is gone.

    Raises Refused where something else lies at ``trace``.
    """
    _make_room(trace)
    # The name comes first, so that no interrupt can leave a folder that nobody knows of.
    root = _temporary() / f"{PREFIX}{secrets.token_hex(6)}"
    try:
        root.mkdir()
        root.chmod(0o755)
        secret = f"decoy-{secrets.token_hex(8)}"
        keys = root / "state" / "safeconduct" / "keys"
        keys.mkdir(parents=True)
        (root / "state").chmod(0o700)
        (root / "tmp").mkdir()
        # Private folders of sandboxes in tier landlock are made there, so they go with the rest.
        tempfile.tempdir = str(root / "tmp")
        stage = Stage(
            root=root,
            trace=trace,
            tier=tier,
            python=_python(),
            secret=secret,
            key=write_key(keys / "log.key", _KEY_NAME),
        )
        ssh = stage.home / ".ssh"
        ssh.mkdir(parents=True)
        (ssh / "id_ed25519").write_text(f"This is no key, only a decoy: {secret}\n")
        repository.create(stage.workspace, stage.home)
        yield stage
    finally:
        tempfile.tempdir = None
        shutil.rmtree(root, ignore_errors=True)
        if not (trace / "origin").exists():
            # Interrupted before the log was opened: nothing was here before, and this is no trace.
            shutil.rmtree(trace, ignore_errors=True)


def is_open(path: Path | str) -> bool:
    """Tell whether any user may reach a path. Started by root, sandboxes have their own."""
    real = Path(path).resolve()
    return all(place.stat().st_mode & 0o001 for place in (real, *real.parents))


def node() -> Program | None:
    """Find Node by its real path, past the wrappers of version managers."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return None
    asked = subprocess.run(
        ["node", "-p", "process.execPath"],
        capture_output=True, text=True, timeout=_NODE_SECONDS, check=False,
    )  # fmt: skip
    real = asked.stdout.strip()
    return Program.of(real, os.path.dirname(os.path.dirname(real))) if real else None


def _python() -> Program:
    """Choose the interpreter that runs the agent's tests.

    Started by root in tier landlock, a sandbox cannot reach one below a home of mode 0700.
    """
    if os.geteuid() == 0 and not is_open(sys.base_prefix) and _SYSTEM_PYTHON.exists():
        return Program.of(str(_SYSTEM_PYTHON), "/usr")
    return Program.of(sys.executable, sys.base_prefix)


def _temporary() -> Path:
    """Choose a temporary folder; started by root, one that every user can reach."""
    usual = Path(tempfile.gettempdir()).resolve()
    if os.geteuid() != 0:
        return usual
    places = [place for place in (usual, Path("/tmp"), Path("/var/tmp")) if place.is_dir()]
    return next((place for place in places if is_open(place)), usual)


def _make_room(trace: Path) -> None:
    """Remove the trace of an earlier run, and nothing else."""
    if not os.path.lexists(trace):
        return
    ours = False
    if trace.is_dir() and not trace.is_symlink():
        names = {entry.name for entry in trace.iterdir()}
        origin = trace / "origin"
        named = origin.is_file() and origin.read_bytes().startswith(f"{_KEY_NAME}/".encode())
        ours = not names or (named and names <= _TRACE_PARTS)
    if not ours:
        raise Refused(f"{trace} exists and is no trace of this demo: move it away first.")
    shutil.rmtree(trace)
