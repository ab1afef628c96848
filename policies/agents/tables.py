"""Policy step 1: the tools of other programs as data: what each becomes, and its arguments.

A tool with an exact counterpart among ours becomes that: what is judged is what it does. Any other
keeps a name of its own under its program (`claude.Grep`), so that no grant of ours covers it by
accident: `Glob` and `Grep` walk a whole folder, which `fs.list` does not; `write_stdin` types
into a running shell. Only arguments that are listed are taken.

Sources: the published types of Claude Code's tools (`sdk-tools.d.ts` of its agent SDK, 0.3.330)
with the names of older versions; codex-rs/tools/src/ and codex-rs/core/src/tools/ of openai/codex.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Takes(StrEnum):
    """What an argument may be."""

    TEXT = "text"
    TEXTS = "texts"
    NUMBER = "number"
    BOOLEAN = "boolean"
    PATH = "path"  # made absolute
    FOLDER = "folder"  # a path that is the current folder where it is left out
    GLOB = "glob"  # a pattern that stays beneath its folder
    JSON = "json"
    FALSE = "false"  # refused unless false: it asks for more rights
    USUAL = "usual"  # refused unless `use_default`: the same
    SHELL = "shell"  # a shell that reads what was judged as a shell does
    NOTHING = "nothing"  # refused whenever it is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One argument. ``to`` is what it is called in the Call; empty where it has no place there."""

    takes: Takes
    to: str = ""
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTool:
    """A tool of a program. ``tool`` is empty where it keeps its own name.

    ``reader`` names how the arguments are read where copying is not enough (tool_names.py).
    """

    tool: str = ""
    arguments: Mapping[str, Given] = field(default_factory=dict[str, Given])
    reader: str = ""


def _own(**arguments: str) -> HostTool:
    """Make a tool that keeps its name and its arguments; `!` marks those it must have."""
    return HostTool(
        arguments={
            name.strip("_"): Given(
                takes=Takes(takes.rstrip("!")), to=name.strip("_"), required=takes.endswith("!")
            )
            for name, takes in arguments.items()
        }
    )


def _becomes(tool: str, reader: str = "", **arguments: Given) -> HostTool:
    return HostTool(tool=tool, arguments=arguments, reader=reader)


def _must(takes: Takes, to: str) -> Given:
    return Given(takes=takes, to=to, required=True)


def _may(takes: Takes, to: str = "") -> Given:
    return Given(takes=takes, to=to)


_TEXT, _NUMBER, _BOOLEAN = _may(Takes.TEXT), _may(Takes.NUMBER), _may(Takes.BOOLEAN)
_DROPPED: Final = Given(takes=Takes.TEXT, required=True)

_CLAUDE: Final[Mapping[str, HostTool]] = {
    "Bash": _becomes(
        "shell.run",
        "in_folder",
        command=_must(Takes.TEXT, "command"),
        timeout=_NUMBER,
        description=_TEXT,
        run_in_background=_BOOLEAN,
        dangerouslyDisableSandbox=_may(Takes.FALSE),
    ),
    "Read": _becomes(
        "fs.read",
        file_path=_must(Takes.PATH, "path"),
        offset=_NUMBER,
        limit=_NUMBER,
        pages=_TEXT,
        allow_large=_BOOLEAN,
    ),
    "NotebookRead": _becomes("fs.read", notebook_path=_must(Takes.PATH, "path"), cell_id=_TEXT),
    "Write": _becomes(
        "fs.write", file_path=_must(Takes.PATH, "path"), content=_must(Takes.TEXT, "content")
    ),
    # The text put in is the content that is judged, not the file as it is afterwards.
    "Edit": _becomes(
        "fs.write",
        file_path=_must(Takes.PATH, "path"),
        old_string=_DROPPED,
        new_string=_must(Takes.TEXT, "content"),
        replace_all=_BOOLEAN,
    ),
    "MultiEdit": _becomes(
        "fs.write",
        "edits",
        file_path=_must(Takes.PATH, "path"),
        edits=_must(Takes.JSON, "content"),
    ),
    "NotebookEdit": _becomes(
        "fs.write",
        notebook_path=_must(Takes.PATH, "path"),
        new_source=_must(Takes.TEXT, "content"),
        cell_id=_TEXT,
        cell_type=_TEXT,
        edit_mode=_TEXT,
    ),
    "WebFetch": _becomes("http.get", url=_must(Takes.TEXT, "url"), prompt=_DROPPED, offset=_NUMBER),
    "Glob": _own(pattern="glob!", path="folder"),
    "Grep": HostTool(
        arguments=dict(
            _own(
                pattern="text!",
                path="folder",
                glob="text",
                output_mode="text",
                context="number",
                type="text",
                head_limit="number",
                offset="number",
                multiline="boolean",
            ).arguments
        )
        | {flag: _may(Takes.NUMBER, flag) for flag in ("-A", "-B", "-C")}
        | {flag: _may(Takes.BOOLEAN, flag) for flag in ("-n", "-i", "-o")}
    ),
    "LS": _own(path="folder", ignore="texts"),
    "WebSearch": _own(query="text!", allowed_domains="texts", blocked_domains="texts"),
    **dict.fromkeys(
        ("Task", "Agent"),
        _own(
            description="text!",
            prompt="text!",
            subagent_type="text",
            model="text",
            effort="text",
            run_in_background="boolean",
            resume="text",
            max_turns="number",
            name="text",
            team_name="text",
            mode="text",
            isolation="text",
        ),
    ),
    "Skill": _own(skill="text", args="text", command="text"),
    "SlashCommand": _own(command="text!"),
    "Monitor": _own(command="text", description="text", timeout_ms="number", ws="json"),
    "BashOutput": _own(bash_id="text!", filter="text"),
    "TaskOutput": _own(task_id="text!", block="boolean", timeout="number"),
    **dict.fromkeys(("KillShell", "KillBash"), _own(shell_id="text!")),
    "TaskStop": _own(task_id="text", shell_id="text"),
    "TodoRead": _own(),
    "TodoWrite": _own(todos="json!"),
    "TaskCreate": _own(subject="text!", description="text!", activeForm="text", metadata="json"),
    "TaskGet": _own(taskId="text!"),
    "TaskList": _own(),
    "AskUserQuestion": _own(questions="json!", answers="json", annotations="json", metadata="json"),
    "EnterPlanMode": _own(),
    "ExitPlanMode": _own(plan="text", planFilePath="text", allowedPrompts="json"),
    "EnterWorktree": _own(name="text", path="path"),
    "ExitWorktree": _own(action="text!", discard_changes="boolean"),
    "ListMcpResourcesTool": _own(server="text"),
    "ReadMcpResourceTool": _own(server="text!", uri="text!"),
    "ToolSearch": _own(query="text!", max_results="number"),
    "PushNotification": _own(message="text!", status="text"),
}

