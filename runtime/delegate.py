"""Step "decide": a sub-agent makes Calls with less than the session that it belongs to may.

What it is handed is a Capability (policies/delegation.py): it can be handed on narrower, never
wider, it expires, and it can be taken back at any time with all that came from it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from safeconduct.call import Bound, Call, Json, Outcome, Profile
from safeconduct.errors import LimitExceeded
from safeconduct.policies import Capability, Judged, Revocations, attenuate

from .pipeline import Pipeline
from .standing import Delegated, Standing
from .threads import in_thread
from .tools.task import Sink


class Delegate:
    """Makes the Calls of a sub-agent, named as their caller in the Trace. Safe to use from threads.

    It belongs to the Runtime that it came from and ends with it.
    """

    def __init__(self, pipeline: Pipeline, session: str, standing: Delegated) -> None:
        """Take over what ``hand_on`` made; use ``Runtime.delegate``."""
        self._pipeline, self._session, self._standing = pipeline.of(standing), session, standing

    @property
    def capability(self) -> Capability:
        """What it holds."""
        return self._standing.capability

    def call(self, tool: str, /, **arguments: Json) -> Outcome:
        """Judge, run and record one Call; blocks. Raises as ``Runtime.call`` does.

        Besides the policy's codes Denied has ``capability.tool``, ``.profile``, ``.expired``
        and ``.revoked``.
        """
        call = Call(id=secrets.token_hex(8), tool=tool, arguments=arguments, session=self._session)
        return result(self.perform(call))

    async def acall(self, tool: str, /, **arguments: Json) -> Outcome:
        """Do what ``call`` does in a worker thread; see ``Runtime.acall``."""
        return await in_thread(self, lambda: self.call(tool, **arguments))

    def perform(self, call: Call, *, sink: Sink | None = None) -> Outcome:
        """Take a Call along the pipeline; an Outcome with a limit is returned, not raised."""
        return self._pipeline.perform(replace(call, caller=self.capability.id), sink=sink)

    def delegate(
        self,
        name: str,
        *,
        tools: Sequence[str] | None = None,
        policy: Judged | None = None,
        profile: Profile | None = None,
        bounds: Sequence[Bound] = (),
        lasts_ms: int | None = None,
    ) -> Delegate:
        """Hand on less of what it holds; see ``Runtime.delegate``."""
        held = attenuate(
            self.capability, id=name, tools=tools, policy=policy, profile=profile, bounds=bounds,
            expires_ms=None if lasts_ms is None else int(time.time() * 1000) + lasts_ms,
        )  # fmt: skip
        return Delegate(self._pipeline, self._session, Delegated(self._standing.session, held))

    def revoke(self) -> None:
        """Take it back, with all that came from it: no Call begins any more."""
        self.capability.revocations.revoke(self.capability)


def whole(pipeline: Pipeline, session: str, standing: Standing) -> Delegate:
    """Return what holds all that a session may, for others to be narrowed from."""
    held = Capability(id=f"session-{session}", policy=standing.policy, revocations=Revocations())
    return Delegate(pipeline, session, Delegated(standing, held))


def result(outcome: Outcome) -> Outcome:
    """Return an Outcome, or raise LimitExceeded with it where a limit ended the Call."""
    if outcome.limit is not None:
        raise LimitExceeded(
            f"The call was ended by its {outcome.limit} limit.",
            limit=outcome.limit,
            outcome=outcome,
        )
    return outcome
