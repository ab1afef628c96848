"""What a policy reaches outside the workspace is told, and told in full."""

from __future__ import annotations

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
