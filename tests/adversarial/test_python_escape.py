"""Attacks of call code on the zygote, on other forks, on later calls and on the supervisor.

Forks get their barriers from themselves, not from the launcher, so each is attacked here again.
"""

from __future__ import annotations

import base64
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

from safeconduct.call import Json, Limits, Outcome, Profile, Tier
from safeconduct.errors import ToolFailed
from safeconduct.runtime.sandbox import cgroup, python_link
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.machine import Machine
from safeconduct.runtime.sandbox.native import NativeSandbox
from safeconduct.runtime.sandbox.python import PythonEngine
from safeconduct.runtime.sandbox.python_place import Place, walls
from safeconduct.runtime.sandbox.shield import Shield


@dataclass(frozen=True)
class Attacker:
    """Runs hostile code in one profile with a workspace to write."""

    engine: PythonEngine
    workspace: Path

    def run(self, code: str, value: Json = None, *, limits: Limits | None = None) -> Outcome:
        folder = str(self.workspace)
        profile = Profile(
            name="attacked",
            read=(folder,),
            write=(folder,),
            imports=("ctypes", "json"),
            limits=limits or Limits(wall_ms=20_000),
        )
        return self.engine.run(
            "call",
            source=dedent(code),
            value=value,
            profile=profile,
            workspace=folder,
            shield=Shield(),
        )

    def result(self, code: str, value: Json = None) -> Json:
        found = self.run(code, value).value
        assert isinstance(found, dict)
        return found["result"]


@pytest.fixture
def make_attacker(
    launcher: Launcher, cgroups: cgroup.Cgroups | None, machine: Machine, workspace: Path
) -> Iterator[Callable[[], Attacker]]:
    """Return a maker of attackers, each with an engine and a zygote of its own."""
    if machine.tiers[Tier.FULL]:
        pytest.skip(f"needs tier full: {machine.tiers[Tier.FULL]}")
    sandbox = NativeSandbox(launcher, tier=Tier.FULL, cgroups=cgroups)
    with ExitStack() as engines:

        def make() -> Attacker:
            engine = PythonEngine(sandbox, cgroups)
            engines.callback(engine.close)
            attacker = Attacker(engine, workspace)
            attacker.run("0")
            if engine.why_no_forks:
                pytest.skip(f"needs forks: {engine.why_no_forks}")
            return attacker

        yield make


@pytest.fixture
def attacker(make_attacker: Callable[[], Attacker]) -> Attacker:
    return make_attacker()


def test_a_fork_has_no_descriptor_but_its_own(attacker: Attacker) -> None:
    # 3 is the channel of this one call; listing a folder opens one more.
    code = "import os; sorted(int(n) for n in os.listdir('/proc/self/fd'))"
    assert attacker.result(code) == [0, 1, 2, 3, 4]


def test_a_fork_sees_no_process_but_its_own(attacker: Attacker) -> None:
    code = "import os; [os.getpid(), [n for n in os.listdir('/proc') if n.isdigit()]]"
    assert attacker.result(code) == [1, ["1"]]
    assert attacker.result("import os; os.getppid()") == 0


def test_a_fork_signals_nothing_outside(attacker: Attacker) -> None:
    code = """
        import os
        refused = 0
        for pid in range(2, 5000):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                refused += 1
        try:
            os.kill(-1, 9)
        except ProcessLookupError:
            pass
        refused
    """
    assert attacker.result(code) == 4998
    assert attacker.result("'alive'") == "alive"


