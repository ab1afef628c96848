"""The rootless column: the running benchmark once more, as an ordinary user, from root's command.

The user must be able to read an interpreter. In place of a private one (in a home folder) stands a
virtual environment of the system's, of the same version, which shows the private one's packages.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import safeconduct

# Where distributions put nobody's ids: above their ordinary users, below `nobody`.
_THROWAWAY_IDS = range(61_000, 65_000)
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
_ROOT = Path(__file__).resolve().parents[1]
_TRIAL_SECONDS, _COLUMN_SECONDS = 60, 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class _User:
    uid: int
    gid: int


def column(
    flags: Sequence[str], as_user: str | None, python: str | None
) -> Mapping[str, object] | str:
    """Return what the same benchmark prints as an ordinary user, or why it cannot.

    ``as_user`` is a name or a number; without it, an id that belongs to nobody.
    """
    try:
        user = _find(as_user)
    except LookupError as error:
        return str(error)
    module = _running()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as home:
        os.chown(home, user.uid, user.gid)
        for interpreter in [python] if python else _interpreters(home):
            failure = _trial(interpreter, module, user, home)
            if failure is None:
                return _measure([interpreter, "-m", module, "--json", *flags], user, home)
            failures.append(f"{interpreter}: {failure}")
    hint = "name another interpreter with --python"
    return f"user {user.uid} cannot run {module} ({'; '.join(failures)}); {hint}"


def _find(as_user: str | None) -> _User:
    if as_user is None:
        taken = {entry.pw_uid for entry in pwd.getpwall()}
        free = next(uid for uid in _THROWAWAY_IDS if uid not in taken)
        return _User(uid=free, gid=free)
    if as_user.isdecimal():
        return _User(uid=int(as_user), gid=int(as_user))
    try:
        entry = pwd.getpwnam(as_user)
    except KeyError as error:
        raise LookupError(f"there is no user {as_user}") from error
    return _User(uid=entry.pw_uid, gid=entry.pw_gid)


def _running() -> str:
    """Return the name of the module that was started with -m."""
    specification = sys.modules["__main__"].__spec__
    if specification is None:
        raise SystemExit("Start benchmarks with `python -m benchmarks.NAME`.")
    return specification.name


def _interpreters(home: str) -> Iterator[str]:
    yield sys.executable
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = shutil.which(version, path=_SYSTEM_PATH)
    if found is None:
        return
    made = Path(home, "venv")
    # The signer's interpreter is isolated: it knows only what its own site-packages names.
    done = subprocess.run(
        [found, "-I", "-m", "venv", "--without-pip", str(made)], capture_output=True
    )
    site = made / "lib" / version / "site-packages"
    if done.returncode == 0 and site.is_dir():
        (site / "benchmarks.pth").write_text("\n".join(_packages()))
        yield str(made / "bin" / "python")


def _packages() -> Sequence[str]:
    ours = str(Path(safeconduct.__file__).parents[1])
    installed = (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"))
    return [*dict.fromkeys((str(_ROOT), ours, *installed))]


def _environment(home: str) -> dict[str, str]:
    return {"HOME": home, "PATH": _SYSTEM_PATH, "PYTHONPATH": ":".join(_packages())}


def _run(
    argv: Sequence[str], user: _User, home: str, seconds: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        user=user.uid,
        group=user.gid,
        extra_groups=[],
        cwd=_ROOT,
        env=_environment(home),
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def _trial(interpreter: str, module: str, user: _User, home: str) -> str | None:
    """Say why ``module`` cannot be imported by that user, None where it can."""
    try:
        tried = _run([interpreter, "-c", f"import {module}"], user, home, _TRIAL_SECONDS)
    except OSError as error:
        return error.strerror or str(error)
    return _last_line(tried.stderr) if tried.returncode else None


def _measure(argv: Sequence[str], user: _User, home: str) -> Mapping[str, object] | str:
    done = _run(argv, user, home, _COLUMN_SECONDS)
    if done.returncode != 0:
        return f"the benchmark failed as user {user.uid}: {_last_line(done.stderr)}"
    return cast("Mapping[str, object]", json.loads(_last_line(done.stdout)))


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"
