"""The change that a denial proposes is one that allows the call."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeconduct.call import Call, Decision, Document, Effect, Json
from safeconduct.policies import canonicalize, decide, parse_policy

WORKSPACE = Path("/srv/space")
# Rules that say what each argument is, and grant none of what is asked for below.
KINDS = (
    "{allow: {p: {path: [/x/**]}, u: {url: ['https://x.example/**']}, h: {host: [x.example]}, "
    "e: {email: ['*@x.example']}, n: {range: [1, 2]}, s: {regex: x+}, a: {argv: [x]}, "
    "j: {json: {type: object}}, l: [x]}}"
)


def advised(decision: Decision) -> str:
    assert decision.code == "policy.no_rule"
    return decision.advice.partition(" add  ")[2]


def judged(tools: str, document: Document) -> Decision:
    text = f"version: 1\ntools:\n  {tools}\n"
    return decide(parse_policy(text.encode(), name="p", workspace=WORKSPACE), document)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"p": "/srv/space/a/b*c"},
        {"p": ["/srv/space/a", "/etc/{x}"]},
        {"u": "https://a.example/b?c=d"},
        {"h": "a.example", "e": ["a@b.example", "c@d.example"]},
        {"n": 7, "s": "yes: [no]", "l": ["a", "..."]},
        {"a": ["git", "any", "..."]},
        {"a": ["git", "'\"\\", ""]},
        {"j": {"x": [1, None]}},
        {"l": []},
        {"l": True, "other": None, "more": 0.5, "nested": [["x"]]},
        {"rest": "x", "odd name": "y"},
        {"s": "x" * 5000},
    ],
)
def test_it_allows_the_call(arguments: dict[str, Json]) -> None:
    policy = parse_policy(
        f"version: 1\ntools: {{t: {KINDS}}}\n".encode(), name="p", workspace=WORKSPACE
    )
    document = Document(tool="t", arguments=arguments, workspace=str(WORKSPACE))
    advice = advised(decide(policy, document))
    rule = advice.removeprefix("t: ")
    assert judged(f"t: [{KINDS}, {rule}]", document).effect is Effect.ALLOW
    # And no other one, unless only `any` could say it.
    if '"any"' not in advice and arguments:
        other = {name: "/z" if name == "p" else "zz" for name in arguments}
        changed = Document(tool="t", arguments=other, workspace=str(WORKSPACE))
        assert judged(f"t: [{KINDS}, {rule}]", changed).effect is Effect.DENY


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("fs.read", {"path": "src/main.py"}),
        ("fs.write", {"path": "new file", "content": "x"}),
        ("shell.run", {"argv": ["echo", "...", "a b"]}),
        ("shell.run", {"argv": ["echo"], "cwd": "src", "stdin": "x"}),
        ("http.get", {"url": "https://a.example/b"}),
        ("mail.send", {"to": "a@b.example", "cc": []}),
    ],
)
def test_it_allows_a_call_of_a_tool_that_no_rule_speaks_of(
    tool: str, arguments: dict[str, Json], workspace: Path
) -> None:
    empty = parse_policy(
        b"version: 1\ntools: {mail.x: {allow: any}, 'mail.s*': {ask: {x: any}}}\n",
        name="p",
        workspace=workspace,
    )
    call = Call(id="1", tool=tool, arguments=arguments, session="s")
    with canonicalize(empty, call) as canonical:
        document = canonical.document
    text = f"version: 1\ntools:\n  {advised(decide(empty, document))}\n"
    policy = parse_policy(text.encode(), name="p", workspace=workspace)
    assert decide(policy, document).effect is Effect.ALLOW


def test_in_a_role_it_says_where() -> None:
    policy = parse_policy(
        b"version: 1\nroles: {a: {t: {deny: {x: [y]}}}}\n", name="p", workspace=WORKSPACE
    ).for_role("a")
    document = Document(tool="t", arguments={}, workspace=str(WORKSPACE))
    assert decide(policy, document).advice == 'under roles.a in p add  t: {"allow": {}}'
