"""Each barrier of the native sandbox: the attack works without it and fails with it.

The attack prints ESCAPED where it worked. Where two barriers stand in its way, the other one is
opened in both runs, so that the verdict is about one barrier alone.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Limits, Outcome, Tier
from safeconduct.runtime.sandbox.cgroup import Cgroups
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import Program
from safeconduct.runtime.sandbox.plan import Plan
from safeconduct.runtime.sandbox.shield import Shield

if TYPE_CHECKING:
    from tests.conftest import Box, Change

    Weaken = Callable[[Change], Box]

ROOT = os.geteuid() == 0


def escaped(outcome: Outcome) -> bool:
    return b"ESCAPED" in outcome.stdout


def without(*layers: str) -> Change:
    def change(request: Plan) -> Plan:
        kept = [name for name in request.layers if name not in layers]
        rules = request.landlock
        if "namespaces" in layers:
            # Rules name paths of the sandbox's own root; on the host some of them are links.
            rules = [{**rule, "path": os.path.realpath(str(rule["path"]))} for rule in rules]
            rules = [rule for rule in rules if os.path.exists(str(rule["path"]))]
        return replace(request, layers=kept, landlock=rules)

    return change


def mounted(*mounts: Mapping[str, object]) -> Change:
    return lambda request: replace(request, mounts=[*request.mounts, *mounts])


def granted(path: object) -> Change:
    rule = {"path": str(path), "access": "write"}
    return lambda request: replace(request, landlock=[*request.landlock, rule])


def both(first: Change, second: Change) -> Change:
    return lambda request: second(first(request))


def only(box: Box, tier: Tier) -> None:
    if box.tier is not tier:
        pytest.skip(f"is about tier {tier}")


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process outside, of a user that a test may share."""
    process = subprocess.Popen(["sleep", "60"], user=4242 if ROOT else None)
    yield process
    process.kill()
    process.wait()


def test_namespaces_hide_other_processes(
    box: Box, weaken: Weaken, victim: subprocess.Popen[bytes]
) -> None:
    only(box, Tier.FULL)
    attack = f"""
try: print("ESCAPED" if b"sleep" in open("/proc/{victim.pid}/cmdline", "rb").read() else "")
except OSError as error: print(error)
"""
    assert escaped(weaken(without("namespaces")).python(attack))
    assert not escaped(box.python(attack))


def test_namespaces_hide_that_a_file_exists(box: Box, weaken: Weaken, outside: Path) -> None:
    only(box, Tier.FULL)
    attack = f"import os; os.path.exists({str(outside / 'secret')!r}) and print('ESCAPED')"
    assert escaped(weaken(without("namespaces")).python(attack))
    assert not escaped(box.python(attack))


def test_network_namespace_hides_the_hosts_loopback(box: Box, weaken: Weaken) -> None:
    only(box, Tier.FULL)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: [server.accept()[0].close()], daemon=True).start()
        port = server.getsockname()[1]
        attack = f"""
import socket
try: socket.create_connection(("127.0.0.1", {port}), 2); print("ESCAPED")
except OSError as error: print(error)
"""
        # Landlock and seccomp refuse it too; with both opened, only the namespace is left.
        assert not escaped(weaken(without("seccomp", "landlock")).python(attack))
        done = subprocess.run(["python3", "-c", attack], capture_output=True, timeout=10)
        assert b"ESCAPED" in done.stdout


def test_landlock_holds_where_a_mount_shows_too_much(
    box: Box, weaken: Weaken, outside: Path
) -> None:
    only(box, Tier.FULL)
    folder = {"kind": "bind", "source": str(outside), "target": str(outside)}
    attack = ("sh", "-c", f"grep -q SECRET {outside}/secret && echo ESCAPED")
    slip = mounted(folder)
    assert escaped(weaken(both(slip, without("landlock"))).run(*attack))
    assert not escaped(weaken(slip).run(*attack))


def test_landlock_alone_holds_files(box: Box, weaken: Weaken, outside: Path) -> None:
    only(box, Tier.LANDLOCK)
    attack = ("sh", "-c", f"grep -q SECRET {outside}/secret && echo ESCAPED")
    assert escaped(weaken(granted("/")).run(*attack))
    assert not escaped(box.run(*attack))


def test_landlock_scopes_signals(box: Box, weaken: Weaken, victim: subprocess.Popen[bytes]) -> None:
    only(box, Tier.LANDLOCK)
    attack = f"""
import os
try: os.kill({victim.pid}, 0); print("ESCAPED")
except OSError as error: print(error)
"""
    uid = 4242 if ROOT else os.geteuid()
    done = subprocess.run(
        ["python3", "-c", attack], capture_output=True, user=uid if ROOT else None
    )
    assert b"ESCAPED" in done.stdout
    inside: Change = lambda r: replace(r, identity={**r.identity, "uid": uid, "gid": uid})  # noqa: E731
    assert not escaped(weaken(inside if ROOT else without()).python(attack))


