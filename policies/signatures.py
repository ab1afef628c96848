"""The signatures of our own tools: which arguments there are, what each one is, what is default.

Other tools have no signature here; theirs follows from the matchers of the policy (`Kind`).

An argument that a rule does not name must be absent, with two exceptions. Content (`free`)
is what the Call carries, not what it reaches: `fs.write`'s text. An argument with a default
may be unnamed where its value *is* the default. So a rule that does not name `cwd` grants
only the workspace itself: the same argv in another folder runs another `Makefile`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from safeconduct.call import Document, Enforcement, Json

WORKSPACE_DEFAULT: Final = "$WS"


class Kind(StrEnum):
    """What an argument is, hence how it is canonicalised and which matchers fit it."""

    PATH = "path"
    NEW_PATH = "new_path"
    TOOL_PATH = "tool_path"  # a path that the tool opens itself, in its sandbox
    URL = "url"
    TOOL_URL = "tool_url"
    HOST = "host"
    EMAIL = "email"
    ARGV = "argv"
    TEXT = "text"
    NUMBER = "number"
    SCALAR = "scalar"
    INTEGERS = "integers"
    RESOURCES = "resources"  # what a Call says it needs, in the words of `limits`
    JSON = "json"


_PATHS: Final = frozenset({Kind.PATH, Kind.NEW_PATH, Kind.TOOL_PATH})
# Kinds whose values have other spellings, of which one is judged and handed over.
SPELLED: Final = frozenset({Kind.TOOL_PATH, Kind.TOOL_URL, Kind.HOST, Kind.EMAIL})
# LIMIT: values of a list under a matcher that takes one value; a longer one fits none.
MAX_LIST: Final = 1024
# Kinds that no text is of.
NO_TEXT: Final = frozenset({Kind.NUMBER, Kind.ARGV, Kind.INTEGERS, Kind.RESOURCES})
_EXPECTED: Final[Mapping[Kind, str]] = MappingProxyType(
    {Kind.TEXT: "a text", Kind.NUMBER: "a number", Kind.SCALAR: "one value"}
)
# The code of an argument whose name another one may be taken for.
AMBIGUOUS: Final = "call.ambiguous_argument"
# The code of an argument that only comes to be while shell text runs.
UNKNOWN: Final = "shell.unjudged"
# Those arguments: what a pipe or a file feeds a program, and what a redirection writes.
FED: Final = frozenset({"stdin", "content"})


def fits(kind: Kind, value: Json) -> bool:
    """Tell whether one value is of the JSON type that a kind is judged in.

    A path or a URL may still have no form: that is what `Document.unfit` says.
    """
    if isinstance(value, str):
        return kind not in NO_TEXT
    if kind is Kind.JSON:
        return True
    if kind is Kind.SCALAR:
        return not isinstance(value, (list, tuple, dict))
    if kind is Kind.NUMBER:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind is Kind.ARGV and isinstance(value, (list, tuple))


def misfit(document: Document, signature: Signature) -> tuple[str, str]:
    """Say of a Call that no rule grants which argument is not what the rules take it for, if any.

    Return the code and a sentence, both empty where all are.
    """
    for said in (document.unfit or {}).values():
        if said[0] != UNKNOWN:
            return said
    if signature.closed:
        return "", ""
    for name, argument in signature.arguments.items():
        if name not in document.arguments or argument.kind not in _EXPECTED:
            continue
        value = document.arguments[name]
        listed = value if isinstance(value, (list, tuple)) else (value,)
        if len(listed) > MAX_LIST:
            return "call.bad_argument", f"{name!a} must be a list of at most {MAX_LIST} values"
        if not all(fits(argument.kind, item) for item in listed):
            return "call.bad_argument", f"{name!a} must be {_EXPECTED[argument.kind]}"
    return "", ""


class Holds(StrEnum):
    """What a path must lead to."""

    FILE = "file"
    FOLDER = "folder"
    ANYTHING = "anything"


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One argument of a tool. ``default`` is None where there is none."""

    kind: Kind
    required: bool = True
    free: bool = False
    default: Json = None
    holds: Holds = Holds.ANYTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The arguments of one tool. ``closed``: there are no others. ``writes`` are changed.

    ``as_text`` is the other form that a Call may have: shell text. No rule names its `command`,
    because each command in it is judged by the rules about argv (shell.py, commands.py).
    """

    arguments: Mapping[str, Argument] = field(default_factory=dict[str, Argument])
    closed: bool = True
    writes: tuple[str, ...] = ()
    as_text: Signature | None = None
    enforcement: Enforcement = Enforcement.SANDBOX
    # Derived: the arguments that are paths.
    paths: tuple[str, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        paths = (name for name, x in self.arguments.items() if x.kind in _PATHS)
        object.__setattr__(self, "paths", tuple(paths))

    def may_be_unnamed(self, name: str, value: Json, workspace: str) -> bool:
        """Tell whether a rule grants this argument without naming it."""
        argument = self.arguments.get(name)
        if argument is None:
            return False
        default = argument.default
        if argument.free or default is None:
            return argument.free
        return value == (workspace if default == WORKSPACE_DEFAULT else default)


def _tool_on_file(holds: Holds) -> Signature:
    path = Argument(kind=Kind.PATH, holds=holds)
    return Signature(arguments={"path": path}, enforcement=Enforcement.OBJECT)


_AROUND_A_PROGRAM: Final = MappingProxyType(
    {
        "cwd": Argument(
            kind=Kind.PATH, required=False, default=WORKSPACE_DEFAULT, holds=Holds.FOLDER
        ),
        "stdin": Argument(kind=Kind.TEXT, required=False, free=True),
        # Free: the policy's limits stay the upper bound of whatever stands here.
        "resources": Argument(kind=Kind.RESOURCES, required=False, free=True),
    }
)

BUILT_IN: Final[Mapping[str, Signature]] = MappingProxyType(
    {
        "fs.read": _tool_on_file(Holds.FILE),
        "fs.list": _tool_on_file(Holds.FOLDER),
        "fs.write": Signature(
            arguments={
                "path": Argument(kind=Kind.NEW_PATH, holds=Holds.FILE),
                "content": Argument(kind=Kind.TEXT, free=True),
            },
            writes=("path",),
            enforcement=Enforcement.OBJECT,
        ),
        "shell.run": Signature(
            arguments={"argv": Argument(kind=Kind.ARGV), **_AROUND_A_PROGRAM},
            as_text=Signature(arguments={"command": Argument(kind=Kind.TEXT), **_AROUND_A_PROGRAM}),
        ),
        "agent.run": Signature(
            arguments={"argv": Argument(kind=Kind.ARGV), "cwd": _AROUND_A_PROGRAM["cwd"]},
        ),
        "http.get": Signature(
            arguments={"url": Argument(kind=Kind.URL)}, enforcement=Enforcement.OBJECT
        ),
        "python.run": Signature(
            arguments={
                "code": Argument(kind=Kind.TEXT, free=True),
                "input": Argument(kind=Kind.JSON, required=False, free=True),
            },
        ),
        "wasm.run": Signature(
            arguments={
                "module": Argument(kind=Kind.PATH, holds=Holds.FILE),
                "function": Argument(kind=Kind.TEXT),
                "arguments": Argument(kind=Kind.INTEGERS, required=False, free=True, default=()),
            },
            enforcement=Enforcement.OBJECT,
        ),
    }
)
# Names under these belong to us: a policy that grants `fs.raed` means one of ours.
RESERVED: Final = frozenset(name.partition(".")[0] for name in BUILT_IN)
# Names under these belong to the tools of other programs (tool_tables.py).
PROGRAMS: Final = frozenset({"claude", "codex"})


def merge_kinds(one: Kind, other: Kind) -> Kind | None:
    """Return the kind that satisfies both, or None where one argument cannot be both."""
    if one is other:
        return one
    pair = {one, other}
    if Kind.SCALAR in pair and pair & {Kind.TEXT, Kind.NUMBER}:
        return (pair - {Kind.SCALAR}).pop()
    return None
