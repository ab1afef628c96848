"""Policy step 3: a valid spec becomes a compiled Policy. What can never match is refused here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from safeconduct.call import Effect, Profile

from .forms import Forms, Loc
from .language import did_you_mean
from .match import AnyValue, Argv, Matcher
from .model import ANY_CALL, MatcherSpec, PolicySpec, RuleSpec
from .profiles import compile_profiles
from .rules import Policy, Rule, ToolRules
from .signatures import BUILT_IN, RESERVED, Argument, Kind, Signature, merge_kinds
from .syntax import Position, Source

DEFAULT_PROFILE = "base"
REST = "rest"
_TOOL_KIND: Mapping[Kind, Kind] = MappingProxyType(
    {Kind.PATH: Kind.TOOL_PATH, Kind.URL: Kind.TOOL_URL}
)


def assemble(spec: PolicySpec, source: Source, *, version: str, workspace: str) -> Policy:
    """Compile the spec; PolicyError points at the first thing that cannot mean anything."""
    profiles = compile_profiles(spec.profiles, source, workspace)
    rules = _Rules(source, workspace, profiles)
    tools = {name: rules.compile_tool(name, found) for name, found in spec.tools.items()}
    default = Profile(name="default", read=(workspace,))
    return Policy(
        file=source.name,
        version=version,
        workspace=workspace,
        require_tier=spec.require.tier,
        require_cgroup=spec.require.cgroup,
        profiles=MappingProxyType(profiles),
        tools=MappingProxyType(tools),
        default_profile=profiles.get(DEFAULT_PROFILE, default),
        profile_positions={name: source.key(("profiles", name)) for name in profiles},
    )


class _Rules:
    """Compile the rules of a file, tool by tool."""

    def __init__(self, source: Source, workspace: str, profiles: Mapping[str, Profile]) -> None:
        self._source = source
        self._matchers = Forms(source, workspace)
        self._profiles = profiles
        self._ids: dict[str, Position] = {}

    def compile_tool(self, tool: str, specs: list[RuleSpec]) -> ToolRules:
        signature = BUILT_IN.get(tool)
        loc: Loc = ("tools", tool)
        if signature is None and tool.partition(".")[0] in RESERVED:
            hint = did_you_mean(tool, BUILT_IN)
            message = f"there is no tool {tool!r} among ours"
            raise self._source.error(self._source.key(loc), message, hint=hint)
        rules = [
            self._compile(tool, signature, spec, (*loc, index)) for index, spec in enumerate(specs)
        ]
        if signature is None:
            signature = self._infer(tool, rules)
        by_effect = {
            effect: tuple(rule for rule in rules if rule.effect is effect) for effect in Effect
        }
        return ToolRules(
            signature=signature,
            allow=by_effect[Effect.ALLOW],
            ask=by_effect[Effect.ASK],
            deny=by_effect[Effect.DENY],
        )

    def _compile(self, tool: str, signature: Signature | None, spec: RuleSpec, loc: Loc) -> Rule:
        effect, arguments = self._effect(spec, loc)
        place: Loc = (*loc, effect.value)
        rest = self._rest(arguments, place)
        matchers: dict[str, Matcher] | None = None
        if ANY_CALL not in arguments:
            matchers = {
                name: self._matcher(signature, name, found, (*place, name))
                for name, found in arguments.items()
                if name != REST
            }
        rule = Rule(
            id=spec.id or f"tools.{tool}[{loc[-1]}]",
            tool=tool,
            effect=effect,
            matchers=matchers,
            rest=rest,
            profile=spec.profile,
            file=self._source.name,
            position=self._source.node(loc).position,
        )
        self._check_empty(rule, place)
        self._check_options(rule, loc)
        self._check_spelling(rule, place)
        self._check_reachable(rule, signature, place)
        return rule

    def _effect(self, spec: RuleSpec, loc: Loc) -> tuple[Effect, Mapping[str, MatcherSpec]]:
        found = {
            Effect.ALLOW: spec.allow,
            Effect.ASK: spec.ask,
            Effect.DENY: spec.deny,
        }
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

    def _matcher(
        self,
        signature: Signature | None,
        name: str,
        spec: MatcherSpec,
        loc: Loc,
    ) -> Matcher:
        if signature is None:
            return self._matchers.compile(spec, None, loc)
        argument = signature.arguments.get(name)
        if argument is None:
            hint = did_you_mean(name, signature.arguments)
            message = f"{loc[1]} has no argument {name!r}"
            raise self._source.error(self._source.key(loc), message, hint=hint)
        return self._matchers.compile(spec, argument.kind, loc)

    def _check_empty(self, rule: Rule, place: Loc) -> None:
        """Refuse `deny: {}`, which reads like nothing and would deny everything."""
        if rule.effect is Effect.DENY and rule.matchers == {}:
            position = self._source.node(place).position
            hint = "write deny: any, or name an argument"
            raise self._source.error(position, "this deny names nothing", hint=hint)

    def _check_options(self, rule: Rule, loc: Loc) -> None:
        if rule.id in self._ids:
            position = self._source.node((*loc, "id")).position
            message = f"the id {rule.id!r} is taken by the rule on line {self._ids[rule.id].line}"
            raise self._source.error(position, message, hint="give each rule an id of its own")
        self._ids[rule.id] = rule.position
        if rule.profile is None:
            return
        position = self._source.node((*loc, "profile")).position
        if rule.effect is Effect.DENY:
            hint = "remove it: a Call that is denied runs nowhere"
            raise self._source.error(position, "a deny has no profile", hint=hint)
        if rule.profile not in self._profiles:
            hint = did_you_mean(rule.profile, self._profiles)
            raise self._source.error(position, f"there is no profile {rule.profile!r}", hint=hint)

    def _check_spelling(self, rule: Rule, place: Loc) -> None:
        """Refuse a path inside argv where its spelling decides nothing."""
        matchers = rule.matchers or {}
        for name, matcher in matchers.items():
            if not isinstance(matcher, Argv) or not matcher.judges_spelling:
                continue
            position = self._source.node((*place, name)).position
            if rule.effect is Effect.DENY:
                message = "a path inside argv judges a spelling, so a deny can be walked around"
                hint = "take the files away from the program with hide in its profile"
                raise self._source.error(position, message, hint=hint)
            if rule.rest or "cwd" in matchers:
                message = "a path inside argv is read from the workspace, so cwd must stay there"
                hint = "remove cwd and rest from this rule"
                raise self._source.error(position, message, hint=hint)

    def _check_reachable(self, rule: Rule, signature: Signature | None, place: Loc) -> None:
        """Refuse a grant that leaves out an argument every Call must have."""
        if signature is None or rule.matchers is None or rule.rest:
            return
        if rule.effect is Effect.DENY:
            return
        for name, argument in signature.arguments.items():
            if argument.required and not argument.free and name not in rule.matchers:
                message = f"this can never match: {rule.tool} always has the argument {name!r}"
                hint = f"add {name}: any, or a matcher for it"
                raise self._source.error(self._source.node(place).position, message, hint=hint)

    def _infer(self, tool: str, rules: Iterable[Rule]) -> Signature:
        """Collect what the rules of a tool that is not ours say about its arguments."""
        kinds: dict[str, tuple[Kind, Rule]] = {}
        for rule in rules:
            for name, matcher in (rule.matchers or {}).items():
                if isinstance(matcher, AnyValue):
                    continue
                kind = _TOOL_KIND.get(matcher.kind, matcher.kind)
                known, first = kinds.get(name, (kind, rule))
                merged = merge_kinds(known, kind)
                if merged is None:
                    message = f"{tool}: {name!r} is a {kind} here and a {known} at {first.where}"
                    raise self._source.error(
                        rule.position,
                        message,
                        hint="use the same matcher for the argument in all rules of the tool",
                    )
                kinds[name] = (merged, first)
        return Signature(
            arguments={
                name: Argument(kind=kind, required=False) for name, (kind, _) in kinds.items()
            },
            closed=False,
        )
