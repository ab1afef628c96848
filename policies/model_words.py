"""Policy step 2: the words of the language's model: names, patterns, and how many there may be."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MAX_TOOLS = 4096
MAX_RULES_PER_TOOL = 8192
MAX_PROFILES = 256
MAX_PATTERNS = 4096
MAX_ARGUMENTS = 64
MAX_IMPORTS = 64
MAX_SYSCALLS = 64
MAX_ROLES = 64
MAX_SERVERS = 64
MAX_BOUNDS = 8
MAX_WHEN = 4096
# The key that `allow: any` becomes. It cannot be an argument's name.
ANY_CALL = "*"
# The key that lets all other arguments pass.
REST = "rest"
# LIMIT: arguments of a rule that may be absent; each doubles what it is compiled to.
MAX_OPTIONAL = 4
WORD = r"^[A-Za-z0-9_-]{1,64}$"
# `*` stands for any part of one word between dots (wildcards.py).
TOOL_NAME = r"^[A-Za-z0-9_*-]+(\.[A-Za-z0-9_*-]+)*$"
# LIMIT: characters of a word that a rule lists.
MAX_LITERAL = 4096
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


def one_or_more(value: object) -> object:
    """Bring a text to the list of it, where one may be written as well."""
    return [value] if isinstance(value, str) else value


OneOrMore = BeforeValidator(one_or_more)
