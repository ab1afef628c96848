"""Step "sandbox": which system calls a filter refused, for an operator who asks (``--explain``).

The filter then asks here instead of refusing by itself (seccomp_unotify(2)). Every question gets
the errno that the filter would have given. None is ever answered with "continue": what a pointer
leads to can be changed after it was looked at, so such a yes would be no security decision.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from fcntl import ioctl
from types import TracebackType
from typing import Self

import pyseccomp as libseccomp

from safeconduct.call import Profile, Refused
from safeconduct.errors import SandboxFailed, SandboxUnavailable
from safeconduct.syscalls import ADDABLE, NEVER, why_never

from . import bpf
from .channel import Channel
from .seccomp import judged_by_arguments, needs_namespaces, refusal_errno

# linux/seccomp.h: SECCOMP_IOCTL_NOTIF_RECV and _SEND, whose numbers hold the sizes below.
_RECEIVE, _SEND = 0xC050_2100, 0xC018_2101
# struct seccomp_notif: id, pid, flags, then struct seccomp_data: nr, arch, instruction, 6 words.
_QUESTION_BYTES = 80
_ID, _DATA_OFFSET, _NUMBER = struct.Struct("=Q"), 16, struct.Struct("=iI")
# struct seccomp_notif_resp: id, val, error, flags (never SECCOMP_USER_NOTIF_FLAG_CONTINUE).
_ANSWER = struct.Struct("=QqiI")
# LIMIT: answers at full speed; from then on one each pause, so that a flood of refused calls
# slows the program that makes them and not the supervisor.
_BURST, _PAUSE_MS = 20_000, 1
# LIMIT: how long the answer that is under way may take. The kernel has a reader wait for the next
# question where another took the one it was told of, so who made the listener could stop us here.
_ANSWER_SECONDS = 5.0
# LIMIT: system call numbers told apart; a program may ask for any of 2^32.
_NUMBERS = 512
_OTHERS = "other numbers"
# Newer than the names of libseccomp 2.5; from 424 on numbers are the same on every architecture.
_NEWER_NAMES = """
    cachestat fchmodat2 map_shadow_stack futex_wake futex_wait futex_requeue statmount listmount
    lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat listxattrat
    removexattrat open_tree_attr file_getattr file_setattr listns
