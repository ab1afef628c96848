"""What stands beside a matcher or an effect: `not`, `when`, `rate`, `budget`."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeconduct.call import Bound, Call, Decision, Document, Effect, Facts, Json, Per, Unit
from safeconduct.errors import PolicyError
from safeconduct.policies import (
    Policy,
    canonicalize,
    check_policy,
    decide,
    describe_bound,
    explain,
    parse_policy,
)

WORKSPACE = Path("/srv/space")
NOON_MS = 1_767_614_400_000  # Monday 2026-01-05T12:00:00Z


def parse(tools: str) -> Policy:
    text = f"version: 1\ntools: {{{tools}}}\n"
    return parse_policy(text.encode(), name="p", workspace=WORKSPACE)


def judged(tools: str, /, facts: Facts | None = None, **arguments: Json) -> Decision:
    """Judge a call of the tool `t` from its arguments as an agent gives them."""
    policy = parse(tools)
    call = Call(id="1", tool="t", arguments=arguments, session="s")
    with canonicalize(policy, call) as canonical:
        return decide(policy, canonical.document, facts or Facts(now_ms=NOON_MS))


def effect(tools: str, /, facts: Facts | None = None, **arguments: Json) -> Effect:
    return judged(tools, facts, **arguments).effect


MAIL = (
    "t: [{allow: {to: {email: ['*@corp.example']}}}, "
    "{ask: {to: {email: any, not: ['*@corp.example']}}}]"
)


class TestNot:
    """`{FORM: X, not: Y}`: what X matches and Y does not."""

    @pytest.mark.parametrize(
        ("matcher", "value", "matches"),
        [
            (
                "{url: ['https://**/**'], not: ['https://**.corp.example/**']}",
                "https://a.org/",
                True,
            ),
            (
                "{url: ['https://**/**'], not: ['https://**.corp.example/**']}",
                "https://x.corp.example/",
                False,
            ),
            ("{in: [a, b], not: [b]}", "b", False),
            ("{range: [1, 10], not: [5, 6]}", 4, True),
            ("{range: [1, 10], not: [5, 6]}", 5, False),
            ("{regex: '[a-z]+', not: 'x+'}", "xx", False),
            ("{regex: '[a-z]+', not: ['x+', 'y+']}", "xy", True),
            ("{host: any, not: ['**.corp.example']}", "A.ORG", True),
            ("{host: any, not: ['**.corp.example']}", "a.CORP.example", False),
            ("{email: any, not: ['*@corp.example']}", "a@b.example", True),
            ("{email: any, not: ['*@corp.example']}", "a@CORP.example", False),
        ],
    )
    def test_it_takes_away(self, matcher: str, value: Json, matches: bool) -> None:
        allowed = effect(f"t: {{allow: {{a: {matcher}}}}}", a=value)
        assert (allowed is Effect.ALLOW) is matches
        denied = effect(f"t: [{{allow: {{a: any}}}}, {{deny: {{a: {matcher}}}}}]", a=value)
        assert (denied is Effect.DENY) is matches

    @pytest.mark.parametrize(
        ("path", "matches"), [("/a/b", True), ("/a/k/b", False), ("/a/k", False)]
    )
    def test_it_takes_away_folders(self, path: str, matches: bool) -> None:
        policy = parse("t: {allow: {a: {path: ['/a/**'], not: ['/a/k/**']}}}")
        document = Document(tool="t", arguments={"a": path}, workspace=str(WORKSPACE))
        assert (decide(policy, document).effect is Effect.ALLOW) is matches

    @pytest.mark.parametrize(
        ("to", "expected"),
        [
            ("ann@corp.example", Effect.ALLOW),
            ("Ann@CORP.EXAMPLE", Effect.ALLOW),
            ("ann@other.example", Effect.ASK),
            (["ann@corp.example", "bob@corp.example"], Effect.ALLOW),
            # One stranger among the receivers: nothing grants all of them.
            (["ann@corp.example", "bob@other.example"], Effect.DENY),
        ],
    )
    def test_mail_within_and_without(self, to: Json, expected: Effect) -> None:
        assert effect(MAIL, to=to) is expected

    @pytest.mark.parametrize("to", ["Ann <ann@corp.example>", "a@b.example, c@d.example", "x"])
    def test_what_is_no_address_has_no_form_to_be_judged(self, to: str) -> None:
        decision = judged(MAIL, to=to)
        assert decision.effect is Effect.DENY
        assert decision.code.startswith("email.")

    @pytest.mark.parametrize(
        ("matcher", "words"),
        [
            ("{not: [a]}", "stands beside one"),
            ("{argv: [git, ...], not: [git, push]}", "does not stand beside argv"),
            ("{text: {max: 4B}, not: [a]}", "does not stand beside text"),
            ("{json: {type: string}, not: [a]}", "does not stand beside json"),
            ("{path: ['/a/**'], not: []}", "at least 1"),
            ("{path: ['/a/**'], not: ['b']}", "must begin"),
            ("{path: ['/a/**'], not: {in: [b]}}", "not"),
            ("{email: any, not: [nobody]}", "nobody"),
            ("{regex: 'a', not: '('}", "regular expression"),
            ("{path: ['/a/b/**'], not: ['/a/**']}", "takes away all"),
            ("{in: [a, b], not: [a, b, c]}", "takes away all"),
            ("{email: ['*@a.example'], not: ['*@*.example']}", "takes away all"),
            ("{range: [2, 3], not: [1, 5]}", "takes away all"),
            ("{range: [2, 3], not: [2]}", "two whole numbers"),
            ("{range: [2, 3], not: [1, 2, 3]}", "two whole numbers"),
        ],
    )
    def test_what_cannot_stand_there(self, matcher: str, words: str) -> None:
        with pytest.raises(PolicyError, match=words) as caught:
            parse(f"t: {{allow: {{a: {matcher}}}}}")
        assert caught.value.hint
        assert caught.value.column > 1

    def test_explain_names_the_exception(self) -> None:
        document = Document(tool="t", arguments={"to": "a@corp.example"}, workspace=str(WORKSPACE))
        (ask, _) = explain(parse(MAIL), document).considered
        assert ask.why == "to is not any mail address, but not an address in *@corp.example"


class TestForms:
    """The forms that this file's language adds, as a policy writes them."""

    @pytest.mark.parametrize(
        ("matcher", "value", "matches"),
        [
            ("{regex: '[A-Z]{3}-[0-9]+'}", "ABC-12", True),
            ("{regex: '[A-Z]{3}-[0-9]+'}", "ABC-12 ", False),
            ("{regex: '.*'}", "a\nb", False),
            ("{host: [api.example.org, '**.corp.example']}", "x.corp.example", True),
            ("{host: [api.example.org]}", "api.example.org.evil.example", False),
            ("{json: {type: object, properties: {id: {type: integer}}}}", {"id": 3}, True),
            ("{json: {type: object, properties: {id: {type: integer}}}}", {"id": 3, "x": 1}, False),
            ("{json: {type: array, items: {enum: [a, b], type: string}}}", ["a", "b"], True),
            ("{json: {type: array, items: {enum: [a, b], type: string}}}", ["a", "c"], False),
        ],
    )
    def test_a_grant_takes_what_surely_is_meant(
        self, matcher: str, value: Json, matches: bool
    ) -> None:
        allowed = effect(f"t: {{allow: {{a: {matcher}}}}}", a=value)
        assert (allowed is Effect.ALLOW) is matches

    @pytest.mark.parametrize(
        ("matcher", "value"),
        [
            ("{regex: '.*secret.*'}", "a\nsecret\n"),
            (
                "{json: {type: object, properties: {id: {enum: ['3'], type: integer}}}}",
                {"id": 3, "x": 1},
            ),
            ("{json: {type: array, items: {enum: [a], type: string}}}", ["b", "a"]),
            ("{range: [1, 9]}", 1.5),
            ("{argv: [nice, {range: [-20, -1]}, ...]}", ["nice", "-05", "x"]),
            ("{argv: [nice, {range: [-20, -1]}, ...]}", ["nice", "-0x5"]),
            ("{argv: [nice, {range: [-20, -1]}, ...]}", ["nice", "-5 "]),
            ("{argv: [nice, {range: [-20, -1]}, ...]}", ["nice", "\u22125"]),
        ],
    )
    def test_a_restriction_takes_whatever_may_be_meant(self, matcher: str, value: Json) -> None:
        denied = effect(f"t: [{{allow: any}}, {{deny: {{a: {matcher}}}}}]", a=value)
        assert denied is Effect.DENY
        # An ask asks about it, and still grants nothing that it does not surely name.
        asked = effect(f"t: [{{allow: any}}, {{ask: {{a: {matcher}}}}}]", a=value)
        assert asked is Effect.ASK
        assert effect(f"t: {{ask: {{a: {matcher}}}}}", a=value) is Effect.DENY

    def test_a_range_inside_argv_restricts_no_other_number_and_no_word(self) -> None:
        text = "t: [{allow: any}, {deny: {a: {argv: [nice, {range: [-20, -1]}, ...]}}}]"
        assert effect(text, a=["nice", "-5"]) is Effect.DENY
        for word in ("5", "0", "-21", "make", "-n"):
            assert effect(text, a=["nice", word]) is Effect.ALLOW

    def test_a_regex_inside_argv(self) -> None:
        text = "t: {allow: {a: {argv: [git, log, {regex: '-n[0-9]+'}, ...]}}}"
        assert effect(text, a=["git", "log", "-n3", "x"]) is Effect.ALLOW
        assert effect(text, a=["git", "log", "-n3;"]) is Effect.DENY

    @pytest.mark.parametrize(
        ("matcher", "words"),
        [
            ("{regex: '(a'}", "regular expression"),
            ("{regex: '(?=a)'}", "regular expression"),
            ("{regex: '(a)\\1'}", "regular expression"),
            ("{regex: ''}", "at least 1"),
            ("{regex: [a]}", "regex"),
            ("{host: []}", "never matches"),
            ("{host: ['a b']}", "a b"),
            ("{host: anything}", "host"),
            ("{email: [a]}", "not name@domain"),
            ("{email: {any: any}}", "list of patterns, or any"),
            ("{json: {type: text}}", "json"),
            ("{json: {}}", "json"),
            ("{json: {type: object, properties: {a: {type: x}}}}", "json"),
        ],
    )
    def test_wrong_ones_are_refused(self, matcher: str, words: str) -> None:
        with pytest.raises(PolicyError, match=words) as caught:
            parse(f"t: {{allow: {{a: {matcher}}}}}")
        assert caught.value.hint
        assert caught.value.column > 1


