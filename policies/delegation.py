"""Capabilities that are handed on: to a sub-agent, for a while, never wider than what is held.

A Capability holds policies that must all agree, and what is joined to it is one more of them. So
whatever `attenuate` is given, the worst it can do is refuse. It lasts until it expires or it, or
one that it came from, is revoked in this process.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from safeconduct.call import Bound, Decision, Document, Effect, Facts, Per, Profile
from safeconduct.errors import Denied, PolicyError

from .bounds import MAX_AMOUNT
from .capability import both, narrow_profiles
from .decision import decide, shown_grants
from .hiding import hides, is_hidden
from .rules import Judged, Policy
from .shell.commands import parts_of
from .signatures import Signature
from .wildcards import compile_tool_pattern

if TYPE_CHECKING:
    from .lattice.difference import Widening

# LIMIT: how often a Capability may be handed on.
MAX_DEPTH: Final = 16
_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9_*-]+(?:\.[A-Za-z0-9_*-]+)*", re.ASCII)


class Revocations:
    """Which Capabilities of this process were taken back. Safe to use from several threads."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._lock = threading.Lock()

    def revoke(self, capability: Capability) -> None:
        """Take back a Capability and all that came from it; at once, and for good."""
        with self._lock:
            self._ids.add(capability.id)

    def first_of(self, ids: Iterable[str]) -> str | None:
        """Return the first of some ids that was revoked."""
        with self._lock:
            return next((one for one in ids if one in self._ids), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """The right to make a set of Calls.

    ``policy`` is judged as it is: its role is chosen already. ``tools`` has for each step of the
    delegation the names that it was narrowed to, also those of redirections in shell text, which
    are `fs.read` and `fs.write`. ``profile`` bounds where Calls run, and ``bounds``
    what they may use together with those of every other Capability that has the same Bound.
    ``expires_ms`` is wall clock time (Unix). ``lineage`` are the ids of those it came from.
    """

    id: str
    policy: Judged
    revocations: Revocations
    tools: tuple[tuple[str, ...], ...] = ()
    profile: Profile | None = None
    bounds: tuple[Bound, ...] = ()
    expires_ms: int | None = None
    lineage: tuple[str, ...] = ()

    def decide(self, document: Document, facts: Facts) -> Decision:
        """Judge a Document as `decide` does, within this Capability. Never raises.

        ``facts.now_ms`` must be known where the Capability expires.
        """
        refusal = self._refusal(document, facts)
        if refusal is not None:
            return self._denied(*refusal)
        decision = decide(self.policy, document, facts)
        if decision.effect is Effect.DENY or decision.profile is None:
            return decision
        try:
            profile = self._narrowed(decision.profile)
        except Denied as denied:
            return self._denied(denied.code, denied.message)
        if self.profile is not None and _names_hidden(self.policy, profile, document, facts):
            return self._denied("path.hidden", "the profile hides this path")
        return replace(decision, profile=profile, obligations=(*decision.obligations, *self.bounds))

    def _refusal(self, document: Document, facts: Facts) -> tuple[str, str] | None:
        revoked = self.revocations.first_of((self.id, *self.lineage))
        if revoked is not None:
            return "capability.revoked", f"the capability {revoked} was revoked"
        if self.expires_ms is not None and not 0 < facts.now_ms < self.expires_ms:
            return "capability.expired", f"the capability {self.id} has expired"
        # The redirections of shell text read and write files, as calls of their own.
        used = {document.tool, *(part.document.tool for part in parts_of(document))}
        for names in self.tools:
            patterns = [compile_tool_pattern(name) for name in names]
            if not all(any(one.matches(tool) for one in patterns) for tool in used):
                return "capability.tool", f"the capability {self.id} is not for this tool"
        return None

    def _narrowed(self, profile: Profile) -> Profile:
        return profile if self.profile is None else narrow_profiles(profile, self.profile)

    def _denied(self, code: str, why: str) -> Decision:
        return Decision(
            effect=Effect.DENY,
            policy=self.policy.version,
            code=code,
            reason=f"Denied ({code}): {why}.",
        )


def attenuate(
    parent: Capability,
    *,
    id: str,
    tools: Sequence[str] | None = None,
    policy: Judged | None = None,
    profile: Profile | None = None,
    bounds: Sequence[Bound] = (),
    expires_ms: int | None = None,
) -> Capability:
    """Return what is left of a Capability under further restrictions; it never allows more.

    ``tools`` are names, in which `*` stands for part of a word. ``policy`` must be for the same
    workspace. Each Bound is counted under this id, beside those of the parent.
    Raise PolicyError ``capability.invalid`` for what cannot be meant, ``policy.*`` where the two
    policies do not fit, Denied ``policy.profile_conflict`` where the profiles do not.
    """
    if not _ID.fullmatch(id) or id in (parent.id, *parent.lineage):
        raise _invalid(f"{id!a} is not a new id", "use letters, digits, _, . and -, and a new id")
    if len(parent.lineage) + 1 > MAX_DEPTH - 1:
        raise _invalid("it was handed on too often", f"a capability is {MAX_DEPTH} steps deep")
    if not all(_is_meant(bound) for bound in bounds):
        raise _invalid("a bound bounds nothing", f"give amounts from 1 to {MAX_AMOUNT}")
    if expires_ms is not None and expires_ms <= 0:
        raise _invalid("it would never have been valid", "give the time in ms since 1970")
    profiles = [one for one in (parent.profile, profile) if one is not None]
    expiries = [one for one in (parent.expires_ms, expires_ms) if one is not None]
    return Capability(
        id=id,
        policy=parent.policy if policy is None else both(parent.policy, policy),
        revocations=parent.revocations,
        tools=parent.tools if tools is None else (*parent.tools, _names(tools)),
        profile=functools.reduce(narrow_profiles, profiles) if profiles else None,
        bounds=(*parent.bounds, *(replace(one, id=f"{id}/{one.id}") for one in bounds)),
        expires_ms=min(expiries, default=None),
        lineage=(*parent.lineage, parent.id),
    )


def beyond(held: Capability, asked: Judged) -> tuple[Widening, ...]:
    """Return what of a policy that is asked for would not count, as it is not held."""
    # Comparing policies is rare, and what it takes need not be loaded with every other use.
    from .lattice.difference import difference

    return difference(held.policy, asked)


def _names(tools: Sequence[str]) -> tuple[str, ...]:
    for name in tools:
        if not _NAME.fullmatch(name) or "**" in name:
            raise _invalid(f"{name!a} is not the name of a tool", "write for example fs.read")
    return tuple(tools)


def _is_meant(bound: Bound) -> bool:
    window = bound.window_ms is not None and bound.window_ms > 0
    amounts = 0 <= bound.most <= MAX_AMOUNT and 0 < bound.reserve <= MAX_AMOUNT
    return amounts and window is (bound.per is Per.WINDOW)


def _invalid(message: str, hint: str) -> PolicyError:
    return PolicyError(message, code="capability.invalid", hint=hint)


def _names_hidden(policy: Judged, profile: Profile, document: Document, facts: Facts) -> bool:
    """Tell whether a path that the Call names is one that the profile hides."""
    for one in (document, *(part.document for part in parts_of(document))):
        signature = policy.signature(one.tool) or Signature()
        if not signature.closed:
            return any(_hides_all(part, profile, one, facts) for part in policy.parts)
        if any(is_hidden(profile, one.arguments.get(name)) for name in signature.paths):
            return True
    return False


def _hides_all(part: Policy, profile: Profile, document: Document, facts: Facts) -> bool:
    """Tell whether a profile hides a path of every rule that grants a Call of a foreign tool."""
    granting = shown_grants(part, document, facts)
    signature = part.signature(document.tool) or Signature()
    return bool(granting) and all(hides(profile, rule, document, signature) for rule in granting)
