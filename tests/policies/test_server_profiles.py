"""The profile of a server: one rule says where it runs and where its calls are judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeconduct.call import Call, Decision
from safeconduct.policies import Policy, canonicalize, decide, parse_policy
from safeconduct.policies.lattice.difference import difference

BASE = "base: {read: [$WS/docs/**]}"
WIDE = "files: {read: [/etc/**], write: [$WS/**]}"
HIDING = "{read: [$WS/**], hide: [$WS/docs/secret/**]}"


def policy(text: str, workspace: Path) -> Policy:
    return parse_policy(f"version: 1\n{text}".encode(), name="policy.yaml", workspace=workspace)


def judged(found: Policy, tool: str, path: str) -> Decision:
    call = Call(id="1", tool=tool, arguments={"path": path}, session="s")
    with canonicalize(found, call) as canonical:
        return decide(found, canonical.document)


@pytest.mark.parametrize("tool", ["files.read", "files.*", "*.read", "f*.read", "*.*"])
@pytest.mark.parametrize("server", ["", "servers: {files: {run: [srv], profile: docs}}"])
def test_a_call_is_judged_in_the_profile_of_its_server(
    workspace: Path, tool: str, server: str
) -> None:
    name = "docs" if server else "files"
    rules = f'"{tool}": {{allow: {{path: {{path: [$WS/docs/**]}}}}}}'
    text = f"profiles: {{base: {{read: [$WS/**]}}, {name}: {HIDING}}}\n{server}\ntools: {{{rules}}}"
    found = policy(text, workspace)
    assert judged(found, "files.read", "docs/secret/x").code == "path.hidden"
    # One of another server, which the policy does not know, is judged in the default profile.
    other = judged(found, "files.read", "docs/plain").profile
    assert other is not None
    assert other.name == name
    if tool in ("*.read", "*.*"):
        elsewhere = judged(found, "more.read", "docs/secret/x").profile
        assert elsewhere is not None
        assert elsewhere.name == "base"


def test_a_rule_that_names_its_profile_keeps_it(workspace: Path) -> None:
    text = f"profiles: {{base: {{read: [$WS/**]}}, docs: {HIDING}, files: {{}}}}\n"
    rules = 'tools: {"*.read": {allow: {path: {path: [$WS/**]}}, profile: docs}}'
    decision = judged(policy(text + rules, workspace), "files.read", "docs/x")
    assert decision.profile is not None
    assert decision.profile.name == "docs"


def test_tools_of_ours_and_of_a_host_have_no_server(workspace: Path) -> None:
    text = "profiles: {base: {read: [$WS/**]}, shell: {}, claude: {}}\n"
    found = policy(text + "tools: {shell.run: {allow: {argv: [ls]}}}", workspace)
    rule = found.tools["shell.run"].allow[0]
    assert found.profile_of(rule).name == "base"
    assert found.profile_of_server("claude", None).name == "base"


@pytest.mark.parametrize(
    ("servers", "tools", "code"),
    [
        ("servers: {files: {run: [srv]}}", "files.x: {allow: {p: any}}", "diff.server_profile"),
        ("", "files.x: {allow: {p: any}}", "diff.profile"),
        ("", '"*.x": {allow: {p: any}}', "diff.default"),
        ("", "shell.run: {allow: {argv: [ls]}}", "diff.default"),
    ],
)
def test_a_namesake_that_widens_a_server_is_told(
    workspace: Path, servers: str, tools: str, code: str
) -> None:
    rest = f"\n{servers}\ntools: {{{tools}}}"
    old = policy(f"profiles: {{{BASE}}}{rest}", workspace)
    new = policy(f"profiles: {{{BASE}, {WIDE}}}{rest}", workspace)
    assert code in {one.code for one in difference(old, new)}
    # Going back gives less, apart from what only the namesake did not show.
    narrow = policy(f"profiles: {{{BASE}, files: {{read: [$WS/docs/a]}}}}{rest}", workspace)
    assert difference(old, narrow) == ()
    assert code in {one.code for one in difference(narrow, old)}


def test_a_namesake_hides_behind_no_rule_that_uses_it(workspace: Path) -> None:
    rest = '\ntools: {"*.x": {allow: {p: any}}, fs.read: {allow: {path: [$WS/docs/**]}%s}}'
    old = policy(f"profiles: {{{BASE}}}{rest}" % "", workspace)
    new = policy(f"profiles: {{{BASE}, {WIDE}}}{rest}" % ", profile: files", workspace)
    assert "diff.default" in {one.code for one in difference(old, new)}