class TestWhen:
    """A condition grants only where it holds, and restricts unless it surely does not."""

    @pytest.mark.parametrize(
        ("when", "allow", "deny", "ask"),
        [
            ("call.n <= 5", True, True, True),
            ("call.n > 5", False, False, False),
            # What is not there, or not comparable, is a doubt.
            ("call.m > 5", False, True, True),
            ("call.n == 'x'", False, True, True),
            ("session.role == 'a'", False, True, True),
            ("session.calls < 10 and time.hour == 12", True, True, True),
            ("time.weekday in ['sat', 'sun']", False, False, False),
        ],
    )
    def test_every_effect(self, when: str, allow: bool, deny: bool, ask: bool) -> None:
        option = f'when: "{when}"'
        assert (effect(f"t: {{allow: any, {option}}}", n=3) is Effect.ALLOW) is allow
        assert (effect(f"t: [{{allow: any}}, {{deny: any, {option}}}]", n=3) is Effect.DENY) is deny
        assert (effect(f"t: [{{allow: any}}, {{ask: any, {option}}}]", n=3) is Effect.ASK) is ask
        # Alone, an ask grants only where its condition holds.
        assert (effect(f"t: {{ask: any, {option}}}", n=3) is Effect.ASK) is allow

    def test_without_facts_time_is_a_doubt(self) -> None:
        text = "t: [{allow: any}, {deny: any, when: 'time.hour < 8'}]"
        assert effect(text, Facts(), a=1) is Effect.DENY

    @pytest.mark.parametrize(
        ("tools", "words"),
        [
            ("t: {allow: any, when: 'call.a ='}", "when: at character"),
            ("t: {allow: any, when: 'env.HOME == 1'}", "when"),
            ("t: {allow: any, when: ''}", "at least 1"),
            ("t: {allow: any, when: [a]}", "when"),
            ("fs.read: {allow: any, when: 'call.file == 1'}", "no argument 'file'"),
        ],
    )
    def test_wrong_conditions_are_refused(self, tools: str, words: str) -> None:
        with pytest.raises(PolicyError, match=words) as caught:
            parse(tools)
        assert caught.value.hint

    def test_explain_says_what_a_condition_made_of_it(self) -> None:
        policy = parse("t: [{allow: any, when: 'call.n > 5'}, {allow: any, when: 'call.m > 5'}]")
        document = Document(tool="t", arguments={"n": 3}, workspace=str(WORKSPACE))
        first, second = explain(policy, document).considered
        assert (first.matched, first.when) == (False, "call.n > 5")
        assert first.why == "when call.n > 5 is false"
        assert second.why.startswith("when call.m > 5 cannot be judged: ")


