"""The compiled filter: what it refuses, and what programs need of it."""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import pyseccomp as libseccomp
import pytest

from safeconduct.call import Profile, Tier, WorkspaceMode
from safeconduct.errors import SandboxUnavailable
from safeconduct.runtime.sandbox import bpf, seccomp
from safeconduct.syscalls import ADDABLE, NEVER, why_never

if TYPE_CHECKING:
    from tests.conftest import Box

CALL = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    return 0 if result >= 0 else ctypes.get_errno()
"""
# x86-64 numbers, syscall(2); each returns ENOSYS whatever its arguments.
REFUSED = {
    "ptrace": 101, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "setns": 308,
    "unshare": 272, "clone3": 435, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
    "io_uring_setup": 425, "keyctl": 250, "add_key": 248, "process_vm_readv": 310,
    "process_vm_writev": 311, "pidfd_getfd": 438, "kcmp": 312, "execveat": 322, "openat2": 437,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "mount_setattr": 442,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "fanotify_init": 300, "seccomp": 317,
    "socket-pair-less connect": 42, "listen": 50, "memfd_secret": 447, "vmsplice": 278,
    "io_setup": 206, "modify_ldt": 154, "iopl": 172, "mq_open": 240, "sethostname": 170,
}  # fmt: skip


def test_the_filter_is_compiled_once_and_is_bounded() -> None:
    for tier in Tier:
        program = seccomp.compile_filter(tier)
        assert program is seccomp.compile_filter(tier)
        assert 0 < len(program) <= 4096 * 8
        assert len(program) % 8 == 0
    assert seccomp.digest(Tier.FULL) != seccomp.digest(Tier.LANDLOCK)


ALLOW, KILL, ASK = 0x7FFF0000, 0x80000000, 0x7FC00000
NATIVE = libseccomp.system_arch()
# LIMIT: a longer program takes longer to load, for every call (benchmarks.bench_seccomp).
INSTRUCTIONS_MAX = 256


def number(name: str) -> int:
    return libseccomp.resolve_syscall(NATIVE, name)


def data(call: int, *arguments: int, arch: int = NATIVE) -> bytes:
    given = [*arguments, *[0] * (6 - len(arguments))]
    return struct.pack("=IIQ6Q", call & 0xFFFFFFFF, arch, 0, *given)


def verdict(program: bytes, call: int, *arguments: int, arch: int = NATIVE) -> int:
    return bpf.execute(bpf.decode(program), data(call, *arguments, arch=arch))


@pytest.mark.parametrize("added", [(), tuple(ADDABLE)], ids=["plain", "all-added"])
@pytest.mark.parametrize("tier", Tier)
def test_the_short_program_is_the_one_libseccomp_made(tier: Tier, added: tuple[str, ...]) -> None:
    exported = seccomp.export(tier, added)
    long, short = bpf.decode(exported), bpf.decode(seccomp.compile_filter(tier, added))
    assert len(short) <= INSTRUCTIONS_MAX
    assert len(short) * 2 < len(long)
    edges = sorted({(one.value + step) & 0xFFFFFFFF for one in long for step in (-1, 0, 1)})
    draw = random.Random(7)  # noqa: S311 - the same draws in every run
    calls = [*range(600), *(0x40000000 + call for call in range(-2, 600)), 1 << 31, -1, -2]
    for call in calls:
        for arch in (NATIVE, 0x40000003, 0):
            for _ in range(30 if arch == NATIVE and 0 <= call < 600 else 1):
                upper = draw.choice([0, 0, 1 << 32, 0xFFFFFFFF << 32])
                given = data(call, *(draw.choice(edges) | upper for _ in range(6)), arch=arch)
                assert bpf.execute(long, given) == bpf.execute(short, given), given


def test_instructions_nobody_expects_leave_a_program_as_it_is() -> None:
    known = [bpf.Instruction(0x20, 0, 0, 0), bpf.Instruction(0x15, 0, 0, 9)] * 9
    end = [bpf.Instruction(0x87, 0, 0, 0), bpf.Instruction(0x06, 0, 0, ALLOW)]
    odd = bpf.encode(known + end)
    assert bpf.shorten(odd) == odd
    with pytest.raises(bpf.Unsupported):
        bpf.execute(bpf.decode(odd), data(0))


def test_far_jumps_reach() -> None:
    # 600 numbers with verdicts of their own: no conditional jump spans them.
    program = [bpf.Instruction(0x20, 0, 0, 0)]
    for call in range(600):
        program.append(bpf.Instruction(0x15, 0, 1, 2 * call))
        program.append(bpf.Instruction(0x06, 0, 0, 0x50000 + call))
    program.append(bpf.Instruction(0x06, 0, 0, ALLOW))
    short = bpf._Assembler(bpf._Graph(program)).assemble()  # pyright: ignore[reportPrivateUsage]
    for call in range(1300):
        given = data(call)
        assert bpf.execute(bpf.decode(short), given) == bpf.execute(program, given)


@pytest.mark.parametrize("tier", Tier)
def test_plain_calls_are_decided_by_their_number_alone(tier: Tier) -> None:
    # Then the kernel decides them once, when the filter is loaded, and never runs it for them
    # (kernel/seccomp.c, seccomp_is_const_allow). Only what is read counts: there are no arguments.
    program = bpf.decode(seccomp.compile_filter(tier))
    for name in ("read", "write", "close", "mmap", "futex", "getppid", "newfstatat", "execve"):
        assert bpf.execute(program, data(number(name))[:16]) == ALLOW
    with pytest.raises(struct.error):
        bpf.execute(program, data(number("openat"))[:16])


def test_the_init_is_named_by_nobody() -> None:
    program = seccomp.compile_filter(Tier.FULL)
    for name in ("prlimit64", "sched_setaffinity", "sched_setparam", "sched_setscheduler"):
        for pid in (0, 2, 3, 1 << 31, 0xFFFFFFFF, (1 << 32) + 2):
            assert verdict(program, number(name), pid, 1, 1) == ALLOW
        for pid in (1, (1 << 32) + 1, (0xFFFFFFFF << 32) + 1):  # the kernel looks at 32 bits
            refused = verdict(program, number(name), pid, 1, 1)
            assert seccomp.refusal_errno(refused) == errno.EPERM
    process, group, user = range(3)
    for which, who in ((process, 0), (process, 2), (group, 0), (group, 1), (3, 1)):
        assert verdict(program, number("setpriority"), which, who, 1) == ALLOW
    for which, who in ((process, 1), (process, (1 << 32) + 1), (user, 0), (user, 1000)):
        refused = verdict(program, number("setpriority"), which, who, 1)
        assert seccomp.refusal_errno(refused) == errno.EPERM


def test_space_is_reserved_only_where_the_kernel_counts_it() -> None:
    direct = Profile(name="direct", write=("/any",))
    session = replace(direct, workspace=WorkspaceMode.SESSION)
    call = number("fallocate")
    assert verdict(seccomp.filter_of(Tier.FULL, session), call) == ALLOW
    for tier, profile in ((Tier.FULL, direct), (Tier.LANDLOCK, direct), (Tier.LANDLOCK, session)):
        refused = verdict(seccomp.filter_of(tier, profile), call)
        assert seccomp.refusal_errno(refused) == errno.EOPNOTSUPP


@pytest.mark.parametrize("tier", Tier)
def test_a_filter_that_asks_asks_where_the_other_refuses(tier: Tier) -> None:
    plain, asking = seccomp.compile_filter(tier), seccomp.compile_filter(tier, explain=True)
    assert asking is seccomp.compile_filter(tier, explain=True)
    for call in range(600):
        refused = seccomp.refusal_errno(verdict(plain, call))
        assert verdict(asking, call) == (ASK if refused else verdict(plain, call))
    assert verdict(asking, 0, arch=0x40000003) == KILL
    assert seccomp.refusal_errno(verdict(plain, number("socket"))) == errno.EAFNOSUPPORT
    assert seccomp.refusal_errno(verdict(plain, number("seccomp"))) == errno.ENOSYS


def test_added_calls_are_part_of_the_filter_whatever_their_order() -> None:
    one = seccomp.compile_filter(Tier.FULL, ["ptrace", "mbind"])
    assert one is seccomp.compile_filter(Tier.FULL, ("mbind", "ptrace", "mbind"))
    assert seccomp.digest(Tier.FULL, ["ptrace"]) != seccomp.digest(Tier.FULL)
    for name in ADDABLE:
        program = seccomp.compile_filter(Tier.FULL, [name])
        given = (0x0040000,) if name == "personality" else ()
        assert seccomp.refusal_errno(
            verdict(seccomp.compile_filter(Tier.FULL), number(name), *given)
        )
        assert verdict(program, number(name), *given) == ALLOW
    wide = seccomp.compile_filter(Tier.FULL, ["personality"])
    assert verdict(wide, number("personality"), 0x0400000) != ALLOW  # READ_IMPLIES_EXEC


@pytest.mark.parametrize("name", [*sorted(NEVER), "vhangup", "no_such_call", "read", ""])
def test_what_may_never_be_added_is_refused(name: str) -> None:
    assert why_never(name)
    with pytest.raises(SandboxUnavailable, match="cannot be added"):
        seccomp.compile_filter(Tier.FULL, [name])


@pytest.mark.parametrize("tier", Tier)
def test_everything_addable_at_once_opens_nothing_else(tier: Tier) -> None:
    plain, added = seccomp.compile_filter(tier), seccomp.compile_filter(tier, tuple(ADDABLE))
    opened = {number(name) for name in ADDABLE}
    for call in range(600):
        if verdict(plain, call) != verdict(added, call):
            assert call in opened
    for name in NEVER:
        if number(name) >= 0:
            assert verdict(added, number(name)) != ALLOW


DEBUG = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
def tell(result): print(ctypes.get_errno() if result < 0 else "works")
pid = os.fork()
if pid == 0:
    signal.pause()
tell(libc.ptrace(ctypes.c_long(0x4206), ctypes.c_long(pid), None, None))
if libc.ptrace(ctypes.c_long(0x4206), ctypes.c_long(os.getppid()), None, None) == 0:
    print("ESCAPED")
os.kill(pid, 9)
"""
PERSONALITY = (
    "import ctypes; print('works' if ctypes.CDLL(None).personality(0x40000) >= 0 else 'no')"
)
MEMORY_EXEC = """
import os
fd = os.memfd_create("x", 0)
os.write(fd, open("/bin/true", "rb").read())
pid = os.fork()
if pid == 0: os.execve(fd, ["true"], {})
print("works" if os.waitpid(pid, 0)[1] == 0 else "no")
"""


