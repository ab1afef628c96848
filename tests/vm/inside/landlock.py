"""A kernel started without Landlock: no tier is left, and everything that would run says so."""

from __future__ import annotations

from pathlib import Path

from safeconduct.call import Tier
from safeconduct.errors import Exit

from .desk import command, execute, landlock_abi, policy, refusal
from .registry import NO_LANDLOCK, USER_UID, check


@check(NO_LANDLOCK, uids=(0, USER_UID))
def nothing_runs_without_landlock() -> None:
    """Not by default, not by asking for either tier, not through Python."""
    assert landlock_abi() == 0
    file = policy()
    for options in ((), ("--tier", "full"), ("--tier", "landlock")):
        done = execute(file, "sh", "-c", "echo >made", options=options)
        assert done.code == Exit.FAILURE, done
        assert done.outcome["error"]["code"] == "sandbox.unavailable", done
        assert "Landlock" in done.err, done
    for tier in (None, *Tier):
        error = refusal(file, tier=tier)
        assert error.missing, error
        assert error.hint, error
    assert not Path("made").exists()


@check(NO_LANDLOCK, uids=(0, USER_UID))
def doctor_names_landlock() -> None:
    """It exits with 125, and says what is missing and how to get it."""
    told = command("doctor", "--json")
    assert (told.code, told.json["tier"]) == (Exit.FAILURE, None), told
    found = {layer["name"]: layer for layer in told.json["layers"]}
    assert not found["landlock"]["available"], found["landlock"]
    for name in ("landlock", *(f"tier {tier}" for tier in Tier)):
        assert not found[name]["available"], found[name]
        assert "lsm=landlock" in found[name]["get"], found[name]