class TestBounds:
    """`rate` and `budget` are obligations of the decisions that their rules make."""

    def bounds(self, options: str) -> tuple[Bound, ...]:
        return judged(f"t: {{allow: any, id: r, {options}}}", a=1).obligations

    def test_a_rate(self) -> None:
        (bound,) = self.bounds("rate: 20/h")
        assert (bound.unit, bound.most, bound.per) == (Unit.CALLS, 20, Per.WINDOW)
        assert (bound.reserve, bound.window_ms) == (1, 3_600_000)
        assert len(self.bounds("rate: [5/s, 30/m, 100/d]")) == 3

    @pytest.mark.parametrize(
        ("budget", "expected"),
        [
            ("{calls: 50}", [("calls", 50, "session", 1)]),
            ("{calls: 2K/day}", [("calls", 2000, "day", 1)]),
            ("{bytes: 1MiB}", [("bytes", 1 << 20, "session", 1)]),
            ("{bytes: [1MiB/call, 8MiB/day]}", [("bytes", 8 << 20, "day", 1 << 20)]),
            ("{money: [0.05/call, 2.5]}", [("money", 2_500_000, "session", 50_000)]),
            (
                "{tokens: [4K/call, 50K/session, 1M/day]}",
                [("tokens", 50_000, "session", 4000), ("tokens", 1_000_000, "day", 4000)],
            ),
        ],
    )
    def test_a_budget(self, budget: str, expected: list[tuple[str, int, str, int]]) -> None:
        found = [
            (one.unit, one.most, one.per, one.reserve) for one in self.bounds(f"budget: {budget}")
        ]
        assert sorted(found) == sorted(expected)
        ids = {one.id for one in self.bounds(f"budget: {budget}")}
        assert len(ids) == len(expected)
        assert all(one.startswith("r:") for one in ids)

    def test_every_rule_that_decided_counts(self) -> None:
        text = "t: [{allow: any, id: a, rate: 1/s}, {allow: {n: any}, id: b, budget: {calls: 5}}]"
        assert {one.id for one in judged(text, n=1).obligations} == {
            "a:rate/1000ms",
            "b:calls/session",
        }
        assert {one.id for one in judged(text, m=1).obligations} == {"a:rate/1000ms"}
        other = "t: [{allow: any, id: a, rate: 1/s}, {ask: {n: any}, id: b, rate: 2/s}]"
        assert {one.id for one in judged(other, n=1).obligations} == {
            "a:rate/1000ms",
            "b:rate/1000ms",
        }
        assert judged("t: [{allow: any, rate: 1/s}, {deny: any}]", n=1).obligations == ()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ("rate: 5", "a rate such as"),
            ("rate: 5/w", "a rate such as"),
            ("rate: 0/h", "number from 1"),
            ("rate: x/h", "a count such as"),
            ("rate: {calls: 5}", "rate"),
            ("rate: []", "at least 1"),
            ("budget: 5", "map"),
            ("budget: {call: 5}", "unknown key 'call' in a budget"),
            ("budget: {calls: 5/call}", "each call is one call"),
            ("budget: {calls: 5/week}", "an amount such as"),
            ("budget: {bytes: 5}", "a size such as"),
            ("budget: {money: 0.0000001}", "at most six places"),
            ("budget: {money: 1e3}", "amount of money"),
            ("budget: {calls: [5, 6]}", "same period"),
            ("budget: {bytes: 1MiB/call}", "counts towards nothing alone"),
            ("budget: {calls: []}", "counts towards nothing"),
            ("budget: {money: 2.50/day}", "nobody measures money"),
            ("budget: {tokens: 1M}", "nobody measures tokens"),
            ("budget: {tokens: [5/call, 4/day]}", "none could run"),
            ("budget: {tokens: [[5]]}", "an amount"),
        ],
    )
    def test_wrong_ones_are_refused(self, options: str, words: str) -> None:
        with pytest.raises(PolicyError, match=words) as caught:
            parse(f"t: {{allow: any, {options}}}")
        assert (caught.value.line, bool(caught.value.hint)) == (2, True)

    def test_a_deny_has_nothing_to_count(self) -> None:
        with pytest.raises(PolicyError, match="nothing to count"):
            parse("t: {deny: any, rate: 5/h}")

    @pytest.mark.parametrize(
        ("options", "described"),
        [
            ("rate: 20/h", "rate 20/h"),
            ("budget: {bytes: 1KiB/day}", "budget bytes 1024B/day"),
            ("budget: {money: [0.1/call, 20.50/day]}", "budget money 20.5/day, 0.1/call"),
            ("budget: {tokens: [10/call, 100]}", "budget tokens 100/session, 10/call"),
            ("budget: {calls: 9}", "budget calls 9/session"),
        ],
    )
    def test_it_is_described_as_it_is_written(self, options: str, described: str) -> None:
        (bound,) = self.bounds(options)
        assert describe_bound(bound) == described


