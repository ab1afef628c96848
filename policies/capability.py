"""Capabilities only narrow: the intersection of profiles, and of two whole policies.

A project's own policy is hostile until a person trusts it. It is then one of two policies
that must both agree, so the worst it can do is refuse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from safeconduct.call import Limits, Profile, Tier, WorkspaceMode
from safeconduct.errors import Denied, PolicyError

from .rules import Policy
from .signatures import BUILT_IN, Argument, Signature, merge_kinds


def narrow_profiles(one: Profile, other: Profile) -> Profile:
    """Return what both profiles grant; the order of the two does not matter.

    Raise Denied `policy.profile_conflict` where they run on different engines.
    """
    if one == other:
        return one
    if one.engine is not other.engine:
        message = f"the profiles {one.name} and {other.name} run on different engines"
        raise Denied(message, code="policy.profile_conflict")
    write = _common(one.write, other.write)
    # What a profile may write it may read, so both count on either side.
    read = _common(one.read + one.write, other.read + other.write)
    return Profile(
        name=_join_names(one.name, other.name),
        engine=one.engine,
        # An overlay holds writes back, so it is what is left of the two.
        workspace=max(one.workspace, other.workspace, key=list(WorkspaceMode).index),
        read=read,
        write=write,
        hide=tuple(sorted({*one.hide, *other.hide})),
        imports=tuple(sorted({*one.imports} & {*other.imports})),
        syscalls=tuple(sorted({*one.syscalls} & {*other.syscalls})),
        limits=_least(one.limits, other.limits),
    )


def _join_names(one: str, other: str) -> str:
    return "&".join(sorted({*one.split("&"), *other.split("&")}))


def covers(folder: str, path: str) -> bool:
    """Tell whether a granted folder (or file) holds a path."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _common(one: Iterable[str], other: Iterable[str]) -> tuple[str, ...]:
    others = tuple(other)
    found: set[str] = set()
    for path in one:
        for second in others:
            if covers(second, path):
                found.add(path)
            elif covers(path, second):
                found.add(second)
    widest = {
        path for path in found if not any(path != item and covers(item, path) for item in found)
    }
    return tuple(sorted(widest))


def _least(one: Limits, other: Limits) -> Limits:
    least: dict[str, int | None] = {}
    for item in fields(Limits):
        bounds = [
            bound
            for bound in (getattr(one, item.name), getattr(other, item.name))
            if bound is not None
        ]
        least[item.name] = min(bounds) if bounds else None
    return Limits(**least)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowedPolicy:
    """A policy and one that may only narrow it; every part must agree to a Call."""

    policy: Policy
    narrowing: Policy
    tools: Mapping[str, Signature]

    @property
    def version(self) -> str:
        """Return the hash over both versions."""
        text = f"{self.policy.version}\n{self.narrowing.version}\n"
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    @property
    def workspace(self) -> str:
        """Return the workspace, which both share."""
        return self.policy.workspace

    @property
    def require_tier(self) -> Tier | None:
        """Return the stricter requirement."""
        tiers = {self.policy.require_tier, self.narrowing.require_tier}
        for tier in (Tier.FULL, Tier.LANDLOCK):
            if tier in tiers:
                return tier
        return None

    @property
    def require_cgroup(self) -> bool:
        """Return the stricter requirement."""
        return self.policy.require_cgroup or self.narrowing.require_cgroup

    @property
    def profiles(self) -> Mapping[str, Profile]:
        """Return the profiles both name, each as what both grant.

        A decision carries its own profile, which may join two names.
        """
        mine, theirs = self.policy.profiles, self.narrowing.profiles
        return MappingProxyType(
            {
                name: narrow_profiles(mine[name], theirs[name])
                for name in mine
                if name in theirs and mine[name].engine is theirs[name].engine
            }
        )

    @property
    def parts(self) -> tuple[Policy, ...]:
        """Return both policies."""
        return (self.policy, self.narrowing)

    def signature(self, tool: str) -> Signature | None:
        """Return the signature of a tool that the first policy speaks of."""
        return self.tools.get(tool) or BUILT_IN.get(tool)


def both(policy: Policy, narrowing: Policy) -> NarrowedPolicy:
    """Join a policy with one that may only narrow it, for example a project's own.

    PolicyError where they are for two workspaces or take one argument for two things.
    """
    if policy.workspace != narrowing.workspace:
        raise PolicyError(
            f"it is for the workspace {narrowing.workspace!r}, yours for {policy.workspace!r}",
            file=narrowing.file,
            code="policy.workspace",
            hint="run in one workspace, or name it with --workspace",
        )
    tools = {
        tool: _merge(tool, found.signature, narrowing.signature(tool), narrowing.file)
        for tool, found in policy.tools.items()
    }
    return NarrowedPolicy(policy=policy, narrowing=narrowing, tools=MappingProxyType(tools))


def _merge(tool: str, mine: Signature, theirs: Signature | None, file: str) -> Signature:
    if theirs is None or mine.closed:
        return mine
    arguments = dict(theirs.arguments)
    for name, argument in mine.arguments.items():
        kind = merge_kinds(argument.kind, arguments.get(name, argument).kind)
        if kind is None:
            raise PolicyError(
                f"{tool}: {name!r} is a {arguments[name].kind} here"
                f" and a {argument.kind} in your own policy",
                file=file,
                hint="use the same matcher for the argument in both files",
            )
        arguments[name] = Argument(kind=kind, required=False)
    return Signature(arguments=arguments, closed=False)
