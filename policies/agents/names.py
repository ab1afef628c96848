"""Policy step 1: a call of another program's tool becomes a Call of the name that is judged.

`Bash` of Claude Code is `shell.run`, `Read` is `fs.read`, `mcp__S__T` is `S.T`. What has no exact
counterpart keeps a name of its own (tool_tables.py). A name or an argument that is not in the
table is refused: a new version of the program may mean anything by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Final, TypeAlias, cast

from safeconduct.call import Json
from safeconduct.errors import Denied
from safeconduct.policies.paths import show
from safeconduct.policies.signatures import PROGRAMS, RESERVED

from .arguments import CHECKS, SHELLS, absolute, bad
from .patch import patch_paths
from .tables import TABLES, HostTool, Takes

# LIMIT: how long a name may be (canonical.MAX_TOOL_CHARACTERS).
_MAX_NAME: Final = 128
_SERVER = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_TOOL = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*", re.ASCII)
_PATCHERS: Final = frozenset({"apply_patch", "applypatch"})

Arguments: TypeAlias = dict[str, Json]


class Host(StrEnum):
    """A program whose tool names are known. Their own names stand under this word."""

    CLAUDE = "claude"
    CODEX = "codex"
    MCP = "mcp"


# Names that no server may have: tools under them would be taken for ours or a program's.
RESERVED_SERVERS: Final = RESERVED | PROGRAMS


def map_tool(
    host: Host,
    name: str,
    arguments: Mapping[str, Json],
    *,
    cwd: str | None = None,
    servers: Collection[str] = (),
) -> tuple[str, Arguments]:
    """Return the tool and the arguments that a Call of this program is judged as.

    ``cwd`` is the absolute folder the program is in: relative paths are refused without it. The
    MCP ``servers`` that the operator named tell apart `mcp__a__b__c`. Denied for what is not
    known, `call.escalation` for what asks the program for more rights than its usual ones.
    """
    if len(name) > _MAX_NAME:
        raise _unknown(host, name)
    if host is Host.MCP:
        return _check_server(name, *name.partition(".")[::2]), dict(arguments)
    if name.startswith("mcp__"):
        return _mcp_name(name, servers), dict(arguments)
    row = TABLES[host].get(name)
    if row is None:
        raise _unknown(host, name)
    taken = _take(f"{host}'s {name}", row, arguments, cwd)
    tool = row.tool or f"{host}.{name}"
    if not row.reader:
        return tool, taken
    return _READERS[row.reader](tool, taken, cwd)


def _mcp_name(name: str, servers: Collection[str]) -> str:
    """Split `mcp__SERVER__TOOL`. Both parts may hold `__`; then the servers decide."""
    parts = name.split("__")[1:]
    splits = [("__".join(parts[:at]), "__".join(parts[at:])) for at in range(1, len(parts))]
    if servers:
        splits = [split for split in splits if split[0] in servers]
    if len(splits) != 1:
        message = f"{show(name)} names no server, or may name several"
        raise Denied(message, code="call.unknown_tool", hint="name servers and tools without __")
    return _check_server(name, *splits[0])


def _check_server(name: str, server: str, tool: str) -> str:
    if not _SERVER.fullmatch(server) or not _TOOL.fullmatch(tool):
        raise Denied(f"{show(name)} is not SERVER.TOOL", code="call.unknown_tool")
    if server in RESERVED_SERVERS:
        message = f"a server named {server} would pass for tools that are not its own"
        raise Denied(message, code="call.unknown_tool", hint="give the server another name")
    return f"{server}.{tool}"


def _unknown(host: Host, name: str) -> Denied:
    return Denied(f"{host} has no tool {show(name)} that is known here", code="call.unknown_tool")


def _take(what: str, row: HostTool, arguments: Mapping[str, Json], cwd: str | None) -> Arguments:
    """Check every argument against the table and name it as in the Call."""
    taken: Arguments = {}
    for name, value in arguments.items():
        given = row.arguments.get(name)
        if given is None:
            raise Denied(f"{what} takes no argument {show(name)}", code="call.extra_argument")
        checked = CHECKS[given.takes](f"{what}: {name}", value, cwd)
        if given.to in taken:
            raise Denied(f"{what} says {given.to} twice", code="call.extra_argument")
        if given.to:
            taken[given.to] = checked
    for name, given in row.arguments.items():
        if given.required and name not in arguments:
            raise Denied(f"{what} needs the argument {name}", code="call.missing_argument")
        if given.takes is Takes.FOLDER and name not in arguments and cwd is not None:
            taken[given.to] = absolute(name, cwd, None)
    return taken


def _in_folder(tool: str, taken: Arguments, cwd: str | None) -> tuple[str, Arguments]:
    """Say where a command runs: where the program is, unless it says another folder."""
    if cwd is not None and "cwd" not in taken:
        taken["cwd"] = absolute("the current folder", cwd, None)
    return tool, taken


def _argv(tool: str, taken: Arguments, cwd: str | None) -> tuple[str, Arguments]:
    """Tell the three things that an argv of Codex is: a shell's text, a patch, or a command."""
    tool, taken = _in_folder(tool, taken, cwd)
    words = cast("Sequence[str]", taken["argv"])
    if len(words) == 3 and words[0] in SHELLS and words[1] in ("-c", "-lc"):
        del taken["argv"]
        return tool, taken | {"command": words[2]}
    if words and words[0] in _PATCHERS:
        # Codex does not run this: it applies the patch itself.
        if len(words) != 2:
            raise bad("the patch", "one text")
        folder = cast("str | None", taken.get("cwd"))
        return _patch(f"{Host.CODEX}.apply_patch", {"input": words[1]}, folder)
    return tool, taken


def _patch(tool: str, taken: Arguments, cwd: str | None) -> tuple[str, Arguments]:
    """Add the files that a patch touches, each as an absolute path."""
    patch = taken.get("input")
    if not isinstance(patch, str):
        raise Denied(f"{tool} needs the argument input", code="call.missing_argument")
    try:
        paths = patch_paths(patch)
    except ValueError as error:
        raise Denied(str(error), code="call.bad_argument") from error
    listed: list[Json] = [absolute("a path in the patch", path, cwd) for path in paths]
    return tool, taken | {"paths": listed}


def _edits(tool: str, taken: Arguments, cwd: str | None) -> tuple[str, Arguments]:
    """Join what several edits put in."""
    edits = taken["content"]
    if not isinstance(edits, list) or not edits:
        raise bad("edits", "a list of edits")
    texts: list[str] = []
    for edit in edits:
        if not isinstance(edit, dict) or not edit.keys() <= _EDIT.keys():
            raise bad("an edit", f"an object of {', '.join(_EDIT)}")
        for name, value in edit.items():
            CHECKS[_EDIT[name]](f"edits: {name}", value, None)
        if "old_string" not in edit or "new_string" not in edit:
            raise bad("an edit", "an old_string and a new_string")
        texts.append(str(edit["new_string"]))
    return tool, taken | {"content": "\n".join(texts)}


_EDIT: Final[Mapping[str, Takes]] = MappingProxyType(
    {"old_string": Takes.TEXT, "new_string": Takes.TEXT, "replace_all": Takes.BOOLEAN}
)
_Reader: TypeAlias = Callable[[str, Arguments, "str | None"], tuple[str, Arguments]]
_READERS: Final[Mapping[str, _Reader]] = MappingProxyType(
    {"in_folder": _in_folder, "argv": _argv, "patch": _patch, "edits": _edits}
)
