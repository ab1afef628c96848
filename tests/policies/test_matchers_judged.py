"""Regexes, hosts, addresses, shapes, `not` and `when` in whole policies."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.call import Call, Effect, Facts, Json
from safeconduct.errors import Denied, PolicyError
from safeconduct.policies import canonicalize, decide, parse_policy

WORKSPACE = Path("/usr")


def verdict(rules: str, tool: str = "t", facts: Facts | None = None, **arguments: Json) -> str:
    """Judge a call; the effect, or the code of the refusal before there is one."""
    text = f"version: 1\ntools:\n  {tool}:\n{rules}"
    policy = parse_policy(text.encode(), name="policy.yaml", workspace=WORKSPACE)
    call = Call(id="1", tool=tool, arguments=arguments, session="s")
    try:
        with canonicalize(policy, call) as canonical:
            return decide(policy, canonical.document, facts or Facts()).effect.value
    except Denied as denied:
        return denied.code


ALLOW, ASK, DENY = (effect.value for effect in (Effect.ALLOW, Effect.ASK, Effect.DENY))
NO_EVIL = "  - {allow: any}\n  - {deny: {x: MATCHER}}\n"


SPELLINGS: list[tuple[str, list[Json]]] = [
    ('{regex: ".*evil.*"}', ["evil", "x evil y", "x\nevil\ny", "\nevil", "evil\0"]),
    ('{regex: "(?i).*evil.*"}', ["EVIL", "x\r\nEvIl"]),
    ('{host: ["**.evil.test", evil.test]}', ["a.EVIL.test", "evil\uff0etest", "\uff45vil.test"]),
    ('{host: ["127.0.0.1"]}', ["127.1", "0x7f.0.0.1", "2130706433", "\uff11\uff12\uff17.1"]),
    ('{email: ["*@evil.test"]}', ["a@EVIL.test", "A+b@evil\u3002test"]),
    (
        "{json: {type: object, properties: {admin: {type: boolean}}, required: [admin]}}",
        [{"admin": True}, {"admin": True, "x": 1}],
    ),
    ("{json: {type: array, items: {type: string, enum: [evil]}}}", [["evil"], ["good", "evil"]]),
    ('{regex: "[a-z]+", not: ["good"]}', ["evil", "other"]),
    ('{email: any, not: ["*@corp.example"]}', ["a@evil.test"]),
    ('{host: any, not: ["**.corp.example"]}', ["corp.example", "127.0.0.1"]),
]


@pytest.mark.parametrize(("matcher", "evil"), SPELLINGS)
def test_a_deny_holds_in_every_spelling(matcher: str, evil: list[Json]) -> None:
    rules = NO_EVIL.replace("MATCHER", matcher)
    for value in evil:
        assert verdict(rules, x=value) == DENY
        assert verdict(rules, x=value, more="y") == DENY


FORMLESS: list[tuple[str, list[Json]]] = [
    (
        '{host: ["**.evil.test"]}',
        ["evil.test.", "a:80", "u@a", "", 3, None, {"a": 1}, "::ffff:1.2.3.4"],
    ),
    ('{email: ["*@evil.test"]}', ["x", "Ann <a@evil.test>", "a@evil.test,b@c.d", "a@b", 3, None]),
    ('{regex: ".*"}', [3, None, {"a": 1}, True]),
]


@pytest.mark.parametrize(("matcher", "values"), FORMLESS)
def test_what_has_no_form_is_refused_and_not_let_past(matcher: str, values: list[Json]) -> None:
    for value in values:
        for rules in (NO_EVIL.replace("MATCHER", matcher), f"  - {{allow: {{x: {matcher}}}}}\n"):
            assert verdict(rules, x=value) not in (ALLOW, ASK)
    assert verdict(NO_EVIL.replace("MATCHER", matcher), x=["fine", {}]) not in (ALLOW, ASK)


GRANTS: list[tuple[str, list[Json], list[Json]]] = [
    ('{regex: "[a-z]+"}', ["a", ["a", "b"]], ["a\n", ["a", "B"], [], "", ["a", ["b"]]]),
    ('{regex: ".*"}', [""], ["a\nb"]),
    ('{regex: ".*", not: [".*evil.*"]}', ["x"], ["evil", "x\nevil"]),
    ('{host: ["*.a.test"]}', ["B.a.TEST", ["b.a.test"]], ["a.test", ["b.a.test", "c.test"], []]),
    ('{email: ["*@a.test"]}', ["X@a.test"], ["x@b.test", ["x@a.test", "x@b.test"], "x@b.a.test"]),
    (
        '{email: any, not: ["*@a.test"]}',
        ["x@b.test"],
        ["x@a.test", "X@A.test", ["x@b.test", "x@a.test"]],
    ),
    ("{json: {type: array, items: {type: integer}}}", [[1, 2], []], [[1, "2"], 1, [[1]], {"0": 1}]),
    ("{json: {type: object, properties: {a: any}}}", [{}, {"a": [1]}], [{"b": 1}, [{}], [], None]),
]


@pytest.mark.parametrize(("matcher", "good", "bad"), GRANTS)
def test_a_grant_covers_what_it_says(matcher: str, good: list[Json], bad: list[Json]) -> None:
    rules = f"  - {{allow: {{x: {matcher}}}}}\n"
    assert [value for value in good if verdict(rules, x=value) != ALLOW] == []
    assert [value for value in bad if verdict(rules, x=value) == ALLOW] == []
    assert verdict(rules) == DENY
    assert verdict(rules, x=good[0], more=1) == DENY


FAULTS = [
    "call.absent == 1",
    "call.x < 1",
    "call.x == 1 or call.absent == 1",
    "session.role == 'r'",
]


@pytest.mark.parametrize("when", FAULTS)
def test_a_fault_never_grants_and_always_restricts(when: str) -> None:
    grant = f'  - {{allow: any, when: "{when}"}}\n'
    assert verdict(grant, x="a") == DENY
    assert verdict(f'  - {{ask: any, when: "{when}"}}\n', x="a") != ALLOW
    assert verdict(f'  - {{allow: any}}\n  - {{ask: any, when: "{when}"}}\n', x="a") != ALLOW
    assert verdict(f'  - {{allow: any}}\n  - {{deny: any, when: "{when}"}}\n', x="a") == DENY


def test_conditions_see_facts_and_the_canonical_call() -> None:
    grant = "  - {allow: {to: {email: any}}, when: \"call.to == 'ann@a.test'\"}\n"
    assert verdict(grant, to="Ann@A.test") == ALLOW
    counted = '  - {allow: any, when: "session.calls < 2 and session.denied == 0"}\n'
    assert verdict(counted, facts=Facts(calls=1)) == ALLOW
    assert verdict(counted, facts=Facts(calls=2)) == DENY
    assert verdict(counted, facts=Facts(denied=1)) == DENY
    role = "  - {allow: any, when: \"session.role == 'a'\"}\n"
    assert verdict(role, facts=Facts(role="a")) == ALLOW
    assert verdict(role, facts=Facts(), session={"role": "a"}) == DENY


@pytest.mark.parametrize(
    "rule",
    [
        "{allow: {x: {regex: '(a'}}}",
        "{allow: {x: {regex: '(?=a)'}}}",
        "{allow: {x: {regex: ''}}}",
        "{allow: {x: {regex: '[^\\s\\S]'}}}",
        "{allow: {x: {host: []}}}",
        "{allow: {x: {host: ['*a.test']}}}",
        "{allow: {x: {host: all}}}",
        "{allow: {x: {email: ['a.test']}}}",
        "{allow: {x: {email: []}}}",
        "{allow: {x: {json: {type: text}}}}",
        "{allow: {x: {json: any, host: any}}}",
        "{allow: {x: {not: [a]}}}",
        "{allow: {x: {regex: a, not: []}}}",
        "{allow: {x: {regex: a, not: ['(']}}}",
        "{allow: {x: {json: {type: string}, not: [a]}}}",
        "{allow: any, when: 'call.x = 1'}",
        "{allow: any, when: ''}",
        "{allow: any, when: [a]}",
        "{allow: any, when: 'true'}",
    ],
)
def test_a_wrong_rule_does_not_load(rule: str) -> None:
    with pytest.raises(PolicyError) as error:
        verdict(f"  - {rule}\n", x="a")
    assert error.value.line >= 4


def test_two_rules_agree_what_an_argument_is() -> None:
    for one, other in (
        ("{host: any}", "{regex: a}"),
        ("{email: any}", "[a]"),
        ("{json: any}", "[a]"),
    ):
        with pytest.raises(PolicyError):
            verdict(f"  - {{allow: {{x: {one}}}}}\n  - {{deny: {{x: {other}}}}}\n", x="a")


texts = st.one_of(
    st.sampled_from(["a@corp.example", "b@evil.test", "corp.example", "evil", "a\nevil", ""]),
    st.text("ab@.\nevil ", max_size=12),
)
MATCHERS = [
    *('{regex: ".*evil.*"}', '{regex: "[a-z]+", not: ["evil"]}', "{host: any}"),
    *('{host: ["**.example"]}', '{email: ["*@corp.example"]}', '{email: any, not: ["b@*.test"]}'),
]


@given(st.sampled_from(MATCHERS), st.one_of(texts, st.lists(texts, max_size=2)))
def test_what_a_matcher_grants_it_also_denies(matcher: str, value: Json) -> None:
    granted = verdict(f"  - {{allow: {{x: {matcher}}}}}\n", x=value) == ALLOW
    both = f"  - {{allow: {{x: {matcher}}}}}\n  - {{deny: {{x: {matcher}}}}}\n"
    assert verdict(both, x=value) != ALLOW
    if granted:
        assert verdict(NO_EVIL.replace("MATCHER", matcher), x=value) == DENY
