"""Step "sandbox": the processes of Python tools, as the supervisor holds them.

A zygote is one native sandbox for one profile; each of its forks, like each process of a single
call where forks cannot be confined (python_single.py), is a ``Hand``: a channel, two streams and a
fate.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import msgspec

from safeconduct.call import Profile, Tier
from safeconduct.errors import SandboxFailed, SandboxUnavailable

from . import cgroup, python_frames, python_nest, python_worker, seccomp
from .accounts import INIT_PIDS
from .channel import Exit, send_fds
from .interpreter import interpreter
from .native import NativeSandbox, Program
from .python_place import Place, walls, zygote_limits
from .refused import Refusals
from .running import Running
from .share import in_cgroup
from .watch import Watch

START_SECONDS = 60.0
_MESSAGE_BYTES_MAX = 64 << 10
# INVARIANT: a fork after this many would know the address layout of as many calls before it.
FORKS_PER_ZYGOTE = 1000


class Fate(Protocol):
    """Where the end of one call's processes is told."""

    def fileno(self) -> int:
        """Return the descriptor that reads as ready when there is something to receive."""
        ...

    def receive(self) -> Exit:
        """Read how it ended. Raises SandboxFailed where it never began or nobody can tell."""
        ...

    @property
    def patience(self) -> float:
        """Return how many seconds the end may take after it was asked for."""
        ...

    def stop(self) -> None:
        """Ask for the end. Does not wait."""
        ...

    def expire(self) -> Exit:
        """Say what it means that the end did not come in time. Raises SandboxFailed, or not."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Hand:
    """Our ends of one process that waits for its one call. ``close`` ends it and frees all."""

    channel: socket.socket
    stdout: int
    stderr: int
    fate: Fate
    charge: Callable[[], cgroup.Charge]
    watch: Callable[[], Watch]
    close: Callable[[], None]
    # Waits for the listener of its filter, where there is one, and takes it over.
    refusals: Callable[[], Refusals] | None = None


class Zygote:
    """One warm interpreter and its waiting forks. Not safe to use from several threads."""

    def __init__(self, native: NativeSandbox, place: Place, groups: cgroup.Cgroups | None) -> None:
        """Start it; blocks until everything is imported.

        Raises SandboxUnavailable with ``missing="python-forks"`` where the kernel refuses what a
        fork needs, ToolFailed and SandboxFailed as ``NativeSandbox.start``.
        """
        self.place = place
        self.calls = 0
        self.spent = False
        self._made = itertools.count()
        self._groups = groups
        # Made ahead: for a fork that is made at call time it is a tenth of the time.
        self._spare: cgroup.Cgroup | None = None
        self._waiting: deque[Hand] = deque()
        granted = place.granted()
        with ExitStack() as opened:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            opened.callback(ours.close)
            with theirs:
                setting = {
                    **place.setting("zygote"),
                    **walls(place, granted, in_cgroup=groups is not None),
                }
                self._nesting = python_nest.nesting(native, asking=place.explain)
                opened.callback(self._nesting.close)
                roomy = replace(granted, limits=zygote_limits(place.profile.limits))
                self._running = start_worker(
                    self._nesting, roomy, place, setting, [theirs.fileno()]
                )
            opened.callback(self._running.close)
            self._control = ours
            _greet(ours)
            opened.pop_all()

    def alive(self) -> bool:
        """Tell whether it can make forks: it has said nothing and closed nothing."""
        try:
            self._control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def take(self) -> Hand:
        """Return a fork that waits, or one that is just being made."""
        return self._waiting.popleft() if self._waiting else self._fork()

    def refill(self, count: int) -> None:
        """Have ``count`` forks wait, and a cgroup for the next. Does not wait for readiness."""
        while len(self._waiting) < count and not self.spent:
            self._waiting.append(self._fork())
        if self._groups and self._spare is None:
            self._spare = self._group(self._groups)

    def close(self) -> None:
        """End the process with all its forks, and wait until they are gone."""
        self.spent = True
        for hand in self._waiting:
            hand.close()
        self._waiting.clear()
        if self._groups and self._spare:
            self._groups.retire(self._spare)
            self._spare = None
        self._control.close()
        try:
            self._running.close()
        finally:
            self._nesting.close()

    def _fork(self) -> Hand:
        if next(self._made) + 1 >= FORKS_PER_ZYGOTE:
            self.spent = True
        with ExitStack() as mine, ExitStack() as theirs:
            fate, their_fate = pair(mine, theirs, socket.SOCK_SEQPACKET)
            channel, their_channel = pair(mine, theirs, socket.SOCK_STREAM)
            stdout, their_stdout = pipe(mine, theirs)
            stderr, their_stderr = pipe(mine, theirs)
            group = self._join(mine)
            given = [their_fate.fileno(), their_channel.fileno(), their_stdout, their_stderr]
            for path in group.joins if group else ():
                given.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
                theirs.callback(os.close, given[-1])
            try:
                send_fds(self._control, b"fork", given)
            except OSError as error:
                raise SandboxFailed(
                    f"The Python zygote is gone: {error}.", step="zygote"
                ) from error
            told = _ForkFate(fate)
            return Hand(
                channel=channel,
                stdout=stdout,
                stderr=stderr,
                fate=told,
                charge=partial(_charge, group),
                watch=partial(self._watch, group),
                close=mine.pop_all().close,
                refusals=partial(self._refusals, told) if self.place.explain else None,
            )

    def _refusals(self, fate: _ForkFate) -> Refusals:
        program = seccomp.filter_of(Tier.FULL, self.place.profile)
        return Refusals(fate.listener(), program)

    def _join(self, mine: ExitStack) -> cgroup.Cgroup | None:
        """Make the cgroup of one fork; a fork has no init, for which cgroups leave room."""
        if self._groups is None:
            return None
        group, self._spare = self._spare or self._group(self._groups), None
        mine.callback(self._groups.retire, group)
        return group

    def _group(self, groups: cgroup.Cgroups) -> cgroup.Cgroup:
        limits = self.place.profile.limits
        return groups.make(replace(limits, pids=limits.pids - INIT_PIDS))

    def _watch(self, group: cgroup.Cgroup | None) -> Watch:
        profile = self.place.profile
        if group is None or self._groups is None:
            return Watch(profile.limits, profile.write)
        share = in_cgroup(self._groups, group)
        return Watch(
            profile.limits, profile.write, group.charge, members=group.members, share=share
        )


class _ForkFate:
    patience = 5.0

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        # It is read when it is ready, or when an end is certain to come.
        end.settimeout(self.patience)

    def fileno(self) -> int:
        return self._socket.fileno()

    def listener(self) -> int:
        """Wait for the listener, which a fork hands over before it says that it is ready.

        INVARIANT: descriptors are taken here alone, once, and from no code of a call: a fork has
        given up its end of this socket before its call arrives.
        """
        self._socket.settimeout(START_SECONDS)
        try:
            data, given, _, _ = socket.recv_fds(
                self._socket, _MESSAGE_BYTES_MAX, 1, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise SandboxFailed(f"The Python zygote is gone: {error}.", step="zygote") from error
        finally:
            self._socket.settimeout(self.patience)
        if data == python_worker.LISTENER and len(given) == 1:
            return given[0]
        for fd in given:
            os.close(fd)
        self._end_told(data)  # raises what it says, where it says why there is no process
        raise SandboxFailed("The Python process died before its call.", step="ready")

    def receive(self) -> Exit:
        try:
            data = self._socket.recv(_MESSAGE_BYTES_MAX)
        except OSError as error:
            raise SandboxFailed(f"The Python zygote is gone: {error}.", step="zygote") from error
        return self._end_told(data)

    def _end_told(self, data: bytes) -> Exit:
        if not data:
            raise SandboxFailed("The Python zygote died.", step="zygote")
        told = python_frames.fate(data)
        if isinstance(told, python_frames.Unable):
            raise _unable(told)
        return Exit(
            code=told.code,
            signal=told.signal,
            wall_limit=False,
            wall_us=0,
            cpu_us=told.cpu_us,
            peak_rss_kib=told.peak_rss_kib,
        )

    def stop(self) -> None:
        try:
            self._socket.send(python_worker.END, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            # Its end is told, or the zygote is gone: `receive` says which.
            return

    def expire(self) -> Exit:
        raise SandboxFailed("The Python zygote did not end a fork.", step="zygote")


def _charge(group: cgroup.Cgroup | None) -> cgroup.Charge:
    if group is None:
        return cgroup.Charge()
    charge = group.charge()
    peak = None if charge.peak_pids is None else charge.peak_pids + INIT_PIDS
    return replace(charge, peak_pids=peak)


def start_worker(
    native: NativeSandbox,
    granted: Profile,
    place: Place,
    setting: dict[str, object],
    descriptors: Sequence[int],
    outputs: tuple[int, int] | None = None,
    *,
    explain: bool = False,
) -> Running:
    """Start the worker; without ``outputs`` what it prints is dropped."""
    script = os.path.realpath(python_worker.__file__)
    program = Program(argv=[*interpreter(), script], cwd="/", descriptors=descriptors)
    with ExitStack() as opened:
        source = seccomp.memory_file(msgspec.json.encode(setting))
        opened.callback(os.close, source)
        if outputs is None:
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            opened.callback(os.close, null)
            outputs = null, null
        return native.start(
            program, granted, workspace=place.workspace, shield=place.shield,
            stdio=(source, *outputs), explain=explain,
        )  # fmt: skip


def _greet(control: socket.socket) -> None:
    control.settimeout(START_SECONDS)
    try:
        data = control.recv(_MESSAGE_BYTES_MAX)
    except OSError as error:
        raise SandboxFailed(f"The Python zygote did not start: {error}.", step="zygote") from error
    finally:
        control.settimeout(None)
    if not data:
        raise SandboxFailed("The Python zygote died while it started.", step="zygote")
    told = python_frames.greeting(data)
    if isinstance(told, python_frames.Unable):
        raise _unable(told)
    if isinstance(told, python_frames.Broken):
        raise python_frames.imports_failed(f"{told.error}: {told.message}")
    if told.version != python_worker.VERSION:
        raise SandboxFailed("The Python zygote is of another version.", step="zygote")


def _unable(told: python_frames.Unable) -> SandboxUnavailable:
    step = python_frames.printable(told.step, 200)
    return SandboxUnavailable(
        f"A Python fork cannot be confined here: {step} ({os.strerror(told.errno)}).",
        missing="python-forks",
        hint="Allow nested user namespaces (sysctl user.max_user_namespaces, AppArmor).",
    )


def pair(
    mine: ExitStack, theirs: ExitStack, kind: socket.SocketKind
) -> tuple[socket.socket, socket.socket]:
    """Return two ends of a line, each kept by its own stack."""
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    return mine.enter_context(one), theirs.enter_context(other)


def pipe(mine: ExitStack, theirs: ExitStack) -> tuple[int, int]:
    """Return an end to read without waiting and an end to write, each kept by its own stack."""
    read, write = os.pipe2(os.O_CLOEXEC)
    mine.callback(os.close, read)
    theirs.callback(os.close, write)
    os.set_blocking(read, False)
    return read, write
