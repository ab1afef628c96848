"""What a filter refused is told, and stays refused: a real child under a real filter."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyseccomp as libseccomp
import pytest

from safeconduct.call import Tier
from safeconduct.errors import SandboxFailed, SandboxUnavailable
from safeconduct.runtime.sandbox import seccomp
from safeconduct.runtime.sandbox.refused import Refusals, remedy

_SECONDS = 20
# SECCOMP_FILTER_FLAG_NEW_LISTENER and, from Linux 5.19, _WAIT_KILLABLE_RECV.
LISTEN, KILLABLE = 0x8, 0x20
LOADER = """
import ctypes, errno, os, signal, socket, sys
end = socket.socket(fileno=int(sys.argv[1]))
program = open(sys.argv[2], "rb").read()
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    return 0 if result >= 0 else ctypes.get_errno()
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]
libc.prctl(38, 1, 0, 0, 0)
wanted = Filter(len(program) // 8, program)
fd = libc.syscall({seccomp}, 1, {flags}, ctypes.byref(wanted))
assert fd >= 0, ctypes.get_errno()
socket.send_fds(end, [b"x"], [fd])
os.close(fd)
end.recv(1)
"""


def number(name: str) -> int:
    return libseccomp.resolve_syscall(libseccomp.system_arch(), name)


class Child:
    """A Python program under a filter that asks; it starts when it is told to."""

    def __init__(self, folder: Path, code: str, *, tier: Tier, flags: int) -> None:
        program = folder / "program"
        program.write_bytes(seccomp.compile_filter(tier, explain=True))
        loader = LOADER.format(seccomp=number("seccomp"), flags=flags)
        self.ours, theirs = socket.socketpair()
        self.ours.settimeout(_SECONDS)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", loader + code, str(theirs.fileno()), str(program)],
                pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        data, fds, _, _ = socket.recv_fds(self.ours, 1, 1)
        if not data:
            raise AssertionError(self.process.communicate(timeout=_SECONDS)[1])
        self.listener = fds[0]

    def go(self) -> None:
        self.ours.send(b"x")

    def finish(self) -> str:
        out, err = self.process.communicate(timeout=_SECONDS)
        assert err == ""
        return out


@contextmanager
def child(
    folder: Path, code: str, *, tier: Tier = Tier.FULL, flags: int = LISTEN | KILLABLE
) -> Generator[tuple[Child, Refusals]]:
    one = Child(folder, code, tier=tier, flags=flags)
    try:
        with Refusals(one.listener, seccomp.compile_filter(tier)) as refusals:
            yield one, refusals
    finally:
        one.ours.close()
        one.process.kill()
        one.process.communicate()


@pytest.fixture(params=[LISTEN, LISTEN | KILLABLE], ids=["interruptible", "killable"])
def flags(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.parametrize("tier", Tier)
def test_refusals_are_counted_and_keep_their_errno(tmp_path: Path, tier: Tier, flags: int) -> None:
    wanted = {
        "ptrace": errno.ENOSYS, "mount": errno.ENOSYS, "socket": errno.EAFNOSUPPORT,
        "setxattr": errno.EOPNOTSUPP, "clone3": errno.ENOSYS, "mseal": errno.ENOSYS,
    }  # fmt: skip
    numbers = {name: 462 if name == "mseal" else number(name) for name in wanted}
    code = f"""
for name, number in {numbers!r}.items():
    for _ in range(3): print(name, call(number, 0, 0, 0, 0, 0))
open({str(tmp_path / "file")!r}, "w").close()
try: os.chmod({str(tmp_path / "file")!r}, 0o4755)
except OSError as error: print("chmod", error.errno)
"""
    with child(tmp_path, code, tier=tier, flags=flags) as (one, refusals):
        refusals.start()
        one.go()
        lines = one.finish().splitlines()
        assert lines[:-1] == [f"{name} {error}" for name, error in wanted.items() for _ in range(3)]
        assert lines[-1] == f"chmod {errno.EPERM}"
    assert refusals.counts == {**dict.fromkeys(sorted(wanted), 3), "chmod": 1}


def test_lines_say_what_would_allow_it(tmp_path: Path) -> None:
    names = ["ptrace", "ptrace", "mount", "seccomp", "socket"]
    code = f"for number in {[number(name) for name in names]!r}: call(number, 0, 0, 0, 0)"
    with child(tmp_path, code) as (one, refusals):
        refusals.start()
        one.go()
        one.finish()
    lines = refusals.lines("dev")
    assert lines[0].startswith(
        "ptrace refused 2 times: allowed by `syscalls: [ptrace]` in profile dev"
    )
    assert all("refused 1 times: cannot be allowed: " in line for line in lines[1:])
    assert [one.syscall for one in refusals.found("dev")] == [
        "ptrace",
        "mount",
        "seccomp",
        "socket",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("personality", "syscalls: [personality]"), ("memfd_create", "MFD_NOEXEC_SEAL"),
        ("ioctl", "with these arguments"), ("shmget", "tier landlock"),
        ("io_uring_setup", "passes every filter"), ("system call 9999", "not among those"),
    ],
)  # fmt: skip
def test_every_refused_call_has_a_remedy_or_a_reason(name: str, words: str) -> None:
    assert words in remedy(name, "base&dev")


def test_serving_ends_with_the_last_program(tmp_path: Path) -> None:
    # The child leaves a grandchild behind that refuses to end with it: it counts too.
    code = f"""
if os.fork() == 0:
    end.recv(1)
    call({number("ptrace")}, 0, 0, 0, 0)
    os._exit(0)
os._exit(0)
"""
    with child(tmp_path, code) as (one, refusals):
        one.go()
        one.process.wait(_SECONDS)
        one.go()
        refusals.serve()  # in this thread: it returns because nobody is left
    assert refusals.counts == {"ptrace": 1}


def test_a_program_that_dies_while_it_asks(tmp_path: Path, flags: int) -> None:
    code = f"""
import threading
def ask():
    while True: call({number("ptrace")}, 0, 0, 0, 0)
for _ in range(4): threading.Thread(target=ask, daemon=True).start()
print("ready", flush=True)
signal.pause()
"""
    for _ in range(10):
        with child(tmp_path, code, flags=flags) as (one, refusals):
            refusals.start()
            one.go()
            assert one.process.stdout is not None
            assert one.process.stdout.readline() == "ready\n"
            one.process.send_signal(signal.SIGKILL)
            one.process.wait(_SECONDS)
            served = refusals._served  # pyright: ignore[reportPrivateUsage]
            assert served.wait(_SECONDS)


def test_what_is_not_answered_any_more_is_refused(tmp_path: Path) -> None:
    code = f"""
print(call({number("socket")}, 1, 1, 0), flush=True)
end.recv(1)
print(call({number("socket")}, 1, 1, 0), call({number("ptrace")}, 0, 0, 0, 0))
"""
    with child(tmp_path, code) as (one, refusals):
        refusals.start()
        one.go()
        assert one.process.stdout is not None
        assert one.process.stdout.readline() == f"{errno.EAFNOSUPPORT}\n"
        refusals.close()
        refusals.close()
        one.go()
        assert one.finish() == f"{errno.ENOSYS} {errno.ENOSYS}\n"


def test_closing_while_a_program_waits_for_its_answer(tmp_path: Path) -> None:
    code = f"print(call({number('ptrace')}, 0, 0, 0, 0))"
    one = Child(tmp_path, code, tier=Tier.FULL, flags=LISTEN)
    refusals = Refusals(one.listener, seccomp.compile_filter(Tier.FULL))
    try:
        one.go()  # nobody serves
        refusals.close()
        assert one.finish() == f"{errno.ENOSYS}\n"
    finally:
        one.ours.close()
        one.process.kill()
        one.process.communicate()


def test_closing_while_somebody_else_took_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel has a reader wait for as long as there is nothing, whatever poll(2) has said.
    monkeypatch.setattr("safeconduct.runtime.sandbox.refused._ANSWER_SECONDS", 0.2)
    code = f"call({number('ptrace')}, 0, 0, 0, 0); print('answered', flush=True); end.recv(1)"
    one = Child(tmp_path, code, tier=Tier.FULL, flags=LISTEN)
    other = os.dup(one.listener)

    class Robbed(Refusals):
        def _answer(self) -> None:
            question = bytearray(80)
            fcntl.ioctl(other, 0xC050_2100, question)
            answer = struct.pack("=QqiI", *struct.unpack_from("=Q", question), 0, -1, 0)
            fcntl.ioctl(other, 0xC018_2101, answer)
            super()._answer()

    refusals = Robbed(one.listener, seccomp.compile_filter(Tier.FULL)).start()
    try:
        one.go()
        assert one.process.stdout is not None
        assert one.process.stdout.readline() == "answered\n"
        closing = threading.Thread(target=_close, args=(refusals,), daemon=True)
        closing.start()
        closing.join(_SECONDS)
        assert not closing.is_alive()
        with pytest.raises(SandboxFailed, match="Nothing tells"):
            refusals.close()
    finally:
        one.ours.close()
        one.process.kill()
        one.process.communicate()
        os.close(other)
    for thread in threading.enumerate():
        if thread.name == "refusals":
            thread.join(_SECONDS)
            assert not thread.is_alive()


def _close(refusals: Refusals) -> None:
    with suppress(SandboxFailed):
        refusals.close()


def test_a_flood_slows_who_floods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeconduct.runtime.sandbox.refused._BURST", 1000)
    code = f"""
import time
def timed(times):
    before = time.monotonic()
    for _ in range(times): call({number("ptrace")}, 0, 0, 0, 0)
    return time.monotonic() - before
timed(1010)
print(timed(100) >= 0.1)
print("flooding", flush=True)
while True: call({number("mount")}, 0, 0, 0, 0)
"""
    with child(tmp_path, code) as (one, refusals):
        refusals.start()
        one.go()
        assert one.process.stdout is not None
        assert one.process.stdout.readline() == "True\n"
        assert one.process.stdout.readline() == "flooding\n"
        used = time.thread_time()
        refusals.close()  # in the middle of it; the flood goes on, refused by the kernel
        assert time.thread_time() - used < 1
        assert one.process.poll() is None
    assert refusals.counts["ptrace"] == 1110


def test_numbers_are_told_apart_up_to_a_bound(tmp_path: Path) -> None:
    code = "for number in range(100_000, 101_000): call(number)"
    with child(tmp_path, code) as (one, refusals):
        refusals.start()
        one.go()
        one.finish()
    assert len(refusals.counts) == 513
    assert refusals.counts["other numbers"] == 1000 - 512


OWN_LISTENER = """
import fcntl, struct, threading
class Inner(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]
# if (nr == unshare) return SECCOMP_RET_USER_NOTIF; return SECCOMP_RET_ALLOW;
code = b"".join(struct.pack("=HBBI", *one) for one in (
    (0x20, 0, 0, 0), (0x15, 0, 1, {unshare}), (6, 0, 0, 0x7fc00000), (6, 0, 0, 0x7fff0000)))
inner = libc.syscall({seccomp}, 1, 8, ctypes.byref(Inner(4, code)))
if inner < 0:
    print("no filter of its own", ctypes.get_errno())
    sys.exit()
def answer():
    question = bytearray(80)
    fcntl.ioctl(inner, 0xC0502100, question)
    (identity,) = struct.unpack_from("=Q", question)
    fcntl.ioctl(inner, 0xC0182101, struct.pack("=QqiI", identity, 0, 0, 1))
thread = threading.Thread(target=answer)
thread.start()
print("ESCAPED" if call({unshare}, 0x400) == 0 else "held", flush=True)
os._exit(0)
"""


def test_no_later_filter_answers_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two filters that ask: the kernel asks the newer one. It is refused while ours has a listener
    # (EBUSY), but not once that is closed. So a filter that explains must refuse seccomp(2); that
    # the requests of a listener are no allowed ioctl(2) is a second bar, opened here in both runs.
    attack = OWN_LISTENER.format(unshare=number("unshare"), seccomp=number("seccomp"))

    def run() -> str:
        with child(tmp_path, attack) as (one, refusals):
            refusals.close()
            one.go()
            return one.finish()

    def run_with(added: str) -> str:
        with monkeypatch.context() as opened:
            names = seccomp._PROCESSES + added  # pyright: ignore[reportPrivateUsage]
            opened.setattr(seccomp, "_PROCESSES", names)
            seccomp._compile.cache_clear()  # pyright: ignore[reportPrivateUsage]
            try:
                return run()
            finally:
                seccomp._compile.cache_clear()  # pyright: ignore[reportPrivateUsage]

    assert run_with(" ioctl seccomp") == "ESCAPED\n"
    assert run_with(" ioctl") == f"no filter of its own {errno.ENOSYS}\n"
    with pytest.raises(SandboxUnavailable, match="could answer"):
        seccomp.compile_filter(Tier.FULL, ["seccomp"])


def test_a_filter_that_cannot_be_run_by_hand_is_refused_at_once() -> None:
    ours, theirs = os.pipe()
    strange = (0x07).to_bytes(2, "little") + bytes(6)
    with pytest.raises(SandboxUnavailable):
        Refusals(ours, strange)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(ours)
    with suppress(OSError):
        os.close(theirs)
