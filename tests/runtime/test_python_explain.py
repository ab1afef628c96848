"""What seccomp refuses to Python tools, counted: in forks of a zygote and in interpreters alone."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import cast

import pyseccomp as libseccomp
import pytest

from safeconduct import Runtime
from safeconduct.call import Json, Limits, Outcome, Profile, Tier
from safeconduct.errors import LimitExceeded, SandboxUnavailable, ToolFailed
from safeconduct.runtime.sandbox import bpf, cgroup, seccomp
from safeconduct.runtime.sandbox.native import NativeSandbox
from safeconduct.runtime.sandbox.python import PythonEngine
from safeconduct.runtime.sandbox.python_nest import nesting_filter
from safeconduct.runtime.sandbox.shield import Shield

ALONE = "no forks, for the test"
# One instruction of classic BPF: allow, seccomp(2).
_ALLOW_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF_0000)


def number(name: str) -> int:
    return libseccomp.resolve_syscall(libseccomp.system_arch(), name)


@dataclass(frozen=True)
class Asked:
    """Runs snippets with what they are refused counted, or not."""

    engine: PythonEngine
    workspace: Path

    def run(self, code: str, *, explain: bool = True, limits: Limits | None = None) -> Outcome:
        folder = str(self.workspace)
        return self.engine.run(
            "call",
            source=dedent(code),
            value=None,
            profile=Profile(
                name="test", read=(folder,), write=(folder,), imports=("ctypes", "socket"),
                limits=limits or Limits(wall_ms=20_000),
            ),
            workspace=folder,
            shield=Shield(),
            explain=explain,
        )  # fmt: skip

    def counts(self, code: str) -> dict[str, int]:
        return {one.syscall: one.count for one in self.run(code).refused}


@pytest.fixture(params=["fork", "process"])
def asked(
    request: pytest.FixtureRequest,
    sandbox: NativeSandbox,
    workspace: Path,
    cgroups: cgroup.Cgroups | None,
) -> Iterator[Asked]:
    if sandbox.tier is Tier.LANDLOCK and request.param == "fork":
        pytest.skip("tier landlock has no zygotes")
    with closing(PythonEngine(sandbox, cgroups)) as engine:
        if request.param == "process":
            engine.why_no_forks = ALONE
        made = Asked(engine, workspace)
        try:
            layers = made.run("0", explain=False).confinement.layers
        except (SandboxUnavailable, ToolFailed) as error:
            if sandbox.tier is Tier.FULL or os.geteuid() != 0:
                raise
            # Root gives the program another user's view, which may not reach root's own Python.
            pytest.skip(f"tier {sandbox.tier}: {error.message}")
        assert layers[-1] == f"python-{request.param}"
        yield made


TRIES = f"""
    import ctypes, errno, os, socket
    libc = ctypes.CDLL(None, use_errno=True)
    def call(number, *arguments):
        return errno.errorcode[ctypes.get_errno()] if libc.syscall(number, *arguments) < 0 else "OK"
    found = []
    for _ in range(3):
        try: socket.socket(socket.AF_INET)
        except OSError as error: found.append(errno.errorcode[error.errno])
    found.append(call({number("ptrace")}, 0, 0, 0, 0))
    found.append(call({number("mount")}, 0, 0, 0, 0, 0))
    found.append(call({number("seccomp")}, 1, 8, 0))
    open("made", "w").close()
    try: os.chmod("made", 0o4755)
    except OSError as error: found.append(errno.errorcode[error.errno])
    found
