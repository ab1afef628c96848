"""``safeconduct doctor``: what this machine can enforce, layer by layer, and how to get more."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING

from safeconduct.call import Tier
from safeconduct.errors import Error, Exit

from .options import JsonOption
from .terminal import print_json, print_table, tell

if TYPE_CHECKING:
    from safeconduct.runtime.sandbox.machine import Machine

    from .layers import Layer

# The shape of --json: fields are only ever added to it.
_VERSION = 1
# What a person should get first where it is missing; everything else follows from these.
_FIRST = ("kernel", "launcher", "state folder", "tier", "tier full", "cgroups", "tier landlock")


def doctor(as_json: JsonOption = False) -> int:
    """Try every layer and say which are in force here, why others are not, how to get them.

    Exits with 0 where some tier is in force, 125 where nothing can be confined.
    """
    with ExitStack() as stack:
        machine, why = _survey(stack)
        tier: Tier | None = None
        if machine is not None:
            tier = next((one for one in Tier if not machine.tiers[one]), None)
        from safeconduct.runtime.sandbox import facts

        from .layers import layers

        found = layers(facts.collect(), machine, tier, why)
    summary, step = _summary(found, tier), _next(found)
    if as_json:
        print_json(
            {
                "version": _VERSION,
                "tier": str(tier) if tier else None,
                "summary": summary,
                "next": step,
                "layers": [asdict(layer) for layer in found],
            }
        )
    tell(summary, step)
    if not as_json:
        print_table(("layer", "available", "used", "note", "how to get it"), _rows(found))
    return Exit.FAILURE if tier is None else Exit.OK


def _summary(layers: Sequence[Layer], tier: Tier | None) -> str:
    if tier is None:
        return "no tier is in force here: nothing can run"
    named = {layer.name: layer for layer in layers}
    held = "memory and pids hold for whole process trees"
    if not named["cgroups"].used:
        # In tier full the user namespace counts the processes of its sandbox alone.
        lost = "memory holds" if tier is Tier.FULL else "memory and pids hold"
        held = f"{lost} only per process (no cgroup)"
    ids = ", each sandbox under a user id of its own" if named["separate user ids"].used else ""
    return f"tier {tier} is in force{ids}; {held}"


def _next(layers: Sequence[Layer]) -> str:
    """Return the one step that gives most; empty where nothing important is missing."""
    named = {layer.name: layer for layer in layers}
    full = "tier full" in named and named["tier full"].available
    for name in _FIRST:
        layer = named.get(name)
        wanted = (
            layer is not None and not layer.available and not (name == "tier landlock" and full)
        )
        if layer is not None and wanted:
            return f"{name}: {layer.note.rstrip('.')}. To get it: {layer.get}"
    return ""


def _rows(layers: Sequence[Layer]) -> list[list[str]]:
    yes = {True: "yes", False: "no"}
    return [[one.name, yes[one.available], yes[one.used], one.note, one.get] for one in layers]


def _survey(stack: ExitStack) -> tuple[Machine | None, str]:
    """Try the tiers with the real launcher; without an answer say why there is none."""
    try:
        from safeconduct.runtime.sandbox import cgroup
        from safeconduct.runtime.sandbox.launcher import Launcher
        from safeconduct.runtime.sandbox.survey import survey
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"the runtime cannot be loaded: {error}"
    try:
        launcher = Launcher()
    except Error as error:
        return None, error.message
    except OSError as error:
        return None, f"the launcher cannot be started: {error.strerror}"
    with ExitStack() as mine:
        mine.callback(launcher.close)
        cgroups = cgroup.discover()
        if cgroups is not None:
            stack.callback(cgroups.close)
        try:
            return survey(launcher, cgroups), ""
        except Error as error:
            return None, error.message