# What asks to leave Codex's sandbox, or only explains why.
_ESCALATION: Final[Mapping[str, Given]] = {
    "sandbox_permissions": _may(Takes.USUAL),
    "with_escalated_permissions": _may(Takes.FALSE),
    "additional_permissions": _may(Takes.NOTHING),
    "justification": _TEXT,
    "prefix_rule": _may(Takes.TEXTS),
}
_RUNNING: Final[Mapping[str, Given]] = {
    **_ESCALATION,
    "workdir": _may(Takes.PATH, "cwd"),
    "timeout_ms": _NUMBER,
}
_AGENT: Final = _own(
    id="text", message="text", items="json", agent_type="text", model="text", interrupt="boolean"
)

_CODEX: Final[Mapping[str, HostTool]] = {
    # What its hooks call every shell-like tool.
    "Bash": _becomes("shell.run", "in_folder", command=_must(Takes.TEXT, "command")),
    "shell": _becomes(
        "shell.run",
        "argv",
        command=_must(Takes.TEXTS, "argv"),
        timeout=_NUMBER,
        **_RUNNING,
    ),
    "shell_command": _becomes(
        "shell.run",
        "in_folder",
        command=_must(Takes.TEXT, "command"),
        login=_BOOLEAN,
        **_RUNNING,
    ),
    "exec_command": _becomes(
        "shell.run",
        "in_folder",
        cmd=_must(Takes.TEXT, "command"),
        shell=_may(Takes.SHELL),
        login=_BOOLEAN,
        tty=_BOOLEAN,
        yield_time_ms=_NUMBER,
        max_output_tokens=_NUMBER,
        **_RUNNING,
    ),
    "read_file": _becomes(
        "fs.read",
        file_path=_must(Takes.PATH, "path"),
        offset=_NUMBER,
        limit=_NUMBER,
        mode=_TEXT,
        indentation=_may(Takes.JSON),
    ),
    "view_image": _becomes("fs.read", path=_must(Takes.PATH, "path"), detail=_TEXT),
    # The patch itself is `input`, and `command` in hooks; `paths` are the files that it touches.
    "apply_patch": HostTool(
        arguments={name: _may(Takes.TEXT, "input") for name in ("input", "command")},
        reader="patch",
    ),
    "write_stdin": _own(
        session_id="number!", chars="text", yield_time_ms="number", max_output_tokens="number"
    ),
    "list_dir": _own(dir_path="path!", offset="number", limit="number", depth="number"),
    "grep_files": _own(pattern="text!", include="text", path="folder", limit="number"),
    "update_plan": _own(plan="json!", explanation="text"),
    "web_search": _own(query="text", queries="texts"),
    **dict.fromkeys(("spawn_agent", "send_input", "resume_agent", "close_agent"), _AGENT),
    "wait": _own(ids="texts!", timeout_ms="number"),
    "request_user_input": _own(questions="json!"),
    "list_mcp_resources": _own(server="text", cursor="text"),
    "list_mcp_resource_templates": _own(server="text", cursor="text"),
    "read_mcp_resource": _own(server="text!", uri="text!"),
}

TABLES: Final[Mapping[str, Mapping[str, HostTool]]] = MappingProxyType(
    {"claude": MappingProxyType(_CLAUDE), "codex": MappingProxyType(_CODEX)}
)


def why_never_called(name: str) -> str:
    """Say why no Call has this name under a program (`claude.Bash`), or the empty text if some has.

    A policy that names it would deny, or grant, what never comes.
    """
    program, _, tool = name.partition(".")
    row = TABLES[program].get(tool)
    if row is None:
        return f"{program} has no tool {tool!r} that is known here"
    return f"{name} is judged as {row.tool}" if row.tool else ""