"""


def test_what_a_snippet_is_refused_is_named_and_counted(asked: Asked) -> None:
    outcome = asked.run(TRIES)
    assert {one.syscall: one.count for one in outcome.refused} == {
        "socket": 3, "chmod": 1, "mount": 1, "ptrace": 1, "seccomp": 1,
    }  # fmt: skip
    remedies = {one.syscall: one.remedy for one in outcome.refused}
    assert remedies["ptrace"].startswith("allowed by `syscalls: [ptrace]` in profile test")
    assert remedies["mount"].startswith("cannot be allowed: ")


def test_every_verdict_is_the_same_with_it_and_without(asked: Asked) -> None:
    plain, explained = asked.run(TRIES, explain=False), asked.run(TRIES)
    assert plain.value == explained.value == {
        "result": [*["EAFNOSUPPORT"] * 3, "ENOSYS", "ENOSYS", "ENOSYS", "EPERM"]
    }  # fmt: skip
    assert plain.confinement == explained.confinement
    assert plain.refused == ()


def test_what_is_refused_nothing_is_told_to_have_been(asked: Asked) -> None:
    code = """
        import os, random, subprocess, tempfile, threading
        thread = threading.Thread(target=print, args=("out",))
        thread.start()
        thread.join()
        pid = os.fork()
        if pid == 0: os._exit(0)
        os.waitpid(pid, 0)
        with open("file", "w") as file: file.write("text")
        sorted(os.listdir())
    """
    outcome = asked.run(code)
    assert (outcome.value, outcome.stdout) == ({"result": ["file"]}, b"out\n")
    # Some C libraries try what is newer first, and then what is allowed.
    assert {one.syscall for one in outcome.refused} <= {"clone3", "ioctl"}


def test_children_and_threads_are_counted_too(asked: Asked) -> None:
    code = f"""
        import ctypes, os, threading
        libc = ctypes.CDLL(None)
        def ask(): libc.syscall({number("ptrace")}, 0, 0, 0, 0)
        for _ in range(3):
            if os.fork() == 0:
                ask()
                os._exit(0)
            os.wait()
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    """
    assert asked.counts(code)["ptrace"] == 7


def test_a_failure_says_what_was_refused_too(asked: Asked) -> None:
    with pytest.raises(ToolFailed, match="OSError") as caught:
        asked.run("import socket\nsocket.socket(socket.AF_INET)")
    assert [(one.syscall, one.count) for one in caught.value.refused] == [("socket", 1)]
    died = f"import ctypes, os\nctypes.CDLL(None).syscall({number('mount')})\nos._exit(3)"
    with pytest.raises(ToolFailed, match="exit code 3") as caught:
        asked.run(died)
    assert [one.syscall for one in caught.value.refused] == ["mount"]
    with pytest.raises(ToolFailed) as caught:
        asked.run("import socket\nsocket.socket(socket.AF_INET)", explain=False)
    assert caught.value.refused == ()


def test_a_limit_ends_what_asks_without_end(asked: Asked) -> None:
    code = f"""
        import ctypes
        libc = ctypes.CDLL(None)
        while True: libc.syscall({number("ptrace")}, 0, 0, 0, 0)
    """
    outcome = asked.run(code, limits=Limits(wall_ms=700))
    assert outcome.limit == "wall"
    assert outcome.refused[0].syscall == "ptrace"


def test_few_descriptors_are_enough(asked: Asked) -> None:
    # The listener needs a number below the limit on descriptors in the moment it is made.
    few = Limits(wall_ms=20_000, files=8)
    plain, explained = (asked.run("1 + 1", limits=few, explain=wanted) for wanted in (False, True))
    assert plain.value == explained.value == {"result": 2}
    assert plain.confinement == explained.confinement


def test_a_call_holds_no_listener_and_cannot_load_a_filter(asked: Asked) -> None:
    code = f"""
        import ctypes, os
        held = []
        for fd in range(3, 4096):
            try: os.fstat(fd)
            except OSError: continue
            held.append(fd)
        libc = ctypes.CDLL(None, use_errno=True)
        program = ctypes.create_string_buffer({_ALLOW_ALL!r}, 8)
        class Program(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
        wanted = Program(1, ctypes.addressof(program))
        flags = [libc.syscall({number("seccomp")}, 1, flag, ctypes.byref(wanted)) for flag in
                 (0, 8, 40)]
        by_prctl = libc.prctl(22, 2, ctypes.byref(wanted), 0, 0)
        [held, flags, by_prctl]
    """
    outcome = asked.run(code)
    # Its channel is all it holds.
    assert outcome.value == {"result": [[3], [-1, -1, -1], -1]}
    counted = {one.syscall: one.count for one in outcome.refused}
    assert (counted["seccomp"], counted["prctl"]) == (3, 1)


SENDS = """
    import json, os, socket
    body = json.dumps({"type": "done", "value": {"result": "sent"}}).encode()
    end = socket.socket(fileno=3)
    given = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    socket.send_fds(end, [len(body).to_bytes(4, "little")], given)
    socket.send_fds(end, [body], given)
    end.detach()
    os._exit(0)
"""


def test_no_call_passes_a_descriptor_to_the_supervisor(asked: Asked) -> None:
    # What is sent does arrive, at whoever takes descriptors.
    receives = """
        import os, socket
        one, other = socket.socketpair()
        socket.send_fds(one, [b"x"], [os.open("/dev/null", os.O_RDONLY)])
        os.fstat(socket.recv_fds(other, 1, 1)[1][0]).st_rdev == os.stat("/dev/null").st_rdev
    """
    assert asked.run(receives).value == {"result": True}
    asked.engine.settle()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert asked.run(SENDS).value == {"result": "sent"}
    asked.engine.settle()
    # A cgroup that is still being removed may hold a few.
    assert len(os.listdir("/proc/self/fd")) < before + 20


def test_nothing_is_left_of_listeners(asked: Asked) -> None:
    def listeners() -> int:
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            try:
                found += "seccomp" in os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                continue
        return found

    for _ in range(20):
        asked.counts("import socket\ntry: socket.socket()\nexcept OSError: pass")
    asked.engine.settle()
    assert listeners() == 0
    asked.engine.close()
    assert listeners() == 0


def test_a_zygote_that_explains_is_another_one(asked: Asked) -> None:
    if asked.engine.why_no_forks:
        pytest.skip("no zygote here")

    def address(*, explain: bool) -> Json:
        return asked.run("id(len)", explain=explain).value

    plain, explained = address(explain=False), address(explain=True)
    assert plain != explained
    assert (address(explain=False), address(explain=True)) == (plain, explained)


def test_the_zygotes_own_filter_refuses_the_same_and_asks_nobody() -> None:
    architecture = libseccomp.system_arch()
    plain, asking = (bpf.decode(nesting_filter((), asking=wanted)) for wanted in (False, True))

    def verdict(program: Sequence[bpf.Instruction], number: int, *words: int) -> int:
        words = (*words, *[0] * (6 - len(words)))
        head = number.to_bytes(4, "little") + int(architecture).to_bytes(4, "little") + bytes(8)
        body = b"".join(word.to_bytes(8, "little") for word in words)
        return bpf.execute(program, head + body)

    notify = 0x7FC0_0000
    for nr in range(1024):
        refused = seccomp.refusal_errno(verdict(plain, nr))
        expected = notify if refused is not None else verdict(plain, nr)
        assert verdict(asking, nr) == expected, nr
    load = number("seccomp")
    assert seccomp.refusal_errno(verdict(plain, load, 1, 40)) == errno.ENOSYS
    allowed = [flags for flags in range(64) if verdict(asking, load, 1, flags) == 0x7FFF_0000]
    assert allowed == [40]
    assert verdict(asking, load, 3, 40) == notify


POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**"], limits: {wall: 20s}}
tools:
  python.run: {allow: {}}
  dial: {allow: any, profile: base}
"""


def dial(times: int) -> int:
    """Try to make sockets, and count those made."""
    import socket

    made = 0
    for _ in range(times):
        try:
            socket.socket(socket.AF_INET)
        except OSError:
            continue
        made += 1
    return made


@pytest.mark.parametrize("explain", [True, False])
def test_functions_and_snippets_through_the_whole_path(
    workspace: Path, tmp_path: Path, *, explain: bool
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    with Runtime.from_policy(
        policy, workspace=workspace, environment=environment, explain=explain
    ) as runtime:
        runtime.tool()(dial)
        outcome = runtime.call("dial", times=2)
        assert outcome.value == 0
        found = [(one.syscall, one.count) for one in outcome.refused]
        assert found == ([("socket", 2)] if explain else [])
        with pytest.raises(LimitExceeded) as caught:
            runtime.call("python.run", code="import socket\ntry: socket.socket()\n"
                         "except OSError: pass\n'x' * 3_000_000")  # fmt: skip
        assert caught.value.outcome is not None
        assert len(caught.value.outcome.refused) == explain


def test_the_command_line_tells_it(workspace: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}

    def run(code: str, *options: str) -> tuple[str, Mapping[str, object]]:
        argv = [sys.executable, "-m", "safeconduct", "call", "python.run",
                json.dumps({"code": code}), "-p", str(policy), "-w", str(workspace), "--json",
                *options]  # fmt: skip
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=60)
        found: Mapping[str, object] = json.loads(done.stdout)
        return done.stderr, found

    raises = "import socket\nsocket.socket(socket.AF_INET)"
    told, found = run(raises, "--explain")
    assert "refused once: the system call socket" in told
    assert found["status"] == "failed"
    [refused] = cast("list[dict[str, object]]", found["refused"])
    assert (refused["syscall"], refused["count"]) == ("socket", 1)
    told, found = run(raises)
    assert "refused" not in told
    assert "refused" not in found
    told, _ = run("import ctypes; ctypes.CDLL(None).unshare(0x10000000)", "--explain")
    assert "refused once: the system call unshare" in told
