"""Why a Decision is what it is: every rule considered, and the matcher that failed.

For the operator's terminal. The agent only ever sees the Decision's reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from safeconduct.call import Decision, Document, Effect, Json, Profile

from .decision import decide
from .rules import Judged, Policy, Rule, ToolRules, holds_all, holds_any


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """One rule held against the Document. ``argument`` is the one that did not fit."""

    rule: str
    effect: Effect
    file: str
    line: int
    matched: bool
    why: str
    argument: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A Decision with everything that led to it."""

    document: Document
    decision: Decision
    considered: tuple[Considered, ...]

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
            "profile": _profile_json(decision.profile) if decision.profile else None,
            "considered": [_considered_json(item) for item in self.considered],
        }


def explain(policy: Judged, document: Document) -> Explanation:
    """Judge a Document and say what every rule of its tool made of it."""
    considered = [
        _consider(part, rule, tool, document)
        for part in policy.parts
        if (tool := part.tools.get(document.tool)) is not None
        for rule in tool.all
    ]
    return Explanation(
        document=document, decision=decide(policy, document), considered=tuple(considered)
    )


def _consider(policy: Policy, rule: Rule, tool: ToolRules, document: Document) -> Considered:
    argument, why = _first_failure(rule, document.arguments)
    if not why and rule.effect is Effect.ALLOW and rule.matchers is not None and not rule.rest:
        extra = rule.unnamed(document.arguments, tool.signature, policy.workspace)
        if extra:
            argument, why = extra[0], f"the rule does not name {extra[0]}"
    return Considered(
        rule=rule.id,
        effect=rule.effect,
        file=rule.file,
        line=rule.position.line,
        matched=not why,
        why=why or "every argument it names matches",
        argument=argument,
    )


def _first_failure(rule: Rule, arguments: Mapping[str, Json]) -> tuple[str | None, str]:
    holds = holds_all if rule.effect is Effect.ALLOW else holds_any
    for name, matcher in (rule.matchers or {}).items():
        if name not in arguments:
            return name, f"the call has no {name}"
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
