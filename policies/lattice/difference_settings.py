"""Policy lattice: what a policy says beside its rules: the machine, the servers, the profiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from safeconduct.call import Effect, Profile, Tier
from safeconduct.policies.rules import Judged, Policy, Server

from .profiles import profile_widenings
from .trace import trace_gains

# What is found here is known without an example.
SETTINGS: Final = frozenset(
    {"diff.require", "diff.server", "diff.server_profile", "diff.default", "diff.trace"}
)


def settings(old: Judged, new: Judged) -> Iterator[tuple[str, str]]:
    """Yield the code and the message of each way in which the second policy gives more."""
    yield from _requirements(old, new)
    for gain in trace_gains(old.trace, new.trace):
        yield "diff.trace", gain
    yield from _servers(old, new)
    yield from _profiles(old, new)


def _requirements(old: Judged, new: Judged) -> Iterator[tuple[str, str]]:
    tiers = (old.require_tier, new.require_tier)
    if tiers[0] is not tiers[1] and (tiers[0] is Tier.FULL or tiers[1] is None):
        yield "diff.require", f"it no longer requires tier {old.require_tier}"
    if old.require_cgroup and not new.require_cgroup:
        yield "diff.require", "it no longer requires a cgroup"


def _servers(old: Judged, new: Judged) -> Iterator[tuple[str, str]]:
    for name, server in new.servers.items():
        known = old.servers.get(name)
        if known is None:
            yield "diff.server", f"it adds the server {name}"
        elif known.run != server.run:
            yield "diff.server", f"the server {name} runs another command"
        elif gains := _server_gains(old, known, new, server):
            yield "diff.server_profile", f"the server {name} {', '.join(gains)}"


def _server_gains(old: Judged, known: Server, new: Judged, server: Server) -> list[str]:
    # A server runs in the narrower of what all parts say; each part is compared by itself.
    gains: list[str] = []
    for mine in old.parts:
        before = _profile(mine, known.profile)
        afters = [_profile(part, server.profile) for part in new.parts]
        ways: list[list[str]] = [list(profile_widenings(before, one)) for one in afters]
        fewest = min(ways, key=_count)
        gains += fewest
    return gains


def _profile(policy: Policy, name: str | None) -> Profile:
    return policy.profiles.get(name or "", policy.default_profile)


def _profiles(old: Judged, new: Judged) -> Iterator[tuple[str, str]]:
    """Find profiles that became wider and that no rule uses.

    A server that the policy does not name runs in the profile of its name, else in the default
    one. Where a rule uses a profile, its calls show what became wider.
    """
    used = {
        part.profile_of(rule).name
        for part in new.parts
        for rule in part.every_rule()
        if rule.effect is not Effect.DENY
    }
    for mine in old.parts:
        default = mine.default_profile
        for name, before in {**mine.profiles, default.name: default}.items():
            afters = [_kept(part, before, default) for part in new.parts]
            ways = [list(profile_widenings(before, one)) for one in afters if one is not None]
            if name not in used and len(ways) == len(new.parts) and all(ways):
                gains = ", ".join(min(ways, key=_count)[:3])
                yield "diff.default", f"profile {name}, in which servers run, {gains}"


def _kept(part: Policy, before: Profile, default: Profile) -> Profile | None:
    """Return what a part has in the place of a profile; None where it has none of the name."""
    return part.default_profile if before is default else part.profiles.get(before.name)


def _count(gains: list[str]) -> int:
    return len(gains)
