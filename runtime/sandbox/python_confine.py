"""Inside Python tools: how a fork of the zygote confines itself, before it knows its call.

Order (each step still needs what the next one takes away): pid namespace (made by the zygote) →
cgroups joined → mount, ipc and cgroup namespaces → its own /proc, /tmp and /dev/shm → user
namespace → rlimits → capabilities → Landlock → seccomp; python_worker.py then closes what is left
of the zygote's descriptors. Standard library only: the sandbox is granted no other file of ours.
Whatever fails here ends the fork.
"""

from __future__ import annotations

import ctypes
import os
import resource
import stat
import struct
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Rule: TypeAlias = tuple[str, str]

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID = 0x10000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
# Numbers of calls newer than most C libraries; alike on every architecture since Linux 5.1.
_OPEN_TREE, _MOVE_MOUNT = 428, 429
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_OPEN_TREE_CLONE, _AT_RECURSIVE, _AT_FDCWD = 1, 0x8000, -100
_MOVE_MOUNT_F_EMPTY_PATH = 4
_PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT = 22, 24, 47
_PR_CAP_AMBIENT_CLEAR_ALL, _SECCOMP_MODE_FILTER = 4, 2
# seccomp(2). The second flag (Linux 5.19): else a signal would make a call be asked about twice.
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_LISTEN = 1 << 3 | 1 << 5  # NEW_LISTENER | WAIT_KILLABLE_RECV
_CAPABILITY_VERSION_3 = 0x20080522

# landlock(7): one bit for each right; native/launcher/src/confine.rs grants the same sets.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK, _TRUNCATE, _IOCTL_DEV = 1 << 6, 1 << 11, 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
# Rights by ABI: 1 has 13, 2 adds refer, 3 truncate, 5 device ioctls.
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_ABI_NET, _ABI_SCOPE = 4, 6

_RLIMITS: Mapping[str, int] = {
    "core": resource.RLIMIT_CORE,
    "cpu": resource.RLIMIT_CPU,
    "data": resource.RLIMIT_DATA,
    "fsize": resource.RLIMIT_FSIZE,
    "memlock": resource.RLIMIT_MEMLOCK,
    "msgqueue": resource.RLIMIT_MSGQUEUE,
    "nice": resource.RLIMIT_NICE,
    "nofile": resource.RLIMIT_NOFILE,
    "nproc": resource.RLIMIT_NPROC,
    "rtprio": resource.RLIMIT_RTPRIO,
    "sigpending": resource.RLIMIT_SIGPENDING,
}

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall


class Refused(OSError):
    """The kernel refused one step; ``strerror`` names the step."""


def _check(result: int, step: str) -> int:
    if result < 0:
        raise Refused(ctypes.get_errno(), step)
    return result


def unshare(flags: int, step: str) -> None:
    """Put new namespaces under this process, unshare(2)."""
    _check(_libc.unshare(flags), step)


def enter(namespace: int, kind: int) -> None:
    """Join the namespace that a descriptor names, setns(2)."""
    _check(_libc.setns(namespace, kind), "return to own pid namespace")


def mount(source: bytes, target: bytes, kind: bytes | None, flags: int, data: bytes | None) -> None:
    """Attach a file system, mount(2)."""
    _check(_libc.mount(source, target, kind, flags, data), f"mount {target.decode()}")


def map_self(inside: int, outside: tuple[int, int]) -> None:
    """Map the one id that this process has, in its fresh user namespace."""
    _write(b"/proc/self/uid_map", b"%d %d 1" % (inside, outside[0]))
    # user_namespaces(7): an unprivileged writer must give up setgroups(2) first.
    _write(b"/proc/self/setgroups", b"deny")
    _write(b"/proc/self/gid_map", b"%d %d 1" % (inside, outside[1]))


