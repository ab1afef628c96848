"""Each system call that the filter refuses: made without the filter it works, with it it does not.

The calls are really made, inside a sandbox that has every other layer. Where another layer, or the
lack of a right, refuses a call as well, it is enough that the kernel knows it: the filter must
then be the one that answers, with the errno of a kernel that does not.
"""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import tty
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyseccomp as libseccomp
import pytest

from safeconduct.call import Outcome, Tier
from safeconduct.runtime.sandbox.native import Program
from safeconduct.runtime.sandbox.plan import Plan
from safeconduct.runtime.sandbox.shield import Shield

if TYPE_CHECKING:
    from tests.conftest import Box, Change

    Weaken = Callable[[Change], Box]

X86_64 = os.uname().machine == "x86_64"
NOSYS, FAMILY, UNSUPPORTED = errno.ENOSYS, errno.EAFNOSUPPORT, errno.EOPNOTSUPP
NEW = {
    "cachestat": 451, "fchmodat2": 452, "map_shadow_stack": 453, "futex_wake": 454,
    "futex_wait": 455, "futex_requeue": 456, "statmount": 457, "listmount": 458,
    "lsm_get_self_attr": 459, "lsm_set_self_attr": 460, "lsm_list_modules": 461, "mseal": 462,
    "setxattrat": 463, "getxattrat": 464, "listxattrat": 465, "removexattrat": 466,
    "open_tree_attr": 467, "file_getattr": 468, "file_setattr": 469,
}  # fmt: skip
# Attacks that work on a stock kernel: an expression that gives 0 where it worked, else the errno.
# `page` is 4 KiB of memory, `words(…)` an array of 64-bit words, `me` the caller's pid.
WORKS = {
    "ptrace": "call('ptrace', 0, 0, 0, 0)",  # PTRACE_TRACEME
    "process_vm_readv": "call('process_vm_readv', me, words(page, 8), 1, words(page + 64, 8), 1)",
    "process_vm_writev": "call('process_vm_writev', me, words(page, 8), 1, words(page + 64, 8), 1)",
    "io_uring_setup": "call('io_uring_setup', 1, page)",
    "userfaultfd": "call('userfaultfd', 1)",  # UFFD_USER_MODE_ONLY
    "keyctl": "call('keyctl', 0, -2, 1)",  # KEYCTL_GET_KEYRING_ID, make the process keyring
    "add_key": "call('add_key', text('user'), text('name'), page, 8, -2)",
    "kcmp": "call('kcmp', me, me, 1, 0, 0)",
    "clone3": "call('clone3', words(0, 0, 0, 0, 17, 0, 0, 0), 64)",
    "execveat": "call('execveat', os.open('/bin/true', os.O_PATH), text(''), words(text('x'), 0),"
    " words(0), 0x1000)",
    "memfd_create": "call('memfd_create', text('x'), 0)",
    "memfd_secret": "call('memfd_secret', 0)",
    "openat2": "call('openat2', -100, text('.'), words(0, 0, 0), 24)",
    "pidfd_getfd": "call('pidfd_getfd', os.pidfd_open(me), 1, 0)",
    "process_madvise": "call('process_madvise', os.pidfd_open(me), words(page, 4096), 1, 20, 0)",
    "vmsplice": "call('vmsplice', os.pipe()[1], words(page, 8), 1, 0)",
    "io_setup": "call('io_setup', 1, page)",
    "name_to_handle_at": "call('name_to_handle_at', -100, text('.'), handle(), page + 256, 0)",
    "fanotify_init": "call('fanotify_init', 0x200, 0)",  # FAN_REPORT_FID
    "personality": "call('personality', 0x0440000)",  # no random addresses, all memory executes
    "prctl-dispatch": "call('prctl', 59, 0, 0, 0, 0)",  # PR_SET_SYSCALL_USER_DISPATCH, off
    "prctl-machine-check": "call('prctl', 33, 0, 0, 0, 0)",  # PR_MCE_KILL
    "fcntl-lease": "call('fcntl', os.open('leased', 0o102), 1024, 1)",
    "fcntl-notify": "call('fcntl', os.open('.', 0), 1026, 2)",
    "fcntl-owner": "call('fcntl', os.pipe()[0], 8, me)",
    "setsockopt-filter": "call('setsockopt', pair(), 1, 26, words(1, instruction()), 16)",
    # RENAME_WHITEOUT: a character device is left behind.
    "rename-whiteout": "call('renameat2', -100, made('moved'), -100, text('there'), 4)",
    "setxattr": "call('setxattr', text('.'), text('user.x'), page, 1, 0)",
    "sync": "call('sync')",
    "syncfs": "call('syncfs', os.open('.', 0))",
    "get_mempolicy": "call('get_mempolicy', 0, 0, 0, 0, 0)",
    "set_mempolicy": "call('set_mempolicy', 0, 0, 0)",
    "sched_setattr": "call('sched_setattr', 0, words(48, 0, 0, 0, 0, 0), 0)",
    "ioprio_set": "call('ioprio_set', 1, 0, 2 << 13)",
    "quiet-unshare": "call('unshare', 0x400)",  # CLONE_FILES
    "user-namespace": "call('unshare', 0x10000000)",
    "user-namespace-by-clone": "call('clone', 0x10000000 | 17, 0, 0, 0, 0)",
    "socket-unix": "call('socket', 1, 2, 0)",
    "socket-netlink": "call('socket', 16, 3, 0)",
    "socketpair-datagram": "call('socketpair', 1, 2, 0, page)",
    "mseal": "call('mseal', page, 0, 0)",
    "lsm_list_modules": "call('lsm_list_modules', page, words(4096), 0)",
    "futex_wake": "call('futex_wake', page, 0xffffffff, 1, 2)",
    "listxattrat": "call('listxattrat', -100, text('.'), 0, page, 4096)",
}
if X86_64:
    WORKS["modify_ldt"] = "call('modify_ldt', 0, page, 16)"
