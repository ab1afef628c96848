"""Capabilities only narrow: the intersection of profiles, and of whole policies.

A project's own policy is hostile until a person trusts it. It is then one of two policies
that must both agree, so the worst it can do is refuse.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

from safeconduct.call import Limits, Profile, Tier, WorkspaceMode
from safeconduct.errors import Denied, PolicyError

from .binding import KindConflict, Wildcard, implied_by
from .files import join_versions
from .language import did_you_mean
from .rules import MAX_NAMES, Judged, Policy, Rule, Server
from .signatures import BUILT_IN, SPELLED, Argument, Signature, merge_kinds
from .trace_terms import TraceTerms, join_terms


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
        # An overlay holds writes back, and one of a call's own shows it less than a session's.
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
    """Policies that must all agree to a Call: the widest first, each narrowed by those after it."""

    parts: tuple[Policy, ...]
    servers: Mapping[str, Server]
    trace: TraceTerms
    # What signature found. It only remembers.
    _signatures: dict[str, Signature | None] = field(
        default_factory=dict[str, "Signature | None"], init=False, repr=False, compare=False
    )

    @property
    def version(self) -> str:
        """Return the hash over the versions of all files. The roles of one file have its own."""
        first, *others = self.parts
        versions = [first.version]
        for before, part in itertools.pairwise((first, *others)):
            if part.role is None or (part.file, part.version) != (before.file, before.version):
                versions.append(part.version)
        return join_versions(versions)

    @property
    def workspace(self) -> str:
        """Return the workspace, which all share."""
        return self.parts[0].workspace

    @property
    def require_tier(self) -> Tier | None:
        """Return the strictest requirement."""
        tiers = {part.require_tier for part in self.parts}
        for tier in (Tier.FULL, Tier.LANDLOCK):
            if tier in tiers:
                return tier
        return None

    @property
    def require_cgroup(self) -> bool:
        """Return the strictest requirement."""
        return any(part.require_cgroup for part in self.parts)

    @property
    def profiles(self) -> Mapping[str, Profile]:
        """Return the profiles that all name, each as what all grant.

        A decision carries its own profile, which may join several names.
        """
        common: Mapping[str, Profile] = self.parts[0].profiles
        for part in self.parts[1:]:
            common = _common_profiles(common, part.profiles)
        return MappingProxyType(dict(common))

    def signature(self, tool: str) -> Signature | None:
        """Return the signature of a tool that any of the policies speaks of."""
        try:
            return self._signatures[tool]
        except KeyError:
            found = self.parts[0].signature(tool)
            rules = () if tool in BUILT_IN else _rules_of(self.parts, tool)
            if rules:
                # Of whichever part: what is spelled for none of them slips past the deny of one.
                found = implied_by(tool, rules)
            if len(self._signatures) >= MAX_NAMES:
                self._signatures.clear()
            self._signatures[tool] = found
            return found

    def for_role(self, name: str | None) -> Judged:
        """Return what is judged in a session of this role; see `judged_in_role`."""
        return judged_in_role(self, name)


def _common_profiles(
    mine: Mapping[str, Profile], theirs: Mapping[str, Profile]
) -> Mapping[str, Profile]:
    return {
        name: narrow_profiles(mine[name], theirs[name])
        for name in mine
        if name in theirs and mine[name].engine is theirs[name].engine
    }


def both(
    policy: Judged, narrowing: Judged, *, servers: Mapping[str, Server] | None = None
) -> NarrowedPolicy:
    """Join a policy with one that may only narrow it, for example a project's own.

    Unless ``servers`` are given they are those of the first: what narrows may be anybody's, and
    names no command to run, nobody to send checkpoints to and nothing to erase. PolicyError where
    they are for two workspaces or take one argument for two things.
    """
    chosen = policy.servers if servers is None else servers
    trace = join_terms(policy.trace, narrowing.trace, operators=servers is not None)
    return narrowed((*policy.parts, *narrowing.parts), servers=chosen, trace=trace)


def narrowed(
    parts: Sequence[Policy], *, servers: Mapping[str, Server], trace: TraceTerms
) -> NarrowedPolicy:
    """Join policies of one workspace, the widest first; PolicyError where they do not fit."""
    joined = NarrowedPolicy(parts=tuple(parts), servers=servers, trace=trace)
    first = parts[0]
    for part in parts[1:]:
        if part.workspace != first.workspace:
            raise PolicyError(
                f"it is for the workspace {part.workspace!r}, yours for {first.workspace!r}",
                file=part.file,
                code="policy.workspace",
                hint="run in one workspace, or name it with --workspace",
            )
    check_kinds(parts)
    return joined


def check_kinds(parts: Sequence[Policy]) -> None:
    """Raise PolicyError where the rules of all parts take one argument for two things."""
    try:
        for tool in dict.fromkeys(tool for part in parts for tool in part.tools):
            if tool not in BUILT_IN:
                implied_by(tool, _rules_of(parts, tool))
        wildcards = [
            (item, implied_by(item.pattern.pattern, item.all).arguments)
            for part in parts
            for item in part.wildcards
        ]
        for (one, mine), (other, theirs) in itertools.combinations(wildcards, 2):
            clash = _clash(mine, theirs) or _reads(one, theirs) or _reads(other, mine)
            if clash and one.pattern.overlaps(other.pattern.pattern):
                implied_by(one.pattern.pattern, one.all + other.all)
    except KindConflict as error:
        raise PolicyError(
            str(error),
            file=error.rule.file,
            line=error.rule.position.line,
            column=error.rule.position.column,
            hint=error.hint,
        ) from error


def _clash(mine: Mapping[str, Argument], theirs: Mapping[str, Argument]) -> bool:
    return any(
        merge_kinds(mine[name].kind, theirs[name].kind) is None
        for name in mine.keys() & theirs.keys()
    )


def _reads(wildcard: Wildcard, theirs: Mapping[str, Argument]) -> bool:
    """Tell whether a `when` asks for what other rules say has several spellings."""
    return any(
        name in theirs and theirs[name].kind in SPELLED
        for rule in wildcard.all
        for name in rule.reads
    )


def _rules_of(parts: Sequence[Policy], tool: str) -> tuple[Rule, ...]:
    found = (part.rules_of(tool) for part in parts)
    return tuple(rule for rules in found if rules for rule in rules.all)


def judged_in_role(judged: Judged, name: str | None) -> Judged:
    """Return what is judged in a session of this role, or in one without a role.

    A role that narrows another is judged with it, and both must agree. A part without roles
    holds for every role, as a policy for all of them does.
    """
    if name is None:
        return judged
    if not any(part.roles for part in judged.parts):
        raise _unknown_role(judged.parts[-1], name)
    parts = [step for part in judged.parts for step in _in_role(part, name)]
    if len(parts) == 1:
        return parts[0]
    return narrowed(parts, servers=judged.servers, trace=judged.trace)


def _in_role(part: Policy, name: str) -> list[Policy]:
    """Return a part in a role, after the roles that it stays within."""
    if not part.roles:
        return [part]
    steps: list[Policy] = []
    next_name: str | None = name
    # INVARIANT: assembly refused chains that never end.
    while next_name is not None:
        role = part.roles.get(next_name)
        if role is None:
            raise _unknown_role(part, next_name)
        steps.append(
            replace(part, tools=role.tools, wildcards=role.wildcards, role=role.name, roles={})
        )
        next_name = role.narrows
    return steps[::-1]


def _unknown_role(part: Policy, name: str) -> PolicyError:
    return PolicyError(
        f"there is no role {name!a}",
        file=part.file,
        code="policy.unknown_role",
        hint=did_you_mean(name, part.roles),
    )
