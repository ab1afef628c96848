"""Step 3 for shell text: every command and every redirection of it is judged as a call of its own.

Pure, as `decide` is. The strictest verdict counts: deny beats ask beats allow. What is judged is
the sandbox that runs them: one for all, so all commands must be granted with one profile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

from safeconduct.call import (
    Bound,
    Decision,
    Document,
    Effect,
    Enforcement,
    Json,
    Per,
    Profile,
    Unit,
)
from safeconduct.policies.bounds import MAX_AMOUNT
from safeconduct.policies.capability import covers
from safeconduct.policies.globs import hidden_by
from safeconduct.policies.rules import Judged, Rule
from safeconduct.policies.signatures import BUILT_IN, UNKNOWN
from safeconduct.policies.trace_terms import most_durable

from .form import Join, Redirect, Simple, write_shell
from .paths import NULL_DEVICE

_SEVERITY: Final = {Effect.ALLOW: 0, Effect.ASK: 1, Effect.DENY: 2}
_ADVICE: Final = {
    "shell.profiles": "give the rules of these commands one profile, or run them as two calls",
    "shell.not_writable": "let the profile of the rule write there",
    "shell.unjudged": "run it alone, with argv and stdin",
    "path.hidden": "take the pattern out of hide in the profile of the rule",
}

DecideOne = Callable[[Document], Decision]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One call that the text makes. ``runs``: a program, else a redirection that opens a path.

    ``unjudged`` names an argument that only comes to be while the text runs, if there is one: the
    input from a pipe, the content of a file. The Document says so too (`Document.unfit`), for the
    `when` of a rule. ``shown`` is its spelling.
    """

    document: Document
    shown: str
    runs: bool
    unjudged: str | None = None


def holds_commands(document: Document) -> bool:
    """Tell whether this is shell text, to be judged by `judge_commands`."""
    signature = BUILT_IN.get(document.tool)
    return (
        signature is not None and signature.as_text is not None and "commands" in document.arguments
    )


def parts_of(document: Document) -> tuple[Part, ...]:
    """Return the calls that shell text makes, in its order; none for any other Document."""
    if not holds_commands(document):
        return ()
    shared = {
        name: value
        for name, value in document.arguments.items()
        if name not in ("command", "commands")
    }
    parts: list[Part] = []
    for command in _commands(document.arguments["commands"]):
        parts.append(_program(document, command, shared))
        parts += [
            _opened(document, redirect)
            for redirect in command.redirects
            if redirect.operator != ">&" and redirect.target != NULL_DEVICE
        ]
    return tuple(parts)


def _commands(value: Json) -> list[Simple]:
    # Also what a trace holds comes here, so nothing is taken for granted.
    return [
        Simple(
            join=Join(cast("str", command["join"])),
            argv=tuple(str(word) for word in cast("Sequence[Json]", command["argv"])),
            redirects=tuple(
                Redirect(
                    descriptor=cast("int", one["fd"]),
                    operator=str(one["operator"]),
                    target=str(one["target"]),
                )
                for one in cast("Sequence[Mapping[str, Json]]", command["redirects"])
            ),
        )
        for command in cast("Sequence[Mapping[str, Json]]", value)
    ]


def _program(document: Document, command: Simple, shared: Mapping[str, Json]) -> Part:
    arguments = {**shared, "argv": list(command.argv)}
    # What another part or a file feeds it is not known yet; behind the first command it is at
    # most what that one left of the Call's own. A rule that names stdin cannot grant it then.
    fed = command.join is Join.PIPE or any(one.operator == "<" for one in command.redirects)
    if command.join is not Join.FIRST:
        fed = fed or "stdin" in arguments
    if fed:
        arguments.pop("stdin", None)
    return Part(
        document=replace(
            document,
            arguments={name: arguments[name] for name in sorted(arguments)},
            unfit=_unknown("stdin") if fed else None,
        ),
        shown=write_shell([replace(command, join=Join.FIRST, redirects=())]),
        runs=True,
        unjudged="stdin" if fed else None,
    )


def _opened(document: Document, redirect: Redirect) -> Part:
    reads = redirect.operator == "<"
    return Part(
        document=Document(
            tool="fs.read" if reads else "fs.write",
            arguments={"path": redirect.target},
            workspace=document.workspace,
            unfit=None if reads else _unknown("content"),
        ),
        shown=f"{redirect.operator} {redirect.target}",
        runs=False,
        unjudged=None if reads else "content",
    )


