"""The demo as a user runs it: it tells its whole story, and an interrupt leaves nothing behind."""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from safeconduct import Tier
from safeconduct.errors import Exit

_DEMO = Path(__file__).parents[2] / "examples" / "demo" / "run.py"
_STORY_SECONDS = 120
_END_SECONDS = 30
_STARTS = re.compile(r"^  contained reach a loopback server")
_ATTACKS = (
    "read ~/.ssh",
    "reach a loopback server",
    "fork bomb",
    "write outside",
    "edit its own policy",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one demo runs: nothing of it may be anywhere else."""

    folder: Path

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def environment(self) -> dict[str, str]:
        own = {
            name: str(self.folder / name.lower())
            for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
        }
        return {**os.environ, **own, "TMPDIR": str(self.temporary)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(_DEMO), *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def leftovers(self, pid: int) -> list[str]:
        """Name what a demo left: processes, cgroups, mounts, temporary folders."""
        found = [entry.name for entry in self.temporary.iterdir()]
        found += glob.glob(f"/sys/fs/cgroup/**/safeconduct-{pid}-*", recursive=True)
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        found += [mount for mount in mounts if str(self.folder) in mount]
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            with suppress(OSError):
                line = (process / "cmdline").read_bytes()
                ours = os.getsid(int(process.name)) == pid
                if line and (ours or os.fsencode(self.folder) in line):
                    found.append(repr(line))
        return found


@pytest.fixture
def place() -> Generator[Place]:
    # Not tmp_path: its parents are closed to others, and root's sandboxes have their own user ids.
    folder = Path(tempfile.mkdtemp(prefix="demo-test-", dir="/tmp")).resolve()
    folder.chmod(0o755)
    (folder / "tmp").mkdir()
    (folder / "home").mkdir()
    yield Place(folder=folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("tier", list(Tier))
def test_the_story_is_told_and_its_trace_verifies(place: Place, tier: Tier) -> None:
    demo = place.start("--tier", tier)
    output, _ = demo.communicate(timeout=_STORY_SECONDS)
    if demo.returncode == Exit.FAILURE and "[sandbox.unavailable]" in output:
        pytest.skip(f"tier {tier} is not available here")

    assert demo.returncode == 0, output
    lines = output.splitlines()
    assert len(lines) <= 90, "short enough to be read"
    assert f"  tier        {tier}" in lines
    for attack in _ATTACKS:
        assert f"\n  denied    {attack}" in output
        assert f"\n  contained {attack}" in output
    for told in (
        "exit 1: FAILED", "exit 0: OK", "seccomp: EAFNOSUPPORT", "pids limit 24",
        "VERIFIED: safeconduct-demo/", "entry.hash: entry", "would be refused",
    ):  # fmt: skip
        assert told in output
    if "skipped   MCP server" not in output:
        assert re.search(r"allowed +files.read_text_file", output)
        assert re.search(r"denied +files.write_file", output)
    if "skipped   wasm.run" not in output:
        assert "[500500]" in output
        assert "limit.fuel" in output
    assert place.leftovers(demo.pid) == []

    key = shlex.split(lines[-1])[-1]
    kept = place.folder / "xdg_state_home" / "safeconduct-demo" / "demo-trace.pub"
    assert kept.read_text().strip() == key
    command = [sys.executable, "-m", "safeconduct", "trace", "verify", "./demo-trace", "--key", key]
    verified = subprocess.run(command, cwd=place.folder, env=place.environment, check=False)
    assert verified.returncode == Exit.OK


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "kill"])
def test_an_interrupt_leaves_nothing_running(place: Place, whole_group: bool) -> None:
    demo = place.start()
    assert demo.stdout is not None
    with demo.stdout:
        assert any(_STARTS.match(line) for line in demo.stdout), "the fork bomb comes next"
        _await_bomb(place)
        if whole_group:
            os.killpg(demo.pid, signal.SIGINT)  # what a terminal does
        else:
            demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read()

    assert demo.wait(_END_SECONDS) == Exit.SIGNAL + signal.SIGINT, rest
    assert "Interrupted: nothing is left running." in rest
    assert "contained fork bomb" not in rest
    assert "Traceback" not in rest
    assert place.leftovers(demo.pid) == []


def test_a_folder_that_is_no_trace_of_the_demo_is_kept(place: Place) -> None:
    mine = place.folder / "demo-trace" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep me")
    demo = place.start()
    output, _ = demo.communicate(timeout=_STORY_SECONDS)
    assert demo.returncode == Exit.USAGE
    assert "move it away" in output
    assert mine.read_text() == "keep me"
    assert place.leftovers(demo.pid) == []


def _await_bomb(place: Place) -> None:
    """Wait until the fork bomb has begun: its processes name the demo's folder."""
    deadline = time.monotonic() + _END_SECONDS
    names = {entry.name.encode() for entry in place.temporary.iterdir()}
    assert names, "the demo's folder is in the temporary folder named"
    while time.monotonic() < deadline:
        for process in glob.glob("/proc/[0-9]*/cmdline"):
            with suppress(OSError):
                words = Path(process).read_bytes().split(b"\0")
                if names.intersection(words):
                    return
    raise AssertionError("the fork bomb never began")
