"""Policy step 2: the shape of the v1 language. Only what this version enforces has a field here.

Every value arrives as text, list or map. The forms that may be written short are brought to
one form first, so that no union hides where an error is.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from safeconduct.call import Engine, Tier, WorkspaceMode

from .units import parse_count, parse_duration_ms, parse_size_bytes

MAX_TOOLS = 4096
MAX_RULES_PER_TOOL = 8192
MAX_PROFILES = 256
MAX_PATTERNS = 4096
MAX_ARGUMENTS = 64
MAX_IMPORTS = 64
MAX_SYSCALLS = 64
# The key that `allow: any` becomes. It cannot be an argument's name.
ANY_CALL = "*"
WORD = r"^[A-Za-z0-9_-]{1,64}$"
TOOL_NAME = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$"
ARGUMENT_NAME = r"^(\*|[A-Za-z_][A-Za-z0-9_.$-]{0,127})$"

Word: TypeAlias = Annotated[str, StringConstraints(pattern=WORD)]
RuleId: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
ToolName: TypeAlias = Annotated[str, StringConstraints(pattern=TOOL_NAME, max_length=128)]
ArgumentName: TypeAlias = Annotated[str, StringConstraints(pattern=ARGUMENT_NAME)]
Pattern: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
Patterns: TypeAlias = Annotated[list[Pattern], Field(max_length=MAX_PATTERNS)]
# The dotted name of a Python module; ASCII, so that no two spellings are one name.
MODULE = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"
Module: TypeAlias = Annotated[str, StringConstraints(pattern=MODULE, max_length=128)]


class Model(BaseModel):
    """A map of the policy file: unknown keys are errors, values do not change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _flag(value: object) -> bool:
    if value not in ("true", "false"):
        raise ValueError("expected true or false")
    return value == "true"


class RequireSpec(Model):
    """What the machine must be able to enforce; one that gives less refuses to run."""

    tier: Tier | None = None
    cgroup: Annotated[bool, BeforeValidator(_flag)] = False


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


class TextSpec(Model):
    """Any text of at most ``max`` bytes of UTF-8."""

    max: Annotated[int, _Size, Field(ge=0, le=1 << 20)]


class ElementSpec(Model):
    """One element of a list: a literal, or a matcher where the list is an argv."""

    literal: Annotated[str, Field(max_length=4096)] | None = None
    path: Patterns | None = None
    in_: Annotated[list[str], Field(max_length=MAX_PATTERNS)] | None = Field(None, alias="in")
    range: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    text: TextSpec | None = None


def _element(value: object) -> object:
    return {"literal": value} if isinstance(value, str) else value


Element: TypeAlias = Annotated[ElementSpec, BeforeValidator(_element)]
Elements: TypeAlias = Annotated[list[Element], Field(max_length=MAX_PATTERNS)]


class MatcherSpec(Model):
    """What one argument may be. Exactly one field is set; ``items`` is the bare list."""

    any: Literal["any"] | None = None
    items: Elements | None = None
    path: Patterns | None = None
    url: Patterns | None = None
    argv: Elements | None = None
    in_: Annotated[list[str], Field(max_length=MAX_PATTERNS)] | None = Field(None, alias="in")
    range: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    text: TextSpec | None = None

    def form(self) -> str:
        """Name the one matcher that is written, or the empty text where there is not one."""
        written = [name.rstrip("_") for name in self.model_fields_set]
        return written[0] if len(written) == 1 else ""


def _matcher(value: object) -> object:
    if value == "any":
        return {"any": "any"}
    if isinstance(value, str):
        raise ValueError("expected a list, a matcher or any")
    if isinstance(value, list):
        return {"items": cast("list[object]", value)}
    if isinstance(value, dict):
        forms = cast("dict[str, object]", value)
        if len(forms) != 1:
            raise ValueError("expected exactly one matcher")
        if "items" in forms or "any" in forms:
            raise ValueError("expected a list, a matcher or any")
        return forms
    return value


Matcher: TypeAlias = Annotated[MatcherSpec, BeforeValidator(_matcher)]


def _arguments(value: object) -> object:
    if value == "any":
        return {ANY_CALL: "any"}
    if isinstance(value, dict):
        arguments = cast("dict[str, object]", value)
        if ANY_CALL in arguments:
            raise ValueError("* is not an argument; write any instead of the map")
        return arguments
    raise ValueError("expected any, or a map from argument to matcher")


Arguments: TypeAlias = Annotated[
    dict[ArgumentName, Matcher], BeforeValidator(_arguments), Field(max_length=MAX_ARGUMENTS)
]


class RuleSpec(Model):
    """One rule: an effect over argument matchers, with its options beside it."""

    allow: Arguments | None = None
    ask: Arguments | None = None
    deny: Arguments | None = None
    profile: Word | None = None
    id: RuleId | None = None


def _rules(value: object) -> object:
    return cast("object", value) if isinstance(value, list) else [value]


Rules: TypeAlias = Annotated[
    list[RuleSpec],
    BeforeValidator(_rules),
    Field(min_length=1, max_length=MAX_RULES_PER_TOOL),
]


class PolicySpec(Model):
    """A whole policy file."""

    version: Literal["1"]
    require: RequireSpec = RequireSpec()
    workspace: Annotated[str, Field(min_length=1, max_length=4096)] = "project"
    profiles: Annotated[dict[Word, ProfileSpec], Field(max_length=MAX_PROFILES)] = {}
    tools: Annotated[dict[ToolName, Rules], Field(max_length=MAX_TOOLS)] = {}