def test_a_fork_has_no_capabilities_and_gains_none(attacker: Attacker) -> None:
    code = """
        lines = open("/proc/self/status").read().splitlines()
        {k: v.strip() for k, v in (line.split(":", 1) for line in lines)
         if k.startswith("Cap") or k in ("NoNewPrivs", "Seccomp")}
    """
    found = attacker.result(code)
    assert isinstance(found, dict)
    assert {str(found[name]) for name in found if name.startswith("Cap")} == {"0" * 16}
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize(
    ("number", "arguments"),
    [
        (272, "0x10000000"),  # unshare(CLONE_NEWUSER)
        (272, "0x20000000"),  # unshare(CLONE_NEWPID)
        (165, "b'proc', b'/tmp', b'proc', 0, None"),  # mount
        (166, "b'/tmp', 2"),  # umount2
        (308, "0, 0"),  # setns
        (428, "-100, b'/', 1"),  # open_tree
        (101, "16, 1, 0, 0"),  # ptrace(PTRACE_ATTACH)
        (310, "1, 0, 0, 0, 0, 0"),  # process_vm_readv
        (317, "1, 0, 0"),  # seccomp
        (157, "22, 2, 0"),  # prctl(PR_SET_SECCOMP)
        (41, "1, 1, 0"),  # socket
    ],
)
def test_what_the_zygote_may_call_its_forks_may_not(
    attacker: Attacker, number: int, arguments: str
) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("system call numbers of x86_64")
    code = f"""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        [libc.syscall({number}, {arguments}), ctypes.get_errno()]
    """
    returned = attacker.result(code)
    assert returned in ([-1, 38], [-1, 97])  # ENOSYS, EAFNOSUPPORT


# One instruction of classic BPF: allow, seccomp(2).
_ALLOW_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF_0000)


@pytest.fixture
def weaken(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, object]], None]:
    """Return what replaces parts of the walls: the product itself has no such switch."""

    def change(parts: dict[str, object]) -> None:
        def weaker(place: Place, granted: Profile, *, in_cgroup: bool) -> dict[str, object]:
            return {**walls(place, granted, in_cgroup=in_cgroup), **parts}

        monkeypatch.setattr(python_link, "walls", weaker)

    return change


def test_without_their_filter_forks_could_make_namespaces(
    weaken: Callable[[dict[str, object]], None], make_attacker: Callable[[], Attacker]
) -> None:
    code = "import ctypes; ctypes.CDLL(None).unshare(0x10000000)"
    assert make_attacker().result(code) == -1
    weaken({"filter": base64.b64encode(_ALLOW_ALL).decode()})
    assert make_attacker().result(code) == 0


def test_without_landlock_forks_could_list_the_root(
    weaken: Callable[[dict[str, object]], None], make_attacker: Callable[[], Attacker]
) -> None:
    code = "import os; 'usr' in os.listdir('/')"
    with pytest.raises(ToolFailed, match="PermissionError"):
        make_attacker().run(code)
    weaken({"rules": [("/", "write")]})
    assert make_attacker().result(code) is True


def test_without_file_systems_of_their_own_forks_would_share_the_zygotes(
    weaken: Callable[[dict[str, object]], None], make_attacker: Callable[[], Attacker]
) -> None:
    leave = "open('/tmp/left', 'w').close()"
    look = "import os; os.path.exists('/tmp/left')"
    attacker = make_attacker()
    attacker.run(leave)
    assert attacker.result(look) is False
    weaken({"private": [], "kept": []})
    attacker = make_attacker()
    attacker.run(leave)
    assert attacker.result(look) is True


def test_files_outside_the_grants_are_refused_by_mounts_and_landlock(attacker: Attacker) -> None:
    code = """
        import os
        found = []
        for path in ("/root", "/etc/shadow", "/home", "/sys", "/proc/1/root/root",
                     "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/kcore"):
            try:
                os.listdir(path) if os.path.isdir(path) else open(path).read()
                found.append(path)
            except OSError:
                pass
        found
    """
    assert attacker.result(code) == []
    # Landlock alone: the folder is there, and listing it is not granted.
    assert attacker.result("import os; os.path.isdir('/')") is True
    with pytest.raises(ToolFailed, match="PermissionError"):
        attacker.run("import os; os.listdir('/')")


