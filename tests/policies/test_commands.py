"""Shell text is judged command by command: the strictest verdict counts, in one sandbox."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeconduct.call import Bound, Call, Decision, Document, Effect, Enforcement, Json, Per, Unit
from safeconduct.errors import Denied
from safeconduct.policies import (
    Canonical,
    Policy,
    canonicalize,
    decide,
    explain,
    parse_policy,
)
from safeconduct.policies.capability import both
from safeconduct.policies.shell.commands import judge_commands, parts_of

PROFILES = """\
  base: {read: ["$WS/**"], write: ["$WS/src/**"], hide: ["**/secret*"]}
  same: {like: base}
  wide: {read: ["$WS/**"], write: ["$WS/**"], limits: {wall: 10m}}
"""
TOOLS = """\
  shell.run:
    - {allow: {argv: [echo, ...]}, id: echo}
    - {allow: {argv: [{in: [cat, ls]}, ...]}, id: cat}
    - {allow: {argv: [pwd], cwd: ["$WS/**"]}, id: pwd}
    - {allow: {argv: [make, ...]}, profile: wide, id: make}
    - {ask: {argv: [git, ...]}, id: git}
    - {deny: {argv: [cat, nothing, ...]}, id: nothing}
  fs.write: [{allow: {path: ["$WS/**"]}, id: write}, {deny: {path: ["$WS/src/no"]}, id: no}]
  fs.read: {allow: {path: ["$WS/src/**"]}, id: read}
