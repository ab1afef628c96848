"""Policy step 3: a valid spec becomes a compiled Policy."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from safeconduct.call import Profile

from .capability import check_kinds
from .compilation import Rules
from .model import PolicySpec
from .profiles import compile_profiles
from .roles import compile_roles, compile_servers
from .rules import Policy
from .syntax import Source
from .trace_compilation import compile_trace

DEFAULT_PROFILE: Final = "base"


def assemble(
    spec: PolicySpec, source: Source, *, version: str, workspace: str, wider: Policy | None = None
) -> Policy:
    """Compile the spec; PolicyError points at the first thing that cannot mean anything.

    ``wider`` is the policy it extends. Its profiles are there by their names, unless the spec
    has its own; both bound a Call in any case.
    """
    inherited: Mapping[str, Profile] = wider.profiles if wider else {}
    profiles = compile_profiles(spec.profiles, source, workspace, inherited)
    extends = source.key(("extends",))
    own = {name: source.key(("profiles", name)) for name in spec.profiles}
    servers = compile_servers(spec.servers, source, profiles, workspace)
    named = {name: server.profile for name, server in servers.items() if server.profile}
    named = {**(wider.server_profiles if wider else {}), **named}
    rules = Rules(source, workspace, profiles, named)
    tools, wildcards = rules.compile_tools(spec.tools, ("tools",))
    ours = Profile(name="default", read=(workspace,))
    default = wider.default_profile if wider else ours
    policy = Policy(
        file=source.name,
        version=version,
        workspace=workspace,
        require_tier=spec.require.tier,
        require_cgroup=spec.require.cgroup,
        profiles=MappingProxyType(profiles),
        tools=tools,
        wildcards=wildcards,
        roles=compile_roles(spec.roles, source, rules),
        servers=servers,
        server_profiles=MappingProxyType(named),
        trace=compile_trace(spec.trace, source),
        default_profile=profiles.get(DEFAULT_PROFILE, default),
        profile_positions=dict.fromkeys(profiles, extends) | own,
    )
    check_kinds([policy])
    for role in policy.roles:
        # Joins the role with those it stays within, and so refuses what does not fit.
        alone = policy.for_role(role).parts
        if len(alone) == 1:
            check_kinds(alone)
    return policy
