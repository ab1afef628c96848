"""Tool names of other programs: the documented schemas, and nothing granted by accident."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.call import Effect, Json
from safeconduct.errors import Denied, PolicyError
from safeconduct.policies.agents.names import Host, map_tool
from safeconduct.policies.agents.tables import TABLES, HostTool, Takes
from safeconduct.policies.signatures import BUILT_IN, PROGRAMS, RESERVED

from .conftest import Judge

SCHEMAS = Path(__file__).parents[1] / "vectors" / "tools"
PATCH = "*** Begin Patch\n*** Update File: a.py\n@@\n-x\n+y\n*** End Patch\n"
# A value of each type, as a program would send it.
SAMPLES: Mapping[Takes, Json] = {
    Takes.TEXT: "text",
    Takes.TEXTS: ["a", "b"],
    Takes.NUMBER: 3,
    Takes.BOOLEAN: True,
    Takes.PATH: "/ws/a",
    Takes.FOLDER: "/ws",
    Takes.GLOB: "**/*.py",
    Takes.JSON: [{"old_string": "a", "new_string": "b"}],
    Takes.FALSE: False,
    Takes.USUAL: "use_default",
    Takes.SHELL: "/bin/bash",
}


def _sample(name: str, row: HostTool, *, whole: bool) -> dict[str, Json]:
    wanted = {
        key: SAMPLES[given.takes]
        for key, given in row.arguments.items()
        if given.takes in SAMPLES and (whole or given.required)
    }
    return {"input": PATCH} if row.reader == "patch" else wanted


ROWS = [(host, name, row) for host, table in TABLES.items() for name, row in table.items()]


@pytest.mark.parametrize("host", ["claude", "codex"])
def test_the_documented_schemas_are_in_the_tables(host: str) -> None:
    documented = json.loads((SCHEMAS / f"{host}.json").read_text())["tools"]
    for name, arguments in documented.items():
        row = TABLES[host][name]
        assert arguments.keys() - row.arguments.keys() == set(), name
        required = {key for key, given in row.arguments.items() if given.required}
        assert required <= {key for key, must in arguments.items() if must}, name


@pytest.mark.parametrize(("host", "name", "row"), ROWS)
@pytest.mark.parametrize("whole", [False, True])
def test_every_tool_becomes_one(host: str, name: str, row: HostTool, whole: bool) -> None:
    tool, arguments = map_tool(Host(host), name, _sample(name, row, whole=whole), cwd="/ws")
    if row.tool:
        signature = BUILT_IN[tool]
        forms = [signature, *([signature.as_text] if signature.as_text else [])]
        assert any(
            arguments.keys() <= form.arguments.keys()
            and all(x in arguments for x, y in form.arguments.items() if y.required)
            for form in forms
        )
    else:
        assert tool == f"{host}.{name}"
        assert tool.partition(".")[0] not in RESERVED


@pytest.mark.parametrize(("host", "name", "row"), ROWS)
def test_what_is_not_in_the_table_is_refused(host: str, name: str, row: HostTool) -> None:
    arguments = _sample(name, row, whole=False)
    with pytest.raises(Denied) as refusal:
        map_tool(Host(host), name, arguments | {"unheard_of": 1}, cwd="/ws")
    assert refusal.value.code == "call.extra_argument"
    for key in [key for key, entry in row.arguments.items() if entry.required]:
        with pytest.raises(Denied) as refusal:
            map_tool(Host(host), name, {x: y for x, y in arguments.items() if x != key}, cwd="/ws")
        assert refusal.value.code == "call.missing_argument"
    for key, entry in row.arguments.items():
        if entry.takes is not Takes.JSON:
            with pytest.raises(Denied) as refusal:
                map_tool(Host(host), name, arguments | {key: {"a": [None]}}, cwd="/ws")
            assert refusal.value.code in ("call.bad_argument", "call.escalation")


@pytest.mark.parametrize(
    ("host", "name", "arguments", "tool", "expected"),
    [
        ("claude", "Bash", {"command": "ls", "timeout": 5, "description": "d"}, "shell.run",
         {"command": "ls", "cwd": "/ws"}),
        ("claude", "Bash", {"command": "ls", "dangerouslyDisableSandbox": False}, "shell.run",
         {"command": "ls", "cwd": "/ws"}),
        ("claude", "Read", {"file_path": "/ws/a", "limit": 3}, "fs.read", {"path": "/ws/a"}),
        ("claude", "Write", {"file_path": "/ws/a", "content": "x"}, "fs.write",
         {"path": "/ws/a", "content": "x"}),
        ("claude", "Edit", {"file_path": "a", "old_string": "x", "new_string": "y"}, "fs.write",
         {"path": "/ws/a", "content": "y"}),
        ("claude", "NotebookEdit", {"notebook_path": "/ws/n", "new_source": "1"}, "fs.write",
         {"path": "/ws/n", "content": "1"}),
        ("claude", "WebFetch", {"url": "https://a.example/", "prompt": "p"}, "http.get",
         {"url": "https://a.example/"}),
        ("claude", "Glob", {"pattern": "**/*.py"}, "claude.Glob",
         {"pattern": "**/*.py", "path": "/ws"}),
        ("claude", "Grep", {"pattern": "x", "path": "src", "-n": True}, "claude.Grep",
         {"pattern": "x", "path": "/ws/src", "-n": True}),
        ("claude", "LS", {"path": "/ws"}, "claude.LS", {"path": "/ws"}),
        ("claude", "mcp__files__read_text_file", {"path": "a"}, "files.read_text_file",
         {"path": "a"}),
        ("codex", "Bash", {"command": "ls"}, "shell.run", {"command": "ls", "cwd": "/ws"}),
        ("codex", "shell", {"command": ["ls", "-l"], "workdir": "src"}, "shell.run",
         {"argv": ["ls", "-l"], "cwd": "/ws/src"}),
        ("codex", "shell", {"command": ["bash", "-lc", "ls && pwd"]}, "shell.run",
         {"command": "ls && pwd", "cwd": "/ws"}),
        ("codex", "shell", {"command": ["zsh", "-lc", "ls"]}, "shell.run",
         {"argv": ["zsh", "-lc", "ls"], "cwd": "/ws"}),
        ("codex", "shell", {"command": ["bash", "-xc", "ls"]}, "shell.run",
         {"argv": ["bash", "-xc", "ls"], "cwd": "/ws"}),
        ("codex", "exec_command", {"cmd": "ls", "shell": "/bin/sh"}, "shell.run",
         {"command": "ls", "cwd": "/ws"}),
        ("codex", "apply_patch", {"command": PATCH}, "codex.apply_patch",
         {"input": PATCH, "paths": ["/ws/a.py"]}),
        ("codex", "shell", {"command": ["apply_patch", PATCH], "workdir": "/ws/b"},
         "codex.apply_patch", {"input": PATCH, "paths": ["/ws/b/a.py"]}),
        ("codex", "view_image", {"path": "a.png"}, "fs.read", {"path": "/ws/a.png"}),
        ("codex", "mcp__mail__send", {"to": "a@b.example"}, "mail.send", {"to": "a@b.example"}),
        ("mcp", "mail.send", {"to": ["a"]}, "mail.send", {"to": ["a"]}),
        ("mcp", "mail.box.send", {}, "mail.box.send", {}),
    ],
)  # fmt: skip
def test_what_becomes_of_it(
    host: str, name: str, arguments: dict[str, Json], tool: str, expected: dict[str, Json]
) -> None:
    assert map_tool(Host(host), name, arguments, cwd="/ws") == (tool, expected)


def test_several_edits_are_judged_together() -> None:
    edits: list[Json] = [{"old_string": "a", "new_string": text} for text in ("x", "y")]
    arguments: dict[str, Json] = {"file_path": "/ws/a", "edits": edits}
    _, judged = map_tool(Host.CLAUDE, "MultiEdit", arguments)
    assert judged == {"path": "/ws/a", "content": "x\ny"}
    bad: list[Json] = [
        None,
        [],
        [1],
        [{"new_string": "x"}],
        [{**cast("dict[str, Json]", edits[0]), "x": 1}],
    ]
    for edit in [*bad, [{"old_string": "a", "new_string": 1}]]:
        with pytest.raises(Denied):
            map_tool(Host.CLAUDE, "MultiEdit", {"file_path": "/ws/a", "edits": edit})


@pytest.mark.parametrize(
    ("host", "name"),
    [
        *(("claude", name) for name in ("", "bash", "BASH", "Bash ", "Bash\n", "claude.Bash")),
        *(("claude", name) for name in ("shell.run", "fs.read", "Exec", "x" * 5000)),
        ("claude", "B\N{CYRILLIC SMALL LETTER A}sh"),
        *(("codex", name) for name in ("Read", "shell.run", "Shell", "codex.shell")),
        # MCP: no server, no tool, or ours or a program's.
        *(("claude", name) for name in ("mcp__", "mcp__a", "mcp__a__", "mcp____b", "mcp__a__b__c")),
        *(("claude", f"mcp__{name}__run") for name in sorted(RESERVED)),
        *(("claude", name) for name in ("mcp__claude__Task", "mcp__codex__x")),
        *(("claude", name) for name in ("mcp__a.b__c", "mcp__a__b/c", "mcp__a__b c", "mcp__é__b")),
        *(("claude", name) for name in ("mcp__a__*", "mcp__*__b", "mcp__a__.b", "Mcp__a__b")),
        *(("mcp", name) for name in ("", "send", ".send", "mail.", "mail..send", "mail.se nd")),
        *(("mcp", name) for name in ("fs.read", "shell.run", "claude.Task", "codex.x")),
        *(("mcp", name) for name in ("mail.*", "m\u200bail.send", "mail.send\n", "a" * 65 + ".b")),
    ],
)  # fmt: skip
def test_no_such_tool(host: str, name: str) -> None:
    with pytest.raises(Denied) as refusal:
        map_tool(Host(host), name, {})
    assert refusal.value.code == "call.unknown_tool"


def test_the_operator_says_which_server_is_meant() -> None:
    name = "mcp__a__b__c"
    assert map_tool(Host.CLAUDE, name, {}, servers=["a__b"])[0] == "a__b.c"
    assert map_tool(Host.CLAUDE, name, {}, servers=["a", "x"])[0] == "a.b__c"
    for servers in (["x"], ["a", "a__b"]):
        with pytest.raises(Denied):
            map_tool(Host.CLAUDE, name, {}, servers=servers)


@pytest.mark.parametrize(
    ("host", "name", "arguments"),
    [
        ("claude", "Bash", {"command": "ls", "dangerouslyDisableSandbox": True}),
        ("claude", "Bash", {"command": "ls", "dangerouslyDisableSandbox": 0}),
        ("claude", "Bash", {"command": "ls", "dangerouslyDisableSandbox": None}),
        ("codex", "shell", {"command": ["ls"], "sandbox_permissions": "require_escalated"}),
        ("codex", "shell", {"command": ["ls"], "with_escalated_permissions": True}),
        ("codex", "exec_command", {"cmd": "ls", "additional_permissions": {}}),
        ("codex", "shell_command", {"command": "ls", "sandbox_permissions": True}),
    ],
)
def test_rights_are_not_asked_for_in_a_call(
    host: str, name: str, arguments: dict[str, Json]
) -> None:
    with pytest.raises(Denied) as refusal:
        map_tool(Host(host), name, arguments, cwd="/ws")
    assert refusal.value.code == "call.escalation"


values: st.SearchStrategy[Json] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(st.sampled_from(ROWS), st.data())
def test_any_arguments_become_a_call_or_a_refusal(
    row: tuple[str, str, HostTool], data: st.DataObject
) -> None:
    host, name, tool = row
    keys = st.one_of(st.sampled_from([*tool.arguments, "x"]), st.text(max_size=5))
    arguments = data.draw(st.dictionaries(keys, values, max_size=4))
    try:
        named, judged = map_tool(Host(host), name, arguments, cwd="/ws")
    except Denied:
        return
    assert named in ({tool.tool, f"{host}.apply_patch"} if tool.tool else {f"{host}.{name}"})
    assert all(isinstance(key, str) for key in judged)


def test_own_names_are_granted_by_no_rule_of_ours(judge: Judge) -> None:
    """A policy that grants all of our tools grants nothing that walks or types by itself."""
    tools = "\n".join(f"  {tool}: {{allow: any}}" for tool in ("fs.read", "fs.list", "shell.run"))
    for name, arguments in (
        ("Grep", {"pattern": "x"}),
        ("Task", {"prompt": "x", "description": "x"}),
        ("Monitor", {"command": "ls"}),
    ):
        tool, judged = map_tool(Host.CLAUDE, name, dict(arguments), cwd="/")
        with pytest.raises(Denied) as refusal:
            judge(tools, tool, **judged)
        assert refusal.value.code == "call.unknown_tool"
        granted = judge(f"{tools}\n  {tool}: {{allow: any}}\n", tool, **judged)
        assert granted.effect is Effect.ALLOW


def test_a_read_is_judged_as_a_read(judge: Judge, workspace: Path) -> None:
    rules = '  fs.read: {allow: {path: ["$WS/src/**"]}}\n'
    for path, effect in (("src/main.py", Effect.ALLOW), (".git/hooks", None)):
        tool, judged = map_tool(Host.CLAUDE, "Read", {"file_path": path}, cwd=str(workspace))
        if effect is None:
            with pytest.raises(Denied):
                judge(rules, tool, **judged)
        else:
            assert judge(rules, tool, **judged).effect is effect


def test_the_document_says_what_the_tables_say() -> None:
    text = (Path(__file__).parents[2] / "docs" / "tool-names.md").read_text()
    sections = re.split(r"^\| (Claude Code|Codex CLI) \|", text, flags=re.MULTILINE)
    for host, section in (("claude", sections[2]), ("codex", sections[4])):
        rows = re.findall(r"^\| (`.*) \| (`.*) \|$", section, flags=re.MULTILINE)
        said = {
            name: re.findall(r"`([^`]+)`", target)[0]
            for names, target in rows
            for name in re.findall(r"`([A-Za-z_]+)`", names)
        }
        ours = {name: row.tool for name, row in TABLES[host].items() if row.tool}
        assert ours.items() <= said.items()
        others = said.keys() - ours.keys() - {"mcp__SERVER__TOOL"}
        assert others <= TABLES[host].keys()
        assert all(said[name].startswith(f"{host}.") for name in others)


def test_a_policy_names_only_what_a_call_may_have(judge: Judge) -> None:
    """`claude.Bash: {deny: any}` would deny nothing: the call is one of `shell.run`."""
    assert frozenset(TABLES) == PROGRAMS
    for host, name, row in ROWS:
        rules = f"  {host}.{name}: {{allow: any}}\n"
        if row.tool:
            with pytest.raises(PolicyError, match=f"judged as {row.tool}"):
                judge(rules, f"{host}.{name}")
        else:
            assert judge(rules, f"{host}.{name}").effect is Effect.ALLOW
    for name in ("claude.grep", "claude.Grep.x", "codex.Grep", "claude"):
        with pytest.raises(PolicyError):
            judge(f"  {name}: {{deny: any}}\n", name)


def test_no_server_passes_for_a_program(judge: Judge) -> None:
    for name in sorted(PROGRAMS | RESERVED):
        text = f"  t: {{allow: any}}\nservers: {{{name}: {{run: [x]}}}}\n"
        with pytest.raises(PolicyError, match="cannot be named"):
            judge(text, "t")
