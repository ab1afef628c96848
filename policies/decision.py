"""Step 3 of the path of one Call: the Document is judged. Pure: no I/O, no clock, no state.

Deny beats ask beats allow and the order of rules never matters. A Call is allowed when some
rule grants it and none restricts it; what is not granted is denied. Two denials stand above
every policy: our tools never write protected files, nor touch what the profile hides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

from safeconduct.call import (
    Bound,
    Decision,
    Document,
    Durability,
    Effect,
    Facts,
    Profile,
)
from safeconduct.errors import Denied

from .capability import narrow_profiles
from .hiding import hides
from .protected import is_protected
from .refusal import (
    denied_as,
    denied_by,
    enforcement_of,
    ids_of,
    not_granted,
    places_of,
    said_of,
)
from .rules import MAX_DECIDED, Judged, Policy, Rule, ToolRules
from .shell.commands import holds_commands, judge_commands
from .signatures import BUILT_IN, Signature
from .sorting import Apart, Sorted, sort
from .trace_terms import most_durable
from .work import MAX_GRANT_STEPS, MAX_STEPS, NO_BOUND, WORK, TooMuchWork, unjudged

_SEVERITY = {Effect.ALLOW: 0, Effect.ASK: 1, Effect.DENY: 2}
# Bound once: each look-up of a member of an enumeration takes as long as a comparison.
_ALLOW, _DENY = Effect.ALLOW, Effect.DENY

_Judge: TypeAlias = Callable[[Policy, Document, Facts], Decision]

# Nothing is known but the Document: a `when` that asks for more cannot be judged.
NO_FACTS: Final = Facts()


def decide(policy: Judged, document: Document, facts: Facts = NO_FACTS) -> Decision:
    """Judge a Document. Never raises: what cannot be judged is denied `policy.error`,
    and what is too much work `policy.too_much_work`.

    ``policy`` is that of the session's role (`Judged.for_role`).
    """
    WORK.left = MAX_GRANT_STEPS
    try:
        try:
            if type(policy) is Policy and "commands" not in document.arguments:
                return _judge(policy, document, facts)
            return _decide(policy, document, facts, _judge)
        except TooMuchWork:
            # More than a little: once more, with a share for each.
            WORK.left = MAX_STEPS
            return _decide(policy, document, facts, functools.partial(_judge_apart, Apart()))
    except Exception as error:
        # Fail closed: a bug of ours must never allow.
        return unjudged(policy.version, error)
    finally:
        WORK.left = NO_BOUND


def _decide(policy: Judged, document: Document, facts: Facts, judge: _Judge) -> Decision:
    if holds_commands(document):
        return judge_commands(policy, document, lambda one: _decide_one(policy, one, facts, judge))
    return _decide_one(policy, document, facts, judge)


def _decide_one(policy: Judged, document: Document, facts: Facts, judge: _Judge) -> Decision:
    verdicts = [judge(part, document, facts) for part in policy.parts]
    if len(verdicts) == 1:
        return verdicts[0]
    return _strictest(policy, document, verdicts)


def shown_grants(policy: Policy, document: Document, facts: Facts) -> list[Rule]:
    """Return the rules of one policy that grant a Call which their own profile does not hide."""
    tool = policy.rules_of(document.tool)
    if tool is None:
        return []
    candidates = tool.candidates(document.arguments, document.unfit)
    _, granting, _ = sort(policy, tool, document, facts, candidates)
    return _shown(policy, document, tool.signature, granting)


def _strictest(policy: Judged, document: Document, verdicts: Sequence[Decision]) -> Decision:
    """Join the verdicts of policies that must all agree."""
    worst = max(verdicts, key=lambda verdict: _SEVERITY[verdict.effect])
    if worst.effect is Effect.DENY:
        return replace(worst, policy=policy.version)
    profile = _narrow(verdict.profile for verdict in verdicts if verdict.profile)
    if isinstance(profile, Denied):
        return denied_as(policy, document, profile.code, profile.message)
    return replace(
        worst,
        policy=policy.version,
        rules=tuple(rule for verdict in verdicts for rule in verdict.rules),
        profile=profile,
        obligations=counted_apart(verdict.obligations for verdict in verdicts),
        durability=most_durable(verdict.durability for verdict in verdicts),
        irreversible=any(verdict.irreversible for verdict in verdicts),
    )


def counted_apart(obligations: Iterable[tuple[Bound, ...]]) -> tuple[Bound, ...]:
    """Join the obligations of several parts; two files may use one rule id for two rules."""
    return tuple(
        replace(bound, id=f"{part}/{bound.id}") if part else bound
        for part, bounds in enumerate(obligations)
        for bound in bounds
    )


def _judge(policy: Policy, document: Document, facts: Facts) -> Decision:
    """Judge by one policy.

    What nearly every Call that is allowed meets is one rule: that is judged here, as `_judge_all`
    would.
    """
    name = document.tool
    tool = policy.rules_of(name) if policy.wildcards else policy.tools.get(name)
    if tool is None or document.workspace != policy.workspace:
        return _not_judged(policy, document)
    arguments, unfit, index = document.arguments, document.unfit, tool.index
    if index is not None and unfit is None:
        candidates = index.candidates(arguments)
    else:
        candidates = tool.candidates(arguments, unfit)
    signature = tool.signature
    if len(candidates) != 1 or signature.writes:
        return _judge_all(policy, tool, document, facts, candidates)
    rule = candidates[0]
    if rule.effect is not _ALLOW or rule.when is not None:
        return _judge_all(policy, tool, document, facts, candidates)
    if not rule.grants(arguments, signature, policy.workspace, unfit):
        return not_granted(policy, document, signature)
    decision = policy.decided.get((name, rule.id, _allowed))
    if decision is None:
        decision = _remembered(policy, document, (rule,), _allowed)
    profile = decision.profile
    # A signature without paths spares the question about each argument.
    if profile is None or not (profile.hide and signature.paths):
        return decision
    if hides(profile, rule, document, signature):
        return denied_as(policy, document, "path.hidden", "the profile hides this path")
    return decision


def _not_judged(policy: Policy, document: Document) -> Decision:
    if document.workspace != policy.workspace:
        return denied_as(policy, document, "policy.workspace", "it is for another workspace")
    return not_granted(policy, document, BUILT_IN.get(document.tool))


def _judge_all(
    policy: Policy, tool: ToolRules, document: Document, facts: Facts, candidates: Sequence[Rule]
) -> Decision:
    return _verdict(policy, tool, document, sort(policy, tool, document, facts, candidates))


def _judge_apart(apart: Apart, policy: Policy, document: Document, facts: Facts) -> Decision:
    """Judge by one policy, whatever the work, with a share of it for each grant."""
    tool = policy.rules_of(document.tool)
    if tool is None or document.workspace != policy.workspace:
        return _not_judged(policy, document)
    return _verdict(policy, tool, document, apart.sort(policy, tool, document, facts))


def _verdict(policy: Policy, tool: ToolRules, document: Document, found: Sorted) -> Decision:
    denying, granting, asking = found
    if denying:
        decision = _remembered(policy, document, denying, denied_by)
        return decision if document.unfit is None else said_of(document.unfit, denying, decision)
    return _granted_by(policy, document, tool.signature, granting, asking)


def _granted_by(
    policy: Policy,
    document: Document,
    signature: Signature,
    granting: Sequence[Rule],
    asking: Sequence[Rule] = (),
) -> Decision:
    """Judge a Call that no rule denies, by the rules that grant it and those that ask."""
    if signature.writes and _writes_protected(document, signature):
        return denied_as(policy, document, "path.protected", "this file decides what runs later")
    if not granting:
        return not_granted(policy, document, signature)
    shown = _shown(policy, document, signature, granting)
    if not shown:
        return denied_as(policy, document, "path.hidden", "the profile hides this path")
    if any(hides(policy.profile_of(one), one, document, signature) for one in asking):
        return denied_as(policy, document, "path.hidden", "the profile hides this path")
    # An ask takes back nothing that an allow says of the Calls it grants.
    rules = [*asking, *(one for one in shown if one not in asking)] if asking else shown
    decision = _remembered(policy, document, rules, _asked if asking else _allowed)
    return decision if len(shown) == len(granting) else _counted(decision, [*rules, *granting])


def _shown(
    policy: Policy, document: Document, signature: Signature, granting: Sequence[Rule]
) -> list[Rule]:
    # A grant covers nothing that its own profile hides; that of another rule takes nothing away.
    return [one for one in granting if not hides(policy.profile_of(one), one, document, signature)]


def _counted(decision: Decision, rules: Sequence[Rule]) -> Decision:
    """Count and mark a Call by rules whose profile hides it too: a hide takes neither back."""
    if decision.effect is _DENY:
        return decision
    marked = decision.irreversible or any(rule.irreversible for rule in rules)
    return replace(
        decision,
        obligations=_obligations(rules),
        durability=Durability.SYNC if marked else decision.durability,
        irreversible=marked,
    )


def _writes_protected(document: Document, signature: Signature) -> bool:
    arguments = document.arguments
    return any(is_protected(str(arguments.get(name, ""))) for name in signature.writes)


_Make: TypeAlias = "Callable[[Policy, Document, Sequence[Rule]], Decision]"


def _remembered(policy: Policy, document: Document, rules: Sequence[Rule], make: _Make) -> Decision:
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


def _allowed(policy: Policy, document: Document, rules: Sequence[Rule]) -> Decision:
    return _granted(policy, document, rules, asks=False)


def _asked(policy: Policy, document: Document, rules: Sequence[Rule]) -> Decision:
    return _granted(policy, document, rules, asks=True)


def _granted(policy: Policy, document: Document, rules: Sequence[Rule], *, asks: bool) -> Decision:
    # Several grants with several profiles: the Call gets what all of them give, because
    # any other choice would depend on the order of the rules.
    profile = _narrow(policy.profile_of(rule) for rule in rules)
    if isinstance(profile, Denied):
        return denied_as(policy, document, profile.code, profile.message)
    names = ids_of(rules)
    effect, said = (Effect.ASK, "asks a person") if asks else (Effect.ALLOW, "allows this")
    marked = any(rule.irreversible for rule in rules)
    kept = policy.trace.durability_of(document.tool)
    return Decision(
        effect=effect,
        policy=policy.version,
        code=f"policy.{effect}",
        reason=f"Rule {names[0]} {said}.",
        rules=names,
        advises=f"decided at {places_of(rules)}" if asks else "",
        profile=profile,
        enforcement=enforcement_of(document.tool),
        obligations=_obligations(rules),
        durability=Durability.SYNC if marked else kept,
        irreversible=marked or policy.trace.is_irreversible(document.tool),
    )


def _obligations(rules: Sequence[Rule]) -> tuple[Bound, ...]:
    if not any(rule.bounds for rule in rules):
        return ()
    # One written rule may be several compiled ones, and is counted once.
    found = {bound.id: bound for rule in rules for bound in rule.bounds}
    return tuple(found[name] for name in sorted(found))


def _narrow(profiles: Iterable[Profile]) -> Profile | Denied:
    first, *others = profiles
    if not others:
        return first
    try:
        return functools.reduce(narrow_profiles, others, first)
    except Denied as denied:
        return denied
