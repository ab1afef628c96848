"""Step "sandbox": the system calls a sandboxed program may make, compiled by libseccomp.

An allow-list: what is not named returns ENOSYS, as on a kernel that never had it (EPERM makes
programs such as Java give up instead of falling back). Other architectures and x32 are killed.
Arguments are compared only where they are scalars, never where they point to memory, because
another thread could change what was checked; and as the 32 bits that the kernel looks at.
A profile may add a few calls by name (``syscalls.ADDABLE``).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache, lru_cache
from itertools import chain
from tempfile import TemporaryFile
from typing import TypeAlias

import pyseccomp as libseccomp

from safeconduct.call import Profile, Tier, WorkspaceMode
from safeconduct.errors import SandboxUnavailable
from safeconduct.syscalls import why_never

from . import bpf

_FILES = """
    read write close stat fstat lstat newfstatat statx poll ppoll select pselect6 lseek pread64
    pwrite64 readv writev preadv pwritev preadv2 pwritev2 access faccessat faccessat2 pipe pipe2
    dup dup2 dup3 flock fsync fdatasync sync_file_range truncate ftruncate getdents
    getdents64 getcwd chdir fchdir rename renameat mkdir mkdirat rmdir link linkat
    unlink unlinkat symlink symlinkat readlink readlinkat chown fchown lchown fchownat umask utime
    utimes futimesat utimensat statfs fstatfs copy_file_range sendfile splice tee
    fadvise64 readahead getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr eventfd
    eventfd2 signalfd signalfd4 timerfd_create timerfd_settime timerfd_gettime epoll_create
    epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 close_range
    landlock_create_ruleset landlock_add_rule landlock_restrict_self
"""
_MEMORY = """
    mmap mprotect munmap brk mremap madvise mincore msync mlock mlock2 munlock mlockall munlockall
    membarrier pkey_mprotect pkey_alloc pkey_free
"""
_PROCESSES = """
    fork vfork execve exit exit_group wait4 waitid kill tkill tgkill getpid getppid gettid getpgid
    getpgrp setpgid getsid setsid getuid geteuid getgid getegid getresuid getresgid getgroups
    setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capget capset
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigqueueinfo
    rt_tgsigqueueinfo rt_sigsuspend sigaltstack restart_syscall pidfd_open pidfd_send_signal pause
    futex futex_waitv set_robust_list get_robust_list set_tid_address rseq arch_prctl
    sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max
    sched_get_priority_min sched_rr_get_interval getpriority getrlimit setrlimit getrusage sysinfo
    uname getcpu getrandom
"""
# Calls that change a process, which their first argument names by pid. Landlock does not hook them,
# so where there is no pid namespace only "myself" (0) may be named; in one, all but its first
# process: our init, which is of the program's uid and could be left unable to watch or to run.
_OTHERS = ("prlimit64", "sched_setaffinity", "sched_setparam", "sched_setscheduler")
_INIT = 1
# setpriority(2); PRIO_USER would reach every process of the user, the init among them.
_PRIO_PROCESS, _PRIO_USER = 0, 2
_TIME = """
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getitimer
    setitimer alarm timer_create timer_settime timer_gettime timer_getoverrun timer_delete
"""
# On descriptors the program was given, or of its own socketpair: there is no socket(2).
_MESSAGES = """
    sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg shutdown getsockopt getsockname getpeername
"""
# System V IPC is safe only in an IPC namespace of one's own.
_NAMESPACED = """
    shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl
"""

# clone(2): every namespace flag, CLONE_NEWTIME included.
_NAMESPACE_FLAGS = 0x7E02_0080
_SET_ID_BITS = 0o6000
# open(2): O_CREAT and the O_TMPFILE bit; without them the mode argument means nothing.
_CREATING_FLAGS = 0o100 | 0o20000000
_MFD_NOEXEC_SEAL = 0x8
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
# prctl(2) options that name, count or tie down only the caller itself.
_PRCTL_OPTIONS = (
    1, 2, 3, 4, 7, 15, 16, 21, 23, 29, 30, 36, 37, 38, 39, 41, 42, 47, 56, 0x53564D41,
)  # fmt: skip
# ioctl(2) requests on terminals, pipes and files; TIOCSTI and TIOCLINUX are not among them.
_IOCTL_REQUESTS = (
    0x5401, 0x5402, 0x5403, 0x5404, 0x540F, 0x5410, 0x5413, 0x5414, 0x541B, 0x5421, 0x5450,
    0x5451, 0x5452, 0x802C542A, 0x80045430, 0x40049409, 0x4020940D, 0x80086601,
)  # fmt: skip
_PERSONALITIES = (0, 0xFFFFFFFF)
_INT = 0xFFFF_FFFF
_AF_UNIX = 1
# A pair of datagram sockets (SOCK_RAW is one too, unix(7)) is connected and yet sends to any other
# address, past the missing socket(2): only kinds that cannot.
_SOCKET_KINDS, _SOCKET_KIND_MASK = (1, 5), 0xF
_SOL_SOCKET = 1
# setsockopt(2) options of buffers, times and credentials; no SO_ATTACH_FILTER: no kernel JIT.
_SOCKET_OPTIONS = (2, 7, 8, 9, 13, 15, 16, 20, 21, 66, 67)
# fcntl(2): no F_SETLEASE (it holds up whoever opens the file next), F_NOTIFY or F_SETOWN.
_FCNTL_COMMANDS = (*range(8), 9, 36, 37, 38, *range(1030, 1039))
_FILE_TYPES = (0, 0o100000, 0o010000)  # mknod(2): regular file (two spellings) and FIFO
_FILE_TYPE_MASK = 0o170000
# renameat2(2): it leaves a character device behind, for which mknod(2) and Landlock are not asked.
_RENAME_WHITEOUT = 0x4
_SET_XATTR = "setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr"
# seccomp(2): the upper half of what a filter returns is the action, the lower one its errno.
_ACTION, _DATA = 0xFFFF_0000, 0x0000_FFFF
_RETURN_ERRNO, _RETURN_NOTIFY = 0x0005_0000, 0x7FC0_0000
# personality(2) ADDR_NO_RANDOMIZE; prctl(2) PR_SET_PTRACER: who may trace the caller.
_ADDR_NO_RANDOMIZE, _PR_SET_PTRACER = 0x0004_0000, 0x5961_6D61
# LIMIT: filters kept; a policy has few sets of added calls.
_FILTERS = 128


def compile_filter(
    tier: Tier,
    syscalls: Collection[str] = (),
    *,
    explain: bool = False,
    polled: bool = False,
) -> bytes:
    """Compile the filter of a tier to classic BPF, ``struct sock_filter[]`` in native order.

    ``syscalls`` are the calls a profile adds. With ``explain`` every refusal first asks the
    holder of the filter's listener, who must answer with ``refusal_errno`` (``refused.py``).
    ``polled`` is for programs whose disk limit is only looked at from time to time.
    Raises SandboxUnavailable where libseccomp is missing or refuses, or a call cannot be added.
    """
    return _compile(tier, tuple(sorted(set(syscalls))), explain, polled)


def filter_of(tier: Tier, profile: Profile, *, explain: bool = False) -> bytes:
    """Compile the filter of a profile. Raises as ``compile_filter``."""
    direct = profile.workspace is WorkspaceMode.DIRECT
    return compile_filter(tier, profile.syscalls, explain=explain, polled=direct)


def digest(tier: Tier, syscalls: Collection[str] = ()) -> str:
    """Name the compiled filter, for the trace."""
    return hashlib.sha256(compile_filter(tier, syscalls)).hexdigest()


def refusal_errno(action: int) -> int | None:
    """Return the errno of what a filter returned; None where it is no refusal with one."""
    return action & _DATA if action & _ACTION == _RETURN_ERRNO else None


@cache
def judged_by_arguments() -> frozenset[str]:
    """Return the system calls of which some are allowed, by their arguments."""
    rules = _rules(Tier.LANDLOCK, (), polled=True)
    return frozenset(name for _, name, arguments in rules if arguments)


def needs_namespaces() -> frozenset[str]:
    """Return the system calls that are allowed only in tier full."""
    return frozenset(_NAMESPACED.split())


@lru_cache(maxsize=_FILTERS)
def _compile(tier: Tier, syscalls: tuple[str, ...], explain: bool, polled: bool) -> bytes:
    for name in syscalls:
        if reason := why_never(name):
            raise SandboxUnavailable(
                f"The system call {name!r} cannot be added to a filter: {reason}.",
                missing="seccomp",
                hint="Take it out of the profile's syscalls.",
            )
    if explain:
        return asking(_compile(tier, syscalls, explain=False, polled=polled))
    return bpf.shorten(export(tier, syscalls, polled=polled))


def asking(program: bytes) -> bytes:
    """Return the program with every refusal turned into a question; killing stays killing.

    INVARIANT: seccomp(2) itself is refused in both, so no later filter can answer instead.
    """
    return bpf.encode(
        [
            one._replace(value=_RETURN_NOTIFY)
            if one.code == bpf.RETURN and refusal_errno(one.value) is not None
            else one
            for one in bpf.decode(program)
        ]
    )


def export(
    tier: Tier, syscalls: tuple[str, ...], more: Iterable[Rule] = (), *, polled: bool = False
) -> bytes:
    """Compile the rules of a tier, and ``more``. Raises SandboxUnavailable without libseccomp."""
    try:
        program = libseccomp.SyscallFilter(defaction=libseccomp.ERRNO(errno.ENOSYS))
        program.set_attr(libseccomp.Attr.ACT_BADARCH, libseccomp.KILL_PROCESS)
        program.set_attr(libseccomp.Attr.CTL_OPTIMIZE, 2)
        for action, name, arguments in chain(_rules(tier, syscalls, polled=polled), more):
            if libseccomp.resolve_syscall(libseccomp.system_arch(), name) >= 0:
                program.add_rule(action, name, *arguments)
        with TemporaryFile() as file:
            program.export_bpf(file)
            file.seek(0)
            return file.read()
    except (OSError, RuntimeError, ValueError) as error:
        raise SandboxUnavailable(
            f"libseccomp cannot compile the filter: {error}",
            missing="seccomp",
            hint="Install libseccomp 2.5 or newer (package libseccomp2).",
        ) from error


Rule: TypeAlias = tuple[int, str, tuple[libseccomp.Arg, ...]]


def _rules(tier: Tier, syscalls: tuple[str, ...], *, polled: bool) -> Iterator[Rule]:
    allow = libseccomp.ALLOW
    plain = _FILES + _MEMORY + _PROCESSES + _TIME + _MESSAGES
    for name in (plain + (_NAMESPACED if tier is Tier.FULL else "")).split():
        yield allow, name, ()
    yield from _all_but_init() if tier is Tier.FULL else _myself()
    yield from _files_without_set_id()
    for bits, action in ((0, allow), (_RENAME_WHITEOUT, libseccomp.ERRNO(errno.EINVAL))):
        flags = libseccomp.Arg(4, libseccomp.MASKED_EQ, _RENAME_WHITEOUT, bits)
        yield action, "renameat2", (flags,)
    yield allow, "clone", (libseccomp.Arg(0, libseccomp.MASKED_EQ, _NAMESPACE_FLAGS, 0),)
    seal = libseccomp.Arg(1, libseccomp.MASKED_EQ, _MFD_NOEXEC_SEAL, _MFD_NOEXEC_SEAL)
    yield allow, "memfd_create", (seal,)
    yield from _choices()
    # It takes gigabytes of a disk in the time of one look at the limit. Who is told that a file
    # system does not know it writes instead, as posix_fallocate(3) does.
    watched = polled or tier is Tier.LANDLOCK
    yield libseccomp.ERRNO(errno.EOPNOTSUPP) if watched else allow, "fallocate", ()
    yield libseccomp.ERRNO(errno.EAFNOSUPPORT), "socket", ()
    for name in _SET_XATTR.split():
        yield libseccomp.ERRNO(errno.EOPNOTSUPP), name, ()
    for name in syscalls:
        yield from _ADDED.get(name, ((allow, name, ()),))


def _myself() -> Iterator[Rule]:
    for name in _OTHERS:
        yield libseccomp.ALLOW, name, (_equal(0, 0),)
    yield libseccomp.ALLOW, "setpriority", (_equal(0, _PRIO_PROCESS), _equal(1, 0))


def _all_but_init() -> Iterator[Rule]:
    refused = libseccomp.ERRNO(errno.EPERM)
    for name in _OTHERS:
        yield refused, name, (_equal(0, _INIT),)
    yield refused, "setpriority", (_equal(0, _PRIO_PROCESS), _equal(1, _INIT))
    yield refused, "setpriority", (_equal(0, _PRIO_USER),)
    # A rule without a condition would replace those with one. This condition always holds; being on
    # the first argument, libseccomp has it looked at last, for it begins with later arguments.
    always = libseccomp.Arg(0, libseccomp.GE, 0)
    for name in (*_OTHERS, "setpriority"):
        yield libseccomp.ALLOW, name, (always,)


def _choices() -> Iterator[Rule]:
    """Yield the calls that are many in one: which of them is one argument's value."""
    allow = libseccomp.ALLOW
    for kind in _SOCKET_KINDS:
        of_kind = libseccomp.Arg(1, libseccomp.MASKED_EQ, _SOCKET_KIND_MASK, kind)
        yield allow, "socketpair", (_equal(0, _AF_UNIX), of_kind)
    for option in _SOCKET_OPTIONS:
        yield allow, "setsockopt", (_equal(1, _SOL_SOCKET), _equal(2, option))
    for name, position, values in (
        ("fcntl", 1, _FCNTL_COMMANDS),
        ("prctl", 0, _PRCTL_OPTIONS),
        ("ioctl", 1, _IOCTL_REQUESTS),
        ("personality", 0, _PERSONALITIES),
    ):
        for value in values:
            yield allow, name, (_equal(position, value),)