FILES = (
    "t: {allow: {p: {in: [a]}}, optional: {head: {range: [1, 9]}, tail: {range: [1, 9]}},"
    " id: r, rate: 5/h}"
)


class TestOptional:
    """`optional`: where the argument is there, it is judged."""

    @pytest.mark.parametrize(
        ("arguments", "allowed"),
        [
            ({"p": "a"}, True),
            ({"p": "a", "head": 3}, True),
            ({"p": "a", "tail": 3}, True),
            ({"p": "a", "head": 3, "tail": 9}, True),
            ({"p": "a", "head": 10}, False),
            ({"p": "a", "head": 3, "tail": 10}, False),
            ({"p": "a", "head?": 3}, False),
            ({"p": "a", "other": 3}, False),
            ({"head": 3}, False),
        ],
    )
    def test_it_is_judged_where_it_is(self, arguments: dict[str, Json], allowed: bool) -> None:
        decision = judged(FILES, None, **arguments)
        assert (decision.effect is Effect.ALLOW) is allowed
        if allowed:
            assert decision.rules == ("r",)
            assert [bound.id for bound in decision.obligations] == ["r:rate/3600000ms"]

    def test_an_ask_is_one_rule_too(self) -> None:
        text = (
            "t: [{allow: any}, {ask: {p: [a]}, optional: {n: {range: [1, 9]}}, id: q, rate: 5/h}]"
        )
        for arguments in ({"p": "a"}, {"p": "a", "n": 3}, {"p": "a", "n": 30}, {"p": "a", "m": 1}):
            decision = judged(text, None, **arguments)
            assert decision.effect is Effect.ASK
            assert decision.rules[-1] == "q" or "q" in decision.rules
            assert len(decision.obligations) == 1
        assert effect(text, p="b", n=3) is Effect.ALLOW

    def test_under_a_wildcard_and_with_kinds(self) -> None:
        text = "'files.*': {allow: {}, optional: {path: {path: [/a/**]}}}"
        policy = parse(text)
        document = Document(tool="files.x", arguments={"path": "/b"}, workspace=str(WORKSPACE))
        assert decide(policy, document).effect is Effect.DENY
        document = Document(tool="files.x", arguments={}, workspace=str(WORKSPACE))
        assert decide(policy, document).effect is Effect.ALLOW

    @pytest.mark.parametrize(
        ("tools", "words"),
        [
            ("t: {deny: {b: any}, optional: {a: [x]}}", "a deny restricts"),
            ("t: {allow: {a: [x]}, optional: {a: [x]}}", "is named already"),
            ("t: {allow: {rest: any}, optional: {a: [x]}}", "any lets it pass"),
            ("t: {allow: any, optional: {a: [x]}}", "any lets it pass"),
            ("t: {allow: {}, optional: {rest: any}}", "any lets it pass"),
            ("t: {allow: {}, optional: any}", "any lets it pass"),
            ("fs.read: {allow: any, optional: {path: ['$WS/**']}}", "has its default"),
            ("t: {allow: {}, optional: {a: any, b: any, c: any, d: any, e: any}}", "at most 4"),
            ("t: {allow: {}, optional: {a: {pth: [x]}}}", "unknown key 'pth' in a matcher"),
            ("t: {allow: {}, optional: {a: {in: []}}}", "never matches"),
            ("t: {optional: {a: any}}", "one effect"),
        ],
    )
    def test_where_it_cannot_stand(self, tools: str, words: str) -> None:
        with pytest.raises(PolicyError, match=words) as caught:
            parse(tools)
        assert (caught.value.line, bool(caught.value.hint)) == (2, True)

    def test_a_file_has_not_too_many(self) -> None:
        rule = "{allow: {a: [x]}, optional: {b: any, c: any, d: any, e: any}}"
        parse(f"t: [{', '.join([rule] * 1092)}]")
        with pytest.raises(PolicyError, match="more than 16384 rules"):
            parse(f"t: [{', '.join([rule] * 1093)}]")

    def test_explain_shows_it_once(self) -> None:
        document = Document(tool="t", arguments={"p": "a", "head": 10}, workspace=str(WORKSPACE))
        (item,) = explain(parse(FILES), document).considered
        assert (item.rule, item.matched, item.argument) == ("r", False, "head")
        document = Document(tool="t", arguments={"p": "a"}, workspace=str(WORKSPACE))
        (item,) = explain(parse(FILES), document).considered
        assert item.matched

    def test_it_is_one_written_rule(self) -> None:
        policy = parse(FILES)
        (rule,) = policy.every_rule()
        assert (set(rule.matchers or {}), rule.optional) == (
            {"p", "head", "tail"},
            ("head", "tail"),
        )
        assert check_policy(policy) == ()


