"""What a policy reaches outside the workspace is told, and told in full."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from safeconduct.policies import PRESETS, Policy, check_policy, parse_policy, read_preset

WORKSPACE = Path("/home/a/code")


def parse(text: str) -> Policy:
    return parse_policy(f"version: 1\n{text}".encode(), name="p", workspace=WORKSPACE)


def outside(text: str) -> list[str]:
    """Return the messages about what lies outside, each without its common end."""
    findings = [one for one in check_policy(parse(text)) if one.code == "check.outside"]
    assert all(one.line and one.fix and one.level == "warning" for one in findings)
    return [one.message.removesuffix(", which is outside the workspace") for one in findings]


def test_folders_of_a_profile() -> None:
    text = "profiles: {p: {read: ['$WS/**', /home/a/**, /home/a/codeshop], write: [/srv/x/**]}}"
    assert outside(text) == [
        "profile p reads /home/a",
        "profile p reads /home/a/codeshop",
        "profile p writes /srv/x",
    ]
    assert outside("profiles: {p: {read: [/home/a/code/src/**], hide: [/etc/**]}}") == []


@pytest.mark.parametrize("effect", ["allow", "ask"])
@pytest.mark.parametrize("pattern", ["/**", "/etc/passwd", "**/.env", "/home/*/code/**", "/home/a"])
def test_path_grants(effect: str, pattern: str) -> None:
    for tool in ("fs.read", "fs.list", "fs.write", "files.get"):
        text = f"tools: {{{tool}: {{{effect}: {{path: {{path: ['$WS/**', '{pattern}']}}}}}}}}"
        (message,) = outside(text)
        assert message.endswith(f" lets {tool} reach {pattern}")


@pytest.mark.parametrize("allow", ["any", "{path: any}"])
def test_any_path_is_outside_too(allow: str) -> None:
    (message,) = outside(f"tools: {{fs.read: {{allow: {allow}}}}}")
    assert message.endswith("lets fs.read reach any path")


@pytest.mark.parametrize("allowed", ["$WS", "$WS/**", "$WS/*/x", "/home/a/code/**"])
def test_what_is_inside_and_what_is_denied_is_fine(allowed: str) -> None:
    rules = f"[{{allow: {{path: ['{allowed}']}}}}, {{deny: {{path: ['**/.env', /etc/**]}}}}]"
    assert outside(f"tools: {{fs.read: {rules}}}") == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_clean(name: str) -> None:
    assert check_policy(parse_policy(read_preset(name), name=name, workspace=WORKSPACE)) == ()


def described(matcher: str) -> str:
    rule = parse(f"tools: {{t: {{allow: {{a: {matcher}}}}}}}").tools["t"].all[0]
    return (rule.matchers or {})["a"].describe()


@pytest.mark.parametrize(
    ("form", "lead"), [("path", "a path in"), ("url", "a URL in"), ("in", "one of")]
)
def test_a_list_is_described_in_full(form: str, lead: str) -> None:
    start = "https://example.org" if form == "url" else ""
    words = [f"{start}/{index}{'x' * 40}" for index in range(10, 40)]
    assert described(f"{{{form}: [{', '.join(words)}]}}") == f"{lead} {', '.join(words)}"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[git, {in: [log, 'a b']}, ...]", '[git, {in: [log, "a b"]}, ...]'),
        ("[cat, {path: ['$WS/**', /etc/x]}]", "[cat, {path: [$WS/**, /etc/x]}]"),
        (
            "[head, {range: [1, 9]}, {text: {max: 1KiB}}]",
            "[head, {range: [1, 9]}, {text: {max: 1024B}}]",
        ),
        # What is quoted in the policy is the word itself, and does not pass for the wildcard.
        ("[any, 'any', '...', '', 'a, b']", '[any, "any", "...", "", "a, b"]'),
    ],
)
def test_an_argv_is_described_with_its_values(written: str, shown: str) -> None:
    assert described(f"{{argv: {written}}}") == f"argv {shown}"


def findings(text: str) -> list[tuple[str, int]]:
    found = check_policy(parse(text))
    assert all(one.fix and one.file == "p" for one in found)
    return [(one.code, one.line) for one in found]


@pytest.mark.parametrize(
    ("wide", "narrow", "covers"),
    [
        ("{a: {path: ['$WS/**']}}", "{a: {path: ['$WS/src/**']}}", True),
        ("{a: {path: ['$WS/src/**']}}", "{a: {path: ['$WS/**']}}", False),
        ("{a: {email: any}}", "{a: {email: ['*@corp.example']}}", True),
        ("{a: {email: any, not: ['*@corp.example']}}", "{a: {email: ['*@corp.example']}}", False),
        ("{a: [x, y]}", "{a: [x], b: any}", True),
        ("{a: [x, y]}", "{a: [x, z]}", False),
        ("{a: {argv: [git, ...]}}", "{a: {argv: [git, push, origin]}}", True),
    ],
)
def test_rules_that_never_count(wide: str, narrow: str, covers: bool) -> None:
    denied = findings(f"tools:\n  t:\n  - {{allow: {narrow}}}\n  - {{deny: {wide}}}\n")
    assert (("check.unreachable", 4) in denied) is covers
    asked = findings(f"tools:\n  t:\n  - {{allow: {narrow}}}\n  - {{ask: {wide}}}\n")
    assert (("check.swallowed", 4) in asked) is covers


def test_a_condition_leaves_something() -> None:
    rule = "tools:\n  t:\n  - {{allow: any{}}}\n  - {{deny: any{}}}\n"
    weekend = ", when: \"time.weekday in ['sat', 'sun']\""
    assert findings(rule.format("", weekend)) == []
    assert findings(rule.format(weekend, weekend)) == [("check.unreachable", 4)]


def test_a_deny_by_wildcard_reaches_other_names() -> None:
    text = "tools:\n  files.read: {allow: {a: [x]}}\n  files.*: {deny: any}\n"
    assert findings(text) == [("check.unreachable", 3)]
    text = "tools:\n  files.read_*: {allow: {a: [x]}}\n  files.*: {deny: any}\n"
    assert findings(text) == [("check.unreachable", 3)]
    text = "tools:\n  files.*: {allow: {a: [x]}}\n  files.read_*: {deny: any}\n"
    assert findings(text) == []


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("files.*: {allow: any}", True),
        ("files.*: {allow: {a: any, rest: any}}", True),
        ("files.*: {ask: any}", False),
        ("files.*: {allow: {a: [x]}}", False),
        ("'*.read': {allow: {a: [x]}}", True),
        ("'*.read': {deny: any}", False),
    ],
)
def test_grants_by_wildcard_that_are_too_broad(rule: str, found: bool) -> None:
    assert (("check.broad_wildcard", 3) in findings(f"tools:\n  {rule}\n")) is found


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ("path: ['$WS/secret/**']", True),
        ("path: ['**/.env']", True),
        ("path: [/etc/*]", True),
        ("url: ['https://a.example/**']", True),
        ("to: ['*@corp.example']", True),
        ("host: ['*.corp.example']", True),
        ("x: {in: [a, '$WS/secret'], not: [a]}", True),
        ("path: {path: ['$WS/secret/**']}", False),
        ("columns: ['*']", False),
        ("cost: ['$WSX', $5, '*/5 * * * *', 'a*b']", False),
    ],
)
def test_a_pattern_that_is_the_text_itself(argument: str, found: bool) -> None:
    rule = "tools:\n  files.read: [{allow: any}, {%s: {%s}}]\n"
    codes = [code for code, _ in findings(rule % ("deny", argument))]
    assert codes == ["check.literal_pattern"] * found
    granted = check_policy(parse(rule % ("allow", argument)))
    assert all(one.level == "warning" for one in granted)
    # Our own tools say what their arguments are.
    assert findings("tools:\n  fs.read: {allow: {path: ['$WS/**']}}\n") == []


def test_a_role_within_one_that_grants_less() -> None:
    text = (
        "roles:\n"
        "  wide:\n    t: {allow: any}\n    files.*: {ask: any}\n    v: {deny: any}\n"
        "  narrow:\n    narrows: wide\n    t: {allow: any}\n    files.x: {allow: any}\n"
        "    u: {allow: any}\n    v: {allow: any}\n"
    )
    assert findings(text) == [("check.unreachable", 11), ("check.unreachable", 12)]


def test_every_role_is_looked_at() -> None:
    text = (
        "profiles: {wide: {read: [/etc/**]}}\n"
        "roles:\n  a:\n    fs.read: {allow: {path: {path: [/etc/**], not: [/etc/shadow]}}}\n"
        "    files.x: {allow: {p: {path: [/srv/**]}}}\n"
        "    files.*: {ask: {p: {path: [/var/**]}}}\n"
    )
    lines = [line for code, line in findings(text) if code == "check.outside"]
    assert lines == [2, 5, 6, 7]


def test_many_rules_are_compared_within_bounds() -> None:
    denies = "".join(f"  - {{deny: {{a: {{path: ['/a{n}/**']}}}}}}\n" for n in range(300))
    allows = "".join(f"  - {{allow: {{a: {{path: ['/a{n}/b']}}}}}}\n" for n in range(300))
    start = time.monotonic()
    check_policy(parse(f"tools:\n  t:\n{denies}{allows}"))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("tool", ["shell.run", "python.run", "wasm.run"])
def test_an_engine_that_refuses_every_call_is_found(tool: str) -> None:
    rule = "{allow: any, profile: w}"
    policy = parse(f"profiles: {{w: {{engine: wasm}}}}\ntools: {{{tool}: {rule}}}")
    codes = [one.code for one in check_policy(policy)]
    assert codes.count("check.no_engine") == (0 if tool == "wasm.run" else 1)
