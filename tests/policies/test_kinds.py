"""A value that is not what a rule takes it for is a doubt of that rule, and of no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeconduct.call import Call, Decision, Effect, Json
from safeconduct.errors import Denied, PolicyError
from safeconduct.policies import canonicalize, decide, explain, parse_policy

ALLOW, DENY = Effect.ALLOW, Effect.DENY
NUMBER = "{allow: {n: {range: [1, 9]}}, id: number}"
ANY = "{allow: {n: any}, id: any}"


def judged(workspace: Path, tools: str, /, head: str = "", **arguments: Json) -> Decision:
    policy = parse_policy(
        f"version: 1\n{head}tools: {{{tools}}}\n".encode(), name="p", workspace=workspace
    )
    call = Call(id="1", tool="t", arguments=arguments, session="s")
    with canonicalize(policy, call) as canonical:
        decision = decide(policy, canonical.document)
        shown = explain(policy, canonical.document)
    assert shown.decision == decision
    assert shown.to_json()["advice"] == decision.advice
    return decision


@pytest.mark.parametrize(
    ("form", "value"),
    [
        ("{range: [1, 9]}", "5 x"),
        ("{range: [1, 9]}", True),
        ("{regex: '[a-z]+'}", 7),
        ("{text: {max: 4B}}", {"x": "y"}),
        ("[a, b]", {"x": "y"}),
        ("[a, b]", [["a"]]),
        ("[a, b]", ["a"] * 1025),
        ("{argv: [ls, ...]}", "ls"),
        ("{argv: [ls, ...]}", ["ls", 1]),
        ("{argv: [ls, ...]}", []),
        ("{path: [$WS/**]}", "../x"),
        ("{path: [$WS/**]}", "~/x"),
        ("{path: [$WS/**]}", ["a", "out/passwd"]),
        ("{url: ['https://**/**']}", "https://u@x.example/"),
        ("{host: any}", "x.example."),
        ("{email: any}", "Ann <ann@x.example>"),
    ],
)
def test_it_takes_nothing_from_another_rule(workspace: Path, form: str, value: Json) -> None:
    (workspace / "out").symlink_to("/etc")
    by_form, by_any = f"{{allow: {{n: {form}}}}}", "{allow: {n: any}, id: free}"
    alone = judged(workspace, f"t: {by_form}", n=value)
    assert alone.effect is DENY
    assert alone.code != "policy.no_rule" or value == []
    both = judged(workspace, f"t: [{by_form}, {by_any}]", n=value)
    assert (both.effect, both.rules) == (ALLOW, ("free",))
    denied = judged(workspace, f"t: [{by_any}, {{deny: {{n: {form}}}, id: no}}]", n=value)
    assert (denied.effect, denied.rules) == (DENY, ("no",))
    asked = judged(workspace, f"t: [{by_any}, {{ask: {{n: {form}}}}}]", n=value)
    assert asked.effect is Effect.ASK


def test_each_matcher_judges_by_its_own_kind(workspace: Path) -> None:
    rules = f"t: [{NUMBER}, {ANY}, {{deny: {{n: ['7']}}}}]"
    assert judged(workspace, rules, n="5").effect is ALLOW
    assert judged(workspace, rules, n="7").effect is DENY
    assert judged(workspace, rules, n=7).effect is DENY


def test_what_is_handed_over_is_one_spelling(workspace: Path) -> None:
    rules = "t: [{allow: {p: {path: [$WS/**]}}}, {allow: {p: any}}]"
    text = f"version: 1\ntools: {{{rules}}}\n".encode()
    policy = parse_policy(text, name="p", workspace=workspace)
    found: list[tuple[Json, bool]] = []
    for path in ("./a", "../a"):
        call = Call(id="1", tool="t", arguments={"p": path}, session="s")
        with canonicalize(policy, call) as canonical:
            document = canonical.document
            found.append((document.arguments["p"], document.unfit is None))
    assert found == [(f"{workspace}/a", True), ("../a", False)]


def test_a_name_in_other_letters_binds_a_restriction(workspace: Path) -> None:
    deny = "t: [{allow: any}, {deny: {path: {path: [/etc/**]}}}]"
    assert judged(workspace, deny, Path="/srv").code == "call.ambiguous_argument"
    grant = "t: [{allow: {path: {path: [/etc/**]}}}, {allow: any, id: free}]"
    assert judged(workspace, grant, Path="/srv").rules == ("free",)
    with pytest.raises(Denied) as caught:
        judged(workspace, grant, Path="/srv", path="/etc")
    assert caught.value.code == "call.ambiguous_argument"


class TestWhen:
    """A condition sees one spelling, whatever other rules there are."""

    @pytest.mark.parametrize(
        "other",
        ["{allow: {h: {host: any}}}", "{deny: {h: {host: any}, x: any}}"],
    )
    @pytest.mark.parametrize("rule", ["deny: any", "deny: {x: any}", "deny: {h: any}"])
    def test_it_asks_only_for_what_its_rule_names(
        self, workspace: Path, rule: str, other: str
    ) -> None:
        rules = f"t: [{other}, {{{rule}, when: 'call.h == \"x.example\"'}}]"
        with pytest.raises(PolicyError) as caught:
            judged(workspace, rules, h="X.example")
        assert "is read as it was given" in caught.value.message
        assert "name h with a matcher of the form host" in caught.value.hint

    def test_so_it_is_also_where_wildcards_meet(self, workspace: Path) -> None:
        rules = (
            "'t.*': {allow: {h: {host: any}}}, '*.a': {deny: any, when: 'call.h == \"x.example\"'}"
        )
        with pytest.raises(PolicyError):
            judged(workspace, rules)

    def test_with_a_matcher_beside_it(self, workspace: Path) -> None:
        rules = (
            "t: [{allow: any}, {deny: {h: {host: any}}, when: 'call.h == \"x.example\"'}, "
            "{allow: {h: {host: any}}}]"
        )
        assert judged(workspace, rules, h="X.EXAMPLE").effect is DENY
        assert judged(workspace, rules, h="y.example").effect is ALLOW
        # It is no host, so nobody can say that it is not this one.
        assert judged(workspace, rules, h="y.example.").effect is DENY


def test_a_grant_covers_nothing_that_its_profile_hides(workspace: Path) -> None:
    head = "profiles: {base: {read: [$WS/**], hide: ['**/.env']}, open: {read: [$WS/**]}}\n"
    (workspace / ".env").write_text("x")
    for form, other in (("{path: [$WS/**]}", "any"), ("{path: [$WS/**]}", "{path: [$WS/**]}")):
        hidden = f"{{allow: {{p: {form}}}, id: hidden}}"
        free = f"{{allow: {{p: {other}}}, profile: open, id: free}}"
        alone = judged(workspace, f"t: {hidden}", head, p=".env")
        assert alone.code == "path.hidden"
        both = judged(workspace, f"t: [{hidden}, {free}]", head, p=".env")
        assert (both.effect, both.rules) == (ALLOW, ("free",))
        assert judged(workspace, f"t: {free}", head, p=".env").effect is ALLOW


def test_advice_for_what_fits_nothing_would_allow_it(workspace: Path) -> None:
    decision = judged(workspace, "t: {allow: {p: {path: [$WS/**]}}}", p="../x")
    assert decision.code == "path.dotdot"
    grant = decision.advice.partition("  ")[2]
    assert grant == 't: {"allow": {"p": "any"}}'


def test_advice_is_written_when_it_is_asked_for(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write(*_: object) -> str:
        written.append("x")
        return "t: {}"

    monkeypatch.setattr("safeconduct.policies.refusal.smallest_grant", write)
    text = b"version: 1\ntools: {t: {allow: {n: [a]}}}\n"
    policy = parse_policy(text, name="p", workspace=workspace)
    call = Call(id="1", tool="t", arguments={"n": "b"}, session="s")
    with canonicalize(policy, call) as canonical:
        decision = decide(policy, canonical.document)
    assert not written
    assert decision.advice.endswith("t: {}")
    assert written