def _write(path: bytes, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


class Walls:
    """Everything about the walls of a fork that is the same for all of them, made once.

    What is built here is built in the zygote, so that a fork runs few lines of Python: each page
    of memory that it touches becomes its own.
    """

    def __init__(
        self, *, rules: Sequence[Rule], private: Sequence[tuple[str, str]], kept: Sequence[str],
        rlimits: Sequence[tuple[str, int]], filter: bytes, listen: int, uid: int, gid: int,
    ) -> None:  # fmt: skip
        """``private`` are a fork's own tmpfs (target, options); ``kept`` lie below one of them.

        ``listen`` is the number of seccomp(2) where the filter asks somebody, and 0 elsewhere.
        """
        self._abi = _check(_syscall(_LANDLOCK_CREATE, None, 0, 1), "landlock version")
        known = max(abi for abi in _RIGHTS if abi <= self._abi)
        self._handled = _RIGHTS[known]
        net = 3 if self._abi >= _ABI_NET else 0
        scope = 3 if self._abi >= _ABI_SCOPE else 0
        attribute = struct.pack("=QQQ", self._handled, net, scope)
        self._attribute = attribute[: 24 if scope else 16 if net else 8]
        fresh = {"/proc", *(target for target, _ in private)}
        # A rule holds for the object it was made with, so objects that are a fork's own come late.
        late = [rule for rule in rules if _below(rule[0], fresh)]
        early = [rule for rule in rules if not _below(rule[0], fresh)]
        self._rules = [self._open(path, access) for path, access in early]
        self._late = late
        self._private = [(path.encode(), options.encode()) for path, options in private]
        self._kept = [(path.encode(), os.path.isdir(path)) for path in kept]
        self._rlimits = [(_RLIMITS[name], (value, value)) for name, value in rlimits]
        self._filter = ctypes.create_string_buffer(filter, len(filter))
        program = struct.pack("@HP", len(filter) // 8, ctypes.addressof(self._filter))
        self._program = ctypes.create_string_buffer(program, len(program))
        self._listen = listen
        self._ids = uid, gid
        self._no_capabilities = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)

    def raise_(self, joins: Sequence[int]) -> int | None:
        """Confine this process for good. ``joins`` are the files of its cgroups, open to write.

        Returns the listener of the filter where it asks. INVARIANT: no code of a call ever holds
        it: who has it may say "continue".
        """
        for fd in joins:
            os.write(fd, b"0")
        unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWCGROUP, "namespaces")
        self._mount()
        # Not only for its capabilities: RLIMIT_NPROC counts for each user namespace on its own.
        unshare(CLONE_NEWUSER, "user namespace")
        map_self(self._ids[0], self._ids)
        ruleset = self._ruleset()
        for name, value in self._rlimits:
            # What already is lower stays lower.
            hard = resource.getrlimit(name)[1]
            bound = value[0] if hard < 0 else min(value[0], hard)
            resource.setrlimit(name, (bound, bound))
        os.setsid()
        self._renounce()
        _check(_syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock")
        os.close(ruleset)
        return self._filter_calls()

    def _filter_calls(self) -> int | None:
        program = ctypes.byref(self._program)
        if self._listen:
            # prctl(2) can load a filter too, but knows no flags.
            mode, flags = SECCOMP_SET_MODE_FILTER, SECCOMP_LISTEN
            return _check(_syscall(self._listen, mode, flags, program), "seccomp")
        _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0), "seccomp")
        return None

    def _mount(self) -> None:
        flags = MS_NOSUID | MS_NODEV
        # Only processes, and only the fork's own: none of the machine's facts or settings.
        mount(b"proc", b"/proc", b"proc", flags | MS_NOEXEC, b"subset=pid")
        trees = [(path, folder, self._clone(path)) for path, folder in self._kept]
        for target, options in self._private:
            mount(b"tmpfs", target, b"tmpfs", flags, options)
        for path, folder, tree in trees:
            os.makedirs(path if folder else os.path.dirname(path), exist_ok=True)
            if not folder:
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444))
            moved = _syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, path, _MOVE_MOUNT_F_EMPTY_PATH)
            _check(moved, "keep a granted folder")
            os.close(tree)

    def _clone(self, path: bytes) -> int:
        flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE
        return _check(_syscall(_OPEN_TREE, _AT_FDCWD, path, flags), "keep a granted folder")

    def _ruleset(self) -> int:
        made = _syscall(_LANDLOCK_CREATE, self._attribute, len(self._attribute), 0)
        ruleset = _check(made, "landlock ruleset")
        for rule in self._rules:
            _check(_syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), "landlock rule")
        for path, access in self._late:
            rule = self._open(path, access)
            _check(_syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), "landlock rule")
        return ruleset

    def _open(self, path: str, access: str) -> bytes:
        """Open what a rule is about; ``struct landlock_path_beneath_attr`` of it."""
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = {
            "read": _EXECUTE | _READ_FILE | _READ_DIR,
            "use": _EXECUTE | _READ_FILE,
            "write": self._handled & ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV),
            "list": _READ_DIR,
            "device": _READ_FILE | _WRITE_FILE,
        }[access]
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _OF_FILES
        return struct.pack("=Qi", rights & self._handled, fd)

    def _renounce(self) -> None:
        """Give up every capability; no_new_privs is set since the launcher started the zygote."""
        capability = 0
        while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
            capability += 1
        cleared = _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
        _check(cleared, "ambient capabilities")
        _check(_libc.capset(*self._no_capabilities), "capabilities")


def _below(path: str, folders: set[str]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)
