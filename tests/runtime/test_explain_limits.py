"""What `policy explain` says of limits agrees with what a sandbox then says of them."""

from __future__ import annotations

import itertools

import pytest

from safeconduct.call import Engine, Limits, Profile, Tier, WorkspaceMode
from safeconduct.runtime.cli.limits import limit_lines
from safeconduct.runtime.sandbox import bounds

PROFILES = (
    Profile(name="reads", read=("/w",), limits=Limits(idle_ms=500)),
    Profile(name="writes", write=("/w",), limits=Limits(idle_ms=500)),
    Profile(name="over", write=("/w",), workspace=WorkspaceMode.OVERLAY),
)


def told(profile: Profile) -> dict[str, str]:
    return {line.split()[0]: line for line in limit_lines(profile)}


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_every_way_a_limit_can_hold_is_named(profile: Profile) -> None:
    lines = told(profile)
    direct = bool(profile.write) and profile.workspace is WorkspaceMode.DIRECT
    for tier, in_cgroup in itertools.product(Tier, (True, False)):
        held = bounds.held(profile.limits, tier, in_cgroup=in_cgroup, direct=direct)
        for name, how in held.items():
            assert str(how) in lines[name], (name, how, tier, in_cgroup)


def test_values_are_told_with_their_units() -> None:
    limits = Limits(cpu_ms=1500, memory_bytes=3 << 20, output_bytes=1 << 10)
    lines = told(Profile(name="p", limits=limits))
    assert "1500 ms" in lines["cpu"]
    assert "3 MiB" in lines["memory"]
    assert "1 KiB" in lines["output"]
    assert "as disk" in lines["file"]
    assert told(Profile(name="w", engine=Engine.WASM)).keys() == {"wall", "cpu", "memory", "fuel"}