"""
Asked = Callable[..., Decision]


@pytest.fixture
def asked(workspace: Path) -> Asked:
    """Judge a text under TOOLS, or under other ones."""

    def run(command: str, /, *, tools: str = TOOLS, **arguments: Json) -> Decision:
        with brought(workspace, tools, command=command, **arguments) as canonical:
            policy = parsed(workspace, tools)
            return decide(policy, canonical.document)

    return run


def parsed(workspace: Path, tools: str) -> Policy:
    text = f"version: 1\nprofiles:\n{PROFILES}tools:\n{tools}"
    return parse_policy(text.encode(), name="policy.yaml", workspace=workspace)


def brought(workspace: Path, tools: str = TOOLS, /, **arguments: Json) -> Canonical:
    call = Call(id="1", tool="shell.run", arguments=arguments, session="s")
    return canonicalize(parsed(workspace, tools), call)


def document(workspace: Path, /, **arguments: Json) -> Document:
    with brought(workspace, **arguments) as canonical:
        return canonical.document


def refused(workspace: Path, /, **arguments: Json) -> str:
    with pytest.raises(Denied) as caught:
        brought(workspace, **arguments)
    return caught.value.code


def test_one_command_is_the_call_of_its_argv(workspace: Path) -> None:
    one = document(workspace, command="echo 'a b'  # said", stdin="x")
    assert one == document(workspace, argv=["echo", "a b"], stdin="x")
    assert parts_of(one) == ()
    entered = document(workspace, command="cd src && echo a")
    assert entered == document(workspace, argv=["echo", "a"], cwd="src")


def test_the_document_of_more_is_one_spelling(workspace: Path) -> None:
    one = document(workspace, command="echo a>src/x&&cat <src/main.py 2>/dev/null | ls 2>&1")
    src = f"{workspace}/src"
    assert one.arguments["command"] == (
        f"echo a > {src}/x && cat < {src}/main.py 2> /dev/null | ls 2>&1"
    )
    other = "echo 'a' > ./src//x &&\n\tcat < 'src/main.py' 2>/dev/null |\n ls 2>&1 # and so on"
    assert document(workspace, command=other) == one
    assert document(workspace, command=str(one.arguments["command"])) == one
    inside = document(workspace, command="cd src; echo a > x && cat < main.py")
    assert inside.arguments["cwd"] == src
    assert inside.arguments["command"] == f"echo a > {src}/x && cat < {src}/main.py"
    assert [part.document.tool for part in parts_of(one)] == [
        *("shell.run", "fs.write", "shell.run", "fs.read", "shell.run")
    ]


def test_it_is_argv_or_command(workspace: Path) -> None:
    assert refused(workspace, command="a; b", argv=["a"]) == "call.extra_argument"
    assert refused(workspace) == "call.missing_argument"
    assert refused(workspace, cwd="src") == "call.missing_argument"
    assert refused(workspace, command=["a"]) == "call.bad_argument"
    assert refused(workspace, command="cd src && a", cwd=7) == "call.bad_argument"
    assert refused(workspace, command="a $b") == "shell.unparsed"
    assert refused(workspace, command="a; cd src") == "shell.builtin"


def test_a_folder_is_entered_from_cwd(workspace: Path) -> None:
    (workspace / "src" / "deep").mkdir()
    found = document(workspace, command="cd deep && pwd; ls", cwd="src")
    assert found.arguments["cwd"] == f"{workspace}/src/deep"
    assert document(workspace, command="cd . && pwd").arguments["cwd"] == str(workspace)
    (workspace / "out").symlink_to("/etc")
    assert refused(workspace, command="cd out && ls") == "path.escape"
    assert refused(workspace, command="cd .. && ls") == "path.dotdot"
    assert refused(workspace, command="cd src/main.py && ls") == "path.not_folder"
    assert refused(workspace, command="cd nowhere && ls; ls") == "path.not_found"


def test_redirections_are_resolved_as_paths_of_ours(workspace: Path) -> None:
    (workspace / "out").symlink_to("/etc")
    os.mkfifo(workspace / "src" / "fifo")
    os.link(workspace / "src" / "main.py", workspace / "src" / "twin")
    for text, code in {
        "echo a > out/x": "path.escape",
        "echo a > ../x": "path.dotdot",
        "echo a > no/x": "path.not_found",
        "cat < no": "path.not_found",
        "echo a > src": "path.not_file",
        "cat < src/fifo": "path.not_file",
        "echo a > src/twin": "path.hard_link",
        "echo a > /dev/full": "path.not_file",
        "echo a > /dev/stdout": "path.",
        "cat < /proc/self/environ": "path.",
        "echo a > src/x; echo b > out/x": "path.escape",
    }.items():
        assert refused(workspace, command=text).startswith(code), text


def test_the_strictest_verdict_counts(asked: Asked) -> None:
    allowed = asked("echo a && ls | cat; echo b > src/x")
    assert (allowed.effect, allowed.code) == (Effect.ALLOW, "policy.allow")
    assert allowed.rules == ("cat", "echo", "write")
    assert allowed.enforcement is Enforcement.SANDBOX
    assert allowed.profile is not None
    assert allowed.profile.name == "base"
    asks = asked("echo a; git push; echo b")
    assert (asks.effect, asks.rules) == (Effect.ASK, ("echo", "git"))
    assert "git push" in asks.reason
    for text, code in {
        "echo a; rm b": "policy.no_rule",
        "git push && cat nothing": "policy.deny",
        "cat nothing || git push": "policy.deny",
        "echo a | sh": "policy.no_rule",
        "echo a > .git/config": "path.protected",
        "echo a > .safeconduct-x; echo b > .mcp.json": "path.protected",
        "echo a > src/no": "policy.deny",
        "cat < .git/hooks/x": "path.not_found",
        "echo a; pwd": "policy.allow",
    }.items():
        if code.startswith("path.not"):
            continue
        decision = asked(text)
        assert decision.code == code, text
        assert decision.enforcement is Enforcement.SANDBOX


def test_one_sandbox_for_all(asked: Asked) -> None:
    assert asked("make; make").effect is Effect.ALLOW
    assert asked("make").effect is Effect.ALLOW
    assert asked("echo a; make").code == "shell.profiles"
    assert asked("echo a | git log; make").code == "shell.profiles"
    assert asked("make > Makefile; make").effect is Effect.ALLOW
    decision = asked("echo a > Makefile")
    assert (decision.code, decision.effect) == ("shell.not_writable", Effect.DENY)
    assert asked("echo a > src/secret").code == "path.hidden"


def test_cwd_counts_for_every_command(asked: Asked) -> None:
    assert asked("cd src && pwd; pwd").effect is Effect.ALLOW
    assert asked("cd src && pwd; ls").code == "policy.no_rule"
    assert asked("pwd; ls", cwd="src").code == "policy.no_rule"


JUDGES_INPUT = """\
  shell.run:
    - {allow: {argv: [a, ...]}}
    - {allow: {argv: [b], stdin: [yes]}}
    - {allow: {argv: [c]}}
    - {deny: {argv: [c], stdin: [evil]}}
    - {allow: {argv: [d]}}
    - {deny: {argv: [d]}, when: 'default(call.stdin, "") != ""'}
    - {allow: {argv: [e]}, when: 'default(call.stdin, "") == ""'}
    - {allow: {argv: [f]}}
    - {ask: {argv: [f]}, when: 'default(call.stdin, "") != ""'}
  fs.write:
    - {allow: {path: ["$WS/src/**"]}}
    - {deny: {path: ["$WS/src/x"], content: [evil]}}
    - {deny: {path: ["$WS/src/z"]}, when: 'len(default(call.content, "")) > 3'}
  fs.read: {allow: {path: ["$WS/src/**"]}}