# Those that need a right nobody has in there: without the filter the kernel at least knows them.
KNOWN = """
    mount umount2 pivot_root chroot setns open_tree move_mount fsopen fsconfig fsmount fspick
    mount_setattr bpf perf_event_open io_uring_enter io_uring_register request_key
    open_by_handle_at fanotify_mark process_mrelease move_pages migrate_pages mbind seccomp
    init_module finit_module delete_module swapon swapoff quotactl reboot acct syslog vhangup
    settimeofday clock_settime adjtimex clock_adjtime sethostname setdomainname bind listen accept
    accept4 connect io_submit io_getevents io_cancel io_destroy kexec_load kexec_file_load
    lookup_dcookie mq_open mq_unlink remap_file_pages quotactl_fd set_mempolicy_home_node
"""
_ERRNO = {
    "setxattr": UNSUPPORTED, "socket-unix": FAMILY, "socket-netlink": FAMILY,
    "rename-whiteout": errno.EINVAL,
}  # fmt: skip
_NO_RIGHT = frozenset([errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EAFNOSUPPORT, errno.EINVAL])

PROBE = """
import ctypes, errno, json, mmap, os, signal, sys
NUMBERS, ATTACKS = json.loads(sys.argv[1]), json.loads(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
os.chdir(os.environ["HOME"])
kept = []
def address(buffer):
    kept.append(buffer)
    return ctypes.addressof(buffer)
def text(value): return address(ctypes.create_string_buffer(value.encode()))
def made(value):
    open(value, "w").close()
    return text(value)
def words(*values): return address((ctypes.c_uint64 * len(values))(*values))
def handle():
    buffer = ctypes.create_string_buffer(256)
    buffer[0] = 128
    return address(buffer)
def instruction(): return words(0x7fff000000000006)
def pair():
    import socket
    kept.append(socket.socketpair())
    return kept[-1][0].fileno()
def call(name, *arguments):
    number = NUMBERS[name] if isinstance(name, str) else name
    given = list(map(ctypes.c_long, arguments)) + [ctypes.c_long(0)] * (6 - len(arguments))
    result = libc.syscall(ctypes.c_long(number), *given)
    if result == 0 and name in ("clone", "clone3"): os._exit(0)
    return 0 if result >= 0 else ctypes.get_errno()
memory = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
page = address((ctypes.c_char * 4096).from_buffer(memory))
found = {}
for name, attack in ATTACKS.items():
    pid = os.fork()
    if pid == 0:
        signal.alarm(5)
        me = os.getpid()
        try: result = eval(attack)
        except OSError as error: result = error.errno
        os._exit(result)
    status = os.waitpid(pid, 0)[1]
    found[name] = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
print(json.dumps(found))
"""