def _unknown(name: str) -> Mapping[str, tuple[str, str]]:
    return {name: (UNKNOWN, f"its {name} is not known yet")}


def judge_commands(policy: Judged, document: Document, decide_one: DecideOne) -> Decision:
    """Judge shell text by what ``decide_one`` says of each of its parts."""
    parts = parts_of(document)
    verdicts = [_judge_part(policy, part, decide_one) for part in parts]
    worst = max(range(len(parts)), key=lambda at: _SEVERITY[verdicts[at].effect])
    strictest = replace(
        verdicts[worst],
        reason=f"{parts[worst].shown[:80]!a}: {verdicts[worst].reason}",
        enforcement=Enforcement.SANDBOX,
    )
    if strictest.effect is Effect.DENY:
        return strictest
    # No program means no profile to run in, which is as wrong as two of them.
    profiles = {verdict.profile for part, verdict in zip(parts, verdicts, strict=True) if part.runs}
    profile = profiles.pop() if len(profiles) == 1 else None
    if profile is None:
        return _denied(policy, "shell.profiles", "its commands are granted in different profiles")
    refusal = _outside(policy, parts, profile)
    if refusal is not None:
        return refusal
    return replace(
        strictest,
        rules=tuple(sorted({rule for verdict in verdicts for rule in verdict.rules})),
        profile=profile,
        obligations=_sum(verdicts),
        durability=most_durable(verdict.durability for verdict in verdicts),
        irreversible=any(verdict.irreversible for verdict in verdicts),
    )


def _judge_part(policy: Judged, part: Part, decide_one: DecideOne) -> Decision:
    verdict = decide_one(part.document)
    if verdict.effect is Effect.DENY or part.unjudged is None:
        return verdict
    for judged in policy.parts:
        found = judged.rules_of(part.document.tool)
        for rule in found.deny + found.ask if found else ():
            if _may_restrict(rule, part.document, part.unjudged):
                why = f"rule {rule.id} judges its {part.unjudged}, which is not known yet"
                return _denied(policy, "shell.unjudged", why)
    return verdict


def _may_restrict(rule: Rule, document: Document, unknown: str) -> bool:
    """Tell whether a rule would bind this call for some value of the argument nobody knows."""
    matchers = rule.restricting or rule.matchers or {}
    if unknown not in matchers and (rule.when is None or unknown not in rule.when.arguments):
        return False
    known = {name: matcher for name, matcher in matchers.items() if name != unknown}
    return replace(rule, matchers=known, restricting=None).restricts(document.arguments)


def _outside(policy: Judged, parts: Sequence[Part], profile: Profile) -> Decision | None:
    """Refuse a redirection that its rule grants and the sandbox of the commands would not.

    It is the sandbox's shell that opens the path, when some of the commands have run already.
    """
    for part in parts:
        if part.runs:
            continue
        path = str(part.document.arguments["path"])
        if hidden_by(profile.hide, path):
            return _denied(policy, "path.hidden", "the profile hides the path of a redirection")
        if part.document.tool == "fs.write" and not _covered(profile.write, path):
            why = f"profile {profile.name} does not write the file of a redirection"
            return _denied(policy, "shell.not_writable", why)
    return None


def _covered(folders: Sequence[str], path: str) -> bool:
    return any(covers(folder, path) for folder in folders)


def _sum(verdicts: Sequence[Decision]) -> tuple[Bound, ...]:
    """Join what each part is bound by: as many calls of a rule as parts that it granted.

    So with money and tokens, which each program spends. Bytes are measured of the one sandbox that
    runs them all, so they are taken once.
    """
    bounds: dict[tuple[str, Unit, Per, int | None], Bound] = {}
    for bound in (bound for verdict in verdicts for bound in verdict.obligations):
        key = (bound.id, bound.unit, bound.per, bound.window_ms)
        known = bounds.get(key)
        if known is None:
            bounds[key] = bound
        elif bound.unit is not Unit.BYTES and bound.per is not Per.CALL:
            spent = min(known.reserve + bound.reserve, MAX_AMOUNT)
            bounds[key] = replace(known, reserve=spent)
        else:
            bounds[key] = replace(known, reserve=max(known.reserve, bound.reserve))
    return tuple(bounds.values())


def _denied(policy: Judged, code: str, why: str) -> Decision:
    return Decision(
        effect=Effect.DENY,
        policy=policy.version,
        code=code,
        reason=f"Denied ({code}): {why}.",
        advises=_ADVICE[code],
        enforcement=Enforcement.SANDBOX,
    )