def _files_without_set_id() -> Iterator[Rule]:
    """Yield the calls that give a file its mode: never set-user-ID or set-group-ID.

    As root the workspace is id-mapped to its owner, so such a bit would reach the host's disk.
    """
    for name, mode in (("chmod", 1), ("fchmod", 1), ("fchmodat", 2), ("creat", 1)):
        yield libseccomp.ALLOW, name, (_no_set_id(mode),)
        for bits in (0o2000, 0o4000, 0o6000):
            arguments = (libseccomp.Arg(mode, libseccomp.MASKED_EQ, _SET_ID_BITS, bits),)
            yield libseccomp.ERRNO(errno.EPERM), name, arguments
    for name, flags in (("open", 1), ("openat", 2)):
        yield libseccomp.ALLOW, name, (_no_set_id(flags + 1),)
        reading = libseccomp.Arg(flags, libseccomp.MASKED_EQ, _CREATING_FLAGS, 0)
        yield libseccomp.ALLOW, name, (reading,)
    for name, mode in (("mknod", 1), ("mknodat", 2)):
        for kind in _FILE_TYPES:
            wanted = _FILE_TYPE_MASK | _SET_ID_BITS
            yield (
                libseccomp.ALLOW,
                name,
                (libseccomp.Arg(mode, libseccomp.MASKED_EQ, wanted, kind),),
            )


