"""Inside Python tools: the zygote, an interpreter that is warm, confined, and runs no call code.

``python.py`` starts this file as a script in a native sandbox, with its configuration on stdin. As
``zygote`` it imports what the profile names and then forks once per call: a datagram on the
control socket (descriptor 3) brings the descriptors of one fork, everything about its end is told
on that fork's own socket, and that socket's closing ends the fork. As ``single`` it is the one
process of one call (descriptor 3 is its channel) and its sandbox is the whole confinement.
"""

from __future__ import annotations

import array
import base64
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, cast

if TYPE_CHECKING or __name__ != "__main__":
    from . import python_call, python_confine
else:
    import importlib.util

    def _load(name: str) -> object:
        """Load a file beside this one: their folder is not granted, so it is not searched."""
        path = os.path.join(os.path.dirname(__file__), f"{name}.py")
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    python_call, python_confine = _load("python_call"), _load("python_confine")

VERSION = 1
CONTROL = 3
# What one fork is given, in this order, before the files of its cgroups.
FATE, CHANNEL, STDOUT, STDERR = range(4)
# LIMIT: forks alive at once, waiting ones among them.
FORKS_MAX = 256
_DESCRIPTORS_MAX = 16
# What is said on a fork's own socket: end it; here is the listener of its filter.
END, LISTENER = b"end", b"listener"
_CONFIGURATION_BYTES_MAX = 8 << 20


def main() -> NoReturn:
    """Read the configuration, import, and become what it says."""
    with open(0, "rb", closefd=False) as source:
        setting = cast("dict[str, Any]", json.loads(source.read(_CONFIGURATION_BYTES_MAX)))
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    # What a call printed is there also when the call is ended from outside.
    cast("Any", sys.stdout).reconfigure(line_buffering=True)
    sys.path += setting["paths"]
    if setting["mode"] == "single":
        _serve_alone(setting)
    _settle()
    control = socket.socket(fileno=CONTROL)
    try:
        _import(setting["imports"])
        os.chdir("/")
        zygote = Zygote(control, setting)
    except (Exception, SystemExit) as error:
        _tell(control, {"type": "broken", "error": type(error).__name__, "message": str(error)})
        os._exit(1)
    _tell(control, {"type": "ready", "version": VERSION})
    gc.collect()
    gc.freeze()
    gc.disable()
    zygote.run()


def _serve_alone(setting: dict[str, Any]) -> NoReturn:
    try:
        _import(setting["imports"])
        os.chdir(setting["cwd"])
    except (Exception, SystemExit) as error:
        # Instead of the byte that says "ready".
        os.write(CONTROL, f"{type(error).__name__}: {error}".encode("ascii", "replace")[:1000])
        os._exit(1)
    python_call.serve(CONTROL)


