"""What code in a zygote of ``--explain`` tries: what a profile imports is there before every call,
and hands over the listeners of its forks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pyseccomp as libseccomp
import pytest

from safeconduct.call import Limits, Outcome, Profile, Tier
from safeconduct.errors import SandboxFailed
from safeconduct.runtime.sandbox import cgroup
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.machine import Machine
from safeconduct.runtime.sandbox.native import NativeSandbox
from safeconduct.runtime.sandbox.python import PythonEngine
from safeconduct.runtime.sandbox.python_place import Place
from safeconduct.runtime.sandbox.shield import Shield

PTRACE = libseccomp.resolve_syscall(libseccomp.system_arch(), "ptrace")
SECCOMP = libseccomp.resolve_syscall(libseccomp.system_arch(), "seccomp")
SOCKET = libseccomp.resolve_syscall(libseccomp.system_arch(), "socket")
ASKS = f"import ctypes; ctypes.CDLL(None).syscall({PTRACE}, 0, 0, 0, 0)"


@dataclass(frozen=True)
class Lab:
    """An engine, and a folder of modules that its zygotes import from."""

    engine: PythonEngine
    workspace: Path
    site: Path

    def module(self, name: str, text: str) -> None:
        (self.site / f"{name}.py").write_text(dedent(text))

    def run(self, code: str, *modules: str, explain: bool = True) -> Outcome:
        folder = str(self.workspace)
        profile = Profile(
            name="test", read=(folder,), imports=("ctypes", "socket", *modules),
            limits=Limits(wall_ms=20_000),
        )  # fmt: skip
        return self.engine.run(
            "call", source=dedent(code), value=None, profile=profile, workspace=folder,
            shield=Shield(), explain=explain,
        )  # fmt: skip


@pytest.fixture
def lab(
    launcher: Launcher,
    machine: Machine,
    cgroups: cgroup.Cgroups | None,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Lab]:
    if machine.tiers[Tier.FULL]:
        pytest.skip(f"needs tier full: {machine.tiers[Tier.FULL]}")
    site = workspace / "site"
    site.mkdir()
    installed = Place.sites.fget
    assert installed is not None
    monkeypatch.setattr(Place, "sites", property(lambda self: (str(site), *installed(self))))
    with (
        closing(NativeSandbox(launcher, tier=Tier.FULL, cgroups=cgroups)) as sandbox,
        closing(PythonEngine(sandbox, cgroups)) as engine,
    ):
        made = Lab(engine, workspace, site)
        if made.run("0", explain=False).confinement.layers[-1] != "python-fork":
            pytest.skip(f"needs forks: {engine.why_no_forks}")
        yield made


INSTEAD = """
    import os, socket, sys
    confine = sys.modules["python_confine"]
    honest = confine.Walls.raise_
    def raise_(self, joins):
        mine = MINE
        listener = honest(self, joins)
        os.dup2(mine, listener)
        return listener
    confine.Walls.raise_ = raise_
"""


@pytest.mark.parametrize(
    "mine",
    ["os.open('/dev/null', 0)", "os.open('/', 0)", "os.eventfd(1)", "os.pidfd_open(os.getpid())",
     "socket.socketpair()[0].detach()"],
)  # fmt: skip
def test_what_is_no_listener_is_not_taken_for_one(
    lab: Lab, mine: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lab.run(ASKS).refused[0].syscall == "ptrace"
    lab.module("evil", INSTEAD.replace("MINE", mine))
    before = len(os.listdir("/proc/self/fd"))
    # Else nothing would be told to have been refused.
    with pytest.raises(SandboxFailed) as caught:
        lab.run(ASKS, "evil")
    assert caught.value.step == "listener"
    lab.engine.settle()
    assert len(os.listdir("/proc/self/fd")) < before + 20
    assert "Traceback" not in capfd.readouterr().err
    assert lab.run("1").value == {"result": 1}


# One listener for all forks, of a filter that a process of the zygote's own is under.
SHARED = f"""
    import ctypes, os, socket, sys, time
    confine = sys.modules["python_confine"]
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    shared = []
    prepare, honest = confine.Walls.__init__, confine.Walls.raise_
    def init(self, *given, **named):
        prepare(self, *given, **named)
        if os.fork() == 0:
            listener = self._filter_calls()
            socket.send_fds(one, [b"x"], [listener])
            os.close(listener)
            for _ in range(100):
                ctypes.CDLL(None).syscall({PTRACE}, 0, 0, 0, 0)
                time.sleep(0.001)
            time.sleep(1000)
        shared.extend(socket.recv_fds(other, 1, 1)[1])
    def raise_(self, joins):
        listener = honest(self, joins)
        os.dup2(shared[0], listener)
        return listener
    confine.Walls.__init__, confine.Walls.raise_ = init, raise_