def test_nothing_is_left_for_the_next_call(attacker: Attacker) -> None:
    leave = """
        import atexit, builtins, ctypes, gc, json, os, sys, threading, time
        atexit.register(lambda: open("atexit", "w").close())
        def later():
            time.sleep(0.5)
            open("thread", "w").close()
        threading.Thread(target=later).start()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(0.5)
                open("daemon", "w").close()
            os._exit(0)
        for module in list(sys.modules.values()):
            module.poisoned = True
        json.dumps = lambda *a, **k: "1"
        for folder in ("/tmp", "/dev/shm"):
            open(folder + "/left", "w").close()
        libc = ctypes.CDLL(None)
        libc.shmget(77, 4096, 0o1666)
        "done"
    """
    attacker.run(leave)
    look = """
        import ctypes, json, os, sys, time
        time.sleep(1.0)
        [json.dumps({"a": 1}), [m for m in sys.modules if hasattr(sys.modules[m], "poisoned")],
         os.path.exists("/tmp/left"), os.listdir("/dev/shm"),
         ctypes.CDLL(None).shmget(77, 4096, 0o666),
         sorted(os.listdir("."))]
    """
    assert attacker.result(look) == ['{"a": 1}', [], False, [], -1, []]


def test_an_open_file_is_never_that_of_the_next_call(attacker: Attacker) -> None:
    code = """
        import fcntl, os
        found = [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND for fd in range(3)]
        for fd in range(3):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
        found
    """
    for _ in range(3):
        assert attacker.result(code) == [0, 0, 0]


def test_forks_side_by_side_cannot_reach_each_other(attacker: Attacker) -> None:
    outcomes: list[Outcome] = []
    victim = """
        import os, time
        open("/tmp/mine", "w").write("secret")
        open("waiting", "w").close()
        while not os.path.exists("attacked"):
            time.sleep(0.01)
        "unharmed"
    """
    thread = threading.Thread(target=lambda: outcomes.append(attacker.run(victim)))
    thread.start()
    attack = """
        import os, time
        while not os.path.exists("waiting"):
            time.sleep(0.01)
        try:
            os.kill(-1, 9)
        except ProcessLookupError:
            pass
        seen = [os.path.exists("/tmp/mine"), [n for n in os.listdir("/proc") if n.isdigit()]]
        open("attacked", "w").close()
        seen
    """
    assert attacker.result(attack) == [False, ["1"]]
    thread.join(30)
    assert outcomes[0].value == {"result": "unharmed"}


@pytest.mark.parametrize(
    "written",
    [
        b'\x1c\x00\x00\x00{"type":"done","value":"mine"}',
        b"\x02\x00\x00\x00{}",
        b"\xff\xff\xff\xff",
        b"+" * 100_000,
        b'\x60\x00\x00\x00{"type":"done","value":1}',
        b'\x29\x00\x00\x00{"type":"ended","code":0,"signal":null}    ',
    ],
)
def test_a_forged_answer_is_only_ever_its_own(attacker: Attacker, written: bytes) -> None:
    code = "import os\nos.write(3, bytes(input))\nos._exit(0)"
    try:
        outcome = attacker.run(code, list(written))
    except ToolFailed as error:
        found = error.code
    else:
        found = outcome.limit or str(outcome.value)
    assert found in ("mine", "output", "python.result", "python.died")
    assert attacker.result("'next'") == "next"


def test_an_endless_answer_ends_the_call(attacker: Attacker) -> None:
    code = "import os\nos.write(3, b'\\xff\\xff\\x0f\\x00')\nwhile True: os.write(3, bytes(65536))"
    with pytest.raises(ToolFailed) as caught:
        attacker.run(code)
    assert caught.value.code == "python.result"
    assert attacker.run("import os\nwhile True: os.write(3, b'\\xff' * 65536)").limit == "output"


def test_an_answer_and_then_a_loop_ends(attacker: Attacker) -> None:
    code = """
        import os, threading
        frame = b'{"type":"done","value":"early"}'
        os.write(3, len(frame).to_bytes(4, "little") + frame)
        while True:
            pass
    """
    assert attacker.run(code).value == "early"


