"""Step 3 of the path of one Call: the Document is judged. Pure: no I/O, no clock, no state.

Deny beats ask beats allow and the order of rules never matters. A Call is allowed when some
rule grants it and none restricts it; what is not granted is denied. Two denials stand above
every policy: our tools never write protected files, nor touch what the profile hides.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from safeconduct.call import Decision, Document, Effect, Enforcement, Json, Profile
from safeconduct.errors import Denied

from .capability import narrow_profiles
from .globs import hidden_by
from .match import scalar_text
from .protected import is_protected
from .rules import Judged, Policy, Rule
from .signatures import BUILT_IN, Kind, Signature

_SEVERITY = {Effect.ALLOW: 0, Effect.ASK: 1, Effect.DENY: 2}
_PATHS = frozenset({Kind.PATH, Kind.NEW_PATH, Kind.TOOL_PATH})
_SPECIAL = str.maketrans(dict.fromkeys("*[]{}\\", "?"))


def decide(policy: Judged, document: Document) -> Decision:
    """Judge a Document. Never raises: what cannot be judged is denied `policy.error`."""
    try:
        verdicts = [_judge(part, document) for part in policy.parts]
        if len(verdicts) == 1:
            return verdicts[0]
        return _strictest(policy, document, verdicts)
    except Exception as error:
        # Fail closed: a bug of ours must never allow.
        return Decision(
            effect=Effect.DENY,
            policy=policy.version,
            code="policy.error",
            reason="Denied: the call could not be judged.",
            advice=f"this is a bug of ours, please report it: {type(error).__name__}",
        )


def _strictest(policy: Judged, document: Document, verdicts: Sequence[Decision]) -> Decision:
    """Join the verdicts of policies that must all agree."""
    worst = max(verdicts, key=lambda verdict: _SEVERITY[verdict.effect])
    if worst.effect is Effect.DENY:
        return replace(worst, policy=policy.version)
    profile = _narrow(verdict.profile for verdict in verdicts if verdict.profile)
    if isinstance(profile, Denied):
        return _denied(policy, document, profile.code, profile.message)
    rules = tuple(rule for verdict in verdicts for rule in verdict.rules)
    return replace(worst, policy=policy.version, rules=rules, profile=profile)


def _judge(policy: Policy, document: Document) -> Decision:
    """Judge by one policy."""
    if document.workspace != policy.workspace:
        return _denied(policy, document, "policy.workspace", "it is for another workspace")
    tool = policy.tools.get(document.tool)
    if tool is None:
        return _not_granted(policy, document)
    arguments, signature = document.arguments, tool.signature
    denies = [rule for rule in tool.deny if rule.restricts(arguments)]
    if denies:
        return _denied_by(policy, document, denies)
    for name in signature.writes:
        if is_protected(str(arguments.get(name, ""))):
            return _denied(policy, document, "path.protected", "this file decides what runs later")
    granting = [
        rule
        for rule in tool.allow + tool.ask
        if rule.grants(arguments, signature, policy.workspace)
    ]
    if not granting:
        return _not_granted(policy, document)
    asking = [rule for rule in tool.ask if rule.restricts(arguments)]
    return _granted(policy, document, signature, _deciding(granting, asking), bool(asking))


def _deciding(granting: list[Rule], asking: list[Rule]) -> list[Rule]:
    """Return the rules that decide: those that ask, with a grant if they are none themselves."""
    if not asking:
        return granting
    if any(rule in granting for rule in asking):
        return asking
    return asking + granting


def _granted(
    policy: Policy, document: Document, signature: Signature, rules: list[Rule], asks: bool
) -> Decision:
    # Several grants with several profiles: the Call gets what all of them give, because
    # any other choice would depend on the order of the rules.
    profile = _narrow(policy.profile_of(rule) for rule in rules)
    if isinstance(profile, Denied):
        return _denied(policy, document, profile.code, profile.message)
    if profile.hide and _names_hidden(profile, document, signature):
        return _denied(policy, document, "path.hidden", "the profile hides this path")
    names = _ids(rules)
    effect, said = (Effect.ASK, "asks a person") if asks else (Effect.ALLOW, "allows this")
    return Decision(
        effect=effect,
        policy=policy.version,
        code=f"policy.{effect}",
        reason=f"Rule {names[0]} {said}.",
        rules=names,
        advice=f"decided at {_places(rules)}" if asks else "",
        profile=profile,
        enforcement=signature.enforcement,
    )


def _ids(rules: list[Rule]) -> tuple[str, ...]:
    return (rules[0].id,) if len(rules) == 1 else tuple(sorted(rule.id for rule in rules))


def _narrow(profiles: Iterable[Profile]) -> Profile | Denied:
    first, *others = profiles
    if not others:
        return first
    try:
        return functools.reduce(narrow_profiles, others, first)
    except Denied as denied:
        return denied


def _names_hidden(profile: Profile, document: Document, signature: Signature) -> bool:
    return any(
        argument.kind in _PATHS and _is_hidden(profile, document.arguments.get(name))
        for name, argument in signature.arguments.items()
    )


def _is_hidden(profile: Profile, value: Json) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_hidden(profile, item) for item in value)
    return isinstance(value, str) and hidden_by(profile.hide, value)


def _enforcement(tool: str) -> Enforcement:
    signature = BUILT_IN.get(tool)
    return signature.enforcement if signature else Enforcement.SANDBOX


def _denied(policy: Judged, document: Document, code: str, why: str) -> Decision:
    return Decision(
        effect=Effect.DENY,
        policy=policy.version,
        code=code,
        reason=f"Denied ({code}): {why}.",
        advice=_ADVICE.get(code, ""),
        enforcement=_enforcement(document.tool),
    )


def _denied_by(policy: Policy, document: Document, rules: list[Rule]) -> Decision:
    names = _ids(rules)
    return Decision(
        effect=Effect.DENY,
        policy=policy.version,
        code="policy.deny",
        reason=f"Denied by rule {names[0]}.",
        rules=names,
        advice=f"remove or narrow the rule at {_places(rules)}",
        enforcement=_enforcement(document.tool),
    )


def _not_granted(policy: Policy, document: Document) -> Decision:
    return Decision(
        effect=Effect.DENY,
        policy=policy.version,
        code="policy.no_rule",
        reason=f"Denied (policy.no_rule): no rule grants {document.tool} with these arguments.",
        advice=f"under tools in {policy.file} add  {smallest_grant(document)}",
        enforcement=_enforcement(document.tool),
    )


def _places(rules: list[Rule]) -> str:
    return ", ".join(sorted({rule.where for rule in rules}))


_ADVICE = {
    "path.protected": "nothing in a policy lifts this; make the change yourself",
    "path.hidden": "take the pattern out of hide in the profile of the rule",
    "policy.profile_conflict": "give the rules that match this call profiles of one engine",
    "policy.workspace": "run it in the workspace the policy was loaded for",
}


def smallest_grant(document: Document) -> str:
    """Write the rule that would allow this Call and as little else as the language can say."""
    signature = BUILT_IN.get(document.tool)
    named: dict[str, object] = {}
    for name, value in document.arguments.items():
        if signature and signature.may_be_unnamed(name, value, document.workspace):
            continue
        kind = signature.arguments[name].kind if signature else Kind.JSON
        named[name] = _smallest_matcher(kind, value, document.workspace)
    # YAML reads JSON, so whatever an agent put into an argument stays inside its quotes.
    return f"{document.tool}: {json.dumps({'allow': named})}"


def _smallest_matcher(kind: Kind, value: Json, workspace: str) -> object:
    if kind in _PATHS and isinstance(value, str):
        inside = value.startswith(workspace + "/")
        path = "$WS" + value[len(workspace) :] if inside else value
        return [path.translate(_SPECIAL)]
    if kind is Kind.URL and isinstance(value, str):
        return [value.translate(_SPECIAL)]
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return list(value)
    text = scalar_text(value)
    return "any" if text is None else [text]