"""
_NEWER = dict(enumerate(_NEWER_NAMES.split(), start=451))


class Refusals:
    """Answers a filter's questions and counts them by system call.

    ``program`` is the filter without ``explain``. The descriptor is closed when the last program
    under the filter has ended, or by ``close``; what is refused after that gets ENOSYS from the
    kernel. Drive it with ``start`` (a thread) or call ``serve``. Whoever handed the listener over
    may lie: what is no listener, or not ours alone, is told by ``close`` as SandboxFailed.

    INVARIANT: the filter refuses seccomp(2). A program that could load a filter of its own would,
    once this listener is closed, be asked in its place, and could say "continue".
    """

    def __init__(self, listener_fd: int, program: bytes) -> None:
        """Take over the listener. Raises SandboxUnavailable for a program that is not read."""
        self._listener = listener_fd
        self._program = bpf.decode(program)
        self._counts: Counter[tuple[int, int]] = Counter()
        self._lock = threading.Lock()
        self._answers = 0
        self._serving, self._served = False, threading.Event()
        self._broken: OSError | None = None
        self._wake = -1
        if not _is_listener(listener_fd):
            # Asked of the kernel: other descriptors may say nothing until the call is over.
            self._broken = OSError(errno.ENOTTY, "no listener of seccomp(2)")
        try:
            # One that cannot be run by hand would leave a program waiting for its answer.
            self._errno(bytes(_QUESTION_BYTES - _DATA_OFFSET))
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except bpf.Unsupported as error:
            self._end()
            message = f"The filter cannot be explained: {error}."
            hint = "Run without --explain."
            raise SandboxUnavailable(message, missing="seccomp", hint=hint) from error
        except OSError:
            self._end()
            raise

    def start(self) -> Self:
        """Serve in a thread of its own until ``close``."""
        threading.Thread(target=self.serve, name="refusals", daemon=True).start()
        return self

    def serve(self) -> None:
        """Answer until every program under the filter has ended, or ``close`` is called; blocks."""
        with self._lock:
            if self._listener < 0 or self._serving:
                return
            self._serving = True
        try:
            self._serve()
        except OSError as error:
            self._broken = error
        finally:
            # Whatever ended it, no program may wait for an answer that never comes.
            self._end()
            self._served.set()

    def _serve(self) -> None:
        if self._broken is not None:
            raise self._broken
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        pause = select.poll()
        pause.register(self._wake, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self._wake in ready or not ready.get(self._listener, 0) & select.POLLIN:
                return  # told to, or POLLHUP: nobody is left to ask
            self._answer()
            if self._answers > _BURST and pause.poll(_PAUSE_MS):
                return

    def close(self) -> None:
        """End serving and close the listener. What was counted stays.

        Raises SandboxFailed where it was no listener of ours; its thread ends with those who ask.
        """
        with self._lock:
            if not self._serving:
                self._serving = True  # it does not begin any more
                self._served.set()
            elif self._wake >= 0:
                os.eventfd_write(self._wake, 1)
        if not self._served.wait(_ANSWER_SECONDS):
            # It closes what it uses: the number must not come to mean something else before.
            raise _no_listener()
        self._end()
        if self._broken is not None:
            raise _no_listener() from self._broken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except SandboxFailed:
            if kind is None:
                raise

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each system call was refused, by name, most often first."""
        with self._lock:
            counted = self._counts.copy()
        names: Counter[str] = Counter()
        for (architecture, number), count in counted.items():
            names[_name(architecture, number)] += count
        return dict(sorted(names.items(), key=lambda item: (-item[1], item[0])))

    def found(self, profile: str) -> tuple[Refused, ...]:
        """Return what was refused, with what to write in the policy to allow it."""
        return tuple(
            Refused(syscall=name, count=count, remedy=remedy(name, profile))
            for name, count in self.counts.items()
        )

    def lines(self, profile: str) -> list[str]:
        """Return what was refused as text: name, count, and the line that would allow it."""
        return [
            f"{one.syscall} refused {one.count} times: {one.remedy}" for one in self.found(profile)
        ]

    def _answer(self) -> None:
        question = bytearray(_QUESTION_BYTES)  # must be zero, seccomp_unotify(2)
        try:
            ioctl(self._listener, _RECEIVE, question)
            (identity,) = _ID.unpack_from(question)
            data = bytes(question[_DATA_OFFSET:])
            self._count(data)
            ioctl(self._listener, _SEND, _ANSWER.pack(identity, 0, -self._errno(data), 0))
        except OSError as error:
            # ENOENT: the program was killed, or a signal took it out of the call.
            if error.errno not in (errno.ENOENT, errno.EINTR):
                raise

    def _errno(self, data: bytes) -> int:
        found = refusal_errno(bpf.execute(self._program, data))
        return errno.ENOSYS if found is None else found

    def _count(self, data: bytes) -> None:
        number, architecture = _NUMBER.unpack_from(data)
        key = architecture, number
        with self._lock:
            if key not in self._counts and len(self._counts) >= _NUMBERS:
                key = architecture, -1
            self._counts[key] += 1
        self._answers += 1

    def _end(self) -> None:
        with self._lock:
            for fd in (self._listener, self._wake):
                if fd >= 0:
                    os.close(fd)
            self._listener = self._wake = -1


def _is_listener(fd: int) -> bool:
    """Tell what the kernel calls a descriptor; no file can be called so, proc(5)."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:seccomp notify"
    except OSError:
        return False


def _no_listener() -> SandboxFailed:
    return SandboxFailed("Nothing tells what the filter refuses.", step="listener")


def remedy(name: str, profile: str) -> str:
    """Return the profile line that would allow a system call, or why none does."""
    if name in ADDABLE and name not in judged_by_arguments():
        return _line(name, profile)
    if name == "personality":
        return f"{_line(name, profile)}; other values of it cannot be allowed"
    if name == "memfd_create":
        return f"{_line(name, profile)}, or make it with MFD_NOEXEC_SEAL"
    if name == "fallocate":
        return "cannot be allowed where the disk limit is only looked at: it would outrun that"
    if name in needs_namespaces():
        return "cannot be allowed in tier landlock: nothing there keeps it to this sandbox"
    if name in judged_by_arguments() and name not in NEVER:
        return "cannot be allowed with these arguments"
    return f"cannot be allowed: {why_never(name)}"


def _line(name: str, profile: str) -> str:
    where = " and ".join(profile.split("&"))
    return f"allowed by `syscalls: [{name}]` in profile {where} ({ADDABLE[name]})"


def _name(architecture: int, number: int) -> str:
    if number < 0:
        return _OTHERS
    try:
        return libseccomp.resolve_syscall(architecture, number).decode("ascii")
    except ValueError:
        return _NEWER.get(number, f"system call {number}")


class Listening:
    """Counts what seccomp refuses in one call, once its listener has come."""

    def __init__(self, held: ExitStack, profile: Profile, program: bytes) -> None:
        self._held, self._profile, self._program = held, profile, program
        self._refusals: Refusals | None = None

    def take(self, channel: Channel) -> None:
        """Take the listener from the line to the sandbox, if it has come."""
        listener, channel.listener = channel.listener, None
        if listener is not None and self._refusals is None:
            self._refusals = Refusals(listener, self._program)
            self._held.enter_context(self._refusals.start())

    def found(self) -> tuple[Refused, ...]:
        """Return what was refused; nothing where no listener came."""
        return self._refusals.found(self._profile.name) if self._refusals else ()