class TestServerProfile:
    """A rule for a tool of a server is judged in the profile that the server runs in."""

    TEXT = (
        "version: 1\nprofiles: {base: {}, docs: {read: ['$WS/docs/**'], hide: ['**/k']}}\n"
        "servers: {s: {run: [x], profile: docs}, n: {run: [x]}}\n"
        "tools: {s.read: {allow: any}, 's.*': {ask: any}, n.read: {allow: any},"
        " s.own: {allow: any, profile: base}}\n"
    )

    @pytest.mark.parametrize(
        ("tool", "profile"),
        [("s.read", "docs"), ("s.x", "docs"), ("n.read", "base")],
    )
    def test_it_is_the_servers(self, tool: str, profile: str) -> None:
        policy = parse_policy(self.TEXT.encode(), name="p", workspace=WORKSPACE)
        document = Document(tool=tool, arguments={}, workspace=str(WORKSPACE))
        decision = decide(policy, document)
        assert decision.profile is not None
        assert decision.profile.name == profile
        assert policy.tools["s.own"].allow[0].profile == "base"


def test_a_budget_that_bounds_nothing_is_refused() -> None:
    with pytest.raises(PolicyError, match="bounds nothing"):
        parse_policy(
            b"version: 1\ntools: {t: {allow: any, budget: {}}}\n", name="p", workspace=Path("/w")
        )
