"""`when`: total, typed, strict about errors, and read in one pass."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest

from safeconduct.call import Facts, Json
from safeconduct.policies.when.condition import WhenError, WhenSyntaxError, compile_when, when_facts

_MONDAY_8_UTC_MS = 1_767_600_000_000  # 2026-01-05T08:00:00Z
FACTS = Facts(role="coder", caller="ann", origin="mcp", calls=3, denied=1, now_ms=_MONDAY_8_UTC_MS)
ARGUMENTS: Mapping[str, Json] = {
    "amount": 50,
    "half": 0.5,
    "text": "3",
    "flag": True,
    "nothing": None,
    "tags": ["a", "b"],
    "mixed": ["a", 1],
    "order": {"id": "x1", "lines": [1, 2, 3], "deep": {"er": 1}},
    "namesake": {"amount": 5, "Amount": 500, "deep": [1]},
    "otherwise": {"Amount": 500, "in": {"\u212aEY": 1}},
    "dry-run": False,
    "a.b": "dotted",
    "in": "keyword",
}


def _answer(text: str, arguments: Mapping[str, Json] = ARGUMENTS, facts: Facts = FACTS) -> bool:
    return compile_when(text).holds(when_facts(arguments, facts))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("call.amount <= 50", True),
        ("call.amount < 50", False),
        ("call.amount == 50.0", True),
        ("call.half < 1", True),
        ("call.amount > -1", True),
        ("call.text == '3'", True),
        ('call.text != "4"', True),
        ("call.flag", True),
        ("not call.flag", False),
        ("call.flag == true", True),
        ("call.nothing == null", True),
        ("call.text == null", False),
        ("null != call.text", True),
        ("'a' in call.tags", True),
        ("'c' not in call.tags", True),
        ("call.text in ['1', '2', '3']", True),
        ("call.amount not in [1, 2]", True),
        ("len(call.tags) == 2", True),
        ("len(call.text) == 1", True),
        ("len(call.order) == 3", True),
        ("len(call.order.lines) > 2", True),
        ("call.order.id == 'x1' and call.order.deep.er == 1", True),
        ("call['order']['id'] == 'x1'", True),
        ("call['dry-run'] == false", True),
        ("call['a.b'] == 'dotted'", True),
        ("call.in == 'keyword'", True),
        ("default(call.absent, 7) == 7", True),
        ("default(call.amount, 7) == 50", True),
        ("default(call.order.absent, false) or call.flag", True),
        ("len(call.namesake.deep) == 1 and call.otherwise.Amount == 500", True),
        ("session.role == 'coder' and session.caller == 'ann' and session.origin == 'mcp'", True),
        ("session.calls == 3 and session.denied == 1", True),
        ("time.hour == 8 and time.weekday == 'mon'", True),
        ("time.weekday in ['sat', 'sun']", False),
        ("(call.flag or call.amount == 0) and call.text == '3'", True),
        ("not (call.flag and call.amount == 0)", True),
        ("not call.amount == 0 and call.flag", True),
        (" \t\n call.flag \n", True),
        (r"call.text != 'it\'s \\ here'", True),
        ("call.text != 'é\U0001f512'", True),
    ],
)
def test_the_answer(text: str, expected: bool) -> None:
    assert _answer(text) is expected


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("call.absent == 1", "when.missing"),
        ("call.order.absent == 1", "when.missing"),
        ("call.Amount == 50", "when.missing"),
        ("call.text < 10", "when.type"),
        ("call.amount == '50'", "when.type"),
        ("call.text == 3", "when.type"),
        ("call.flag == 1", "when.type"),
        ("call.amount == true", "when.type"),
        ("call.flag > 0", "when.type"),
        ("call.nothing != 'admin'", "when.type"),
        ("call.nothing < 1", "when.type"),
        ("call.tags == call.tags", "when.type"),
        ("call.order == call.order", "when.type"),
        ("call.tags == 'a'", "when.type"),
        ("1 in call.tags", "when.type"),
        ("'a' in call.mixed", "when.type"),
        ("'a' in call.text", "when.type"),
        ("'id' in call.order", "when.type"),
        ("call.tags in ['a']", "when.type"),
        ("call.amount", "when.type"),
        ("call.text", "when.type"),
        ("not call.nothing", "when.type"),
        ("call.flag and call.amount", "when.type"),
        ("len(call.amount) == 1", "when.type"),
        ("len(call.nothing) == 0", "when.type"),
        ("call.text.inner == 1", "when.type"),
        ("default(call.text.inner, 1) == 1", "when.type"),
        ("default(call.nothing, 1) == 1", "when.type"),
        ("call.namesake.amount == 5", "when.ambiguous"),
        ("default(call.namesake.amount, 0) < 100", "when.ambiguous"),
        ("default(call.otherwise.amount, 0) < 100", "when.ambiguous"),
        ("default(call.otherwise.In.key, 0) == 0", "when.ambiguous"),
        ("default(call.otherwise['in'].key, 0) == 0", "when.ambiguous"),
    ],
)
def test_no_answer(text: str, code: str) -> None:
    with pytest.raises(WhenError) as error:
        _answer(text)
    assert error.value.code == code


@pytest.mark.parametrize("bad", ["call.absent == 1", "call.text < 1", "call.amount"])
@pytest.mark.parametrize("frame", ["{true} or {bad}", "{bad} or {true}", "{false} and {bad}"])
def test_nothing_hides_an_error(bad: str, frame: str) -> None:
    """Two-valued short circuits and three-valued logic would both answer here."""
    with pytest.raises(WhenError):
        _answer(frame.format(bad=f"({bad})", true="call.flag", false="(call.amount == 0)"))
    with pytest.raises(WhenError):
        _answer("'a' in call.mixed or call.flag")


def test_a_session_without_role_or_clock_has_none() -> None:
    for text in ("session.role != 'coder'", "time.hour >= 0", "time.weekday != 'mon'"):
        with pytest.raises(WhenError, match="there is no"):
            _answer(text, facts=Facts())
    assert _answer("default(session.role, '') == ''", facts=Facts())


def test_an_argument_is_not_a_fact() -> None:
    arguments: Mapping[str, Json] = {"session": {"role": "admin"}, "time": {"hour": 1}}
    assert not _answer("session.role == 'admin'", arguments)
    assert _answer("call.session.role == 'admin'", arguments)


@pytest.mark.parametrize(
    ("days", "weekday"),
    list(enumerate(["thu", "fri", "sat", "sun", "mon", "tue", "wed"])),
)
def test_weekdays_and_hours_are_utc(days: int, weekday: str) -> None:
    start = days * 86_400_000
    last = Facts(now_ms=start + 86_399_999)
    assert _answer(f"time.weekday == '{weekday}' and time.hour == 23", facts=last)
    first = Facts(now_ms=start + 1)
    assert _answer(f"time.weekday == '{weekday}' and time.hour == 0", facts=first)


@pytest.mark.parametrize(
    ("text", "position", "said"),
    [
        ("", 1, "expected a value"),
        ("   ", 4, "expected a value"),
        ("call.a ==", 10, "the end"),
        ("== 'x'", 1, "expected a value"),
        ("call.a = 'x'", 8, "cannot read"),
        ("call.a === 'x'", 10, "cannot read"),
        ("call.a == 'x", 11, "cannot read"),
        ("call.a == 'x\n'", 11, "cannot read"),
        (r"call.a == '\n'", 11, "cannot read"),
        ("call.a == '\0'", 11, "cannot read"),
        ("(call.a == 'x'", 15, "expected )"),
        ("call.a == 'x')", 14, "expected the end"),
        ("call.a == 'x' call.b", 15, "expected the end"),
        ("call.a + 1 > 2", 8, "cannot read"),
        ("call.a - 1 > 2", 8, "cannot read"),
        ("call.a == 01", 11, "cannot read"),
        ("call.a == 1e9", 11, "cannot read"),
        ("call.a == 1.5.2", 11, "cannot read"),
        ("call.a == .5", 11, "expected a value"),
        ("call.a == 12345678901234567", 11, "cannot read"),
        ("call.a == \N{FULLWIDTH DIGIT ONE}", 11, "cannot read"),
        ("call.\N{CYRILLIC SMALL LETTER A} == 1", 6, "cannot read"),
        ("\N{LEFT DOUBLE QUOTATION MARK}call.a\N{RIGHT DOUBLE QUOTATION MARK}", 1, "cannot read"),
        ("call.a; call.b", 7, "cannot read"),
        ("call.a == 1 # no", 13, "cannot read"),
        ("True == call.a", 1, "expected call."),
        ("a == 1", 1, "expected call."),
        ("env.HOME == 'x'", 1, "expected call."),
        ("call == 'x'", 1, "names after call"),
        ("call. == 'x'", 7, "expected a name"),
        ("call[1] == 'x'", 6, "expected a name"),
        ("call[a] == 'x'", 6, "expected a name"),
        ("call.a.b.c.d.e.f.g.h == 1", 1, "names after call"),
        ("session.key == 'x'", 1, "there is no session.key"),
        ("session.role.name == 'x'", 1, "there is no session.role.name"),
        ("session['role.name'] == 'x'", 1, "there is no session.role.name"),
        ("time.minute == 1", 1, "there is no time.minute"),
        ("call.a or call.b and call.c", 18, "needs parentheses"),
        ("call.a and call.b or call.c", 19, "needs parentheses"),
        ("1 < call.a < 3", 12, "not chained"),
        ("call.a == 1 == true", 13, "not chained"),
        ("not not call.a", 5, "expected call."),
        ("call.a not 1", 12, "expected in"),
        ("call.a in []", 12, "expected a text"),
        ("call.a in [1, 'x']", 11, "of one type"),
        ("call.a in [null]", 11, "null"),
        ("call.a in [[1]]", 12, "expected a text"),
        ("call.a in [call.b]", 12, "expected a text"),
        ("call.a in 'abc'", 8, "in looks into a list"),
        ("[1] in call.a", 5, "not an element"),
        ("[1] == call.a", 5, "a list is not compared"),
        ("call.a < 'x'", 8, "have an order"),
        ("call.a < true", 8, "have an order"),
        ("session.calls == '3'", 15, "never compared"),
        ("session.calls < '3'", 15, "have an order"),
        ("session.role == 1", 14, "never compared"),
        ("session.calls in ['1']", 15, "never compared"),
        ("time.weekday == 'Monday'", 14, "it is never"),
        ("time.weekday in ['mon', 'Tue']", 14, "it is never"),
        ("24 == time.hour", 4, "it is never"),
        ("default(time.hour, 0) == 24", 23, "it is never"),
        ("default(session.calls, '0') == 1", 1, "is a number"),
        ("default(1, 2) == 1", 9, "expected call."),
        ("default(call.a) == 1", 15, "expected ,"),
        ("default(call.a, call.b) == 1", 17, "expected a text"),
        ("len() == 1", 5, "expected a value"),
        ("len(call.a, call.b) == 1", 11, "expected )"),
        ("len(len(call.a)) == 1", 1, "has no length"),
        ("len == 1", 5, "expected ("),
        ("max(call.a) == 1", 1, "expected call."),
        ("session.calls", 1, "not a number"),
        ("session.role and call.a", 1, "neither true nor false"),
        ("not session.role", 5, "neither true nor false"),
        ("len(call.a) or call.b", 1, "neither true nor false"),
        ("true", 1, "names nothing"),
        ("1 == 1 and 'a' != 'b'", 1, "names nothing"),
        ("__import__('os').system('id')", 1, "expected call."),
        ("lambda: 1", 7, "cannot read"),
        ("call.a if call.b else call.c", 8, "expected the end"),
    ],
)
def test_a_condition_that_is_none(text: str, position: int, said: str) -> None:
    with pytest.raises(WhenSyntaxError, match=f"^at character {position}: ") as error:
        compile_when(text)
    assert said in str(error.value)
    assert error.value.position == position


@pytest.mark.parametrize(
    "text",
    [
        "(" * 1000 + "call.a" + ")" * 1000,
        "(" * 500,
        "not " * 250 + "call.a",
        "len(" * 200 + "call.a",
        "call" + ".a" * 500,
        "call" + "['a']" * 200,
        "call.a in [" + "1," * 600 + "1]",
        "call.a == '" + "x" * 5000 + "'",
        "call.a == " + "9" * 1000,
        " " * 1024 + "call.a",
    ],
)
def test_what_is_long_or_deep_is_refused_at_once(text: str) -> None:
    started = time.process_time()
    with pytest.raises(WhenSyntaxError):
        compile_when(text)
    assert time.process_time() - started < 0.1


def test_the_longest_condition_is_read_at_once() -> None:
    started = time.process_time()
    text = " or ".join(["call.a"] * 102)
    assert not compile_when(text).holds({"call": {"a": False}, "session": {}, "time": {}})
    nested = "(" * 15 + "call.a" + ")" * 15
    assert compile_when(nested).holds({"call": {"a": True}, "session": {}, "time": {}})
    assert time.process_time() - started < 0.1


def test_evaluation_is_bounded() -> None:
    arguments: Mapping[str, Json] = {"list": ["a"] * 9_999}
    assert _answer("'a' in call.list", arguments)
    text = " and ".join(["'a' in call.list"] * 3)
    with pytest.raises(WhenError) as error:
        _answer(text, arguments)
    assert error.value.code == "when.steps"


def test_numbers_are_compared_exactly() -> None:
    large = (1 << 53) + 1
    assert not _answer("call.a == 9007199254740992", {"a": large})
    assert _answer("call.a > 9007199254740992", {"a": large})
    assert not _answer("call.a == 0.3", {"a": 0.1 + 0.2})
    for number in (float("nan"), float("inf")):
        with pytest.raises(WhenError, match="finite"):
            _answer("call.a > 1", {"a": number})


def test_what_a_condition_names() -> None:
    when = compile_when(
        "call.a == 1 and call['b-c'].d == 2 or session.calls == 1".replace("or", "and")
    )
    assert when.arguments == {"a", "b-c"}
    assert when == compile_when(when.text)
