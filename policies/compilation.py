"""Policy step 3b: the rules of a file, compiled. What can never match is refused here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from safeconduct.call import Effect, Per, Profile, Unit

from .binding import KindConflict, Rule, ToolRules, Wildcard, implied_by
from .bounds import compile_bounds
from .forms import Forms, Loc
from .language import did_you_mean
from .match import Matcher
from .model import RuleSpec
from .model_matchers import MatcherSpec
from .model_words import ANY_CALL, MAX_OPTIONAL, REST
from .rule_checks import RuleChecks
from .rules import server_profile
from .signatures import BUILT_IN, PROGRAMS, Argument, Kind, Signature
from .syntax import Source
from .when.condition import When, compile_when
from .wildcards import MAX_WILDCARDS, ToolPattern, compile_tool_pattern, is_ours, is_wildcard


class Rules:
    """Compile the rules of a file, tool by tool. Ids are unique in the whole file."""

    def __init__(
        self,
        source: Source,
        workspace: str,
        profiles: Mapping[str, Profile],
        server_profiles: Mapping[str, str],
    ) -> None:
        self._source = source
        self._matchers = Forms(source, workspace)
        self._profiles, self._server_profiles = profiles, server_profiles
        self._checks = RuleChecks(source, profiles)
        self._wildcards = 0

    def compile_tools(
        self, specs: Mapping[str, list[RuleSpec]], base: Loc
    ) -> tuple[Mapping[str, ToolRules], tuple[Wildcard, ...]]:
        """Compile what stands under ``base``: the rules of names, and those of wildcards."""
        tools: dict[str, ToolRules] = {}
        wildcards: list[Wildcard] = []
        for name, listed in specs.items():
            if is_wildcard(name):
                wildcards.append(self._wildcard(name, listed, (*base, name)))
            else:
                tools[name] = self._tool(name, listed, (*base, name))
        self._wildcards += len(wildcards)
        if self._wildcards > MAX_WILDCARDS:
            position = self._source.key((*base, wildcards[-1].pattern.pattern))
            message = f"more than {MAX_WILDCARDS} tool names with * in one file"
            raise self._source.error(position, message, hint="use fewer, wider ones")
        return MappingProxyType(tools), tuple(wildcards)

    def _tool(self, tool: str, specs: list[RuleSpec], loc: Loc) -> ToolRules:
        signature = BUILT_IN.get(tool)
        if signature is None and is_ours(tool):
            hint = did_you_mean(tool, BUILT_IN)
            message = f"there is no tool {tool!r} among ours"
            raise self._source.error(self._source.key(loc), message, hint=hint)
        if tool.partition(".")[0] in PROGRAMS:
            self._check_called(tool, loc)
        rules = [
            rule
            for index, spec in enumerate(specs)
            for rule in self._compile(tool, signature, spec, (*loc, index))
        ]
        try:
            implied = signature or implied_by(tool, rules)
        except KindConflict as error:
            position = error.rule.position
            raise self._source.error(position, str(error), hint=error.hint) from error
        return ToolRules(
            signature=implied,
            allow=_with(Effect.ALLOW, rules),
            ask=_with(Effect.ASK, rules),
            deny=_with(Effect.DENY, rules),
        )

    def _check_called(self, tool: str, loc: Loc) -> None:
        """Refuse a name of another program's tool that no call has: its rules would never bind."""
        from .agents.tables import why_never_called

        why = why_never_called(tool)
        if why:
            hint = "docs/tool-names.md lists what the tools of other programs are judged as"
            raise self._source.error(self._source.key(loc), why, hint=hint)

    def _wildcard(self, name: str, specs: list[RuleSpec], loc: Loc) -> Wildcard:
        position = self._source.key(loc)
        try:
            pattern = compile_tool_pattern(name)
        except ValueError as error:
            hint = "name one tool, or all of one server: files.*"
            raise self._source.error(position, f"{name!r} {error}", hint=hint) from error
        if pattern.only_ours and not pattern.ours:
            hint = did_you_mean(name, BUILT_IN)
            raise self._source.error(position, f"no tool of ours is named {name!r}", hint=hint)
        signature = _common_signature(pattern) if pattern.only_ours else None
        rules = [
            rule
            for index, spec in enumerate(specs)
            for rule in self._compile(name, signature, spec, (*loc, index))
        ]
        for rule in rules:
            if pattern.only_ours and rule.effect is not Effect.DENY:
                message = f"{name!r} never grants: a wildcard does not reach our own tools"
                hint = f"name each of them, such as {pattern.ours[0]}; a deny may use the wildcard"
                raise self._source.error(rule.position, message, hint=hint)
        return Wildcard(
            pattern=pattern,
            allow=_with(Effect.ALLOW, rules),
            ask=_with(Effect.ASK, rules),
            deny=_with(Effect.DENY, rules),
        )

    def _compile(
        self, tool: str, signature: Signature | None, spec: RuleSpec, loc: Loc
    ) -> list[Rule]:
        """Compile one written rule: several where arguments are optional, one for each set of them.

        INVARIANT: those have one id, and of the ones that grant no two grant the same Call.
        """
        effect, arguments = self._effect(spec, loc)
        place: Loc = (*loc, effect.value)
        where = ".".join(str(step) for step in loc[:-1])
        identity = spec.id or f"{where}[{loc[-1]}]"
        whole = Rule(
            id=identity,
            tool=tool,
            effect=effect,
            matchers=None,
            role=str(loc[1]) if loc[0] == "roles" else None,
            rest=self._rest(arguments, place),
            profile=spec.profile,
            when=self._when(spec.when, signature, (*loc, "when")),
            bounds=compile_bounds(identity, spec.rate, self._budget(spec, loc)),
            irreversible=spec.irreversible,
            file=self._source.name,
            position=self._source.node(loc).position,
        )
        optional = self._optional(whole, spec, signature, loc)
        whole = replace(whole, optional=tuple(optional))
        if ANY_CALL not in arguments:
            named = {(*place, name): found for name, found in arguments.items() if name != REST}
            named |= {(*loc, "optional", name): found for name, found in optional.items()}
            whole = self._with_matchers(whole, signature, named)
        self._checks.check(whole, signature, loc)
        of_server = self._profile_of_server(tool)
        if of_server and effect is not Effect.DENY and whole.profile is None:
            whole = replace(whole, profile=of_server)
        return [_without(whole, absent) for absent in _subsets([*optional])]

    def _with_matchers(
        self, rule: Rule, signature: Signature | None, named: Mapping[Loc, MatcherSpec]
    ) -> Rule:
        denies = rule.effect is Effect.DENY
        matchers = self._compile_matchers(signature, named, restricts=denies)
        if rule.effect is not Effect.ASK:
            return replace(rule, matchers=matchers)
        widely = self._compile_matchers(signature, named, restricts=True)
        return replace(rule, matchers=matchers, restricting=None if widely == matchers else widely)

    def _optional(
        self, rule: Rule, spec: RuleSpec, signature: Signature | None, loc: Loc
    ) -> Mapping[str, MatcherSpec]:
        """Return the arguments that may be absent, and are judged where they are there."""
        optional = spec.optional or {}
        if not optional:
            return {}
        _, named = self._effect(spec, loc)
        twice = sorted(optional.keys() & named.keys())
        why = hint = ""
        if rule.effect is Effect.DENY:
            why, hint = (
                "a deny restricts on what it names",
                "name it there, or in a rule of its own",
            )
        elif signature is not None:
            why, hint = "an argument of ours has its default", "name it, or leave it out"
        elif rule.rest or {ANY_CALL, REST} & {*named, *optional}:
            why, hint = "any lets it pass, whatever it is", "name each argument"
        elif twice:
            why, hint = f"{twice[0]!r} is named already", "keep one of the two"
        elif len(optional) > MAX_OPTIONAL:
            why, hint = f"a rule has at most {MAX_OPTIONAL} of them", "write two rules"
        if why:
            position = self._source.key((*loc, "optional"))
            raise self._source.error(
                position, f"no argument can be optional here: {why}", hint=hint
            )
        return optional

    def _profile_of_server(self, tool: str) -> str | None:
        """Return the profile of the server that a tool belongs to: what judges is what runs."""
        name, dot, _ = tool.partition(".")
        return (
            server_profile(self._profiles, name, self._server_profiles.get(name)) if dot else None
        )

    def _when(self, text: str | None, signature: Signature | None, loc: Loc) -> When | None:
        if text is None:
            return None
        position = self._source.node(loc).position
        try:
            when = compile_when(text)
        except ValueError as error:
            hint = 'write for example when: "call.amount <= 100 and session.calls < 50"'
            raise self._source.error(position, f"when: {error}", hint=hint) from error
        if signature is not None:
            for name in sorted(when.arguments - signature.arguments.keys()):
                message = f"when: {loc[-3]} has no argument {name!r}"
                hint = did_you_mean(name, signature.arguments)
                raise self._source.error(position, message, hint=hint)
        return when

    def _budget(self, spec: RuleSpec, loc: Loc) -> Mapping[Unit, Sequence[tuple[int, Per]]]:
        amounts = spec.budget.amounts() if spec.budget else {}
        if spec.budget is not None and not amounts:
            position = self._source.node((*loc, "budget")).position
            hint = "write for example budget: {calls: 50/session}, or remove it"
            raise self._source.error(position, "this budget bounds nothing", hint=hint)
        return amounts

    def _effect(self, spec: RuleSpec, loc: Loc) -> tuple[Effect, Mapping[str, MatcherSpec]]:
        found = {Effect.ALLOW: spec.allow, Effect.ASK: spec.ask, Effect.DENY: spec.deny}
        written = [(effect, value) for effect, value in found.items() if value is not None]
        if len(written) != 1:
            hint = "give each rule exactly one of allow, ask and deny; use a list for several"
            position = self._source.node(loc).position
            raise self._source.error(position, "a rule has one effect", hint=hint)
        return written[0]

    def _rest(self, arguments: Mapping[str, MatcherSpec], place: Loc) -> bool:
        rest = arguments.get(REST)
        if rest is not None and rest.any is None:
            hint = "write rest: any, or name the arguments"
            position = self._source.node((*place, REST)).position
            raise self._source.error(position, "rest can only be any", hint=hint)
        return rest is not None

    def _compile_matchers(
        self, signature: Signature | None, specs: Mapping[Loc, MatcherSpec], *, restricts: bool
    ) -> dict[str, Matcher]:
        compiled: dict[str, Matcher] = {}
        for loc, spec in specs.items():
            name = str(loc[-1])
            kind = self._kind(signature, name, loc)
            compiled[name] = self._matchers.compile(spec, kind, loc, restricts=restricts)
        return compiled

    def _kind(self, signature: Signature | None, name: str, loc: Loc) -> Kind | None:
        """Return what an argument of ours is; None for those of others, which rules decide."""
        if signature is None:
            return None
        argument = signature.arguments.get(name)
        if argument is None:
            hint = did_you_mean(name, signature.arguments)
            message = f"{loc[-4]} has no argument {name!r}"
            raise self._source.error(self._source.key(loc), message, hint=hint)
        return argument.kind


def _subsets(names: Sequence[str]) -> Iterable[tuple[str, ...]]:
    sizes = range(len(names) + 1)
    return (chosen for size in sizes for chosen in itertools.combinations(names, size))


def _without(rule: Rule, absent: Sequence[str]) -> Rule:
    """Return the rule for Calls in which these arguments are absent."""
    if not absent:
        return rule

    def left(matchers: Mapping[str, Matcher] | None) -> Mapping[str, Matcher] | None:
        found = matchers or {}
        return {name: found[name] for name in found if name not in absent}

    restricting = None if rule.restricting is None else left(rule.restricting)
    return replace(rule, matchers=left(rule.matchers), restricting=restricting)


def _with(effect: Effect, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    return tuple(rule for rule in rules if rule.effect is effect)


def _common_signature(pattern: ToolPattern) -> Signature:
    """Join the arguments of those tools of ours that a wildcard covers; none is required."""
    found: dict[str, Argument] = {}
    for tool in pattern.ours:
        for name, argument in BUILT_IN[tool].arguments.items():
            found.setdefault(name, replace(argument, required=False))
    return Signature(arguments=found)
