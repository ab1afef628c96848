"""Decisions: properties of the semantics first, then one example of each promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.call import (
    Decision,
    Document,
    Effect,
    Enforcement,
    Engine,
    Json,
    Limits,
    Profile,
    Tier,
)
from safeconduct.errors import Denied, PolicyError
from safeconduct.policies import (
    Policy,
    both,
    check_policy,
    decide,
    explain,
    narrow_profiles,
    parse_policy,
)

Judge = Callable[..., Decision]
WORKSPACE = Path("/srv/space")
RANK = {Effect.DENY: 0, Effect.ASK: 1, Effect.ALLOW: 2}

matchers = st.sampled_from(
    [
        "any",
        "[x]",
        "[x, y]",
        "{in: [y]}",
        "{in: [x, y], not: [x]}",
        "{text: {max: 1B}}",
        "{regex: x+}",
        "{regex: '[a-z]+', not: [x, y]}",
    ]
)
options = st.sampled_from(
    [
        "",
        "",
        ", when: \"call.a == 'x'\"",
        ', when: "len(call.b) > 1"',
        ', when: "session.calls > 0"',
        ", when: \"session.role == 'r'\"",
    ]
)
arguments = st.dictionaries(st.sampled_from(["a", "b", "rest"]), matchers, max_size=3)


@st.composite
def rules(draw: st.DrawFn, effects: tuple[str, ...] = ("allow", "ask", "deny")) -> str:
    effect = draw(st.sampled_from(effects))
    named = draw(arguments)
    if "rest" in named:
        named["rest"] = "any"
    body = ", ".join(f"{name}: {matcher}" for name, matcher in named.items())
    whole = not set(named) - {"rest"} and (effect == "deny" or draw(st.booleans()))
    option = draw(options)
    if effect != "deny" and draw(st.booleans()):
        option += ", rate: 5/h, budget: {calls: 3}"
    return f"{{{effect}: {'any' if whole else '{' + body + '}'}{option}}}"


values = st.one_of(
    st.sampled_from(["x", "y", "z", "xx"]), st.lists(st.sampled_from(["x", "y"]), max_size=2)
)
documents = st.dictionaries(st.sampled_from(["a", "b", "c"]), values, max_size=3)


def policy_of(listed: list[str]) -> Policy:
    body = "".join(f"  - {rule}\n" for rule in listed)
    text = f"version: 1\ntools:\n  t:\n{body}" if listed else "version: 1\n"
    return parse_policy(text.encode(), name="p", workspace=WORKSPACE)


def verdict(listed: list[str], given_arguments: dict[str, Any]) -> Decision:
    document = Document(tool="t", arguments=given_arguments, workspace=str(WORKSPACE))
    return decide(policy_of(listed), document)


@given(st.lists(rules(), min_size=1, max_size=5), documents, st.randoms())
def test_the_order_of_rules_never_matters(
    listed: list[str], document: dict[str, Any], random: Random
) -> None:
    shuffled = list(listed)
    random.shuffle(shuffled)
    one, other = verdict(listed, document), verdict(shuffled, document)
    assert (one.effect, one.code, one.profile) == (other.effect, other.code, other.profile)
    # The ids count the rules, so only how much is demanded can be compared.
    assert len(one.obligations) == len(other.obligations)


@given(st.lists(rules(), max_size=4), rules(("deny",)), documents)
def test_a_deny_never_allows_more(listed: list[str], deny: str, document: dict[str, Any]) -> None:
    before, after = verdict(listed, document), verdict([*listed, deny], document)
    assert RANK[after.effect] <= RANK[before.effect]


@given(st.lists(rules(), min_size=1, max_size=5), documents, st.data())
def test_fewer_grants_never_allow_more(
    listed: list[str], document: dict[str, Any], data: st.DataObject
) -> None:
    grants = [rule for rule in listed if rule.startswith("{allow")]
    if not grants:
        return
    gone = data.draw(st.sampled_from(grants))
    fewer = list(listed)
    fewer.remove(gone)
    assert RANK[verdict(fewer, document).effect] <= RANK[verdict(listed, document).effect]


@given(st.lists(rules(), max_size=4), st.lists(rules(), max_size=4), documents)
def test_a_pair_is_the_stricter_of_the_two(
    mine: list[str], theirs: list[str], document: dict[str, Any]
) -> None:
    whole = Document(tool="t", arguments=document, workspace=str(WORKSPACE))
    one, other = policy_of(mine), policy_of(theirs)
    joined = decide(both(one, other), whole)
    assert RANK[joined.effect] == min(
        RANK[decide(one, whole).effect], RANK[decide(other, whole).effect]
    )
    assert joined.policy not in (one.version, other.version)


@given(st.lists(rules(), min_size=1, max_size=5), documents)
def test_the_explanation_agrees(listed: list[str], document: dict[str, Any]) -> None:
    whole = Document(tool="t", arguments=document, workspace=str(WORKSPACE))
    explanation = explain(policy_of(listed), whole)
    assert len(explanation.considered) == len(listed)
    matched = {item.rule for item in explanation.considered if item.matched}
    assert set(explanation.decision.rules) <= matched
    assert explanation.to_json()["code"] == explanation.decision.code


folders = st.sampled_from(["/a", "/a/b", "/a/b/c", "/ab", "/", "/d"])
limits = st.builds(
    Limits,
    wall_ms=st.integers(1, 9),
    cpu_ms=st.none() | st.integers(1, 9),
    memory_bytes=st.integers(1, 9),
)
profiles = st.builds(
    Profile,
    name=st.sampled_from(["p", "q"]),
    read=st.lists(folders, max_size=3).map(tuple),
    write=st.lists(folders, max_size=2).map(tuple),
    hide=st.lists(st.sampled_from(["/**/.env", "/a/k"]), max_size=2).map(tuple),
    limits=limits,
)


def shown(granted: tuple[str, ...], path: str) -> bool:
    return any(path == item or path.startswith(item.rstrip("/") + "/") for item in granted)


@given(profiles, profiles, folders)
def test_narrowing_grants_what_both_grant(one: Profile, other: Profile, path: str) -> None:
    narrow = narrow_profiles(one, other)
    assert shown(narrow.write, path) == (shown(one.write, path) and shown(other.write, path))
    reads = [shown(item.read + item.write, path) for item in (one, other, narrow)]
    assert reads[2] == (reads[0] and reads[1])
    assert set(narrow.hide) == {*one.hide, *other.hide}
    assert narrow.limits.wall_ms == min(one.limits.wall_ms, other.limits.wall_ms)
    backwards = narrow_profiles(other, one)
    assert (set(backwards.read), set(backwards.write)) == (set(narrow.read), set(narrow.write))


def test_profiles_of_two_engines_have_nothing_in_common() -> None:
    with pytest.raises(Denied) as caught:
        narrow_profiles(Profile(name="p"), Profile(name="q", engine=Engine.WASM))
    assert caught.value.code == "policy.profile_conflict"


class TestExamples:
    """One example for each promise."""

    def test_what_is_not_granted_is_denied(self, judge: Judge) -> None:
        tools = '  fs.read: {allow: {path: ["$WS/src/**"]}}'
        assert judge(tools, "fs.read", path="src/main.py").effect is Effect.ALLOW
        assert judge(tools, "fs.read", path="/etc/passwd").code == "policy.no_rule"
        assert judge(tools, "fs.list", path="src").code == "policy.no_rule"

    def test_an_extra_argument_never_slips_past_a_deny(self, judge: Judge) -> None:
        tools = "  t:\n  - {allow: any}\n  - {deny: {to: [boss]}}"
        assert judge(tools, "t", to="boss", more=1).code == "policy.deny"
        assert judge(tools, "t", to=["me", "boss"]).code == "policy.deny"
        assert judge(tools, "t", to=["me"]).effect is Effect.ALLOW

    def test_an_extra_argument_never_slips_past_an_ask(self, judge: Judge) -> None:
        tools = "  t:\n  - {allow: any}\n  - {ask: {to: [boss]}}"
        assert judge(tools, "t", to="boss", more=1).effect is Effect.ASK

    def test_an_ask_grants_nothing_it_does_not_name(self, judge: Judge) -> None:
        tools = "  t: {ask: {to: [boss]}}"
        assert judge(tools, "t", to="boss").effect is Effect.ASK
        assert judge(tools, "t", to="boss", more=1).code == "policy.no_rule"

    def test_an_unnamed_folder_is_the_workspace_only(self, judge: Judge, workspace: Path) -> None:
        tools = "  shell.run: {allow: {argv: [make]}}"
        assert judge(tools, "shell.run", argv=["make"]).effect is Effect.ALLOW
        assert judge(tools, "shell.run", argv=["make"], cwd=".").effect is Effect.ALLOW
        assert judge(tools, "shell.run", argv=["make"], cwd=str(workspace)).effect is Effect.ALLOW
        assert judge(tools, "shell.run", argv=["make"], cwd="src").code == "policy.no_rule"
        wide = '  shell.run: {allow: {argv: [make], cwd: ["$WS/**"]}}'
        assert judge(wide, "shell.run", argv=["make"], cwd="src").effect is Effect.ALLOW

    @pytest.mark.parametrize("path", [".safeconduct", ".git/hooks/x", ".mcp.json", ".git/HEAD"])
    def test_no_policy_lifts_protection(self, judge: Judge, path: str) -> None:
        tools = "  fs.write: {allow: any}"
        assert judge(tools, "fs.write", path=path, content="").code == "path.protected"

    def test_protection_follows_links(self, judge: Judge, workspace: Path) -> None:
        (workspace / "innocent").symlink_to(".git/hooks")
        decision = judge("  fs.write: {allow: any}", "fs.write", path="innocent/x", content="")
        assert decision.code == "path.protected"

    def test_what_a_profile_hides_stays_hidden(self, judge: Judge, workspace: Path) -> None:
        (workspace / ".env").mkdir()
        (workspace / ".env" / "key").write_text("x")
        tools = (
            '  fs.read: {allow: {path: ["$WS/**"]}, profile: p}\n'
            '  fs.write: {allow: {path: ["$WS/**"]}, profile: p}\n'
            'profiles: {p: {hide: ["**/.env"]}}'
        )
        assert judge(tools, "fs.read", path=".env/key").code == "path.hidden"
        assert judge(tools, "fs.write", path=".env/new", content="").code == "path.hidden"
        assert judge(tools, "fs.read", path="src/main.py").effect is Effect.ALLOW

    def test_a_decision_says_how_strong_it_is(self, judge: Judge) -> None:
        tools = "  fs.read: {allow: any}\n  shell.run: {allow: any}\n  t: {allow: any}"
        assert judge(tools, "fs.read", path="src/main.py").enforcement is Enforcement.OBJECT
        assert judge(tools, "shell.run", argv=["x"]).enforcement is Enforcement.SANDBOX
        assert judge(tools, "t").enforcement is Enforcement.SANDBOX

    def test_the_agent_is_not_told_what_would_help(self, judge: Judge) -> None:
        tools = "  fs.read: {deny: any, id: never}"
        decision = judge(tools, "fs.read", path="src/main.py")
        assert decision.reason == "Denied by rule never."
        assert "policy.yaml:3" in decision.advice
        other = judge("  t: {allow: any}", "fs.read", path="src/main.py")
        assert '{"allow": {"path": ["$WS/src/main.py"]}}' in other.advice
        assert "main.py" not in other.reason

    def test_the_profile_is_the_rules_then_base_then_ours(self, judge: Judge) -> None:
        tools = "  shell.run: {allow: any}\nprofiles: {%s: {limits: {wall: 7s}}}"
        chosen = judge(tools % "base", "shell.run", argv=["x"]).profile
        assert chosen is not None
        assert chosen.limits.wall_ms == 7000
        ours = judge(tools % "other", "shell.run", argv=["x"]).profile
        assert ours is not None
        assert (ours.limits, ours.write) == (Limits(), ())

    def test_several_grants_give_what_all_of_them_give(self, judge: Judge) -> None:
        tools = (
            "  shell.run:\n  - {allow: any, profile: a}\n  - {allow: {argv: [x]}, profile: b}\n"
            "profiles: {a: {limits: {wall: 9s}}, b: {limits: {wall: 3s, pids: 9}}}"
        )
        profile = judge(tools, "shell.run", argv=["x"]).profile
        assert profile is not None
        assert (profile.name, profile.limits.wall_ms, profile.limits.pids) == ("a&b", 3000, 9)

    def test_a_bug_of_ours_denies(self) -> None:
        arguments = cast("dict[str, Json]", None)
        document = Document(tool="t", arguments=arguments, workspace=str(WORKSPACE))
        decision = decide(policy_of(["{allow: {}}"]), document)
        assert (decision.effect, decision.code) == (Effect.DENY, "policy.error")

    def test_another_workspace_is_another_policy(self) -> None:
        document = Document(tool="t", arguments={}, workspace="/elsewhere")
        assert decide(policy_of(["{allow: any}"]), document).code == "policy.workspace"


class TestPairs:
    """A project policy only narrows."""

    def parse(self, text: str) -> Policy:
        return parse_policy(f"version: 1\n{text}".encode(), name="p", workspace=WORKSPACE)

    def test_requirements_are_the_stricter(self) -> None:
        pair = both(self.parse("require: {tier: landlock}"), self.parse("require: {cgroup: true}"))
        assert (pair.require_tier, pair.require_cgroup) == (Tier.LANDLOCK, True)

    def test_the_profile_is_what_both_give(self) -> None:
        mine = self.parse("tools: {shell.run: {allow: any}}")
        theirs = self.parse(
            "tools: {shell.run: {allow: any, profile: wide}}\n"
            'profiles: {wide: {read: ["/**"], write: ["/**"], limits: {wall: 1h}}}'
        )
        document = Document(
            tool="shell.run",
            arguments={"argv": ["x"], "cwd": str(WORKSPACE)},
            workspace=str(WORKSPACE),
        )
        profile = decide(both(mine, theirs), document).profile
        assert profile is not None
        assert (profile.read, profile.write) == ((str(WORKSPACE),), ())
        assert profile.limits == Limits()

    def test_one_argument_is_one_thing(self) -> None:
        mine = self.parse("tools: {t: {deny: {a: [secret]}}}")
        theirs = self.parse('tools: {t: {allow: {a: {path: ["/**"]}}}}')
        with pytest.raises(PolicyError, match="'a' is a"):
            both(mine, theirs)


class TestCheck:
    """Findings of `policy check`."""

    def codes(self, text: str) -> list[str]:
        policy = parse_policy(f"version: 1\n{text}".encode(), name="p", workspace=WORKSPACE)
        findings = check_policy(policy)
        assert all(item.line and item.fix and item.to_json() for item in findings)
        return [item.code for item in findings]

    def test_an_ask_that_swallows_an_allow(self) -> None:
        assert self.codes("tools: {t: [{allow: {a: [x]}}, {ask: any}]}") == ["check.swallowed"]
        assert self.codes("tools: {t: [{allow: {a: [x]}}, {ask: {a: [y]}}]}") == []

    def test_a_deny_that_leaves_nothing(self) -> None:
        assert self.codes("tools: {t: [{allow: {a: [x]}}, {deny: any}]}") == ["check.unreachable"]

    def test_a_program_that_runs_others_in_a_wide_profile(self) -> None:
        text = (
            'profiles: {{base: {{read: ["$WS/**"], write: ["$WS/**"]}}}}\n'
            'tools: {{fs.read: {{allow: {{path: ["$WS/**"]}}}}, '
            "shell.run: {{allow: {{argv: {}}}}}}}"
        )
        assert self.codes(text.format("[bash, ...]")) == ["check.wide_profile"]
        assert self.codes(text.format("[any, ...]")) == ["check.wide_profile"]
        assert self.codes(text.format("[true]")) == []

    def test_a_profile_that_shows_what_a_deny_hides(self) -> None:
        text = (
            'profiles: {{base: {{read: ["$WS/**"], hide: [{}]}}}}\n'
            'tools: {{fs.read: [{{allow: {{path: ["$WS/**"]}}}}, {{deny: {{path: ["**/.env"]}}}}],'
            " shell.run: {{allow: {{argv: [ls]}}}}}}"
        )
        assert self.codes(text.format("")) == ["check.shown"]
        assert self.codes(text.format('"**/.env"')) == []
