"""Step 3 of the path of one Call: a denial says what was wrong, and what change would lift it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from safeconduct.call import Decision, Document, Effect, Enforcement

from .advice import smallest_grant
from .binding import Unfit
from .rules import Judged, Policy, Rule
from .signatures import BUILT_IN, Signature, misfit

_ADVICE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "path.protected": "nothing in a policy lifts this; make the change yourself",
        "path.hidden": "take the pattern out of hide in the profile of the rule",
        "policy.profile_conflict": "give the rules that match this call profiles of one engine",
        "policy.workspace": "run it in the workspace the policy was loaded for",
    }
)


def enforcement_of(tool: str) -> Enforcement:
    """Say how a tool is held to what was decided."""
    signature = BUILT_IN.get(tool)
    return signature.enforcement if signature else Enforcement.SANDBOX


def denied_as(policy: Judged, document: Document, code: str, why: str) -> Decision:
    """Deny a Call for what no rule says."""
    return Decision(
        effect=Effect.DENY,
        policy=policy.version,
        code=code,
        reason=f"Denied ({code}): {why}.",
        advises=_ADVICE.get(code, ""),
        enforcement=enforcement_of(document.tool),
    )


def denied_by(policy: Policy, document: Document, rules: Sequence[Rule]) -> Decision:
    """Deny a Call because of rules."""
    names = ids_of(rules)
    return Decision(
        effect=Effect.DENY,
        policy=policy.version,
        code="policy.deny",
        reason=f"Denied by rule {names[0]}.",
        rules=names,
        advises=f"remove or narrow the rule at {places_of(rules)}",
        enforcement=enforcement_of(document.tool),
    )


def not_granted(policy: Policy, document: Document, signature: Signature | None) -> Decision:
    """Deny a Call that nothing grants, and say so of an argument that fits no rule."""
    code, why = misfit(document, signature) if signature is not None else ("", "")
    why = why or f"no rule grants {document.tool} with these arguments"
    code = code or "policy.no_rule"
    return Decision(
        effect=Effect.DENY,
        policy=policy.version,
        code=code,
        reason=f"Denied ({code}): {why}.",
        # Nobody reads most of them, and to write one takes longer than all the rest.
        advises=functools.partial(_advise, policy, document, signature),
        enforcement=enforcement_of(document.tool),
    )


def _advise(policy: Policy, document: Document, signature: Signature | None) -> str:
    section = f"roles.{policy.role}" if policy.role else "tools"
    return f"under {section} in {policy.file} add  {smallest_grant(document, signature)}"


def places_of(rules: Sequence[Rule]) -> str:
    """Say where rules stand."""
    return ", ".join(sorted({rule.where for rule in rules}))


def ids_of(rules: Sequence[Rule]) -> tuple[str, ...]:
    """Return the ids of rules, each once."""
    return (rules[0].id,) if len(rules) == 1 else tuple(sorted({rule.id for rule in rules}))


def said_of(unfit: Unfit, denying: Sequence[Rule], decision: Decision) -> Decision:
    """Say what is wrong with an argument where a rule denies because it cannot judge it."""
    for code, why in (unfit[name] for rule in denying for name in rule.doubted(unfit)):
        return replace(decision, code=code, reason=f"Denied ({code}): {why}.")
    return decision
