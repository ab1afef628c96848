"""Policy step 3d: the roles and the servers of a file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from safeconduct.call import Engine, Profile

from .compilation import Rules
from .language import did_you_mean
from .model import RoleSpec, ServerSpec
from .rules import Role, Server
from .signatures import PROGRAMS, RESERVED
from .syntax import Source

# LIMIT: `narrows` chains are walked, and each step is one more policy that must agree.
MAX_NARROWS = 4


def compile_roles(
    specs: Mapping[str, RoleSpec], source: Source, rules: Rules
) -> Mapping[str, Role]:
    """Compile the roles; PolicyError where one narrows nothing, or itself."""
    roles: dict[str, Role] = {}
    for name, spec in specs.items():
        _check_narrows(name, specs, source)
        tools, wildcards = rules.compile_tools(spec.tools, ("roles", name))
        roles[name] = Role(name=name, narrows=spec.narrows, tools=tools, wildcards=wildcards)
    return MappingProxyType(roles)


def _check_narrows(name: str, specs: Mapping[str, RoleSpec], source: Source) -> None:
    chain = [name]
    while (wider := specs[chain[-1]].narrows) is not None:
        position = source.node(("roles", chain[-1], "narrows")).position
        if wider not in specs:
            hint = did_you_mean(wider, specs)
            raise source.error(position, f"there is no role {wider!r}", hint=hint)
        if wider in chain or len(chain) > MAX_NARROWS:
            hint = f"roles narrow one another along at most {MAX_NARROWS} steps, in no circle"
            raise source.error(position, "narrows never ends", hint=hint)
        chain.append(wider)


def compile_servers(
    specs: Mapping[str, ServerSpec],
    source: Source,
    profiles: Mapping[str, Profile],
    workspace: str,
) -> Mapping[str, Server]:
    """Compile the servers; `$WS` at the start of a word is the workspace."""
    servers: dict[str, Server] = {}
    for name, spec in specs.items():
        if name in RESERVED | PROGRAMS:
            owner = "ours" if name in RESERVED else f"those of {name} itself"
            message = f"a server cannot be named {name!r}: tools under it are {owner}"
            hint = "give it another name; its tools are NAME.TOOL"
            raise source.error(source.key(("servers", name)), message, hint=hint)
        _check_profile(name, spec, source, profiles)
        run = tuple(_expand(word, workspace) for word in spec.run)
        servers[name] = Server(name=name, run=run, profile=spec.profile)
    return MappingProxyType(servers)


def _expand(word: str, workspace: str) -> str:
    if word == "$WS" or word.startswith("$WS/"):
        return workspace + word[len("$WS") :]
    return word


def _check_profile(
    name: str, spec: ServerSpec, source: Source, profiles: Mapping[str, Profile]
) -> None:
    if spec.profile is None:
        return
    position = source.node(("servers", name, "profile")).position
    if spec.profile not in profiles:
        hint = did_you_mean(spec.profile, profiles)
        raise source.error(position, f"there is no profile {spec.profile!r}", hint=hint)
    if profiles[spec.profile].engine is not Engine.NATIVE:
        message = f"a server is a program, and profile {spec.profile!r} has engine: wasm"
        raise source.error(position, message, hint="name a profile with engine: native")