def number(name: str) -> int:
    return NEW.get(name) or libseccomp.resolve_syscall(libseccomp.system_arch(), name)


KNOWN_NAMES = [name for name in [*KNOWN.split(), *NEW] if name not in WORKS and number(name) >= 0]


def unfiltered(request: Plan) -> Plan:
    return replace(request, layers=[name for name in request.layers if name != "seccomp"])


def probe(box: Box, attacks: Mapping[str, str]) -> dict[str, int]:
    names = {*KNOWN_NAMES, *(part for code in attacks.values() for part in code.split("'")[1:2])}
    numbers = {name: number(name) for name in names}
    outcome = box.run("python3", "-c", PROBE, json.dumps(numbers), json.dumps(attacks))
    assert outcome.exit_code == 0, outcome.stderr
    return json.loads(outcome.stdout)


Results = Callable[[str], tuple[int, int]]


@pytest.fixture(scope="session")
def results() -> dict[Tier, tuple[dict[str, int], dict[str, int]]]:
    return {}


@pytest.fixture
def errnos(
    box: Box, weaken: Weaken, results: dict[Tier, tuple[dict[str, int], dict[str, int]]]
) -> Results:
    """Return what a call gave without and with the filter; all are made in one sandbox each."""
    if box.tier not in results:
        attacks = {**WORKS, **{name: f"call('{name}', -1, 0, 0, 0, -1, 0)" for name in KNOWN_NAMES}}
        results[box.tier] = probe(weaken(unfiltered), attacks), probe(box, attacks)
    without, inside = results[box.tier]
    return lambda name: (without[name], inside[name])


@pytest.mark.parametrize("name", WORKS)
def test_what_works_without_the_filter_is_refused_by_it(errnos: Results, name: str) -> None:
    without, inside = errnos(name)
    if without == NOSYS:
        pytest.skip(f"this kernel has no {name}")
    if without in _NO_RIGHT:
        pytest.skip(f"this machine refuses {name} to everybody: {os.strerror(without)}")
    assert without == 0
    assert inside == _ERRNO.get(name, NOSYS)


@pytest.mark.parametrize("name", KNOWN_NAMES)
def test_what_the_kernel_knows_does_not_exist_under_the_filter(errnos: Results, name: str) -> None:
    without, inside = errnos(name)
    if without == NOSYS:
        pytest.skip(f"this kernel has no {name}")
    assert inside == NOSYS


def test_no_socket_of_any_family(box: Box, weaken: Weaken) -> None:
    attacks = {f"{family}-{kind}": f"call('socket', {family}, {kind}, 0)"
               for family in range(46) for kind in (1, 2, 3, 5)}  # fmt: skip
    without = probe(weaken(unfiltered), attacks)
    assert sum(result == 0 for result in without.values()) > 5
    assert set(probe(box, attacks).values()) == {FAMILY}


def test_no_namespace_by_any_flag(box: Box, weaken: Weaken) -> None:
    flags = [0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]
    attacks = {hex(flag): f"call('clone', {flag} | 17, 0, 0, 0, 0)" for flag in flags}
    attacks |= {f"high {name}": code.replace("17,", "17 | 1 << 40,")
                for name, code in attacks.items()}  # fmt: skip
    without = probe(weaken(unfiltered), attacks)
    assert without.pop("0x80") in (0, errno.EINVAL)  # in clone(2) only a strange exit signal
    assert NOSYS not in without.values()
    assert set(probe(box, attacks).values()) == {NOSYS}
    assert probe(box, {"plain": "call('clone', 17, 0, 0, 0, 0)"}) == {"plain": 0}


def test_the_upper_half_of_an_int_is_nobodys(box: Box, weaken: Weaken) -> None:
    # The kernel looks at 32 bits of these; the filter must neither be misled nor refuse for it.
    upper = 0xFFFFFFFF << 32
    wide = f"({{}} | {upper})"
    attacks = {
        "lease": f"call('fcntl', os.open('leased', 0o102), {wide.format(1024)}, 1)",
        "persona": f"call('personality', {wide.format(0x0440000)})",
        "memory-file": f"call('memfd_create', text('x'), {wide.format(0)})",
        "pair": f"call('socketpair', {wide.format(1)}, {wide.format(2)}, 0, page)",
    }
    allowed = {
        "flags": f"call('fcntl', 1, {wide.format(1)}, 0)",
        "name": f"call('prctl', {wide.format(15)}, text('name'), 0, 0, 0)",
        "pending": f"call('ioctl', os.pipe()[0], {wide.format(0x541B)}, page)",
    }
    assert set(probe(weaken(unfiltered), {**attacks, **allowed}).values()) == {0}
    assert set(probe(box, attacks).values()) == {NOSYS}
    assert set(probe(box, allowed).values()) == {0}


