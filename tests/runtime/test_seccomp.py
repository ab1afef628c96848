"""The compiled filter: what it refuses, and what programs need of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Tier
from safeconduct.runtime.sandbox import seccomp

if TYPE_CHECKING:
    from conftest import Box

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


def test_names_elsewhere_cannot_be_watched_by_landlock_alone(box: Box) -> None:
    # Landlock does not hook inotify(7): a watch would tell what others do in their folders.
    code = CALL + "print(call(253) == 0)"
    assert box.python(code).stdout == (b"True\n" if box.tier is Tier.FULL else b"False\n")


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