@pytest.mark.parametrize(
    ("name", "code"),
    [("ptrace", DEBUG), ("personality", PERSONALITY), ("memfd_create", MEMORY_EXEC)],
)
def test_a_profile_that_adds_a_call_has_it(
    box: Box, monkeypatch: pytest.MonkeyPatch, name: str, code: str
) -> None:
    compiled = seccomp.compile_filter
    profile = replace(box.profile(), syscalls=(name,))

    def added(
        tier: Tier, _: Collection[str] = (), *, explain: bool = False, polled: bool = False
    ) -> bytes:
        return compiled(tier, profile.syscalls, explain=explain, polled=polled)

    assert b"works" not in box.python(code).stdout
    monkeypatch.setattr(seccomp, "compile_filter", added)
    outcome = box.run("python3", "-c", code, profile=profile)
    assert outcome.stdout == b"works\n"  # and the sandbox's own init cannot be traced


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="system call numbers of x86-64")
def test_system_calls_that_are_not_named_do_not_exist(box: Box) -> None:
    code = CALL + f"print([n for n, c in {REFUSED!r}.items() if call(c, 0, 0, 0) != errno.ENOSYS])"
    assert box.python(code).stdout == b"[]\n"


def test_every_new_namespace_is_refused(box: Box) -> None:
    flags = [0x10000000, 0x20000, 0x40000000, 0x08000000, 0x04000000, 0x02000000, 0x80]
    code = (
        CALL
        + f"""
for flag in {flags!r}:
    if call(56, flag | 17, 0, 0, 0, 0) == 0: print("ESCAPED", hex(flag))
"""
    )
    assert box.python(code).stdout == b""