"""


def test_one_listener_for_many_forks_holds_no_call_up(lab: Lab) -> None:
    lab.module("shares", SHARED)

    def one(_: int) -> str:
        try:
            return str(lab.run("import time; time.sleep(0.5)", "shares").value)
        except SandboxFailed as error:
            return error.step

    with ThreadPoolExecutor(8) as threads:
        ended = list(threads.map(one, range(8), timeout=40))
    assert set(ended) <= {"{'result': None}", "listener"}
    lab.engine.close()
    for thread in threading.enumerate():
        if thread.name == "refusals":
            thread.join(20)
            assert not thread.is_alive()


ANSWERS = f"""
    import ctypes, errno, os, socket, struct, sys
    libc = ctypes.CDLL(None, use_errno=True)
    confine = sys.modules["python_confine"]
    prepare = confine.Walls.__init__
    found = []
    def call(*arguments):
        return errno.errorcode[ctypes.get_errno()] if libc.syscall(*arguments) < 0 else "done"
    def ask(end):
        # if (nr == socket) return SECCOMP_RET_USER_NOTIF; return SECCOMP_RET_ALLOW;
        code = b"".join(struct.pack("=HBBI", *one) for one in (
            (0x20, 0, 0, 0), (0x15, 0, 1, {SOCKET}), (6, 0, 0, 0x7fc00000), (6, 0, 0, 0x7fff0000)))
        kept = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("@HP", 4, ctypes.addressof(kept))
        listener = libc.syscall({SECCOMP}, 1, 40, program)
        socket.send_fds(end, [b"x"], [listener])
        os.close(listener)
        end.send(call({SOCKET}, 2, 1, 0).encode())
        os._exit(0)
    def init(self, *given, **named):
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ask(one)
        listener = socket.recv_fds(other, 1, 1)[1][0]
        question = ctypes.create_string_buffer(80)
        took = libc.ioctl(listener, ctypes.c_ulong(0xC0502100), question)
        found.append(errno.errorcode[ctypes.get_errno()] if took < 0 else "took")
        if took == 0:
            (identity,) = struct.unpack_from("=Q", question.raw)
            libc.ioctl(listener, ctypes.c_ulong(0xC0182101),
                       struct.pack("=QqiI", identity, 0, 0, 1))
        os.close(listener)
        found.append(other.recv(100).decode())
        prepare(self, *given, **named)
    confine.Walls.__init__ = init
"""


def test_no_newer_filter_in_the_zygote_says_continue(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A zygote may load filters that ask, and its own asks nobody, so the kernel would ask a newer
    # one. INVARIANT: an answer is an ioctl(2) that no filter of ours allows.
    from safeconduct.runtime.sandbox import seccomp
    from safeconduct.runtime.sandbox.python_nest import nesting_filter

    lab.module("answers", ANSWERS)
    code = "import answers; answers.found"
    with monkeypatch.context() as opened:
        names = seccomp._FILES + " ioctl"  # pyright: ignore[reportPrivateUsage]
        opened.setattr(seccomp, "_FILES", names)
        for cached in (seccomp._compile, nesting_filter):  # pyright: ignore[reportPrivateUsage]
            cached.cache_clear()
        try:
            assert lab.run(code, "answers").value == {"result": ["took", "done"]}
        finally:
            for cached in (seccomp._compile, nesting_filter):  # pyright: ignore[reportPrivateUsage]
                cached.cache_clear()
    lab.module("again", ANSWERS)
    outcome = lab.run("import again; again.found", "again")
    assert outcome.value == {"result": ["ENOSYS", "ENOSYS"]}
