r"""Regular expressions and exceptions: whole text, linear time, and doubts that never grant."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.call import Json
from safeconduct.policies.match import AnyValue, Argv, Literals, NumberRange
from safeconduct.policies.match_text import (
    MAX_PROGRAM,
    MAX_WORK,
    Excluding,
    compile_regex,
    email_matcher,
    host_matcher,
)
from safeconduct.policies.signatures import Kind

MEBIBYTE = 1 << 20
# The classic inputs on which a backtracking engine needs exponential or cubic time.
CATASTROPHES = [
    (r"(a+)+$", "a" * 40 + "!"),
    (r"(a|aa)+$", "a" * 40 + "!"),
    (r"(a|a?)+$", "a" * 40 + "!"),
    (r"([a-zA-Z]+)*$", "a" * 40 + "!"),
    (r"(x+x+)+y", "x" * 40),
    (r"(.*)*b", "a" * 40),
    (r"(a?){30}a{30}", "a" * 29),
    (r"^(([a-z])+.)+[A-Z]([a-z])+$", "a" * 40),
    (r"(?i)(\w+\s?)+\.$", "word " * 30 + "!"),
    (r"^([0-9]+)*\d+$", "1" * 40 + "x"),
]


@pytest.mark.parametrize(("pattern", "text"), CATASTROPHES)
@pytest.mark.parametrize("restricts", [False, True])
def test_the_classics_take_linear_time(pattern: str, text: str, restricts: bool) -> None:
    regex = compile_regex(pattern, restricts=restricts)
    long = text[:-1] * (MEBIBYTE // len(text)) + text[-1]
    started = time.process_time()
    regex.matches(text)
    regex.matches(long)
    assert time.process_time() - started < 1.0


def test_the_standard_engine_fails_on_one_of_them() -> None:
    """Without RE2 the attack works: this would take about 2^40 steps."""
    code = f"import re; re.fullmatch({CATASTROPHES[0][0]!r}, {CATASTROPHES[0][1]!r})"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", code], timeout=1, check=True)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?s).*a.{500}",
        r"(?s)(.*a.{30}){20}",
        r".*a.{200}",
        r"(?s).*(\pL.{300}\pN).*",
        r"(.?){500}",
    ],
)
@pytest.mark.parametrize("letters", ["a", "ab", "aé1"])
def test_the_worst_walk_is_bounded(pattern: str, letters: str) -> None:
    """Where the automaton outgrows its memory, RE2 walks all states at once."""
    text = "".join(random.Random(1).choices(letters, k=MEBIBYTE // 2))  # noqa: S311 - a text
    for restricts in (False, True):
        regex = compile_regex(pattern, restricts=restricts)
        longest = text.encode()[: MAX_WORK // regex.programs[0].programsize].decode(
            "utf-8", "ignore"
        )
        started = time.process_time()
        regex.matches(longest)
        assert time.process_time() - started < 2.0


def test_what_is_too_long_to_judge_is_a_doubt() -> None:
    for restricts in (False, True):
        regex = compile_regex(".*a.{200}", restricts=restricts)
        longest = MAX_WORK // regex.programs[0].programsize
        assert regex.matches("a" * longest) is True
        assert regex.matches("a" * longest + "a") is restricts
        assert regex.matches("a" + "b" * longest) is restricts
        assert regex.matches("\ud800") is restricts


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("", "characters"),
        ("a" * 1025, "characters"),
        (r"(a)\1", "RE2"),
        ("(?=a)", "RE2"),
        ("(?<!a)b", "RE2"),
        ("(?>a)", "RE2"),
        ("a++", "RE2"),
        ("(?#c)a", "RE2"),
        (r"(?(1)a|b)", "RE2"),
        (r"\Z", "RE2"),
        (r"\K", "RE2"),
        ("[", "RE2"),
        ("(", "RE2"),
        ("a{1001}", "RE2"),
        ("((a{100}){100}){100}", "RE2"),
        (r"\pL{100}", "steps"),
        ("(a{1000}|b{1000}){10}", "RE2"),
        (r"\C", r"\C"),
        (r"a\\\C", r"\C"),
        (r"[^\x00-\x{10FFFF}]", "no text"),
        (r"[^\s\S]", "no text"),
        ("\ud800", "not Unicode"),
    ],
)
def test_refused_at_load(pattern: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        compile_regex(pattern)


def test_no_pattern_is_no_rule() -> None:
    with pytest.raises(ValueError, match="empty"):
        compile_regex([])


def test_a_refusal_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="RE2"):
        compile_regex("(")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("pattern", "value", "expected"),
    [
        ("[a-z]+", "abc", True),
        ("[a-z]+", "abc\n", False),
        ("[a-z]+", "\nabc", False),
        ("[a-z]+", "abc\nrm -rf", False),
        ("[a-z]+", "1abc", False),
        ("[a-z]+", "abc\0", False),
        ("[a-z]+$", "abc\n", False),
        ("^[a-z]+$", "abc", True),
        ("rm|ls", "rmx", False),
        ("rm|ls", "xls", False),
        ("rm|ls", "ls", True),
        ("a*", "", True),
        (r"\d+", "12", True),
        (r"\d+", "\N{ARABIC-INDIC DIGIT ONE}", False),
        (r"\d+", "\N{FULLWIDTH DIGIT ONE}", False),
        (r"\w+", "é", False),
        (r"\pL+", "é\N{CYRILLIC SMALL LETTER A}", True),
        (r"\p{Greek}+", "αβ", True),
        (r"\p{Greek}+", "aβ", False),
        (r"\s", "\N{NO-BREAK SPACE}", False),
        (r"[[:alpha:]]+", "é", False),
        (".", "é", True),
        (".", "\U0001f512", True),
        (".", "e\N{COMBINING ACUTE ACCENT}", False),
        (".", "\n", False),
        ("(?s).", "\n", True),
        (".", "\0", True),
        (r"a\x00b", "a\0b", True),
        (r"\x{1F512}", "\U0001f512", True),
        ("(?i)admin", "ADMIN", True),
        ("(?i)k", "\N{KELVIN SIGN}", True),
        ("(?i)s", "\N{LATIN SMALL LETTER LONG S}", True),
        ("(?i)i", "\N{LATIN SMALL LETTER DOTLESS I}", False),
        ("admin", "ADMIN", False),
        ("(?m)^ok$", "ok\nrm", False),
        (r"\Qa.b\E", "a.b", True),
        (r"\Qa.b\E", "axb", False),
        (r"a\.b", "axb", False),
        ("3", 3, False),
        ("true", True, False),
        (".*", None, False),
        (".*", ["a"], False),
        (".*", {"a": "b"}, False),
    ],
)
def test_the_whole_text(pattern: str, value: Json, expected: bool) -> None:
    assert compile_regex(pattern).matches(value) is expected


def test_a_deny_does_not_end_at_the_line() -> None:
    assert not compile_regex(".*secret.*").matches("x\nsecret\ny")
    assert compile_regex(".*secret.*", restricts=True).matches("x\nsecret\ny")
    assert not compile_regex("(?-s).*secret.*", restricts=True).matches("x\nsecret\ny")


SIMPLE = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\n", "^", "$", r"\b", "é"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join).map("({})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{1,3}"])).map(
            lambda x: f"({x[0]}){x[1]}"
        ),
    ),
    max_leaves=6,
)
TEXTS = st.text(alphabet="ab\né", max_size=8)


@given(SIMPLE, TEXTS)
def test_what_grants_also_restricts(pattern: str, text: str) -> None:
    granting = compile_regex(pattern)
    assert not granting.matches(text) or compile_regex(pattern, restricts=True).matches(text)


@given(SIMPLE.filter(lambda pattern: not set("$^") & set(pattern.replace("[^", "["))), TEXTS)
def test_the_standard_engine_agrees(pattern: str, text: str) -> None:
    expected = re.compile(pattern.replace(r"\b", r"(?a:\b)")).fullmatch(text) is not None
    assert compile_regex(pattern).matches(text) is expected


@given(st.text(max_size=40))
def test_any_pattern_is_compiled_or_refused(pattern: str) -> None:
    try:
        regex = compile_regex(pattern)
    except ValueError:
        return
    assert MAX_PROGRAM >= regex.programs[0].programsize > 1
    assert regex.matches("a") in (True, False)


def test_several_patterns_and_what_they_say() -> None:
    regex = compile_regex(["a+", "b c"])
    assert regex.matches("aa")
    assert regex.matches("b c")
    assert not regex.matches("aab c")
    assert regex.words == ("a+", '"b c"')
    assert regex.describe() == 'a text that is all of the pattern a+ or "b c"'
    assert regex == compile_regex(["a+", "b c"])
    assert regex != compile_regex(["a+", "b c"], restricts=True)
    assert regex.kind is Kind.TEXT


def test_excluding_takes_away() -> None:
    mail = Excluding(email_matcher([]), email_matcher(["*@corp.example"]))
    assert mail.matches("a@else.example")
    assert not mail.matches("a@corp.example")
    assert not mail.matches("no address")
    assert mail.kind is Kind.EMAIL
    assert mail.describe() == "any mail address, but not an address in *@corp.example"
    host = Excluding(host_matcher(["**.example"]), host_matcher(["a.example"]))
    assert [host.matches(x) for x in ("b.example", "a.example", "a.test")] == [True, False, False]
    number = Excluding(NumberRange(1, 10), NumberRange(5, 5))
    assert [number.matches(x) for x in (4, 5, 11)] == [True, False, False]


def test_excluding_judges_lists_as_its_base_does() -> None:
    assert not Excluding(AnyValue(), Literals(frozenset("x"))).whole
    argv = Argv(("git",), True, ("git",))
    assert Excluding(argv, Argv(("git", "push"), True, ("git", "push"))).whole
    assert Excluding(Excluding(argv, argv), argv).whole


@given(SIMPLE, SIMPLE, TEXTS)
def test_a_doubt_about_the_exception_is_a_doubt_about_the_whole(
    base: str, exclude: str, text: str
) -> None:
    granting = Excluding(compile_regex(base), compile_regex(exclude, restricts=True))
    restricting = Excluding(compile_regex(base, restricts=True), compile_regex(exclude))
    assert not granting.matches(text) or restricting.matches(text)
    assert not granting.matches("\ud800")
    assert restricting.matches("\ud800")


def test_a_policy_without_expressions_does_not_load_re2() -> None:
    code = (
        "import sys; from pathlib import Path; from safeconduct.policies import parse_policy;"
        "text = b'version: 1\\ntools: {fs.read: {allow: any}}';"
        "parse_policy(text, name='p', workspace=Path('/usr'));"
        "sys.exit('re2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
