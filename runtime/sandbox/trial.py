"""Step "sandbox": a program of its own that tries single layers of the kernel and says what came.

``python -I -S trial.py FOLDER`` prints one JSON object: for each trial ``["", 0]`` where it worked,
else the step that failed and its errno. Each trial runs in a fork of its own, so nothing it does
outlives it. Only the standard library is used, because it also runs where the package cannot load.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial

# LIMIT: seconds for one trial; a file system that hangs must not hang the doctor.
_SECONDS = 5
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_FS = 0x200
# clone(2), unshare(2)
KINDS = {
    "mount": 0x0002_0000, "cgroup": 0x0200_0000, "uts": 0x0400_0000, "ipc": 0x0800_0000,
    "pid": 0x2000_0000, "net": 0x4000_0000, "time": 0x80,
}  # fmt: skip
_NEWUSER = 0x1000_0000
_MACHINE = os.uname().machine
# Numbers that differ between architectures; all newer calls share one number everywhere.
_CLONE = {"x86_64": 56}.get(_MACHINE, 220)
_GETPPID = {"x86_64": 110}.get(_MACHINE, 173)
_SECCOMP = {"x86_64": 317}.get(_MACHINE, 277)
_OPEN_TREE, _MOUNT_SETATTR = 428, 442
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446
_CAP_SYS_ADMIN = 21
# prctl(2)
_PR_SET_NO_NEW_PRIVS = 38
_MS_PRIVATE_ALL = 0x4_4000  # mount(2): MS_PRIVATE | MS_REC
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_MOUNT_ATTR_IDMAP = 0x10_0000
# The first host id that sandboxes started by root are given (native.py).
_FIRST_ID = 0x7000_0000


class Failed(Exception):
    """A step that the kernel refused."""

    def __init__(self, step: str, number: int) -> None:
        super().__init__(step)
        self.step, self.number = step, number


@contextmanager
def _step(name: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise Failed(name, error.errno or errno.EIO) from error


def _called(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _syscall(number: int, *arguments: object) -> int:
    # Plain integers go as 64 bits: the kernel reads whole registers, syscall(2).
    wide = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return _called(_LIBC.syscall(ctypes.c_long(number), *wide))


def _unshare(flags: int) -> None:
    _called(_LIBC.unshare(ctypes.c_int(flags)))


def _mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    words = [text.encode() for text in (source, target, kind, options)]
    _called(_LIBC.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]))


def _has_capability(bit: int) -> bool:
    # In tier landlock a process cannot read its own entry of /proc, and has no capability.
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> bit & 1)
    return False


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _enter_user_namespace(flags: int = 0) -> None:
    """Make a user namespace, and others with it, and become its root, user_namespaces(7)."""
    uid, gid = os.geteuid(), os.getegid()
    with _step("unshare"):
        _unshare(_NEWUSER | flags)
    with _step("map ids"):
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"0 {uid} 1")
        _write("/proc/self/gid_map", f"0 {gid} 1")


def _enter(flags: int) -> None:
    """Make namespaces as the launcher would: alone where we may, else in a user namespace."""
    if _has_capability(_CAP_SYS_ADMIN):
        with _step("unshare"):
            _unshare(flags)
    else:
        _enter_user_namespace(flags)


def _user() -> None:
    _enter_user_namespace()
    with _step("use capability"):
        # AppArmor lets the namespace be made and then refuses its capabilities.
        _unshare(KINDS["uts"])


def _new_root() -> None:
    _enter(KINDS["mount"])
    with _step("make mounts private"):
        _mount("none", "/", "none", _MS_PRIVATE_ALL)


def _tmpfs() -> str:
    _new_root()
    folder = "/tmp" if os.path.isdir("/tmp") else "/"  # noqa: S108 - covered, not written to
    with _step("mount tmpfs"):
        _mount("none", folder, "tmpfs", 0, "size=1m")
    return folder


def _proc() -> None:
    _enter(KINDS["mount"] | KINDS["pid"])
    with _step("fork"):
        child = os.fork()
    if child == 0:
        # A fresh proc needs a pid namespace of one's own, so only a child can mount it.
        number = 0
        try:
            _mount("none", "/", "none", _MS_PRIVATE_ALL)
            _mount("proc", "/proc", "proc")
        except OSError as error:
            number = error.errno or errno.EIO
        os._exit(number)
    number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if number:
        raise Failed("mount proc", number)


def _overlay() -> None:
    folder = _tmpfs()
    with _step("mount overlay"):
        os.chdir(folder)
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(name)
        options = "lowerdir=lower,upperdir=upper,workdir=work"
        # Ordinary users have no trusted.* attributes, kernel overlayfs.rst.
        options += "" if os.geteuid() == 0 and _maps_all() else ",userxattr"
        _mount("none", "merged", "overlay", 0, options)


def _maps_all() -> bool:
    with open("/proc/self/uid_map") as file:
        return file.read().split()[-1] == "4294967295"


def _idmap() -> None:
    """Show a folder under other ids, as each sandbox of root gets its workspace."""
    ready, wait = os.pipe()
    child = os.fork()
    if child == 0:
        if _LIBC.unshare(_NEWUSER) == 0:
            os.write(wait, b"1")
            signal.pause()
        os._exit(0)
    os.close(wait)
    try:
        with _step("user namespace"):
            if not os.read(ready, 1):
                raise OSError(errno.EPERM, "refused")
            for name in ("uid_map", "gid_map"):
                _write(f"/proc/{child}/{name}", f"0 {_FIRST_ID} 1")
            namespace = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
        with _step("clone mount"):
            clone, cloexec = 1, os.O_CLOEXEC
            tree = _syscall(_OPEN_TREE, _AT_FDCWD, _folder().encode(), clone | cloexec)
        with _step("map mount"):
            attributes = struct.pack("QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, namespace)
            _syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, len(attributes))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _folder() -> str:
    return sys.argv[1] if len(sys.argv) > 1 else "."


def _own_ids() -> None:
    with _step("setresgid"):
        os.setresgid(_FIRST_ID, _FIRST_ID, _FIRST_ID)
    with _step("setresuid"):
        os.setresuid(_FIRST_ID, _FIRST_ID, _FIRST_ID)


def _no_new_privileges() -> None:
    with _step("no_new_privs"):
        _called(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _landlock() -> None:
    """Forbid reading every file and look whether it holds, landlock(7)."""
    with _step("create ruleset"):
        read_file = struct.pack("Q", 1 << 2)
        ruleset = _syscall(_LANDLOCK_CREATE, read_file, len(read_file), 0)
    _no_new_privileges()
    with _step("open this file"):
        os.close(os.open(sys.argv[0], os.O_RDONLY))
    with _step("restrict"):
        _syscall(_LANDLOCK_RESTRICT, ruleset, 0)
    with suppress(PermissionError):
        os.close(os.open(sys.argv[0], os.O_RDONLY))
        raise Failed("hold", 0)


def _seccomp() -> None:
    """Refuse getppid(2) to ourselves and look whether it holds, seccomp(2)."""
    _no_new_privileges()
    refuse = 0x0005_0000 | errno.EDOM
    lines = [
        (0x20, 0, 0, 0),
        (0x15, 0, 1, _GETPPID),
        (0x06, 0, 0, refuse),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    header = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(program))
    with _step("load filter"):
        _syscall(_SECCOMP, 1, 0, header)
    try:
        _syscall(_GETPPID)
    except OSError as error:
        if error.errno == errno.EDOM:
            return
    raise Failed("hold", 0)


def _unfiltered_unshare() -> None:
    """Ask for something impossible: the kernel says EINVAL, a filter in front of it does not."""
    with _step("unshare"):
        _unshare(_NEWUSER | 1)


def _unfiltered_clone() -> None:
    with _step("clone"):
        if _syscall(_CLONE, _NEWUSER | _CLONE_FS | signal.SIGCHLD, 0, 0, 0, 0) == 0:
            os._exit(0)


def _landlock_version() -> int:
    try:
        return _syscall(_LANDLOCK_CREATE, None, 0, 1)
    except OSError as error:
        return -(error.errno or errno.EIO)


def _attempt(trial: Callable[[], object]) -> tuple[str, int]:
    """Run one trial in a fork; the step that failed and its errno."""
    read, write = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        return "fork", error.errno or errno.EIO
    if child == 0:
        os.close(read)
        signal.alarm(_SECONDS)
        answer = ("", 0)
        try:
            trial()
        except Failed as failed:
            answer = (failed.step, failed.number)
        except OSError as error:
            answer = ("other", error.errno or errno.EIO)
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        data = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not data:
        return f"ended with {status}", 0
    step, number = json.loads(data)
    return str(step), int(number)


def main() -> None:
    """Run every trial and print what came."""
    trials: dict[str, Callable[[], object]] = {
        "user": _user, "root": _new_root, "tmpfs": _tmpfs, "proc": _proc, "overlay": _overlay,
        "idmap": _idmap, "own ids": _own_ids, "landlock": _landlock, "seccomp": _seccomp,
        "unfiltered unshare": _unfiltered_unshare, "unfiltered clone": _unfiltered_clone,
    }  # fmt: skip
    for kind, flag in KINDS.items():
        trials[kind] = partial(_enter, flag)
    answers = {name: _attempt(trial) for name, trial in trials.items()}
    print(json.dumps({"landlock_abi": _landlock_version(), "trials": answers}))


if __name__ == "__main__":
    main()