@pytest.mark.parametrize("kind", ["AF_UNIX", "AF_INET", "AF_NETLINK", "AF_VSOCK", "AF_ALG"])
def test_sockets_of_every_family_are_refused_as_unsupported(box: Box, kind: str) -> None:
    code = f"""
import errno, socket
try: socket.socket(socket.{kind}, socket.SOCK_DGRAM)
except OSError as error: print(error.errno == errno.EAFNOSUPPORT)
"""
    assert box.python(code).stdout == b"True\n"


def test_pairs_of_stream_sockets_work(box: Box) -> None:
    code = """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    one.send(b"x"); print(two.recv(1))
"""
    assert box.python(code).stdout == b"b'x'\n" * 2


def test_terminal_injection_is_refused(box: Box) -> None:
    code = (
        CALL + "print([r for r in (0x5412, 0x541C, 0x540E) if call(16, 0, r, 0) != errno.ENOSYS])"
    )
    assert box.python(code).stdout == b"[]\n"


def test_what_others_use_cannot_be_watched(box: Box) -> None:
    # Landlock does not hook inotify(7), and a mount namespace shows the host's own programs.
    code = CALL + "print(call(253) == 0, call(294, 0) == 0)"
    assert box.python(code).stdout == b"False False\n"
    names = ("inotify_init1", "inotify_add_watch")
    code = """
import ctypes
libc = ctypes.CDLL(None)
print(libc.inotify_add_watch(libc.inotify_init1(0), b"/usr/bin", 0x20) >= 0)
"""
    profile = replace(box.profile(), syscalls=names)
    assert box.run("python3", "-c", code, profile=profile).stdout == b"True\n"


@pytest.mark.parametrize("bits", [0o4755, 0o2755])
def test_set_id_bits_are_refused_in_every_spelling(box: Box, bits: int) -> None:
    code = f"""
import os
os.chdir(os.environ["HOME"])
open("plain", "w").close()
for attempt in (
    lambda: os.chmod("plain", {bits}),
    lambda: os.chmod(os.open("plain", 0), {bits}),
    lambda: os.open("made", os.O_CREAT | os.O_WRONLY, {bits}),
    lambda: os.open(".", os.O_TMPFILE | os.O_WRONLY, {bits}),
    lambda: os.mknod("node", 0o100000 | {bits}),
    lambda: os.mkdir("folder", {bits}) or os.stat("folder").st_mode & 0o6000 or 1 / 0,
):
    try:
        attempt()
        print("ESCAPED")
    except (OSError, ZeroDivisionError):
        pass
"""
    outcome = box.python(code)
    assert (outcome.stdout, outcome.exit_code) == (b"", 0)