def _settle() -> None:
    """Move into a user and pid namespace of our own, whose first process becomes the zygote.

    Only there may it make namespaces for its forks, and as pid 1 it takes all of them with it.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = python_confine.CLONE_NEWUSER | python_confine.CLONE_NEWNS
    try:
        python_confine.unshare(
            flags | python_confine.CLONE_NEWIPC | python_confine.CLONE_NEWPID, "namespaces"
        )
        python_confine.map_self(uid, (uid, gid))
        pid = os.fork()
        if pid:
            os.closerange(0, 1024)
            _, status = os.waitpid(pid, 0)
            os._exit(min(os.waitstatus_to_exitcode(status), 255) & 0xFF)
        private = python_confine.MS_REC | python_confine.MS_PRIVATE
        python_confine.mount(b"", b"/", None, private, None)
        flags = python_confine.MS_NOSUID | python_confine.MS_NODEV | python_confine.MS_NOEXEC
        python_confine.mount(b"proc", b"/proc", b"proc", flags, None)
    except OSError as error:
        control = socket.socket(fileno=CONTROL)
        _tell(control, {"type": "unable", "step": str(error.strerror), "errno": error.errno or 0})
        os._exit(1)


def _import(names: list[str]) -> None:
    for name in names:
        importlib.import_module(name)
    if "numpy" in names:
        # Part of numpy is loaded on first use; a fork would otherwise pay for it.
        importlib.import_module("numpy.random")


def _tell(to: socket.socket, message: dict[str, Any]) -> None:
    try:
        to.send(json.dumps(message).encode("ascii"), socket.MSG_DONTWAIT)
    except OSError:
        # Whoever asked is gone, and knows by that.
        return


def _hang_up(fate: socket.socket) -> None:
    """Close, so that what was told is read: with something unread it would be a reset, unix(7)."""
    with suppress(OSError):
        fate.shutdown(socket.SHUT_RD)
        while fate.recv(64, socket.MSG_DONTWAIT):
            pass
    fate.close()


class Zygote:
    """Makes forks and reports their ends."""

    def __init__(self, control: socket.socket, setting: dict[str, Any]) -> None:
        self._control = control
        self._cwd = str(setting["cwd"])
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._walls = python_confine.Walls(
            rules=[(path, access) for path, access in setting["rules"]],
            private=[(target, options) for target, options in setting["private"]],
            kept=setting["kept"],
            rlimits=[(name, value) for name, value in setting["rlimits"]],
            filter=base64.b64decode(setting["filter"]),
            listen=setting["listen"],
            uid=os.geteuid(),
            gid=os.getegid(),
        )
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._forks: dict[int, tuple[int, socket.socket]] = {}
        self._fates: dict[int, int] = {}

    def run(self) -> NoReturn:
        """Serve until the supervisor closes the control socket."""
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._control.fileno():
                    self._accept()
                elif fd in self._fates:
                    self._end(self._fates[fd])
                elif fd in self._forks:
                    self._bury(fd)

    def _accept(self) -> None:
        size = socket.CMSG_SPACE(_DESCRIPTORS_MAX * 4)
        data, rights, flags, _ = self._control.recvmsg(16, size, socket.MSG_CMSG_CLOEXEC)
        if not data:
            os._exit(0)
        given = array.array("i")
        for _, _, part in rights:
            given.frombytes(part[: len(part) - len(part) % given.itemsize])
        if flags & socket.MSG_CTRUNC or len(given) <= STDERR or len(self._forks) >= FORKS_MAX:
            for fd in given:
                os.close(fd)
            return
        self._fork(list(given))

    def _fork(self, given: list[int]) -> None:
        fate = socket.socket(fileno=given[FATE])
        try:
            python_confine.unshare(python_confine.CLONE_NEWPID, "pid namespace")
            try:
                pid = os.fork()
                if pid == 0:
                    self._become(given, fate)
            finally:
                python_confine.enter(self._own, python_confine.CLONE_NEWPID)
            process = os.pidfd_open(pid)
        except OSError as error:
            _tell(fate, {"type": "unable", "step": str(error), "errno": error.errno or 0})
            _hang_up(fate)
        else:
            self._forks[process] = pid, fate
            self._fates[fate.fileno()] = process
            self._poll.register(process, select.POLLIN)
            self._poll.register(fate, select.POLLIN)
        finally:
            for fd in given[CHANNEL:]:
                os.close(fd)

    def _become(self, given: list[int], fate: socket.socket) -> NoReturn:
        """In the fork: confine it, then let it wait for its call."""
        try:
            # What is made next gets this number, which is below any limit on descriptors.
            os.close(CONTROL)
            listener = self._walls.raise_(given[STDERR + 1 :])
            if listener is not None:
                # INVARIANT: from here on nothing is asked for that the filter refuses, until
                # somebody answers; and nothing of the call has come yet.
                socket.send_fds(fate, [LISTENER], [listener])
                os.close(listener)
            os.chdir(self._cwd)
            _reseed()
            gc.enable()
        except BaseException as error:
            number = error.errno if isinstance(error, OSError) else 0
            step = f"{type(error).__name__}: {error}"
            message = json.dumps({"type": "unable", "step": step[:500], "errno": number or 0})
            os.write(given[FATE], message.encode("ascii"))
            os._exit(1)
        try:
            python_call.serve(_arrange(given))
        finally:
            os._exit(1)

    def _end(self, process: int) -> None:
        """End a fork: it was asked for, or nobody wants the fork any more."""
        _, fate = self._forks[process]
        self._poll.unregister(fate)
        del self._fates[fate.fileno()]
        signal.pidfd_send_signal(process, signal.SIGKILL)

    def _bury(self, process: int) -> None:
        pid, fate = self._forks.pop(process)
        _, status, usage = os.wait4(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        end = {
            "type": "ended",
            "code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "cpu_us": int((usage.ru_utime + usage.ru_stime) * 1_000_000),
            "peak_rss_kib": usage.ru_maxrss,
        }
        self._poll.unregister(process)
        if self._fates.pop(fate.fileno(), None) is not None:
            self._poll.unregister(fate)
        os.close(process)
        _tell(fate, end)
        _hang_up(fate)


def _arrange(given: list[int]) -> int:
    """Leave the fork its standard streams and its channel, and nothing of the zygote's."""
    # Flags and locks of an open file that all forks share would be there for the next one.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(given[STDOUT], 1)
    os.dup2(given[STDERR], 2)
    os.dup2(given[CHANNEL], CONTROL, inheritable=False)
    # close_range(2); every other number belonged to the zygote or to another fork.
    os.closerange(CONTROL + 1, 1 << 30)
    return CONTROL


def _reseed() -> None:
    """Give this fork its own random numbers; ``random`` itself does so in every fork."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        cast("Any", numpy_random).seed()
    ssl = sys.modules.get("ssl")
    if ssl is not None:
        cast("Any", ssl).RAND_add(os.urandom(32), 32.0)
    tempfile = sys.modules.get("tempfile")
    if tempfile is not None:
        # It tells forks apart by their pid, and here every one has pid 1.
        cast("Any", tempfile)._name_sequence = None


if __name__ == "__main__":
    main()
