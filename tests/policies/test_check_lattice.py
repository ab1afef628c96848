"""`policy check` finds rules that add nothing and grants that keep nothing out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from safeconduct.policies import check_policy, decide, parse_policy
from safeconduct.policies.lattice.profiles import profile_within

from .generate import WORKSPACE, parse, seeded

PROFILES = (
    "{base: {read: [$WS/**]}, dev: {like: base, write: [$WS/**]},"
    " shy: {like: base, hide: ['**/.env']}}"
)


def codes(tools: str, code: str) -> list[str]:
    text = f"version: 1\nprofiles: {PROFILES}\ntools: {{{tools}}}"
    policy = parse_policy(text.encode(), name="p", workspace=Path(WORKSPACE))
    return [one.message for one in check_policy(policy) if one.code == code]


SHADOWED = {
    "a path": "fs.read: [{allow: {path: [$WS/**]}, id: a}, {allow: {path: [$WS/b]}, id: r}]",
    "the same": "fs.read: [{allow: {path: [$WS/b]}, id: a}, {allow: {path: [$WS/b]}, id: r}]",
    "a deny": "t: [{allow: any, id: x}, {deny: {p: [a, b]}, id: a}, {deny: {p: [a]}, id: r}]",
    "an ask": "shell.run: [{ask: {argv: [git, ...]}, id: a}, {ask: {argv: [git, x]}, id: r}]",
    "a wider profile": "shell.run: [{allow: {argv: [git, ...]}, id: a},"
    " {allow: {argv: [git, x]}, profile: dev, id: r}]",
    "under a wildcard": "'t.*': [{allow: {p: {range: [1, 9]}}, id: a},"
    " {allow: {p: {range: [3, 3]}}, id: r}]",
}
NOT_SHADOWED = {
    "a narrower profile": "shell.run: [{allow: {argv: [git, ...]}, profile: dev},"
    " {allow: {argv: [git, x]}}]",
    "a rate of its own": "fs.read: [{allow: any}, {allow: {path: [$WS/b]}, rate: 3/h}]",
    "another effect": "fs.read: [{allow: any}, {ask: {path: [$WS/b]}}]",
    "a condition above it": "fs.read: [{allow: any, when: session.calls < 3},"
    " {allow: {path: [$WS/b]}}]",
    "a path that only it tells": "t: [{allow: {a: any}}, {allow: {a: {path: [$WS/**]}}}]",
    "an argument more": "t: [{allow: {a: any}}, {allow: {a: any, b: any}}]",
}


@pytest.mark.parametrize("name", SHADOWED)
def test_a_rule_under_another_is_found(name: str) -> None:
    (message,) = codes(SHADOWED[name], "check.shadowed")
    assert message.startswith("r ")
    assert "a covers it" in message


@pytest.mark.parametrize("name", NOT_SHADOWED)
def test_a_rule_that_counts_is_not_found(name: str) -> None:
    assert codes(NOT_SHADOWED[name], "check.shadowed") == []


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("http.get: {allow: any, id: r}", "r lets url be any URL"),
        ("http.get: {allow: {url: ['https://**/**']}, id: r}", "r lets url be any URL of any host"),
        ("m.send: {allow: {to: {email: any}}, id: r}", "r lets to be any mail address"),
        ("m.send: {allow: {to: {email: ['*@**']}}, id: r}", "r lets to be any mail address"),
        ("n.dial: {allow: {h: {host: any}}, id: r}", "r lets h be any host"),
        ("t: {allow: {a: {regex: '.*'}}, id: r}", "r lets a be any text"),
    ],
)
def test_what_keeps_nothing_out_is_found(tools: str, said: str) -> None:
    (message,) = codes(tools, "check.broad")
    assert message.startswith(said)
    asked = tools.replace("allow:", "ask:")
    assert codes(asked, "check.broad") == []
    assert codes(tools.replace("id: r", "id: r, rate: 9/h"), "check.broad") == []


@pytest.mark.parametrize(
    "tools",
    [
        "http.get: {allow: {url: {url: ['https://**/**'], not: ['https://*.corp.test/**']}}}",
        "http.get: {allow: {url: ['https://**/api/**']}}",
        "m.send: {allow: {to: {email: ['*@a.test']}}}",
        "t: {allow: {a: {regex: '[a-z]+'}}}",
    ],
)
def test_what_keeps_something_out_is_fine(tools: str) -> None:
    assert codes(tools, "check.broad") == []


@pytest.mark.parametrize(
    ("tools", "code", "said"),
    [
        (
            "fs.read: [{allow: {path: [$WS/a, $WS/b]}, id: r},"
            " {deny: {path: [$WS/a]}}, {deny: {path: [$WS/b]}}]",
            "check.unreachable",
            "several denies together take back all that r grants",
        ),
        (
            "fs.read: {allow: {path: ['**/.env', '$WS/x/.env/y']}, profile: shy, id: r}",
            "check.unreachable",
            "r grants only what profile shy hides",
        ),
        (
            "t: {allow: {p: {path: ['$WS/.env']}}, profile: shy, id: r}",
            "check.unreachable",
            "r grants only what profile shy hides",
        ),
        (
            "fs.write: {allow: {path: ['$WS/**', '$WS/.git/hooks/**']}, id: r}",
            "check.protected",
            "r never lets fs.write write /ws/.git/hooks/**: it decides what runs later",
        ),
        (
            "fs.write: {ask: {path: ['$WS/.mcp.json']}, id: r}",
            "check.protected",
            "r never lets fs.write write /ws/.mcp.json: it decides what runs later",
        ),
    ],
)
def test_grants_that_never_count(tools: str, code: str, said: str) -> None:
    assert codes(tools, code) == [said]


@pytest.mark.parametrize(
    "tools",
    [
        "fs.read: {allow: {path: ['**/.env*']}, profile: shy}",
        "fs.read: [{allow: {path: [$WS/a, $WS/b]}}, {deny: {path: [$WS/a]}},"
        " {deny: {path: [$WS/c]}}]",
        "fs.write: {allow: {path: ['$WS/**']}}",
        "fs.read: {allow: {path: ['$WS/.git/config']}}",
    ],
)
def test_grants_that_count(tools: str) -> None:
    assert codes(tools, "check.unreachable") == []
    assert codes(tools, "check.protected") == []


def test_a_policy_that_is_made_to_cost_is_looked_at_in_time() -> None:
    letters = [f"'**/*a{'?' * 14}b{at}'" for at in range(120)]
    excluded = [f"'**/*b{'?' * 15}c{at}'" for at in range(120)]
    rules = [
        f"{{allow: {{path: {{path: [{one}], not: [{other}]}}}}}}"
        for one, other in zip(letters, excluded, strict=True)
    ]
    started = time.process_time()
    text = f"version: 1\ntools: {{fs.read: [{', '.join(rules)}]}}"
    policy = parse_policy(text.encode(), name="p", workspace=Path(WORKSPACE))
    loaded = time.process_time()
    check_policy(policy)
    # Seconds of its own, many times what it takes; without a bound these would be minutes.
    assert loaded - started < 10
    assert time.process_time() - loaded < 60


def test_a_shadowed_rule_changes_no_decision_when_it_is_removed() -> None:
    removed = 0
    for seed in range(250):
        generator = seeded(seed)
        spec = generator.spec()
        policy = parse(spec)
        for one in check_policy(policy):
            if one.code != "check.shadowed" or not one.message.startswith("tools."):
                continue
            rule, _, _ = one.message.partition(" ")
            tool, _, index = rule.removeprefix("tools.").rstrip("]").partition("[")
            tools = spec["tools"]
            assert isinstance(tools, Mapping)
            rules = [rule for at, rule in enumerate(tools[tool]) if at != int(index)]
            left = parse({**spec, "tools": {**tools, tool: rules}})
            removed += 1
            for _ in range(40):
                document = generator.document(None if "*" in tool else tool)
                before, after = decide(policy, document), decide(left, document)
                assert before.effect is after.effect, f"seed {seed}: {one.message}"
                if before.profile and after.profile:
                    assert profile_within(before.profile, after.profile)
                    assert profile_within(after.profile, before.profile)
    assert removed > 10
