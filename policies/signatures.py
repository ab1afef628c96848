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

from safeconduct.call import Enforcement, Json

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

    def may_be_unnamed(self, name: str, value: Json, workspace: str) -> bool:
        """Tell whether a rule grants this argument without naming it."""
        argument = self.arguments.get(name)
        if argument is None:
            return False
        if argument.free:
            return True
        default = workspace if argument.default == WORKSPACE_DEFAULT else argument.default
        return default is not None and value == default


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
