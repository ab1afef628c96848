"""Step "decide": what a session is judged by: the policy in force, its role, what it did so far."""

from __future__ import annotations

import functools
import ipaddress
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import urlsplit

from safeconduct.call import Call, Decision, Document, Effect, Enforcement, Facts, Profile
from safeconduct.errors import Denied, PolicyError
from safeconduct.policies import (
    BUILT_IN,
    Capability,
    Judged,
    Kind,
    Signature,
    as_observed,
    both,
    decide,
    hidden_by,
    is_protected,
    narrow_profiles,
)  # fmt: skip

from .sandbox.layout import inside

# What an observing runtime lets run although nothing grants it. A deny that somebody wrote, what
# stands above every policy, and what could not be judged are not among it.
_OBSERVED = frozenset({"policy.allow", "policy.no_rule", "policy.ask"})
_PATHS = frozenset({Kind.PATH, Kind.NEW_PATH})


class Standing:
    """The policy in force and the facts of one session. Safe to use from several threads.

    ``watch`` is asked before each Call and may call ``adopt``.
    """

    def __init__(
        self,
        policy: Judged,
        *,
        role: str | None = None,
        observe: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin with a policy; PolicyError where it has no such role."""
        self._lock = threading.Lock()
        self._role, self._observe, self._clock = role, observe, clock
        self._calls = self._denied = 0
        self._policy = self.of_role(policy)
        self.watch: Callable[[], object] = lambda: None

    @property
    def policy(self) -> Judged:
        """What is judged by now; a Call keeps the one that it began with."""
        return self._policy

    def adopt(self, policy: Judged) -> None:
        """Judge every later Call by another policy; PolicyError where the role is gone."""
        self._policy = self.of_role(policy)

    def begin(self, call: Call) -> tuple[Judged, Facts]:
        """Return what one more Call is judged by, from its beginning to its end."""
        self.watch()
        with self._lock:
            facts = Facts(
                role=self._role,
                caller=call.caller,
                origin=call.origin,
                calls=self._calls,
                denied=self._denied,
                now_ms=self._now_ms(),
            )
            self._calls += 1
        return self._policy, facts

    def later(self, facts: Facts) -> Facts:
        """Return the facts of a Call that has waited."""
        return replace(facts, now_ms=self._now_ms())

    @property
    def unknown(self) -> Signature | None:
        """What a tool that the policy does not speak of is taken for; None: it is refused."""
        return Signature(closed=False) if self._observe else None

    def refused(self) -> None:
        """Count a Call that was denied."""
        with self._lock:
            self._denied += 1

    def decide(self, policy: Judged, document: Document, facts: Facts) -> Decision:
        """Judge a Document by what ``begin`` returned. Never raises.

        Where this session only observes, what nothing grants runs all the same, in the profile that
        Calls get which name none; that one is enforced.
        """
        decision = decide(policy, document, facts)
        if not self._observe or decision.effect is Effect.ALLOW:
            return decision
        # Where several parts refuse, the code is that of the first; a later one may have a rule.
        verdicts = [decide(part, document, facts) for part in policy.parts]
        if not _OBSERVED.issuperset([decision.code, *(one.code for one in verdicts)]):
            return decision
        profile = decision.profile or _default_profile(policy)
        # No rule has named what they would open.
        beyond = not _reaches(profile, document) or _spells_address(document)
        if decision.effect is Effect.DENY and beyond:
            return decision
        return as_observed(policy, document, decision, verdicts, profile)

    def of_role(self, policy: Judged) -> Judged:
        """Return what of a policy judges this session; PolicyError where it has no such role."""
        return policy.for_role(self._role)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


class Delegated:
    """What a sub-agent of a session is judged by: the session's policy and its own Capability."""

    def __init__(self, session: Standing, capability: Capability) -> None:
        self.session, self.capability = session, capability
        self._held = capability.policy, capability

    @property
    def policy(self) -> Judged:
        """What the session is judged by now."""
        return self.session.policy

    @property
    def unknown(self) -> None:
        """A sub-agent is granted what it may do, and never only observed."""

    def begin(self, call: Call) -> tuple[Judged, Facts]:
        """Count the Call as one of the session's; what judges it is also what spells its values.

        Where the two policies do not fit, ``decide`` refuses.
        """
        policy, facts = self.session.begin(call)
        try:
            return self._within(policy).policy, facts
        except PolicyError:
            return policy, facts

    def refused(self) -> None:
        """Count a Call that was denied."""
        self.session.refused()

    def later(self, facts: Facts) -> Facts:
        """Return the facts of a Call that has waited."""
        return self.session.later(facts)

    def decide(self, policy: Judged, document: Document, facts: Facts) -> Decision:
        """Judge within the Capability, and by what has come into force since it was handed on."""
        try:
            held = self._within(policy)
        except PolicyError as error:
            return _denied(policy, "capability.policy", error.message)
        decision = held.decide(document, facts)
        bound = self.capability.profile
        if decision.effect is Effect.DENY or _reaches(bound, document):
            return decision
        return _denied(held.policy, "capability.profile", "its profile does not show this path")

    def _within(self, policy: Judged) -> Capability:
        """Return the Capability within a session's policy, which may be joined with it already."""
        judged, held = self._held
        if policy is not judged and policy is not held.policy:
            held = self._joined(policy)
            self._held = policy, held
        return held

    def _joined(self, policy: Judged) -> Capability:
        mine = self.capability.policy
        if _has_parts(mine, policy):
            return self.capability
        if _has_parts(policy, mine):
            return replace(self.capability, policy=policy)
        return replace(self.capability, policy=both(policy, mine))


def _has_parts(policy: Judged, other: Judged) -> bool:
    return all(any(part is one for one in policy.parts) for part in other.parts)


def _denied(policy: Judged, code: str, why: str) -> Decision:
    return Decision(
        effect=Effect.DENY,
        policy=policy.version,
        code=code,
        reason=f"Denied ({code}): {why}.",
    )


def _default_profile(policy: Judged) -> Profile | None:
    try:
        return functools.reduce(narrow_profiles, [part.default_profile for part in policy.parts])
    except Denied:
        return None


def _reaches(profile: Profile | None, document: Document) -> bool:
    """Tell whether our own tools would do no more than a program in this profile could.

    No sandbox is around what they open themselves.
    """
    signature = BUILT_IN.get(document.tool)
    if profile is None or signature is None or signature.enforcement is not Enforcement.OBJECT:
        return True
    return all(
        _shows(profile, str(document.arguments.get(name, "")), write=name in signature.writes)
        for name, argument in signature.arguments.items()
        if argument.kind in _PATHS
    )


def _shows(profile: Profile, path: str, *, write: bool) -> bool:
    granted = profile.write if write else (*profile.read, *profile.write)
    if hidden_by(profile.hide, path) or (write and is_protected(path)):
        return False
    return any(inside(path, folder) for folder in granted)


def _spells_address(document: Document) -> bool:
    """Tell whether http.get would go to an address that is spelled out; a rule has to name that."""
    if document.tool != "http.get":
        return False
    host = urlsplit(str(document.arguments.get("url"))).hostname or "localhost"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True
