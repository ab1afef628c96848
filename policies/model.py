"""Policy step 2: the shape of the v1 language. Only what this version enforces has a field here.

Every value arrives as text, list or map. The forms that may be written short are brought to
one form first, so that no union hides where an error is.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, cast

from pydantic import BeforeValidator, FailFast, Field, ValidationInfo

from safeconduct.call import Engine, Per, Tier, Unit, WorkspaceMode

from .bounds import check_amounts, parse_amount, parse_rate
from .model_matchers import Arguments
from .model_trace import TraceSpec, read_flag, read_mark
from .model_words import (
    MAX_BOUNDS,
    MAX_IMPORTS,
    MAX_PATTERNS,
    MAX_PROFILES,
    MAX_ROLES,
    MAX_RULES_PER_TOOL,
    MAX_SERVERS,
    MAX_SYSCALLS,
    MAX_TOOLS,
    MAX_WHEN,
    Model,
    Module,
    OneOrMore,
    Pattern,
    Patterns,
    RuleId,
    ToolName,
    Word,
)
from .units import parse_count, parse_duration_ms, parse_size_bytes


class RequireSpec(Model):
    """What the machine must be able to enforce; one that gives less refuses to run."""

    tier: Tier | None = None
    cgroup: Annotated[bool, BeforeValidator(read_flag)] = False


_Duration = BeforeValidator(parse_duration_ms)
_Size = BeforeValidator(parse_size_bytes)
_Count = BeforeValidator(parse_count)
_DAY_MS = 86_400_000
_TEBIBYTE = 1 << 40


class LimitsSpec(Model):
    """The limits of a profile; an absent one is inherited."""

    wall: Annotated[int, _Duration, Field(ge=1, le=_DAY_MS)] | None = None
    cpu: Annotated[int, _Duration, Field(ge=1, le=_DAY_MS)] | None = None
    memory: Annotated[int, _Size, Field(ge=1 << 20, le=_TEBIBYTE)] | None = None
    pids: Annotated[int, _Count, Field(ge=1, le=1_000_000)] | None = None
    files: Annotated[int, _Count, Field(ge=16, le=1_000_000)] | None = None
    disk: Annotated[int, _Size, Field(ge=0, le=_TEBIBYTE)] | None = None
    inodes: Annotated[int, _Count, Field(ge=16, le=10**9)] | None = None
    depth: Annotated[int, _Count, Field(ge=16, le=100_000)] | None = None
    file: Annotated[int, _Size, Field(ge=0, le=_TEBIBYTE)] | None = None
    output: Annotated[int, _Size, Field(ge=0, le=1 << 30)] | None = None
    idle: Annotated[int, _Duration, Field(ge=100, le=_DAY_MS)] | None = None
    fuel: Annotated[int, _Count, Field(ge=1, le=10**15)] | None = None


class ProfileSpec(Model):
    """The named settings of a sandbox; an absent one is inherited from `like`."""

    like: Word | None = None
    engine: Engine | None = None
    workspace: WorkspaceMode | None = None
    read: Patterns | None = None
    write: Patterns | None = None
    hide: Patterns | None = None
    imports: Annotated[list[Module], Field(max_length=MAX_IMPORTS)] | None = None
    syscalls: Annotated[list[Word], Field(max_length=MAX_SYSCALLS)] | None = None
    net: Literal["none"] | None = None
    limits: LimitsSpec | None = None


def _rate(value: object) -> tuple[int, int]:
    if not isinstance(value, str):
        raise ValueError("expected a rate such as 20/h")
    return parse_rate(value)


Rate: TypeAlias = Annotated[tuple[int, int], BeforeValidator(_rate)]


def _amounts(value: object, info: ValidationInfo) -> object:
    listed = cast("list[object]", value) if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in listed):
        raise ValueError("expected an amount, or a list of them")
    unit = Unit(str(info.field_name))
    amounts = [parse_amount(unit, str(item)) for item in listed]
    check_amounts(unit, amounts)
    return amounts


Amounts: TypeAlias = Annotated[tuple[tuple[int, Per], ...], BeforeValidator(_amounts)]


class BudgetSpec(Model):
    """What the calls of a rule may use in a session or a day, and what each counts for."""

    calls: Amounts = ()
    bytes: Amounts = ()
    money: Amounts = ()
    tokens: Amounts = ()

    def amounts(self) -> dict[Unit, tuple[tuple[int, Per], ...]]:
        """Return the amounts of each unit that is bounded."""
        found = {unit: cast("tuple[tuple[int, Per], ...]", getattr(self, unit)) for unit in Unit}
        return {unit: amounts for unit, amounts in found.items() if amounts}


class RuleSpec(Model):
    """One rule: an effect over argument matchers, with its options beside it."""

    allow: Arguments | None = None
    ask: Arguments | None = None
    deny: Arguments | None = None
    optional: Arguments | None = None
    profile: Word | None = None
    id: RuleId | None = None
    when: Annotated[str, Field(min_length=1, max_length=MAX_WHEN)] | None = None
    rate: Annotated[tuple[Rate, ...], OneOrMore, Field(min_length=1, max_length=MAX_BOUNDS)] = ()
    budget: BudgetSpec | None = None
    irreversible: Annotated[bool, BeforeValidator(read_mark)] = False


def _rules(value: object) -> object:
    return cast("object", value) if isinstance(value, list) else [value]


Rules: TypeAlias = Annotated[
    list[RuleSpec],
    FailFast(),
    BeforeValidator(_rules),
    Field(min_length=1, max_length=MAX_RULES_PER_TOOL),
]


Tools: TypeAlias = Annotated[
    dict[ToolName, Rules], Field(max_length=MAX_TOOLS, default_factory=dict)
]


class RoleSpec(Model):
    """What a session in one role may do; ``narrows`` names the role it stays within."""

    narrows: Word | None = None
    tools: Tools


def _role(value: object) -> object:
    """Part `narrows` from the tools, beside which it is written."""
    if not isinstance(value, dict):
        raise ValueError("expected a map from tool to rules")
    written = cast("dict[str, object]", value)
    tools = {name: rules for name, rules in written.items() if name != "narrows"}
    return {"tools": tools} | ({"narrows": written["narrows"]} if "narrows" in written else {})


class ServerSpec(Model):
    """A server the operator names: the command that runs it, and where."""

    run: Annotated[list[Pattern], Field(min_length=1, max_length=MAX_PATTERNS)]
    profile: Word | None = None


class PolicySpec(Model):
    """A whole policy file."""

    version: Literal["1"]
    extends: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    require: RequireSpec = RequireSpec()
    trace: TraceSpec | None = None
    workspace: Annotated[str, Field(min_length=1, max_length=4096)] = "project"
    profiles: Annotated[
        dict[Word, ProfileSpec], Field(max_length=MAX_PROFILES, default_factory=dict)
    ]
    servers: Annotated[dict[Word, ServerSpec], Field(max_length=MAX_SERVERS, default_factory=dict)]
    tools: Tools
    roles: Annotated[
        dict[Word, Annotated[RoleSpec, BeforeValidator(_role)]],
        Field(max_length=MAX_ROLES, default_factory=dict),
    ]
