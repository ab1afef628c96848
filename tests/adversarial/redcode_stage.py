"""A throw-away machine for RedCode cases: its own root, processes and loopback.

`unshare` starts this file as process 1 of new mount, pid, network, uts and ipc namespaces. The root
becomes an overlay whose changes lie in memory, so that an attack may really delete `/etc/shadow` or
kill `sshd`, and the sandbox under test finds the same prey. For every case the stage lays out what
the oracle names, runs it (unconfined, or by the driver), and judges the oracle.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

from redcode_prey import Sinks, lay_out, oracle_of, parts_of, ports_of

Play: TypeAlias = Callable[[list[str], Callable[[], bool]], str]

DEVICES = ("null", "zero", "full", "random", "urandom")
LOOK_ALIKE = "1mocat.github.io"
PROGRAMS = {"bash": ("/bin/bash", "case.sh"), "python": ("/usr/bin/python3", "case.py")}
# LIMIT: seconds an unconfined attack may take, and how often its oracle is looked at meanwhile.
ATTACK_SECONDS, GLANCE_SECONDS = 60.0, 0.05
# LIMIT: seconds until a killed process is gone, or a datagram that was sent has come.
SETTLE_SECONDS = 0.03
PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the test asks for: ``driver`` None means unconfined."""

    cases: Sequence[Mapping[str, object]]
    shown: Sequence[str]
    workspace: str
    driver: Sequence[str] | None
    user: int | None


def enter_root(order: Order) -> None:
    """Make the root an overlay in memory and leave the host's behind."""
    run("mount", "--make-rprivate", "/")
    stage = "/mnt"
    run("mount", "-t", "tmpfs", "-o", "mode=0755", "stage", stage)
    upper, work, root = f"{stage}/upper", f"{stage}/work", f"{stage}/root"
    for folder in (upper, work, root):
        os.mkdir(folder, 0o755)
    layers = f"lowerdir=/,upperdir={upper},workdir={work}"
    run("mount", "-t", "overlay", "-o", layers, "overlay", root)
    for folder in ("proc", "sys", "dev", "tmp"):
        os.makedirs(root + "/" + folder, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmp", root + "/tmp")
    run("mount", "-t", "tmpfs", "-o", "mode=0755", "dev", root + "/dev")
    os.mkdir(root + "/dev/shm", 0o1777)
    for name in DEVICES:
        bind(f"/dev/{name}", root, folder=False)
    for name, to in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{to}", f"{root}/dev/{name}")
    run("mount", "-t", "proc", "proc", root + "/proc")
    run("mount", "-t", "sysfs", "sysfs", root + "/sys")
    for path in order.shown:
        bind(path, root, folder=True)
    bind(order.workspace, root, folder=True, write=True)
    os.mkdir(root + "/old")
    run("pivot_root", root, root + "/old")
    os.chdir("/")
    run("umount", "-l", "/old")
    os.rmdir("/old")


def bind(path: str, root: str, *, folder: bool, write: bool = False) -> None:
    """Show one path of the host at the same place, and let every user walk to it."""
    target = root + path
    if folder:
        os.makedirs(target, exist_ok=True)
    else:
        Path(target).touch()
    run("mount", "--rbind", path, target)
    if folder and not write:
        run("mount", "-o", "remount,bind,ro", target)
    for parent in Path(path).parents:
        place = root + str(parent)
        if folder and not os.stat(place).st_mode & 0o001:
            os.chmod(place, os.stat(place).st_mode | 0o055)  # noqa: S103 - on this machine only


def run(*argv: str) -> None:
    """Run a program of the stage itself."""
    subprocess.run(argv, check=True, capture_output=True, timeout=20)


def prepare_network() -> None:
    """Bring the loopback up and let the corpus's host name lead to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        # netdevice(7): SIOCSIFFLAGS with IFF_UP.
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 1))
    with open("/etc/hosts", "w") as hosts:
        hosts.write(f"127.0.0.1 localhost {LOOK_ALIKE}\n")


def unconfined(argv: list[str], holds: Callable[[], bool]) -> str:
    """Run a case as root of the stage until it ends or has what it wanted."""
    environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}
    with open("/tmp/output", "wb+") as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
            cwd="/tmp", start_new_session=True,
        )  # fmt: skip
        for _ in range(int(ATTACK_SECONDS / GLANCE_SECONDS)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GLANCE_SECONDS)
                break
            if holds():
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        return output.read(1 << 20).decode(errors="replace")


@contextmanager
def confined(order: Order) -> Generator[Play]:
    """Start the driver, as the user the test asks for, and yield the way to have it run a case."""
    assert order.driver is not None
    home = "/tmp/driver"
    environment = {**os.environ, "HOME": home, "XDG_STATE_HOME": home, "XDG_CONFIG_HOME": home}
    os.mkdir(home, 0o700)
    if order.user is not None:
        os.chown(home, order.user, order.user)
    with subprocess.Popen(
        order.driver, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        user=order.user, group=order.user, extra_groups=[] if order.user is not None else None,
        cwd=order.workspace,
    ) as driver:  # fmt: skip
        assert driver.stdin is not None
        assert driver.stdout is not None
        asking, answering = driver.stdin, driver.stdout
        ready = answering.readline()
        assert "ready" in ready, f"the driver did not start: {ready}"

        def play(argv: list[str], _: Callable[[], bool]) -> str:
            asking.write(json.dumps(argv) + "\n")
            asking.flush()
            answer = cast("dict[str, str]", json.loads(answering.readline()))
            ends.append(answer["end"])
            return answer["output"]

        yield play
        asking.close()
        driver.wait(30)


ends: list[str] = []


def perform(order: Order, play: Play, sinks: Sinks) -> Iterator[Mapping[str, object]]:
    """Run every case and say whether its oracle held."""
    for case in order.cases:
        program, name = PROGRAMS[str(case["language"])]
        for entry in os.scandir(order.workspace):
            (shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.unlink)(entry.path)
        script = Path(order.workspace, name)
        script.write_text(str(case["code"]))
        script.chmod(0o755)
        sinks.empty()
        with contextlib.ExitStack() as stack:
            parts = parts_of(oracle_of(case))
            holds = either([stack.enter_context(lay_out(part, sinks)) for part in parts])
            output = play([program, str(script)], partial(holds, ""))
            held = settle(holds, output)
        end = ends[-1] if ends else ""
        yield {"id": case["id"], "held": held, "end": end, "output": output[-2000:]}


def either(questions: Sequence[Callable[[str], bool]]) -> Callable[[str], bool]:
    """Ask whether one of several oracles holds."""
    return lambda output: any(ask(output) for ask in questions)


def settle(holds: Callable[[str], bool], output: str) -> bool:
    """Ask until the answer is yes or what was under way has had its time."""
    pause = threading.Event()
    for _ in range(int(SETTLE_SECONDS / 0.01)):
        if holds(output):
            return True
        pause.wait(0.01)
    return False


def main(order_file: str, report: str) -> None:
    """Set up the machine, play every case, write the report."""
    order = Order(**json.loads(Path(order_file).read_text()))
    out = open(report, "w")  # noqa: SIM115 - opened on the host's side of the new root
    enter_root(order)
    prepare_network()
    sinks = Sinks()
    sinks.open(*ports_of(order.cases))
    with out, contextlib.ExitStack() as stack:
        play = unconfined if order.driver is None else stack.enter_context(confined(order))
        for line in perform(order, play, sinks):
            out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
