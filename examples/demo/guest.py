"""(c) A Wasm tool: one function that computes, and one that never ends until its fuel does."""

from __future__ import annotations

import os
import sys

from stage import Stage, is_open
from story import Story

import safeconduct
from safeconduct import Error, LimitExceeded, Runtime, Tier, ToolFailed

_UPTO = 1000


def compute(runtime: Runtime, stage: Stage, story: Story) -> None:
    """Call the tool twice. Raises Error where it does not end as it must."""
    module = str(stage.workspace / "tools" / "tool.wasm")
    try:
        outcome = runtime.call("wasm.run", module=module, function="sum", arguments=[_UPTO])
    except (Error, ToolFailed) as error:
        if not (out_of_reach := _out_of_reach(runtime)):
            raise
        why = f"{out_of_reach} is closed to other users ({error.code})"
        story.event("skipped", "wasm.run", why)
        return
    if outcome.value != [_UPTO * (_UPTO + 1) // 2]:
        raise Error(f"The Wasm tool returned {outcome.value}.")
    used = f"{outcome.usage.fuel} fuel, {outcome.usage.wall_ms} ms"
    story.event("allowed", f"wasm.run  sum({_UPTO})", f"{outcome.value} ({used})")
    try:
        runtime.call("wasm.run", module=module, function="spin")
    except LimitExceeded as ended:
        fuel = runtime.policy.profiles["calc"].limits.fuel
        story.event("contained", "wasm.run  spin() never ends", f"{ended.code}: {fuel} units")
        return
    raise Error("An endless loop came to an end.")


def _out_of_reach(runtime: Runtime) -> str:
    """Name what a sandbox of another user cannot reach; only without a mount namespace."""
    if os.geteuid() != 0 or runtime.confinement.tier is not Tier.LANDLOCK:
        return ""
    needed = (sys.base_prefix, os.path.dirname(str(safeconduct.__file__)))
    return next((path for path in needed if not is_open(path)), "")
