"""(a) The agent: no model, a plan. It finds a bug by a failing test, fixes it, and tests again."""

from __future__ import annotations

from collections.abc import Iterator

from repository import BUG, FIX
from stage import Stage
from story import Story

from safeconduct import Error, Outcome, Runtime

SOURCE = "src/basket.py"


def work(runtime: Runtime, stage: Stage, story: Story) -> None:
    """Carry out the plan, one allowed call after the other."""
    for verdict, what, why in _steps(runtime, stage):
        story.event(verdict, what, why)


def _steps(runtime: Runtime, stage: Stage) -> Iterator[tuple[str, str, str]]:
    source = str(stage.workspace / SOURCE)
    test = [stage.python.path, "-m", "unittest"]
    listed = runtime.call("fs.list", path=str(stage.workspace / "src"))
    yield "allowed", "fs.list   src/", f"{listed.value}"
    text = str(runtime.call("fs.read", path=source).value)
    yield "allowed", f"fs.read   {SOURCE}", f"{len(text.splitlines())} lines"
    before = runtime.call("shell.run", argv=test)
    yield "allowed", "shell.run python -m unittest", _verdict(before)
    written = runtime.call("fs.write", path=source, content=text.replace(BUG, FIX))
    yield "allowed", f"fs.write  {SOURCE}", f"{written.value} bytes, the bug is fixed"
    after = runtime.call("shell.run", argv=test)
    yield "allowed", "shell.run python -m unittest", _verdict(after)
    if before.ok or not after.ok:
        raise Error("The tests of the sample repository did not end as they must.")


def _verdict(outcome: Outcome) -> str:
    lines = outcome.stderr.decode(errors="replace").strip().splitlines()
    wall, memory = outcome.usage.wall_ms, outcome.usage.peak_memory_bytes
    used = f"{wall} ms" + (f", {memory >> 20} MiB" if memory else "")
    return f"exit {outcome.exit_code}: {lines[-1] if lines else ''} ({used})"