NAMESPACE = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print("ESCAPED" if libc.unshare(0x10000000) == 0 else ctypes.get_errno())
"""
SOCKET = """
import socket
try: socket.socket(socket.AF_UNIX); print("ESCAPED")
except OSError as error: print(error)
"""
MEMORY_EXEC = """
import os
fd = os.memfd_create("x", 0)
os.write(fd, open("/bin/true", "rb").read())
pid = os.fork()
if pid == 0: os.execve(fd, ["true"], {})
print("ESCAPED" if os.waitpid(pid, 0)[1] == 0 else "")
"""
DATAGRAM = """
import socket
one, _ = socket.socketpair(socket.AF_UNIX, socket.%s)
one.sendto(b"x", %r)
print("ESCAPED")
"""
LEASE = """
import fcntl
fcntl.fcntl(open("leased", "w"), 1024, fcntl.F_WRLCK)
print("ESCAPED")
"""
BY_SECCOMP = {"user-namespace": NAMESPACE, "socket": SOCKET, "memfd-exec": MEMORY_EXEC,
              "lease": LEASE}  # fmt: skip


@pytest.mark.parametrize("attack", BY_SECCOMP.values(), ids=BY_SECCOMP.keys())
def test_seccomp_refuses(box: Box, weaken: Weaken, attack: str) -> None:
    if attack is NAMESPACE and not escaped(weaken(without("seccomp")).python(attack)):
        pytest.skip("this machine refuses user namespaces to everybody: there is nothing to refuse")
    assert escaped(weaken(without("seccomp")).python(attack))
    assert not escaped(box.python(attack))


@pytest.mark.parametrize("kind", ["SOCK_DGRAM", "SOCK_RAW"])
def test_seccomp_refuses_datagram_pairs_that_reach_any_socket(
    box: Box, weaken: Weaken, kind: str
) -> None:
    # unix(7): a connected datagram socket still sends to another address, so a pair replaces the
    # refused socket(2). A workspace often holds sockets; in tier landlock all of the host's do.
    place = box.workspace / "service.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.bind(str(place))
        place.chmod(0o777)
        service.setblocking(False)
        attack = DATAGRAM % (kind, str(place))
        assert escaped(weaken(without("seccomp")).python(attack))
        assert service.recv(10) == b"x"
        assert not escaped(box.python(attack))
        with pytest.raises(BlockingIOError):
            service.recv(10)


def test_seccomp_keeps_set_id_bits_off_the_hosts_disk(box: Box, weaken: Weaken) -> None:
    if not ROOT:
        pytest.skip("needs root: only then is the workspace id-mapped to another user")
    only(box, Tier.FULL)
    file = box.workspace / "tool"
    attack = "import os; os.close(os.open('tool', 65)); os.chmod('tool', 0o4755)"
    weaken(without("seccomp")).python(attack)
    assert file.stat().st_mode & 0o4000
    assert file.stat().st_uid == box.workspace.stat().st_uid
    file.unlink()
    box.python(attack)
    assert not file.stat().st_mode & 0o6000


def test_priority_of_the_users_other_processes(
    box: Box, weaken: Weaken, victim: subprocess.Popen[bytes]
) -> None:
    only(box, Tier.LANDLOCK)
    attack = "import os; os.setpriority(os.PRIO_USER, 0, os.getpriority(os.PRIO_PROCESS, 0) + 1)"
    uid = 4242 if ROOT else os.geteuid()
    inside: Change = lambda r: replace(r, identity={**r.identity, "uid": uid, "gid": uid})  # noqa: E731
    same_user = inside if ROOT else without()
    before = os.getpriority(os.PRIO_PROCESS, victim.pid)
    weaken(same_user).python(attack)
    assert os.getpriority(os.PRIO_PROCESS, victim.pid) == before
    if ROOT:  # as an ordinary user it would slow down the test run itself
        weaken(both(same_user, without("seccomp"))).python(attack)
        assert os.getpriority(os.PRIO_PROCESS, victim.pid) == before + 1


def test_capabilities_leave_init_too(box: Box, weaken: Weaken) -> None:
    # execve(2) by another user than 0 takes the program's anyway; what is left to take are those
    # of the sandbox's own init and the bounding set.
    only(box, Tier.FULL)
    attack = """
fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("ESCAPED" if int(fields["CapEff"], 16) | int(fields["CapBnd"], 16) else "none")
"""
    assert escaped(weaken(without("capabilities")).python(attack))
    assert b"none" in box.python(attack).stdout


CORE = "import os; os.chdir(os.environ['HOME']); os.fork() or os.abort(); os.wait(); "
RLIMITS = {
    "fsize": "open('big', 'wb').truncate(9 << 20); print('ESCAPED')",
    "nofile": "import os; [os.dup(0) for _ in range(60)]; print('ESCAPED')",
    "memlock": "import ctypes; n = 1 << 20; b = ctypes.create_string_buffer(n); "
    "print('ESCAPED' if ctypes.CDLL(None).mlock(b, n) == 0 else '')",
    "sigpending": "import ctypes, os, signal; signal.pthread_sigmask(0, [40]); "
    "send = ctypes.CDLL(None).sigqueue; "
    "print('ESCAPED' if sum(send(os.getpid(), 40, 0) == 0 for _ in range(400)) == 400 else '')",
    "core": CORE + "print('ESCAPED' if [n for n in os.listdir('.') if 'core' in n] else '')",
    "cpu": "import time\nwhile time.process_time() < 1.5: pass\nprint('ESCAPED')",
    "data": "bytearray(300 << 20); print('ESCAPED')",
    "nproc": "import os\nfor _ in range(40):\n  if os.fork() == 0: os.read(0, 1); os._exit(0)\n"
    "print('ESCAPED')",
}
TIGHT = Limits(wall_ms=8000, cpu_ms=1000, files=32, disk_bytes=8 << 20, memory_bytes=128 << 20,
               pids=16)  # fmt: skip


@pytest.mark.parametrize("name", RLIMITS)
def test_each_rlimit(box: Box, weaken: Weaken, launcher: Launcher, name: str) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    if name == "core" and not pattern.startswith("core"):
        pytest.skip("needs core dumps that land in the working folder")

    # Only where no cgroup holds memory and processes do rlimits have to.
    def kept(request: Plan) -> Plan:
        others = [bound for bound in request.rlimits if bound["name"] != name]
        # Where it is soft zero anyway, taking our bound away is not enough: raise it.
        return replace(
            request,
            rlimits=[*others, *([{"name": "core", "value": 1 << 30}] if name == "core" else [])],
        )

    raised: Change = without()
    open_box, closed = (weaken(change) for change in (kept, raised))
    if name in ("cpu", "data", "nproc"):  # which a cgroup and its account hold too
        open_box.sandbox._cgroups = closed.sandbox._cgroups = None  # pyright: ignore[reportPrivateUsage]
    if name in ("nproc", "sigpending", "memlock") and not ROOT:
        pytest.skip("counted per user: as an ordinary user other processes take part")
    assert escaped(open_box.python(RLIMITS[name], limits=TIGHT))
    assert not escaped(closed.python(RLIMITS[name], limits=TIGHT))


@pytest.mark.parametrize("name", ["data", "nproc"])
def test_each_controller(box: Box, weaken: Weaken, cgroups: Cgroups | None, name: str) -> None:
    if cgroups is None:
        pytest.skip("needs cgroups")
    attack = RLIMITS[name]
    assert escaped(weaken(lambda r: replace(r, cgroups=())).python(attack, limits=TIGHT))
    assert not escaped(box.python(attack, limits=TIGHT))


def test_environment_is_the_sandboxs_own(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTSIDE_TOKEN", "x")
    attack = """
import os
found = "OUTSIDE_TOKEN" in os.environ
for name in ("1", "self", str(os.getppid())):
    try: found |= b"OUTSIDE_TOKEN" in open(f"/proc/{name}/environ", "rb").read()
    except OSError: pass
print("ESCAPED" if found else "")
"""
    program = Program(
        argv=["python3", "-c", attack],
        cwd=str(box.workspace),
        environment={"OUTSIDE_TOKEN": "x"},
    )
    workspace = str(box.workspace)
    leaking = box.sandbox.run("c", program, box.profile(), workspace=workspace, shield=Shield())
    assert escaped(leaking)
    assert not escaped(box.python(attack))


def test_descriptors_are_closed(box: Box, outside: Path) -> None:
    attack = """
import os
for fd in range(3, 256):
    try: b"SECRET" in os.pread(fd, 10, 0) and print("ESCAPED")
    except OSError: pass
"""
    with (outside / "secret").open("rb") as secret:
        os.set_inheritable(secret.fileno(), True)
        done = subprocess.run(["python3", "-c", attack], capture_output=True, close_fds=False)
        assert b"ESCAPED" in done.stdout
        assert not escaped(box.python(attack))


def test_proc_is_masked(box: Box, weaken: Weaken) -> None:
    only(box, Tier.FULL)
    attack = "open('/proc/sys/kernel/ostype').read() and print('ESCAPED')"

    def unmasked(request: Plan) -> Plan:
        keep = [m for m in request.mounts if not str(m["target"]).startswith("/proc/")]
        return replace(request, mounts=keep)

    assert escaped(weaken(unmasked).python(attack))
    assert not escaped(box.python(attack))
