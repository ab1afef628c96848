"""How much slower is a call while another one beside it tries to exhaust the machine?

The neighbour runs `/usr/bin/true` in its own sandbox of one runtime, alone and beside each bomb
in turn; a bomb that its limits end is started anew at once. Before each turn everything has come to
rest. It calls in two ways: without a pause, which on two processors needs both of them, and with a
pause after each call, so that a sandbox always waits for the next one (``paced``). ``p99_ratio`` is
its 99th percentile beside the bomb over that alone, in turns. The bomb ``nothing`` only sleeps: its
figures are the noise of the machine and what any second call costs.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from safeconduct.call import Limits, Outcome, Profile
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.shield import Shield

from .harness import Measured, Options, columns, spread
from .subject import bench, rest

_LIMITS = Limits(memory_bytes=128 << 20, pids=64, disk_bytes=32 << 20, inodes=2000)
_FILL = """
import os
for n in range(10**6):
    with open(f"f{n}", "wb") as file: file.write(b"x" * SIZE)
"""
# Of the neighbour that is paced, after each call.
_PAUSE_SECONDS = 0.008
BOMBS: Mapping[str, str] = {
    "nothing": "import time\ntime.sleep(60)",
    "spin": "import os\nfor _ in range(7): os.fork()\nwhile True: pass",
    "fork": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "rss": "held = []\nwhile True: held.append(bytearray(1 << 20))",
    "tmpfs": "import os; os.chdir('/dev/shm')" + _FILL.replace("SIZE", str(1 << 20)),
    "page cache": "while True:\n  with open('cache', 'wb') as f:\n"
    "    for _ in range(16): f.write(b'x' * (1 << 20))",
    "pipes": "import fcntl, os\nheld = []\nwhile True:\n  r, w = os.pipe(); held += [r, w]\n"
    "  fcntl.fcntl(w, 1031, 1 << 20); os.set_blocking(w, False); os.write(w, b'x' * (1 << 20))",
    "disk": _FILL.replace("SIZE", str(1 << 20)),
    "inodes": _FILL.replace("SIZE", "0"),
    "output": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "zombies": "import os\nwhile True:\n  if os.fork() == 0: os._exit(0)",
}  # fmt: skip


@dataclass(slots=True)
class Pair:
    """The sandbox both run in, a folder for each, and how the bombs ended."""

    sandbox: NativeSandbox
    stack: ExitStack

    def folder(self) -> str:
        """Make a workspace."""
        path = self.stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        os.chmod(path, 0o777)  # noqa: S103 - meant: tier landlock has no id-mapped mounts
        return path

    def run(
        self,
        argv: list[str],
        limits: Limits,
        folder: str,
        begun: Callable[[object], object] | None = None,
    ) -> Outcome:
        """Run a program to its end."""
        profile = Profile(name="bench", read=(folder,), write=(folder,), limits=limits)
        program = Program(argv=argv, cwd=folder)
        return self.sandbox.run(
            "bench", program, profile, workspace=folder, shield=Shield(), begun=begun
        )

    def neighbour(self, calls: int, folder: str, *, pause: float = 0.0) -> list[float]:
        """Time that many calls, with a pause after each. Seconds."""
        times: list[float] = []
        for _ in range(calls):
            begun = time.perf_counter()
            self.run(["/usr/bin/true"], Limits(), folder)
            times.append(time.perf_counter() - begun)
            if pause:
                time.sleep(pause)
        return times

    @contextmanager
    def exploding(self, code: str, limits: Limits, ends: dict[str, int]) -> Generator[None]:
        """Keep a bomb going, and count which limits end it."""
        stop, started = threading.Event(), threading.Event()
        folder = self.folder()

        def explode() -> None:
            while not stop.is_set():
                outcome = self.run(["python3", "-c", code], limits, folder, lambda _: started.set())
                name = outcome.limit or f"exit {outcome.exit_code}"
                ends[name] = ends.get(name, 0) + 1
                # Nobody's work, so behind everybody's and in no thread of this process.
                empty = ["find", folder, "-mindepth", "1", "-delete"]
                subprocess.run(["chrt", "--idle", "0", *empty], check=True)

        thread = threading.Thread(target=explode)
        thread.start()
        try:
            started.wait()
            yield
        finally:
            stop.set()
            thread.join()


def _p99(times: list[float]) -> float:
    return spread(times, scale=1e3)["p99"]


def measure(chosen: Options) -> Measured:
    """Measure one column."""
    figures: dict[str, object] = {}
    details: dict[str, object] = {}
    calls, rounds = (50, 4) if chosen.quick else (250, 6)
    with bench() as made:
        pair = Pair(made.sandbox(), made.stack)
        folder = pair.folder()
        pair.neighbour(20, folder)
        for name, code in BOMBS.items():
            for way, pause in (("", 0.0), ("paced ", _PAUSE_SECONDS)):
                turns = _turns(pair, folder, code, calls=calls, rounds=rounds, pause=pause)
                alone, beside, ends = turns
                key = f"{name}: {way}"
                figures[f"{key}p99_ratio"] = round(_p99(beside) / _p99(alone), 2)
                ratio = statistics.median(beside) / statistics.median(alone)
                figures[f"{key}median_ratio"] = round(ratio, 2)
                details[f"{key}ended by"] = ends
                details[f"{key}alone_ms"] = spread(alone, scale=1e3)
                details[f"{key}beside_ms"] = spread(beside, scale=1e3)
        facts = made.facts
    return Measured(figures=figures, details=details, facts=facts)


def _turns(
    pair: Pair, folder: str, code: str, *, calls: int, rounds: int, pause: float
) -> tuple[list[float], list[float], dict[str, int]]:
    """Time the neighbour alone and beside a bomb, in turns; count what ended the bomb."""
    alone: list[float] = []
    beside: list[float] = []
    ends: dict[str, int] = {}
    if pause:
        calls //= 2
    # A bomb that nothing ends sooner lives about as long as one turn.
    limits = replace(_LIMITS, wall_ms=int(calls * (5 + pause * 1000)))
    for _ in range(rounds):
        rest()
        alone += pair.neighbour(calls, folder, pause=pause)
        rest()
        with pair.exploding(code, limits, ends):
            beside += pair.neighbour(calls, folder, pause=pause)
    return alone, beside, ends


if __name__ == "__main__":
    columns(__doc__, measure, shieldable=False)
