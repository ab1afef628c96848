"""Step "sandbox": what this machine gives, tried and not guessed."""

from __future__ import annotations

from contextlib import closing

from safeconduct.call import Limits, Profile, Tier
from safeconduct.errors import SandboxFailed, SandboxUnavailable, ToolFailed

from . import cgroup, machine
from .launcher import Launcher
from .native import NativeSandbox, Program
from .shield import Shield


def survey(launcher: Launcher, cgroups: cgroup.Cgroups | None) -> machine.Machine:
    """Try each tier with a program that does nothing, and say what this machine gives."""
    tiers: dict[Tier, str] = {}
    for tier in Tier:
        shortfall = machine.landlock_shortfall(launcher.landlock_abi, tier)
        tiers[tier] = shortfall or _try(launcher, tier)
    return machine.Machine(
        tiers=tiers,
        landlock_abi=launcher.landlock_abi,
        cgroups=cgroups,
        root=machine.is_root(),
    )


def _try(launcher: Launcher, tier: Tier) -> str:
    profile = Profile(name="survey", limits=Limits(wall_ms=10_000))
    program = Program(argv=["true"], cwd="/usr")
    with closing(NativeSandbox(launcher, tier=tier, cgroups=None, ahead=0)) as sandbox:
        try:
            outcome = sandbox.run("survey", program, profile, workspace="/usr", shield=Shield())
        except (SandboxFailed, SandboxUnavailable, ToolFailed) as error:
            return error.message
    if outcome.signal is not None:
        return f"A trial program was ended by signal {outcome.signal}."
    return "" if outcome.ok else f"A trial program ended with {outcome.exit_code}."
