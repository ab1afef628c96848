"""Policy lattice: what a policy says beside its rules: the machine, the servers, the profiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from safeconduct.call import Effect, Profile, Tier
from safeconduct.policies.rules import Judged, Policy, Rule, Server
from safeconduct.policies.signatures import PROGRAMS, RESERVED
from safeconduct.policies.wildcards import ToolPattern, is_wildcard

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
        before = mine.profile_of_server(known.name, known.profile)
        afters = [part.profile_of_server(server.name, server.profile) for part in new.parts]
        gains += _fewest(before, afters)
    return gains


def _profiles(old: Judged, new: Judged) -> Iterator[tuple[str, str]]:
    """Find profiles that became wider and that no rule uses.

    A server that the policy does not name runs in the profile of its name, else in the default
    one. Where a rule uses a profile, its calls show what became wider; those of a rule for tools
    of any server do not.
    """
    granting = [(part, x) for part in new.parts for x in part.every_rule() if _grants(x)]
    used = {part.profile_of(rule).name for part, rule in granting}
    anywhere = {rule.tool.partition(".")[0] for _, rule in granting if rule.profile is None}
    patterns = [ToolPattern(word) for word in sorted(anywhere) if is_wildcard(word)]
    for mine in old.parts:
        for name, before, afters in _placed(mine, new):
            if name in used and not any(pattern.matches(name) for pattern in patterns):
                continue
            if gains := _fewest(before, afters):
                yield (
                    "diff.default",
                    f"profile {name}, in which servers run, {', '.join(gains[:3])}",
                )


def _placed(mine: Policy, new: Judged) -> Iterator[tuple[str, Profile, list[Profile]]]:
    """Yield where a server runs, by its name: before, and in each part of the new policy."""
    default = mine.default_profile
    yield default.name, default, [part.default_profile for part in new.parts]
    added = {name for part in new.parts for name in part.profiles} - mine.profiles.keys()
    defaults = {part.default_profile.name for part in new.parts}
    # A profile that becomes the default one was compared as such.
    for name in (*mine.profiles, *sorted(added - defaults)):
        if name != default.name and name not in RESERVED | PROGRAMS:
            afters = [part.profile_of_server(name, None) for part in new.parts]
            yield name, mine.profile_of_server(name, None), afters


def _grants(rule: Rule) -> bool:
    return rule.effect is not Effect.DENY


def _fewest(before: Profile, afters: Iterable[Profile]) -> list[str]:
    """Return what is gained where a server gets what all of these give."""
    return min((list(profile_widenings(before, one)) for one in afters), key=len)
