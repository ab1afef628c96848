"""Shell text: what is read, what is refused and why, within a second and without recursion."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.errors import Denied
from safeconduct.policies.shell.form import write_shell
from safeconduct.policies.shell.reader import MAX_COMMANDS, MAX_TEXT_BYTES, read_shell


def words(text: str) -> list[tuple[str, ...]]:
    return [command.argv for command in read_shell(text).commands]


def shown(text: str) -> str:
    return write_shell(read_shell(text).commands)


def refused(text: str) -> str:
    with pytest.raises(Denied) as caught:
        read_shell(text)
    assert caught.value.hint
    return caught.value.code


READ = {
    "pytest -q tests/unit": [("pytest", "-q", "tests/unit")],
    "a 'b c' \"d e\" f\\ g": [("a", "b c", "d e", "f g")],
    "a b'c'\"d\"\\e": [("a", "bcde")],
    "a '' \"\"": [("a", "", "")],
    'a "b\\c\\$\\"\\`\\\\"': [("a", 'b\\c$"`\\')],
    "a '`b` $(c) $d *'": [("a", "`b` $(c) $d *")],
    "a 'b\nc'": [("a", "b\nc")],
    "a b#c ''#d e\\#": [("a", "b#c", "#d", "e#")],
    "a # b; rm -rf /\nc": [("a",), ("c",)],
    "# only this\n\na;;".removesuffix(";"): [("a",)],
    "a \\\n  b": [("a", "b")],
    "a \\\n#b": [("a",)],
    "a && b || c; d | e": [("a",), ("b",), ("c",), ("d",), ("e",)],
    "a&&b||c;d|e": [("a",), ("b",), ("c",), ("d",), ("e",)],
    "a &&\n\n b |\n c\n\n\nd\n": [("a",), ("b",), ("c",), ("d",)],
    "git log HEAD~3 HEAD^ stash@{0} a..b": [("git", "log", "HEAD~3", "HEAD^", "stash@{0}", "a..b")],
    "find . ! -name x -exec wc {} \\;": [
        ("find", ".", "!", "-name", "x", "-exec", "wc", "{}", ";")
    ],
    "a x=y --k=v B=c": [("a", "x=y", "--k=v", "B=c")],
    "a if then fi": [("a", "if", "then", "fi")],
    "grün ß 名": [("grün", "ß", "名")],
    "a '\u00a0' '\u202e'": [("a", "\u00a0", "\u202e")],
}


@pytest.mark.parametrize("text", READ, ids=repr)
def test_read(text: str) -> None:
    assert words(text) == READ[text]
    assert words(shown(text)) == READ[text]


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("a >f", "a > f"),
        (">f a b", "a b > f"),
        ("a >f b", "a b > f"),
        ("a 2>f>>g<h", "a 2> f >> g < h"),
        ("a 1>f 0<g", "a > f < g"),
        ("a >'x y' 2>&1", "a > 'x y' 2>&1"),
        ("a 1>&2|b", "a >&2 | b"),
        ("a 2 >f", "a 2 > f"),
        ("a b2>f", "a b2 > f"),
        ("a '2'>f", "a 2 > f"),
        ("a 2>&1&&b", "a 2>&1 && b"),
        ("a;\nb\n", "a; b"),
        ("a 'it'\\''s'", "a 'it'\\''s'"),
    ],
)
def test_spelled(text: str, spelling: str) -> None:
    assert shown(text) == spelling
    assert shown(spelling) == spelling


UNPARSED = [
    *(
        "",
        "   ",
        "\n",
        "#",
        ";",
        "&&",
        "|",
        "a &&",
        "a |",
        "a ||\n",
        "&& a",
        "; a",
        "a;;b",
        "a ; ; b",
    ),
    *("a\n;b", "a\n&& b", "a ;| b", "a |& b", "a & b", "a &", "a &&& b", "a ||| b"),
    *("a $b", "a ${b}", "a $(b)", "a `b`", 'a "$b"', 'a "`b`"', "a $'b'", 'a $"b"', "a b$", "$a"),
    *("a *", "a b?c", "a [x]", "a x]", "a @(b|c)", "a !(b)", "a {b,c}", "a {1..3}", "a {", "a }"),
    *("a ~", "a ~root/x", "a b=~", "a b:~", "a --b=~/c", "a ''~", "a =~b"),
    *(
        "(a)",
        "{ a; }",
        "a (b)",
        "f() { a; }",
        "a()",
        "[ a ]",
        "[[ a ]]",
        "((1))",
        "a <(b)",
        "a >(b)",
    ),
    *("a <<E\nb\nE", "a <<<b", "a <>f", "a >|f", "a &>f", "a >&f", "a <&3", "a >&-", "a 2>&-"),
    *(
        "a 3>f",
        "a 0>f",
        "a 1<f",
        "a 10>f",
        "a 2>&1x",
        "a 1>&1",
        "a {x}>f",
        "a y{x}>f",
        "a >",
        "a > ;",
    ),
    *("> f", "a && > f", "a > ''", "a > 2>f", "a >#f", "a < <b"),
    *(
        "A=b",
        "A=b a",
        "A+=b a",
        "'A'=b a",
        "=a",
        "a && B=c d",
        "'' a",
        '"" a',
        "- a",
        "-x",
        "'-x' a",
    ),
    *(
        "! a",
        "a | ! b",
        "if a",
        "'if' a",
        "i\\f a",
        "time a",
        "coproc a",
        "while a",
        "case a",
        "select x",
    ),
    *("function f", "then", "a && do b", "until a", "for x in a"),
    *("a 'b", 'a "b', "a \\", "a b\\\nc", "a\\\n#b", "\\\na", "a |\\\n| b", 'a "b\\\nc"'),
    *(
        "a\rb",
        "a b\r\nc",
        "a 'b\rc'",
        "a\0b",
        "a '\0'",
        "a\x0bb",
        "a\x0cb",
        "a \x1b[0m",
        "a \x7f",
        "a '\x7f'",
        "a '\x9b'",
    ),
    *(
        "a\u00a0b",
        "a\u2003b",
        "a\u2028b",
        "a\u200bb",
        "a\ufeffb",
        "\ufeffa",
        "a \u0301",
        "a \ud800",
        "a 😀",
    ),
]


@pytest.mark.parametrize("text", UNPARSED, ids=ascii)
def test_unparsed(text: str) -> None:
    assert refused(text) == "shell.unparsed"


@pytest.mark.parametrize(
    "text",
    [
        *("eval a", "exec a", "source a", ". a", "command a", "builtin a", "alias a=b", "set -x"),
        *("trap a 0", "export A=b", "unset a", "read a", "declare a", "umask 0", "a; exit 1"),
        *("'ev'al a", "e\\val a", "a | read b", "wait", ": a", "shopt -s extglob", "ulimit -n 1"),
        *(
            "cd",
            "cd a",
            "cd a || b",
            "cd a | b",
            "cd && a",
            "cd - && a",
            "cd '' && a",
            "cd a b && c",
        ),
        *(
            "cd -P a && b",
            "cd a >f && b",
            "a && cd b",
            "a; cd b; c",
            "cd a && cd b && c",
            "pushd a",
        ),
    ],
)
def test_what_only_a_shell_can_do(text: str) -> None:
    assert refused(text) == "shell.builtin"


def test_a_leading_cd_is_the_folder() -> None:
    text = read_shell("cd 'a b'/c && d | e")
    assert (text.folder, write_shell(text.commands)) == ("a b/c", "d | e")
    assert read_shell("cd a; b").folder == "a"
    assert read_shell("cd a\nb").folder == "a"
    assert read_shell("echo cd && b").folder is None


def test_limits() -> None:
    assert len(words(";".join(["a"] * MAX_COMMANDS))) == MAX_COMMANDS
    assert refused(";".join(["a"] * (MAX_COMMANDS + 1))) == "shell.too_large"
    assert refused("a " * 1025) == "shell.too_large"
    assert refused("a" + " >f" * 17) == "shell.too_large"
    assert words("a '" + "b" * (MAX_TEXT_BYTES - 4) + "'")
    assert refused("a '" + "b" * (MAX_TEXT_BYTES - 3) + "'") == "shell.too_large"
    assert refused("é" * (MAX_TEXT_BYTES // 2 + 1)) == "shell.too_large"


HOSTILE = [
    *"'\"\\`$(){}[]<>|&;#~!=",
    *("$(", "${", "''", '""', "\\\n", " \\\n", "<<E ", "a;", "a|", "a=", "{}", "a "),
]


@pytest.mark.parametrize("piece", HOSTILE, ids=ascii)
def test_long_and_deep_text_is_answered_at_once(piece: str) -> None:
    for count in (MAX_TEXT_BYTES // len(piece) - 2, 2_000_000):
        for text in (piece * count, "a " + piece * count, piece * count + "'"):
            started = time.process_time()
            with suppress(Denied):
                read_shell(text)
            assert time.process_time() - started < 1


@given(text=st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(Denied):
        commands = read_shell(text).commands
        assert read_shell(write_shell(commands)).commands == commands
