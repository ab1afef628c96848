"""The profile key `workspace`: how a call's writes reach the workspace."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeconduct.call import Profile, WorkspaceMode
from safeconduct.errors import PolicyError
from safeconduct.policies import check_policy, narrow_profiles, parse_policy, policy_schema

DIRECT, OVERLAY = WorkspaceMode.DIRECT, WorkspaceMode.OVERLAY
SESSION = WorkspaceMode.SESSION


def profiles(text: str, tmp_path: Path) -> dict[str, WorkspaceMode]:
    data = f"version: 1\nprofiles: {{{text}}}\n".encode()
    policy = parse_policy(data, name="p.yaml", workspace=tmp_path)
    return {name: profile.workspace for name, profile in policy.profiles.items()}


def test_it_is_direct_unless_said_and_is_copied_by_like(tmp_path: Path) -> None:
    text = "a: {}, b: {workspace: overlay}, c: {like: b}, d: {like: b, workspace: direct}"
    text += ", e: {like: b, workspace: session-overlay}, f: {like: e}"
    found = profiles(text, tmp_path)
    assert found == {
        "a": DIRECT, "b": OVERLAY, "c": OVERLAY, "d": DIRECT, "e": SESSION, "f": SESSION
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "a: {workspace: shadow}",
        "a: {workspace: [overlay]}",
        "a: {workspace: session}",
        "a: {engine: wasm, workspace: overlay}",
        "a: {engine: wasm, workspace: session-overlay}",
    ],
)
def test_what_nothing_can_enforce_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        profiles(text, tmp_path)
    assert caught.value.line == 2


@pytest.mark.parametrize("one", list(WorkspaceMode))
@pytest.mark.parametrize("other", list(WorkspaceMode))
def test_of_two_profiles_the_stricter_counts(one: WorkspaceMode, other: WorkspaceMode) -> None:
    both = narrow_profiles(
        Profile(name="a", workspace=one, write=("/w",)),
        Profile(name="b", workspace=other, write=("/w",)),
    )
    # A session's overlay holds writes back too, but shows what other calls did.
    strictness = [DIRECT, SESSION, OVERLAY]
    assert both.workspace is max(one, other, key=strictness.index)


def test_the_schema_names_all() -> None:
    assert all(f"'{mode}'" in str(policy_schema()) for mode in WorkspaceMode)


@pytest.mark.parametrize(
    ("tool", "rule", "found"),
    [
        ("fs.write", '{allow: {path: ["$WS/**"]}}', ["check.no_overlay"]),
        ("python.run", "{ask: {code: any}}", ["check.no_overlay"]),
        ("fs.read", '{allow: {path: ["$WS/**"]}}', []),
        ("fs.write", '{allow: {path: ["$WS/**"]}, profile: plain}', []),
        ("python.run", "{allow: {code: any}, profile: looks}", []),
        ("fs.read", '{allow: {path: ["$WS/**"]}, profile: shared}', ["check.no_overlay"]),
        ("fs.list", '{ask: {path: ["$WS/**"]}, profile: shared}', ["check.no_overlay"]),
        ("python.run", "{allow: {code: any}, profile: shared}", ["check.no_overlay"]),
    ],
)
def test_a_rule_that_its_overlay_would_always_refuse_is_found(
    tool: str, rule: str, found: list[str], tmp_path: Path
) -> None:
    text = (
        'version: 1\nprofiles:\n  base: {write: ["$WS/**"], workspace: overlay}\n'
        '  plain: {write: ["$WS/**"]}\n  looks: {read: ["$WS/**"], workspace: overlay}\n'
        '  shared: {read: ["$WS/**"], workspace: session-overlay}\n'
        f"tools: {{{tool}: {rule}}}\n"
    )
    policy = parse_policy(text.encode(), name="p.yaml", workspace=tmp_path)
    codes = [one.code for one in check_policy(policy)]
    assert [code for code in codes if code == "check.no_overlay"] == found