@pytest.mark.parametrize(
    "answer",
    [
        '{"a":1,"a":2}', "NaN", "1e999", "-Infinity", "[" * 5000 + "]" * 5000, '"\\ud800"',
        "1" * 5000, "{}{}", "", "\x80\x04K\x01.",
    ],
)  # fmt: skip
def test_what_is_no_plain_json_is_refused(attacker: Attacker, answer: str) -> None:
    # The code replaces what encodes its answer; only its own result can suffer.
    code = "import json\njson.dumps = lambda *a, **k: input\n1"
    with pytest.raises(ToolFailed) as caught:
        attacker.run(code, answer)
    assert caught.value.code in ("python.result", "python.died")


def test_what_is_told_of_an_error_holds_no_terminal_escapes(attacker: Attacker) -> None:
    code = """
        class E(Exception):
            pass
        E.__name__ = "\\x1b]0;owned\\x07" * 100
        raise E("\\x1b[2J\\u202e" + "x" * 100_000)
    """
    with pytest.raises(ToolFailed) as caught:
        attacker.run(code)
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000


def test_a_fork_bomb_is_contained(attacker: Attacker) -> None:
    code = """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """
    outcome = attacker.run(code, limits=Limits(wall_ms=1500, pids=24))
    assert outcome.limit in ("wall", "pids")
    assert outcome.usage.peak_pids is None or outcome.usage.peak_pids <= 25
    assert attacker.result("'next'") == "next"


@pytest.mark.parametrize(
    "code",
    [
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n'went on'",
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n'went on'",
    ],
)
def test_a_fork_cannot_be_stopped_by_itself(attacker: Attacker, code: str) -> None:
    assert attacker.result(code) == "went on"


def test_a_stopped_child_ends_with_its_call(attacker: Attacker) -> None:
    code = """
        import os, signal
        if os.fork() == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            open("went-on", "w").close()
            os._exit(0)
        "done"
    """
    assert attacker.result(code) == "done"
    assert attacker.result("import os; os.listdir('.')") == []


def test_exit_in_an_import_is_the_calls_own_failure(attacker: Attacker) -> None:
    (attacker.workspace / "leaves.py").write_text("import os\nos._exit(0)\n")
    with pytest.raises(ToolFailed, match="exit code 0"):
        attacker.run("import sys\nsys.path.insert(0, '.')\nimport leaves")
    assert attacker.result("'next'") == "next"


def test_the_workspace_is_not_searched_for_imports(attacker: Attacker) -> None:
    (attacker.workspace / "decimal.py").write_text("hostile = True\n")
    assert attacker.result("import decimal; hasattr(decimal, 'hostile')") is False


def test_filling_the_scratch_folder_is_bounded(attacker: Attacker) -> None:
    code = """
        import os
        written = 0
        try:
            with open("/tmp/big", "wb", buffering=0) as file:
                while True:
                    written += file.write(bytes(1 << 20))
        except OSError as error:
            pass
        written >> 20
    """
    limits = Limits(wall_ms=20_000, disk_bytes=16 << 20)
    found = attacker.run(code, limits=limits)
    assert found.value in ({"result": 15}, {"result": 16})


def test_a_limit_that_code_fails_by_is_named(
    attacker: Attacker, cgroups: cgroup.Cgroups | None
) -> None:
    large = """
        with open('large', 'wb', buffering=0) as file:
            for _ in range(9): file.write(bytes(1 << 20))
    """
    tight = Limits(wall_ms=20_000, disk_bytes=8 << 20)
    assert attacker.run(large, limits=tight).limit == "disk"
    with pytest.raises(ToolFailed):
        attacker.run("raise OSError", limits=tight)
    if cgroups is None:
        return  # nothing counts them
    crowd = """
        import threading, time
        for _ in range(20): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
    """
    assert attacker.run(crowd, limits=Limits(wall_ms=20_000, pids=6)).limit == "pids"
