"""Step "sandbox": what can be known of this machine layer by layer, for ``doctor`` and ``setup``.

What the kernel does is tried (trial.py, in a process of its own); what the settings say is read
only to tell why a trial failed. Nothing here decides how a Call is confined: machine.py does.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

# LIMIT: seconds for all trials, each of which has a limit of its own.
_TRIALS_SECONDS = 60
KNOBS = (
    "user.max_user_namespaces",
    "kernel.unprivileged_userns_clone",  # Debian, until 11 and by choice later
    "kernel.apparmor_restrict_unprivileged_userns",  # Ubuntu, from 23.10
)
_CAPABILITIES = {"CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SYS_ADMIN": 21}
_OURS = "run/safeconduct"
_OURS_VARIABLE = "SAFECONDUCT_SANDBOX"
_CONTAINER_FILES = {".dockerenv": "docker", "run/.containerenv": "podman"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How one trial ended: the step that failed and its errno; an empty step is success."""

    step: str = ""
    errno: int = 0

    @property
    def ok(self) -> bool:
        """Tell whether it worked."""
        return not self.step

    def __str__(self) -> str:
        """Say it as "unshare: EPERM"."""
        name = errno.errorcode.get(self.errno, str(self.errno))
        return f"{self.step}: {name}" if self.errno else self.step


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What this process lives in: what was taken from it before it started."""

    ours: bool = False
    container: str = ""
    ids_mapped: bool = True
    seccomp_filter: bool = False
    no_new_privileges: bool = False
    proc_masked: tuple[str, ...] = ()
    apparmor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything found. ``landlock_abi`` below 0 is the errno that the kernel answered."""

    root: bool
    capabilities: frozenset[str]
    trials: Mapping[str, Trial]
    landlock_abi: int
    knobs: Mapping[str, str] = field(default_factory=dict[str, str])
    security_modules: tuple[str, ...] | None = None
    around: Surroundings = Surroundings()

    def trial(self, name: str) -> Trial:
        """Return how a trial ended; one that could not run has failed."""
        return self.trials.get(name, Trial(step="the trial could not run"))

    @property
    def filtered(self) -> bool:
        """Tell whether something answers before the kernel looks at what was asked for.

        An impossible request is EINVAL to a stock kernel, whoever asks. What says something else is
        a seccomp filter, or Debian's ``kernel.unprivileged_userns_clone``: ask for that first.
        """
        asked = [(call, self.trial(f"unfiltered {call}")) for call in ("unshare", "clone")]
        return any(one.step == call and one.errno != errno.EINVAL for call, one in asked)


class _Answer(msgspec.Struct, forbid_unknown_fields=True):
    landlock_abi: int
    trials: dict[str, tuple[str, int]]


def collect(folder: str = ".", *, root: Path = Path("/")) -> Facts:
    """Try every layer and read what explains it. Starts and ends one process.

    ``folder`` is where id-mapped mounts are tried; settings are read below ``root``.
    """
    answer = _run_trials(folder)
    status = _status(root)
    effective = int(status.get("CapEff", "0"), 16)
    return Facts(
        root=os.geteuid() == 0,
        capabilities=frozenset(name for name, bit in _CAPABILITIES.items() if effective >> bit & 1),
        trials={
            name: Trial(step=step, errno=number) for name, (step, number) in answer.trials.items()
        },
        landlock_abi=answer.landlock_abi,
        knobs=read_knobs(root),
        security_modules=_security_modules(root),
        around=_surroundings(root, status),
    )


def _run_trials(folder: str) -> _Answer:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("trial.py")), folder],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TRIALS_SECONDS,
            check=True,
        )
        return msgspec.json.decode(done.stdout, type=_Answer)
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError):
        # Every trial then counts as failed and says so: less is claimed, never more.
        return _Answer(landlock_abi=-errno.EIO, trials={})


def read_knobs(root: Path = Path("/")) -> dict[str, str]:
    """Return the settings that this kernel knows and that may forbid user namespaces."""
    found: dict[str, str] = {}
    for knob in KNOBS:
        text = _read(root / "proc/sys" / knob.replace(".", "/"))
        if text is not None:
            found[knob] = text.strip()
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _status(root: Path) -> dict[str, str]:
    lines = (_read(root / "proc/self/status") or "").splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name: value.strip() for name, value in pairs}


def _security_modules(root: Path) -> tuple[str, ...] | None:
    text = _read(root / "sys/kernel/security/lsm")
    return None if text is None else tuple(text.strip().split(","))


def _surroundings(root: Path, status: Mapping[str, str]) -> Surroundings:
    container = next(
        (name for file, name in _CONTAINER_FILES.items() if (root / file).exists()),
        os.environ.get("container", ""),  # noqa: SIM112 - systemd's name for it
    )
    uid_map = (_read(root / "proc/self/uid_map") or "").split()
    mounts = (_read(root / "proc/self/mountinfo") or "").splitlines()
    places = [line.split(" ")[4] for line in mounts if line.count(" ") > 4]
    label = (_read(root / "proc/self/attr/current") or "").strip("\0\n ")
    return Surroundings(
        ours=(root / _OURS).exists() or _OURS_VARIABLE in os.environ,
        container=container,
        # user_namespaces(7): the first namespace maps every id to itself.
        ids_mapped=not uid_map or uid_map == ["0", "0", "4294967295"],
        seccomp_filter=status.get("Seccomp") == "2",
        no_new_privileges=status.get("NoNewPrivs") == "1",
        proc_masked=tuple(sorted({one for one in places if one.startswith("/proc/")})),
        apparmor="" if label in ("", "unconfined") else label,
    )
