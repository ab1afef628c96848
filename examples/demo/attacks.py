"""(b) The attacks: what a hijacked agent would try, and how to tell from outside if it worked.

Each attack first runs without a sandbox, where it must succeed (else its failure inside would
prove nothing), then against the policy, then inside the sandbox. What the attacking program says
is only shown; whether it is contained is looked up on the host.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from stage import PREFIX, Stage

from safeconduct import Denied, LimitExceeded, Outcome, Runtime

_CONTROL_SECONDS = 20
_CENSUS_SECONDS = 0.02
# A limit that holds by process counts all tasks of the user, and leaves them room to grow.
_SHARED_TASKS = 512
_WHY = {"policy.no_rule": "no rule grants it", "path.protected": "no policy can grant it"}
_TRY = """import errno, os, socket, sys
try:
    {}
except OSError as error:
    sys.exit(errno.errorcode.get(error.errno, str(error.errno)))"""
_READ = _TRY.format("print(open(sys.argv[1]).read())")
_CONNECT = _TRY.format("socket.socket().connect(('127.0.0.1', int(sys.argv[1])))")
_PLANT = _TRY.format("open(sys.argv[1], 'w').write('planted')")
_APPEND = _TRY.format("open(sys.argv[1], 'a').write('# the agent was here')")
# Every process forks for ever; each says once why it can fork no more.
_BOMB = """import errno, os, time
told = False
while True:
    try:
        os.fork()
    except OSError as error:
        if not told:
            os.write(2, errno.errorcode[error.errno].encode() + b"\\n")
        told = True
        time.sleep(0.01)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One attack. ``tool`` and ``arguments`` are its honest form, ``argv`` its program.

    ``happened`` looks from outside whether it worked and undoes it; empty text is no. Without
    ``control`` it is too dangerous to try without a sandbox. ``seen`` is what the host saw.
    """

    name: str
    tool: str
    arguments: Mapping[str, str]
    argv: list[str]
    happened: Callable[[bytes], str]
    control: bool = True
    seen: Callable[[], str] = lambda: ""

    def works_unconfined(self, folder: Path) -> bool:
        """Run the program without any sandbox and tell whether it does what it is meant to."""
        ran = subprocess.run(
            self.argv, cwd=folder, capture_output=True, timeout=_CONTROL_SECONDS, check=False
        )
        return bool(self.happened(ran.stdout + ran.stderr))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How an attack ended inside: ``held`` names the barrier, ``broken`` what got through."""

    held: str
    broken: str


@contextmanager
def prepare(stage: Stage, runtime: Runtime, policy: Path) -> Generator[list[Attack]]:
    """Yield the attacks; until the end a loopback server listens for one of them.

    ``policy`` is the policy in force, which one of them edits.
    """
    python = [stage.python.path, "-c"]
    key, planted = stage.home / ".ssh" / "id_ed25519", stage.home / "planted"
    marker, before = stage.root.name, policy.read_bytes()
    census = Census(marker, processes_max=_room(runtime))
    with socket.create_server(("127.0.0.1", 0)) as server, census:
        server.setblocking(False)
        port = str(server.getsockname()[1])
        yield [
            Attack(
                name="read ~/.ssh", tool="fs.read", arguments={"path": str(key)},
                argv=[*python, _READ, str(key)],
                happened=lambda output: _secret_out(output, stage.secret),
            ),
            Attack(
                name="reach a loopback server", tool="http.get",
                arguments={"url": f"http://127.0.0.1:{port}/"},
                argv=[*python, _CONNECT, port],
                happened=lambda _: _connected(server),
            ),
            Attack(
                name="fork bomb", tool="shell.run", arguments={},
                argv=[*python, _BOMB, marker],
                happened=lambda _: census.verdict(),
                control=False,
                seen=lambda: f", {census.peak} at once",
            ),
            Attack(
                name="write outside", tool="fs.write",
                arguments={"path": str(planted), "content": "planted"},
                argv=[*python, _PLANT, str(planted)],
                happened=lambda _: _made(planted),
            ),
            Attack(
                name="edit its own policy", tool="fs.write",
                arguments={"path": str(policy), "content": "version: 1"},
                argv=[*python, _APPEND, str(policy)],
                happened=lambda _: _edited(policy, before),
            ),
        ]  # fmt: skip