def _no_set_id(position: int) -> libseccomp.Arg:
    return libseccomp.Arg(position, libseccomp.MASKED_EQ, _SET_ID_BITS, 0)


def _equal(position: int, value: int) -> libseccomp.Arg:
    # Every argument compared so is an int to the kernel, which does not look at its upper half.
    # Programs leave signs and rubbish there (musl's ioctl(3) a sign).
    return libseccomp.Arg(position, libseccomp.MASKED_EQ, _INT, value)


# What a name adds where it is not the whole system call, or not it alone.
_ADDED: Mapping[str, tuple[Rule, ...]] = {
    "ptrace": (
        (libseccomp.ALLOW, "ptrace", ()),
        (libseccomp.ALLOW, "prctl", (_equal(0, _PR_SET_PTRACER),)),
    ),
    "personality": ((libseccomp.ALLOW, "personality", (_equal(0, _ADDR_NO_RANDOMIZE),)),),
}


def memory_file(data: bytes) -> int:
    """Return a read-only descriptor of a new memfd that holds ``data``; the caller closes it.

    It is sealed: a sandbox that is handed one can neither change it nor execute it.
    """
    fd = _memory_descriptor()
    try:
        written = 0
        while written < len(data):  # write(2) takes 2 GiB at most
            written += os.write(fd, data[written:] if written else data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        os.fchmod(fd, 0o444)
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _memory_descriptor() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("safeconduct", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Before Linux 6.3 there is no such flag; the file mode alone refuses to execute it.
        return os.memfd_create("safeconduct", flags)