MACHINE_CODE = """
import ctypes, mmap, os
os.chdir(os.environ["HOME"])
memory = mmap.mmap(-1, 4096, prot=7)
memory.write(%r)
function = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
print("ESCAPED" if function() == os.getpid() else "other", flush=True)
"""


def machine(code: bytes) -> str:
    return MACHINE_CODE % code


@pytest.mark.skipif(not X86_64, reason="is about x86-64")
def test_the_32_bit_gate_is_deadly(box: Box, weaken: Weaken) -> None:
    # mov eax, 20 (getpid of i386); int 0x80; ret
    attack = machine(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
    without = weaken(unfiltered).python(attack)
    if b"ESCAPED" not in without.stdout:
        pytest.skip("needs a kernel with IA32 emulation")
    assert killed(box.python(attack))


@pytest.mark.skipif(not X86_64, reason="is about x86-64")
@pytest.mark.parametrize("bits", [0x40000000, 0x7FFFFF00, 0x80000000, 0xFFFFFF00])
def test_x32_is_deadly(box: Box, weaken: Weaken, bits: int) -> None:
    # mov eax, getpid | bits; syscall; ret. Where the kernel has no x32 it says ENOSYS.
    attack = machine(b"\xb8" + (39 | bits).to_bytes(4, "little") + b"\x0f\x05\xc3")
    assert weaken(unfiltered).python(attack).signal is None
    assert killed(box.python(attack))


def killed(outcome: Outcome) -> bool:
    return outcome.signal == signal.SIGSYS and outcome.stdout == b""


INJECT = """
import ctypes, fcntl
libc = ctypes.CDLL(None, use_errno=True)
first = libc.ioctl(3, 0x540E, 0)
print("ESCAPED" if libc.ioctl(3, 0x5412, ctypes.c_char_p(b"x")) == 0 else ctypes.get_errno())
"""


def test_nothing_is_typed_into_a_terminal_that_was_handed_in(box: Box, weaken: Weaken) -> None:
    legacy = Path("/proc/sys/dev/tty/legacy_tiocsti")
    if legacy.exists() and legacy.read_text() == "0\n":
        pytest.skip("needs dev.tty.legacy_tiocsti=1: this machine refuses TIOCSTI to everybody")
    ours, theirs = pty.openpty()
    try:
        tty.setraw(theirs)
        os.set_blocking(theirs, False)
        program = Program(
            argv=["python3", "-c", INJECT], cwd=str(box.workspace), descriptors=(theirs,)
        )

        def run(one: Box) -> bytes:
            folder = str(one.workspace)
            return one.sandbox.run(
                "call", program, one.profile(), workspace=folder, shield=Shield()
            ).stdout

        assert run(weaken(unfiltered)) == b"ESCAPED\n"
        assert os.read(theirs, 10) == b"x"
        assert run(box) == f"{NOSYS}\n".encode()
        with pytest.raises(BlockingIOError):
            os.read(theirs, 10)
    finally:
        os.close(ours)
        os.close(theirs)


def test_requests_that_type_for_others_are_refused(box: Box, weaken: Weaken) -> None:
    # TIOCSTI, TIOCLINUX, TIOCSCTTY, TIOCCONS, TIOCSETD, FIOSETOWN, SIOCSPGRP, FS_IOC_SETFLAGS,
    # BLKRRPART: on a pipe the kernel itself says ENOTTY to most of them.
    requests = (0x5412, 0x541C, 0x540E, 0x541D, 0x5423, 0x8901, 0x8902, 0x40086602, 0x125F)
    attacks = {hex(one): f"call('ioctl', os.pipe()[0], {one}, page)" for one in requests}
    assert NOSYS not in probe(weaken(unfiltered), attacks).values()
    assert set(probe(box, attacks).values()) == {NOSYS}