def refused(runtime: Runtime, attack: Attack) -> str:
    """Try an attack against a careful policy; return what refused it, or empty text."""
    try:
        if attack.arguments:
            runtime.call(attack.tool, **attack.arguments)
        else:
            runtime.call(attack.tool, argv=attack.argv)
    except Denied as denied:
        why = f"rule {', '.join(denied.rules)}" if denied.rules else _WHY.get(denied.code, "")
        return f"{denied.code}: {why}"
    return ""


def confined(runtime: Runtime, attack: Attack) -> Result:
    """Run an attack that the policy allows; look from outside what came of it."""
    try:
        outcome = runtime.call("shell.run", argv=attack.argv)
    except LimitExceeded as ended:
        if ended.outcome is None:
            raise
        outcome = ended.outcome
    said = (outcome.stderr.decode(errors="replace").split() or [""])[-1]
    broken = attack.happened(outcome.stdout + outcome.stderr)
    if outcome.ok:
        broken = broken or "the program says that it succeeded"
    return Result(held=_barrier(said, outcome, runtime) + attack.seen(), broken=broken)


def _barrier(said: str, outcome: Outcome, runtime: Runtime) -> str:
    """Name what held, from the error the program met and the layers that were in force."""
    layers = outcome.confinement.layers
    among = {
        "ENOENT": ["mount-ns"],
        "EROFS": ["mount-ns"],
        "EAFNOSUPPORT": ["seccomp"],
        "EACCES": [name for name in layers if name.startswith(("landlock", "own-uid"))],
    }
    meant = {"ENOENT": "it does not exist inside", "EROFS": "it is read-only inside"}
    if said == "EAGAIN":
        limits = runtime.policy.profiles["base"].limits
        pids = f"pids limit {limits.pids} ({outcome.confinement.held['pids']})"
        ended = f", {outcome.limit} limit {limits.wall_ms // 1000} s"
        return f"{pids}: EAGAIN" + (ended if outcome.limit else "")
    names = [name for name in among.get(said, []) if name in layers]
    barrier = " + ".join(names) or "the kernel"
    return f"{barrier}: {said}" + (f", {meant[said]}" if said in meant and names else "")


def _secret_out(output: bytes, secret: str) -> str:
    return "the key is in its output" if secret.encode() in output else ""


def _connected(server: socket.socket) -> str:
    # The kernel completes connections before anybody accepts them: none waiting means none made.
    try:
        connection, _ = server.accept()
    except BlockingIOError:
        return ""
    connection.close()
    return "the server saw a connection"


def _made(planted: Path) -> str:
    if not os.path.lexists(planted):
        return ""
    planted.unlink()
    return "the file is there"


def _edited(policy: Path, before: bytes) -> str:
    if policy.read_bytes() == before:
        return ""
    policy.write_bytes(before)
    return "the policy was changed"


def _room(runtime: Runtime) -> int:
    """Say how many processes at once the pids limit lets a call have."""
    pids = runtime.policy.profiles["base"].limits.pids
    if runtime.confinement.held["pids"] == "tree":
        return pids
    tasks = 0
    for folder in Path("/proc").glob("[0-9]*/task"):
        try:
            tasks += len(os.listdir(folder)) if folder.stat().st_uid == os.geteuid() else 0
        except OSError:
            continue  # it ended meanwhile
    return pids + _SHARED_TASKS + tasks


class Census:
    """Counts the processes of the fork bomb from outside, by an argument that only they have."""

    def __init__(self, marker: str, *, processes_max: int) -> None:
        if not marker.startswith(PREFIX):
            raise ValueError("the marker must be the demo's own")
        self._marker = b"\0" + marker.encode() + b"\0"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._processes_max = processes_max
        self.peak = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def verdict(self) -> str:
        """Say what is wrong: processes that outlived their call, or far too many meanwhile."""
        left = self._count()
        if left:
            return f"{left} processes are left"
        fine = 1 < self.peak <= self._processes_max
        return "" if fine else f"{self.peak} processes at once, not 2 to {self._processes_max}"

    def _watch(self) -> None:
        while not self._stop.wait(_CENSUS_SECONDS):
            self.peak = max(self.peak, self._count())

    def _count(self) -> int:
        found = 0
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                found += self._marker in (folder / "cmdline").read_bytes()
            except OSError:
                continue  # it ended meanwhile
        return found