"""


@pytest.mark.parametrize(
    ("text", "stdin", "code"),
    [
        ("b; a", "yes", "policy.allow"),
        ("b; a", "no", "policy.no_rule"),
        ("a; b", "yes", "policy.no_rule"),  # a may have read all of it
        ("a | b", None, "policy.no_rule"),
        ("b < src/main.py", "yes", "policy.no_rule"),
        ("c; a", "good", "policy.allow"),
        ("c; a", "evil", "policy.deny"),
        ("a; c", None, "policy.allow"),
        ("a; c", "good\nevil", "shell.unjudged"),
        ("a evil | c", None, "shell.unjudged"),
        ("c < src/main.py", None, "shell.unjudged"),
        ("c < /dev/null", None, "shell.unjudged"),
        ("a evil > src/x", None, "shell.unjudged"),
        ("a evil > src/y", None, "policy.allow"),
        ("d", None, "policy.allow"),
        ("d", "x", "policy.deny"),
        ("a evil | d", None, "shell.unjudged"),
        ("a; d", None, "policy.allow"),
        ("e", None, "policy.allow"),
        ("e", "x", "policy.no_rule"),
        ("a evil | e", None, "policy.no_rule"),
        ("a evil | f", None, "shell.unjudged"),
        ("a evil > src/z", None, "shell.unjudged"),
    ],
)
def test_what_is_not_known_yet_grants_nothing_and_restricts(
    asked: Asked, text: str, stdin: str | None, code: str
) -> None:
    given: dict[str, Json] = {} if stdin is None else {"stdin": stdin}
    assert asked(text, tools=JUDGES_INPUT, **given).code == code


def test_no_policy_names_command(asked: Asked) -> None:
    for name in ("command", "commands"):
        with pytest.raises(Exception, match=name):
            asked("a; b", tools=f"  shell.run: {{allow: {{{name}: any}}}}\n")
    assert asked("a; b", tools="  shell.run: {allow: any}\n").effect is Effect.ALLOW
    assert asked("a; b > src/x", tools="  shell.run: {allow: any}\n").code == "policy.no_rule"
    rest = "  shell.run: {allow: {argv: [a, ...], rest: any}}\n"
    assert asked("a; a x", tools=rest).effect is Effect.ALLOW
    assert asked("a; b", tools=rest).code == "policy.no_rule"


def test_a_tool_of_others_may_take_commands(workspace: Path) -> None:
    policy = parsed(workspace, "  batch.run: {allow: {commands: any, command: any}}\n")
    arguments: dict[str, Json] = {"commands": ["a"], "command": "a $b"}
    call = Call(id="1", tool="batch.run", arguments=arguments, session="s")
    with canonicalize(policy, call) as canonical:
        assert canonical.document.arguments == arguments
        assert decide(policy, canonical.document).effect is Effect.ALLOW


def test_bounds_are_counted_for_every_command(workspace: Path) -> None:
    policy, one = parsed(workspace, TOOLS), document(workspace, command="echo a; echo b | cat")
    calls = Bound(id="r", unit=Unit.CALLS, most=9, per=Per.SESSION, reserve=1)
    size = Bound(id="r", unit=Unit.BYTES, most=99, per=Per.DAY, reserve=50)
    money = Bound(id="r", unit=Unit.MONEY, most=99, per=Per.DAY, reserve=5)
    tokens = Bound(id="r", unit=Unit.TOKENS, most=9000, per=Per.SESSION, reserve=1000)
    each = Bound(id="r", unit=Unit.CALLS, most=1, per=Per.CALL, reserve=1)
    profile = policy.profiles["base"]

    def decide_one(part: Document) -> Decision:
        return Decision(
            effect=Effect.ALLOW,
            policy="p",
            code="policy.allow",
            reason="",
            profile=profile,
            obligations=(calls, size, money, tokens, each),
        )

    found = judge_commands(policy, one, decide_one).obligations
    assert [bound.reserve for bound in found] == [3, 50, 15, 3000, 1]


def test_explain_shows_every_command(workspace: Path) -> None:
    one = document(workspace, command="echo a > src/x; git push")
    explanation = explain(parsed(workspace, TOOLS), one)
    shown = {item.part for item in explanation.considered}
    assert shown == {"echo a", f"> {workspace}/src/x", "git push"}
    matched = {(item.part, item.rule) for item in explanation.considered if item.matched}
    assert {("echo a", "echo"), ("git push", "git")} <= matched


def test_what_a_call_writes_is_told(workspace: Path) -> None:
    with brought(workspace, command="echo a > src/x 2>>src/y < src/main.py; ls") as canonical:
        assert canonical.written == (f"{workspace}/src/x", f"{workspace}/src/y")
        assert len(canonical.descriptors) == 3
    with brought(workspace, argv=["ls"]) as canonical:
        assert canonical.written == ()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    order=st.permutations(["echo a", "git push", "make", "rm x", "cat nothing", "ls"]),
    count=st.integers(2, 6),
)
def test_the_order_of_commands_decides_no_effect(
    asked: Asked, order: list[str], count: int
) -> None:
    listed = order[:count]
    effects = {asked("; ".join(listed)).effect, asked("; ".join(reversed(listed))).effect}
    assert len(effects) == 1


def test_every_policy_that_must_agree_judges_every_command(workspace: Path) -> None:
    mine = parsed(workspace, TOOLS)
    theirs = parsed(workspace, "  shell.run: {allow: {argv: [{in: [echo, ls]}, ...]}, id: few}\n")
    one = document(workspace, command="echo a; ls")
    found = decide(both(mine, theirs), one)
    assert (found.effect, found.rules) == (Effect.ALLOW, ("cat", "echo", "few"))
    other = document(workspace, command="echo a; cat")
    assert decide(mine, other).effect is Effect.ALLOW
    assert decide(both(mine, theirs), other).code == "policy.no_rule"


def documented() -> list[tuple[str, str]]:
    """Return the texts in the table of the specification, each with what it says of them."""
    page = Path(__file__).parents[2] / "docs" / "policy-language.md"
    section = page.read_text().partition("### Shell text")[2].partition("\n## ")[0]
    cells = [
        re.split(r"(?<!\\)\|", line)[1:3] for line in section.splitlines() if line.startswith("| `")
    ]
    return [
        (text.replace("\\|", "|"), said)
        for cell, said in cells
        for text in re.findall("`(.+?)`", cell)
    ]


@pytest.mark.parametrize(("text", "said"), documented())
def test_the_specification_says_what_is_judged(workspace: Path, text: str, said: str) -> None:
    (workspace / "src" / "x").write_text("")
    if said.strip().startswith("refused"):
        assert f"`{refused(workspace, command=text)}`" in said
        return
    one = document(workspace, command=text)
    folder = str(one.arguments["cwd"])
    judged = [part.document for part in parts_of(one)] or [one]
    named = [[*map(str, yaml.safe_load(item))] for item in re.findall(r"`(\[.+?\])`", said)]
    assert [found.arguments["argv"] for found in judged if found.tool == "shell.run"] == named
    paths = [f"`{found.tool}` of `src/x`" for found in judged if found.tool != "shell.run"]
    assert all(path in said for path in paths)
    assert len(paths) == said.count("src/x")
    assert ("cwd: src" in said) == (folder != str(workspace))


def test_the_specification_shows_something() -> None:
    assert len(documented()) >= 12
