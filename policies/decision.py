"""Step 3 of the path of one Call: the Document is judged. Pure: no I/O, no clock, no state.

Deny beats ask beats allow and the order of rules never matters. A Call is allowed when some
rule grants it and none restricts it; what is not granted is denied. Two denials stand above
every policy: our tools never write protected files, nor touch what the profile hides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

from safeconduct.call import Bound, Decision, Document, Effect, Enforcement, Facts, Json, Profile
from safeconduct.errors import Denied

from .advice import smallest_grant
from .capability import narrow_profiles
from .globs import hidden_by, hides_folder
from .protected import is_protected
from .rules import MAX_DECIDED, Judged, Policy, Rule, ToolRules
from .shell.commands import holds_commands, judge_commands
from .signatures import BUILT_IN, Kind, Signature
from .when.condition import when_facts

_SEVERITY = {Effect.ALLOW: 0, Effect.ASK: 1, Effect.DENY: 2}
# Bound once: each look-up of a member of an enumeration takes as long as a comparison.
_ALLOW, _DENY = Effect.ALLOW, Effect.DENY
_PATHS = frozenset({Kind.PATH, Kind.NEW_PATH, Kind.TOOL_PATH})

# Nothing is known but the Document: a `when` that asks for more cannot be judged.
NO_FACTS: Final = Facts()


def decide(policy: Judged, document: Document, facts: Facts = NO_FACTS) -> Decision:
    """Judge a Document. Never raises: what cannot be judged is denied `policy.error`.

    ``policy`` is that of the session's role (`Judged.for_role`).
    """
    try:
        if "commands" in document.arguments and holds_commands(document):
            return judge_commands(policy, document, lambda one: _decide(policy, one, facts))
        parts = policy.parts
        if len(parts) == 1:
            return _judge(parts[0], document, facts)
        return _decide(policy, document, facts)
    except Exception as error:
        # Fail closed: a bug of ours must never allow.
        return Decision(
            effect=Effect.DENY,
            policy=policy.version,
            code="policy.error",
            reason="Denied: the call could not be judged.",
            advice=f"this is a bug of ours, please report it: {type(error).__name__}",
        )


def _decide(policy: Judged, document: Document, facts: Facts) -> Decision:
    verdicts = [_judge(part, document, facts) for part in policy.parts]
    if len(verdicts) == 1:
        return verdicts[0]
    return _strictest(policy, document, verdicts)


class Known:
    """What the `when` of a rule may ask for, put together when the first rule asks."""

    __slots__ = ("_document", "_facts", "_named")

    def __init__(self, document: Document, facts: Facts) -> None:
        self._document, self._facts = document, facts
        self._named: Mapping[str, Json] | None = None

    def surely_holds(self, rule: Rule) -> bool:
        """Tell whether the rule has no `when`, or one that holds."""
        return rule.when is None or rule.holds(self.named) is True

    def may_hold(self, rule: Rule) -> bool:
        """Tell whether the rule has no `when`, or one that holds or cannot be judged."""
        return rule.when is None or rule.holds(self.named) is not False

    @property
    def named(self) -> Mapping[str, Json]:
        """The facts by their names in the language."""
        if self._named is None:
            self._named = when_facts(self._document.arguments, self._facts)
        return self._named


def _strictest(policy: Judged, document: Document, verdicts: Sequence[Decision]) -> Decision:
    """Join the verdicts of policies that must all agree."""
    worst = max(verdicts, key=lambda verdict: _SEVERITY[verdict.effect])
    if worst.effect is Effect.DENY:
        return replace(worst, policy=policy.version)
    profile = _narrow(verdict.profile for verdict in verdicts if verdict.profile)
    if isinstance(profile, Denied):
        return _denied(policy, document, profile.code, profile.message)
    return replace(
        worst,
        policy=policy.version,
        rules=tuple(rule for verdict in verdicts for rule in verdict.rules),
        profile=profile,
        obligations=_counted_apart(verdict.obligations for verdict in verdicts),
    )


def _counted_apart(obligations: Iterable[tuple[Bound, ...]]) -> tuple[Bound, ...]:
    """Join the obligations of several parts; two files may use one rule id for two rules."""
    return tuple(
        replace(bound, id=f"{part}/{bound.id}") if part else bound
        for part, bounds in enumerate(obligations)
        for bound in bounds
    )


def _judge(policy: Policy, document: Document, facts: Facts) -> Decision:
    """Judge by one policy."""
    if document.workspace != policy.workspace:
        return _denied(policy, document, "policy.workspace", "it is for another workspace")
    tool = policy.rules_of(document.tool)
    if tool is None:
        return _not_granted(policy, document, BUILT_IN.get(document.tool))
    arguments, signature = document.arguments, tool.signature
    denying, granting, asking = _sort(policy, tool, document, facts)
    if denying:
        return _remembered(policy, document, denying, _denied_by)
    for name in signature.writes:
        if is_protected(str(arguments.get(name, ""))):
            return _denied(policy, document, "path.protected", "this file decides what runs later")
    if not granting:
        return _not_granted(policy, document, signature)
    if not asking:
        decision = _remembered(policy, document, granting, _allowed)
    else:
        # Those that ask decide, with a grant if they are none themselves.
        granted_by = {rule.id for rule in granting}
        own = any(rule.id in granted_by for rule in asking)
        decision = _remembered(policy, document, asking if own else asking + granting, _asked)
    profile = decision.profile
    if profile and profile.hide and _names_hidden(profile, document, signature):
        return _denied(policy, document, "path.hidden", "the profile hides this path")
    return decision


def _sort(
    policy: Policy, tool: ToolRules, document: Document, facts: Facts
) -> tuple[list[Rule], list[Rule], list[Rule]]:
    """Return the rules that deny, those that grant, and those that ask."""
    arguments = document.arguments
    candidates = tool.candidates(arguments)
    if len(candidates) == 1 and candidates[0].effect is _ALLOW and candidates[0].when is None:
        # What nearly every Call that is allowed meets.
        grants = candidates[0].grants(arguments, tool.signature, policy.workspace)
        return [], [candidates[0]] if grants else [], []
    known = Known(document, facts)
    denying: list[Rule] = []
    granting: list[Rule] = []
    asking: list[Rule] = []
    for rule in candidates:
        effect = rule.effect
        if effect is not _DENY:
            grants = rule.grants(arguments, tool.signature, policy.workspace)
            if grants and (rule.when is None or known.surely_holds(rule)):
                granting.append(rule)
        if effect is _ALLOW or not rule.restricts(arguments):
            continue
        if rule.when is None or known.may_hold(rule):
            (denying if effect is _DENY else asking).append(rule)
    return denying, granting, asking


_Make: TypeAlias = "Callable[[Policy, Document, list[Rule]], Decision]"


def _remembered(policy: Policy, document: Document, rules: list[Rule], make: _Make) -> Decision:
    """Make a Decision, or find the one of the same rule for the same tool.

    INVARIANT: ``make`` reads nothing of the Document but the name of its tool.
    """
    if len(rules) > 1:
        return make(policy, document, rules)
    key = (document.tool, rules[0].id, make)
    found = policy.decided.get(key)
    if found is None:
        if len(policy.decided) >= MAX_DECIDED:
            policy.decided.clear()
        found = policy.decided[key] = make(policy, document, rules)
    return found


def _allowed(policy: Policy, document: Document, rules: list[Rule]) -> Decision:
    return _granted(policy, document, rules, asks=False)


def _asked(policy: Policy, document: Document, rules: list[Rule]) -> Decision:
    return _granted(policy, document, rules, asks=True)


def _granted(policy: Policy, document: Document, rules: list[Rule], *, asks: bool) -> Decision:
    # Several grants with several profiles: the Call gets what all of them give, because
    # any other choice would depend on the order of the rules.
    profile = _narrow(policy.profile_of(rule) for rule in rules)
    if isinstance(profile, Denied):
        return _denied(policy, document, profile.code, profile.message)
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
        enforcement=_enforcement(document.tool),
        obligations=_obligations(rules),
    )


def _obligations(rules: list[Rule]) -> tuple[Bound, ...]:
    if not any(rule.bounds for rule in rules):
        return ()
    # One written rule may be several compiled ones, and is counted once.
    found = {bound.id: bound for rule in rules for bound in rule.bounds}
    return tuple(found[name] for name in sorted(found))


def _ids(rules: list[Rule]) -> tuple[str, ...]:
    return (rules[0].id,) if len(rules) == 1 else tuple(sorted({rule.id for rule in rules}))


def _narrow(profiles: Iterable[Profile]) -> Profile | Denied:
    first, *others = profiles
    if not others:
        return first
    try:
        return functools.reduce(narrow_profiles, others, first)
    except Denied as denied:
        return denied


def _names_hidden(profile: Profile, document: Document, signature: Signature) -> bool:
    for name, argument in signature.arguments.items():
        if argument.kind not in _PATHS:
            continue
        value = document.arguments.get(name)
        if value == document.workspace:
            hidden = hides_folder(profile.hide, document.workspace)
        else:
            hidden = _is_hidden(profile, value)
        if hidden:
            return True
    return False


def _is_hidden(profile: Profile, value: Json) -> bool:
    if isinstance(value, str):
        return hidden_by(profile.hide, value)
    return isinstance(value, list | tuple) and any(_is_hidden(profile, item) for item in value)


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


def _not_granted(policy: Policy, document: Document, signature: Signature | None) -> Decision:
    section = f"roles.{policy.role}" if policy.role else "tools"
    return Decision(
        effect=Effect.DENY,
        policy=policy.version,
        code="policy.no_rule",
        reason=f"Denied (policy.no_rule): no rule grants {document.tool} with these arguments.",
        advice=f"under {section} in {policy.file} add  {smallest_grant(document, signature)}",
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
