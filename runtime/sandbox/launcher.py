"""Step "sandbox": the supervisor's side of the launcher process (native/launcher).

The launcher makes templates, a template makes the sandboxes of one plan ahead of time, and the
queue of the socket to it is the pool of those that wait. A call takes one, tells it its program on
its own channel and hears there what became of it. Closing the channel ends the sandbox.
"""

from __future__ import annotations

import importlib.resources
import os
import resource
import socket
import subprocess
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from safeconduct.call import Tier
from safeconduct.errors import SandboxFailed

from . import seccomp
from .channel import (
    MESSAGE_BYTES_MAX,
    Document,
    Message,
    encode,
    failure_of,
    parse,
    send_fds,
)
from .executable import unavailable
from .template import Template

VERSION = 2
_HELLO_SECONDS = 10.0


class Launcher:
    """The native side of one runtime. Safe to use from several threads.

    An ordinary user's sandboxes with namespaces are made by a process that lives in a user
    namespace of its own, those without by one that does not; root needs one process for both.
    """

    def __init__(self) -> None:
        """Start it. Raises SandboxUnavailable where the executable is missing."""
        self._lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._processes: dict[Tier, _Process] = {}
        self._refused: SandboxFailed | None = None
        try:
            self._processes[Tier.FULL] = first = _Process(Tier.FULL)
        except SandboxFailed as error:
            self._refused = error
            self._processes[Tier.LANDLOCK] = first = _Process(Tier.LANDLOCK)
        self.landlock_abi = first.landlock_abi

    @property
    def pid(self) -> int:
        """Process id of the process that was started first."""
        return next(iter(self._processes.values())).pid

    @property
    def pids(self) -> list[int]:
        """Process ids of all its processes."""
        return [process.pid for process in self._processes.values()]

    def template(self, tier: Tier, plan: Document, program: bytes) -> Template:
        """Have a template made; ``program`` is a seccomp filter. Does not wait for it.

        Raises SandboxFailed where the machine refuses the tier or the launcher is gone.
        """
        document = encode({"version": VERSION, **plan})
        end = self._process(tier).ask(b"template", document, program)
        return Template(end, str(plan["name"]))

    def clone(self, identity: Document, mounts: Sequence[Document], seconds: float) -> list[int]:
        """Return descriptors of detached clones of bind ``mounts``, for a sandbox bound late."""
        document = encode({"identity": identity, "mounts": mounts})
        with self._process(Tier.FULL).ask(b"clone", document) as answer:
            answer.settimeout(seconds)
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    answer, MESSAGE_BYTES_MAX, 253, socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                raise SandboxFailed(f"The launcher is gone: {error}.", step="clone") from error
        message = parse(data) if data else None
        if isinstance(message, Message) and message.failed is not None:
            raise failure_of(message.failed)
        if message != "clones":
            raise SandboxFailed("The launcher is gone.", step="clone")
        return descriptors

    def _process(self, tier: Tier) -> _Process:
        if tier is Tier.FULL and self._refused is not None:
            raise self._refused
        kind = Tier.FULL if os.geteuid() == 0 else tier
        with self._lock:
            process = self._processes.get(kind)
            if process is None or not process.alive():
                if os.getpid() != self._owner_pid:
                    raise SandboxFailed("The launcher belongs to another process.", step="launcher")
                if process is not None:
                    process.close()
                # One that was killed is started again: the next call recovers.
                process = self._processes[kind] = _Process(kind)
            return process

    def alive(self) -> bool:
        """Tell whether its processes still run."""
        return all(process.alive() for process in self._processes.values())

    def close(self) -> None:
        """End it and with it every sandbox it started; waits for its processes.

        In a fork of the process that started it, only that process's copies of sockets are closed.
        """
        for process in self._processes.values():
            process.close(owned=os.getpid() == self._owner_pid)


class _Process:
    """One native process and the socket to it."""

    def __init__(self, tier: Tier) -> None:
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        try:
            with theirs:
                self._process = _spawn(theirs.fileno(), tier)
        except BaseException:
            ours.close()
            raise
        try:
            self.landlock_abi = self._greet()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, kind: bytes, *documents: bytes) -> socket.socket:
        """Send a request; return the socket that its answer comes on."""
        with ExitStack() as mine:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            mine.enter_context(theirs)
            failing = mine.enter_context(ExitStack())
            failing.enter_context(ours)
            handed = [theirs.fileno()]
            for data in documents:
                handed.append(seccomp.memory_file(data))
                mine.callback(os.close, handed[-1])
            try:
                with self._lock:
                    send_fds(self._control, kind, handed)
            except OSError as error:
                raise SandboxFailed(f"The launcher is gone: {error}.", step="launcher") from error
            failing.pop_all()
        return ours

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self, *, owned: bool = True) -> None:
        if not owned:
            self._control.close()
            return  # somebody else's child: it can be neither waited for nor ended from here
        with suppress(OSError):
            # A fork may hold a copy of this end, which would hide that it is closed.
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _greet(self) -> int:
        self._control.settimeout(_HELLO_SECONDS)
        try:
            data = self._control.recv(MESSAGE_BYTES_MAX)
        except OSError as error:
            raise SandboxFailed(f"The launcher did not start: {error}.", step="hello") from error
        finally:
            self._control.settimeout(None)
        message = parse(data) if data else None
        if isinstance(message, Message) and message.failed is not None:
            raise failure_of(message.failed)
        if not isinstance(message, Message) or message.hello is None:
            raise SandboxFailed("The launcher did not start.", step="hello")
        if message.hello.version != VERSION:
            raise SandboxFailed("The launcher is of another version.", step="hello")
        return message.hello.landlock_abi


def _spawn(control: int, tier: Tier) -> subprocess.Popen[bytes]:
    """Start the executable of this package with nothing inherited but its control socket."""
    executable = importlib.resources.files("safeconduct.runtime").joinpath(
        "bin", "safeconduct-launcher"
    )
    with importlib.resources.as_file(executable) as path:
        try:
            process = subprocess.Popen(
                [str(path), str(control), str(tier)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={},
                pass_fds=(control,),
                start_new_session=True,
            )
        except OSError as error:
            raise unavailable(path, error) from error
    with suppress(OSError, ValueError):
        # It hands over descriptors as well (`send_fds`), and no program keeps what it may open.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard, hard))
    with suppress(ProcessLookupError):  # it has died, as whoever asks it finds out
        _take_precedence_from(process.pid)
    return process


def _take_precedence_from(pid: int) -> None:
    """Let no program inherit a real-time policy of ours, or a place before others, sched(7).

    It could keep the machine to itself, and may be in no cgroup with a share of the processors.
    """
    if os.sched_getscheduler(pid) in (os.SCHED_FIFO, os.SCHED_RR):
        os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
    if os.getpriority(os.PRIO_PROCESS, pid) < 0:
        os.setpriority(os.PRIO_PROCESS, pid, 0)
