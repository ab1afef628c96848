"""Why a Decision is what it is: every rule considered, and the matcher that failed.

For the operator's terminal. The agent only ever sees the Decision's reason.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Final

from safeconduct.call import Decision, Document, Effect, Facts, Json, Profile

from .binding import Rule, ToolRules, holds_all, holds_any
from .bounds import describe_bound
from .decision import NO_FACTS, decide
from .match import AnyValue
from .rules import Judged, Policy
from .shell.commands import parts_of
from .sorting import Known
from .when.condition import When, WhenError

_LACKS: Final = "the call has no "


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """One rule held against the Document. ``argument`` is the one that did not fit.

    ``when`` is the rule's condition and ``bounds`` what its Calls may use, as written. ``part``
    is the command of a shell text that was judged, where there are several.
    """

    rule: str
    effect: Effect
    file: str
    line: int
    matched: bool
    why: str
    argument: str | None = None
    role: str | None = None
    when: str | None = None
    bounds: tuple[str, ...] = ()
    part: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A Decision with everything that led to it."""

    document: Document
    decision: Decision
    considered: tuple[Considered, ...]
    facts: Facts = NO_FACTS

    def to_json(self) -> dict[str, Json]:
        """Return it as plain JSON."""
        decision = self.decision
        return {
            "tool": self.document.tool,
            "arguments": self.document.arguments,
            "workspace": self.document.workspace,
            "effect": decision.effect.value,
            "code": decision.code,
            "reason": decision.reason,
            "advice": decision.advice,
            "rules": list(decision.rules),
            "enforcement": decision.enforcement.value,
            "policy": decision.policy,
            "role": self.facts.role,
            "obligations": [asdict(bound) for bound in decision.obligations],
            "durability": decision.durability.value,
            "irreversible": decision.irreversible,
            "profile": _profile_json(decision.profile) if decision.profile else None,
            "considered": [_considered_json(item) for item in self.considered],
        }


def explain(policy: Judged, document: Document, facts: Facts = NO_FACTS) -> Explanation:
    """Judge a Document and say what every rule that its tool meets made of it."""
    considered = [
        _one_of([_consider(judged, rule, tool, one, Known(one, facts), part) for rule in written])
        for one, part in _documents(document)
        for judged in policy.parts
        if (tool := judged.rules_of(one.tool)) is not None
        for _, written in itertools.groupby(tool.all, key=lambda rule: rule.id)
    ]
    return Explanation(
        document=document,
        decision=decide(policy, document, facts),
        considered=tuple(considered),
        facts=facts,
    )


def _one_of(considered: list[Considered]) -> Considered:
    """Choose one of what a rule with optional arguments was compiled to.

    That is the one that matched, else one that the Call does not lack an argument for, the whole
    rule first.
    """
    matched = [item for item in considered if item.matched]
    judged = [item for item in considered if not item.why.startswith(_LACKS)]
    return (matched or judged or considered)[0]


def _documents(document: Document) -> list[tuple[Document, str]]:
    """Return what is judged: the Document, or each part of shell text."""
    parts = parts_of(document)
    return [(part.document, part.shown) for part in parts] if parts else [(document, "")]


def _consider(
    policy: Policy,
    rule: Rule,
    tool: ToolRules,
    document: Document,
    known: Known,
    part: str,
) -> Considered:
    argument, why = _first_failure(rule, document)
    if not why and rule.effect is Effect.ALLOW and rule.matchers is not None and not rule.rest:
        extra = rule.unnamed(document.arguments, tool.signature, policy.workspace)
        if extra:
            argument, why = extra[0], f"the rule does not name {extra[0]}"
    if not why:
        why = _condition(rule, known)
    bounds = tuple(describe_bound(bound) for bound in rule.bounds)
    return Considered(
        rule=rule.id,
        effect=rule.effect,
        file=rule.file,
        line=rule.position.line,
        matched=not why,
        why=why or _matched(rule, bounds),
        argument=argument,
        role=rule.role,
        when=rule.when.text if rule.when else None,
        bounds=bounds,
        part=part,
    )


def _matched(rule: Rule, bounds: tuple[str, ...]) -> str:
    said = "every argument it names matches"
    if rule.when is not None:
        said += f", and so does when {rule.when.text}"
    return f"{said}; {', '.join(bounds)}" if bounds else said


def _condition(rule: Rule, known: Known) -> str:
    """Say why a `when` keeps the rule from counting; the empty text where it does not."""
    if rule.when is None:
        return ""
    holds = rule.holds(known.named, known.unfit)
    if holds is None and rule.effect is Effect.ALLOW:
        return f"when {rule.when.text} cannot be judged: {_fault(rule.when, known)}"
    return f"when {rule.when.text} is false" if holds is False else ""


def _fault(when: When, known: Known) -> str:
    try:
        return "it holds" if when.holds(known.named) else "it is false"
    except WhenError as error:
        return str(error)


def _first_failure(rule: Rule, document: Document) -> tuple[str | None, str]:
    arguments, unfit = document.arguments, document.unfit or {}
    grants = rule.effect is Effect.ALLOW
    matchers = rule.matchers if grants else rule.restricting or rule.matchers
    holds = holds_all if grants else holds_any
    for name, matcher in (matchers or {}).items():
        if name in unfit and not (grants and isinstance(matcher, AnyValue)):
            if grants:
                return name, unfit[name][1]
            continue
        if name not in arguments:
            return name, f"{_LACKS}{name}"
        if not holds(matcher, arguments[name]):
            return name, f"{name} is not {matcher.describe()}"
    return None, ""


def _considered_json(item: Considered) -> dict[str, Json]:
    return {
        "rule": item.rule,
        "effect": item.effect.value,
        "file": item.file,
        "line": item.line,
        "matched": item.matched,
        "argument": item.argument,
        "why": item.why,
        "role": item.role,
        "when": item.when,
        "bounds": list(item.bounds),
    }


def _profile_json(profile: Profile) -> dict[str, Json]:
    return {
        "name": profile.name,
        "engine": profile.engine.value,
        "workspace": profile.workspace.value,
        "read": list(profile.read),
        "write": list(profile.write),
        "hide": list(profile.hide),
        "imports": list(profile.imports),
        "syscalls": list(profile.syscalls),
        "net": "none",
        "limits": asdict(profile.limits),
    }
