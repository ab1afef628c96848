"""Step "decide": replace the policy in force by what its files say now, whole or not at all.

A file that changed is found, read, believed, compiled and tested as at the start. Whatever is
wrong with it leaves the policy in force as it is, and that is told once for each state of the
files. A Call is judged by the one policy that it began with (``standing.py``).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from safeconduct.call import Confinement, Tier
from safeconduct.errors import Error, PolicyError, SandboxUnavailable
from safeconduct.policies import Resolution, read_policy_file, require_passing

from .record import Recorder
from .sandbox.layout import inside
from .sandbox.machine import Machine
from .standing import Standing

# How long a change may go unnoticed: looking costs two system calls for each file.
_LOOK_SECONDS = 0.25

Signature: TypeAlias = tuple[tuple[int, ...], ...]


class Reloader:
    """Watches the files of one Resolution. Safe to use from several threads.

    ``resolve`` finds and loads the policy anew. ``promised`` is what enforces Calls here, and
    ``tell`` is told in a line or two why the old policy stays.
    """

    def __init__(
        self,
        first: Resolution,
        resolve: Callable[[], Resolution],
        *,
        standing: Standing,
        recorder: Recorder,
        machine: Machine,
        promised: Confinement,
        tell: Callable[[str], object],
    ) -> None:
        """Record what is in force at the start."""
        self._current, self._resolve = first, resolve
        self._standing, self._recorder, self._machine = standing, recorder, machine
        self._promised, self._tell = promised, tell
        self._demands: list[Callable[[Resolution], object]] = []
        self._lock = threading.Lock()
        self._real = frozenset(os.path.realpath(path) for path in first.files)
        self._seen: Signature = _signature(first.files)
        self._looked = time.monotonic()
        self._due = False
        self._record(first)

    @property
    def current(self) -> Resolution:
        """What is in force."""
        return self._current

    def demand(self, check: Callable[[Resolution], object]) -> None:
        """Have ``check`` raise PolicyError for what cannot come into force here either."""
        self._demands.append(check)

    def ask(self) -> None:
        """Have the next look load the policy anew, also where nothing seems changed.

        Takes no lock: a signal handler may call it.
        """
        self._due = True

    def look(self) -> None:
        """Load the policy anew if its files changed; called before each Call."""
        now = time.monotonic()
        if not self._due and now - self._looked < _LOOK_SECONDS:
            return
        # Whoever comes meanwhile is judged by the old policy, like a Call a moment before.
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._looked = now
            seen = _signature(self._current.files)
            if self._due or seen != self._seen:
                self._due, self._seen = False, seen
                self._replace()
        finally:
            self._lock.release()

    def reload(self) -> Resolution:
        """Load the policy anew now and return it; raises PolicyError where the old one stays."""
        with self._lock:
            self._due, self._seen = False, _signature(self._current.files)
            error = self._replace()
            if error is not None:
                raise error
            return self._current

    def _replace(self) -> Error | None:
        try:
            found = self._resolve()
            _refuse_other_files(self._current, found)
            _refuse_within_reach(found, self._real)
            self._refuse_unenforced(found)
            _refuse_other_log(self._current, found)
            _refuse_failing(found)
            for check in self._demands:
                check(found)
            self._standing.of_role(found.policy)
        except Error as error:
            return self._keep(error)
        # Whatever else goes wrong on the way (no disk, no descriptors) is no reason to end a Call.
        except Exception as error:
            refusal = PolicyError(
                f"it cannot be loaded: {type(error).__name__}: {error}",
                file=str(self._current.found.path),
                code="policy.unloadable",
                hint="see whether the disk is full or the working directory is gone",
            )
            refusal.__cause__ = error
            return self._keep(refusal)
        # No Call is recorded under a version before the Trace has it.
        self._record(found)
        self._standing.adopt(found.policy)
        self._current = found
        return None

    def _keep(self, error: Error) -> Error:
        self._recorder.policy_kept(self._standing.policy.version, error)
        # Where nobody can be told, it stands in the Trace.
        with suppress(OSError):
            self._tell(f"the policy in force stays: {str(error).partition(chr(10))[0]}")
        return error

    def _record(self, found: Resolution) -> None:
        version, file = found.policy.version, str(found.found.path)
        self._recorder.policy(version, file, found.why, self._promised)

    def _refuse_unenforced(self, found: Resolution) -> None:
        """Refuse what needs more than this runtime was put up with."""
        policy, tier = found.policy, self._promised.tier
        try:
            self._machine.choose(policy.require_tier, cgroup=policy.require_cgroup)
            why = "" if policy.require_tier in (None, tier, Tier.LANDLOCK) else f"tier is {tier}"
        except SandboxUnavailable as error:
            why = error.message
        if why:
            raise PolicyError(
                f"this runtime cannot enforce it: {why}",
                file=str(found.found.path),
                code="policy.require",
                hint="start anew, where the machine gives what it requires",
            )


def _refuse_other_files(current: Resolution, found: Resolution) -> None:
    """The files in force are out of reach of every tool; others are not, before a restart."""
    if set(found.files) - set(current.files):
        raise PolicyError(
            f"another policy would come into force: {found.why}",
            file=str(found.found.path),
            code="policy.other_file",
            hint="start anew for it",
        )


def _refuse_other_log(current: Resolution, found: Resolution) -> None:
    """The log is put up once: how much it holds, how long, and who cosigns it."""
    if found.policy.trace.of_the_log != current.policy.trace.of_the_log:
        raise PolicyError(
            "trace: batch, quota, retain or witness would be others than of the log that is open",
            file=str(found.found.path),
            code="policy.trace",
            hint="start anew for it",
        )


def _refuse_within_reach(found: Resolution, guarded: frozenset[str]) -> None:
    """A link may lead elsewhere by now, to a file that the shields of this runtime do not know."""
    profiles = [one for part in found.policy.parts for one in part.profiles.values()]
    roots = {found.policy.workspace, *(path for one in profiles for path in one.write)}
    for path in found.files:
        real = os.path.realpath(path)
        if real not in guarded and any(inside(real, root) for root in roots):
            raise PolicyError(
                f"it leads to {real!a}, where tools may write",
                file=str(path),
                code="policy.other_file",
                hint="start anew for it",
            )


def _refuse_failing(found: Resolution) -> None:
    """Run the tests that lie beside the policies in force, where there are any."""
    compiled = {part.version for part in found.policy.parts}
    for path in found.files:
        file = read_policy_file(path)
        if not compiled.issuperset(replace(one, wider=None).digest for one in file.chain):
            raise PolicyError(
                "the file changed again while it was read",
                file=str(path),
                code="policy.changed",
                hint="it is looked at again before the next call",
            )
        require_passing(file)


def _signature(files: Sequence[Path]) -> Signature:
    """Name the state of files without reading them: no writer can set a change time."""
    return tuple(_state(path) for path in files)


def _state(path: Path) -> tuple[int, ...]:
    try:
        link, file = os.lstat(path), os.stat(path)
    except OSError as error:
        return (error.errno or 0,)
    return (
        link.st_dev, link.st_ino, link.st_ctime_ns,
        file.st_dev, file.st_ino, file.st_ctime_ns, file.st_size,
    )  # fmt: skip
