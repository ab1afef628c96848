"""Shell text means to real shells what it means to us, and what is written anew means the same.

``SAFECONDUCT_SHELL_TEXTS`` sets how many texts each test tries.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tests.policies.shells import SEARCHING, SHELLS, Bench, Ran

from safeconduct.errors import Denied
from safeconduct.policies.shell.form import Join, Redirect, Simple, quote, write_shell
from safeconduct.policies.shell.reader import read_shell
from safeconduct.runtime.tools.shell_script import script

EXAMPLES = int(os.environ.get("SAFECONDUCT_SHELL_TEXTS", "60"))
RUNS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
NAMES = ("a", "b", "c")
shells = pytest.mark.skipif(not SHELLS, reason="neither dash nor bash is installed")

# No slash: what a shell takes for another redirection than we do stays in its folder.
_TOKENS = """
a b c x 1 2 99 if time {x} HEAD~1 {} é ² ~ ~a = : , .. . # ! $ ` * ? [ ] ( ) { } - ^ % @ +
< > >> 2> 2>&1 >&2 <& <> >| &> & | || && ; ;; ' " \\ '' "" 'q' "d" a= =~ :~ {a,b} {1..2} $'x'
x#y #c a&&b <#x >#x 2>#x 1\\> "2"> '1'> ²> 1> 12> a1>x {x}> 2{}> 2>&- 0< 1< x~ %~ -~ ~x ;&
|& coproc [[ @( a+=1 a[1]= \\~ \\# 日本 \uff11 &
"""
TOKENS = _TOKENS.split()
LAYOUT = [" ", "\t", "\n", " \\\n", "\\\n", "\r", "\u00a0", "\v", "\f", "\u2028", "\u0301"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def texts() -> st.SearchStrategy[str]:
    token = st.one_of(st.sampled_from(TOKENS), st.just(" "), st.sampled_from(LAYOUT))
    tail = st.lists(token, min_size=1, max_size=9).map("".join)
    return st.tuples(st.sampled_from(NAMES), st.sampled_from([" ", "", "\t"]), tail).map("".join)


def files_of(commands: Sequence[Simple]) -> tuple[list[str], list[str]]:
    """Return the files that are read and those that are written."""
    redirects = [one for command in commands for one in command.redirects]
    read = [one.target for one in redirects if one.operator == "<"]
    return read, [one.target for one in redirects if one.operator in (">", ">>")]


def expected(commands: Sequence[Simple]) -> Ran:
    """Return what runs where every program succeeds: all but what stands behind `||`."""
    programs: list[tuple[str, ...]] = []
    ran: list[Simple] = []
    runs = True
    for command in commands:
        if command.join is not Join.PIPE:
            runs = command.join is not Join.OR
        if runs:
            programs.append(command.argv)
            ran.append(command)
    files = {name for half in files_of(ran) for name in half} | set(files_of(commands)[0])
    return Ran(tuple(sorted(programs)), tuple(sorted(files)))


def check(bench: Bench, text: str) -> bool:
    """Hold a text against every shell; False where it is refused."""
    try:
        found = read_shell(text)
    except Denied:
        return False
    commands = found.commands
    if found.folder is not None:  # `c"d" a;b`: there is no folder a for the shells
        return False
    read, written = files_of(commands)
    if any(command.argv[0] not in NAMES for command in commands):
        return False
    if any(name in (".", "..") or "/" in name for name in read + written):
        return False
    for shell in SHELLS:
        assert bench.run(shell, text, files=read) == expected(commands), shell
        assert bench.run(shell, anew(commands), files=read) == expected(commands), shell
    return True


def anew(commands: Sequence[Simple]) -> Callable[[str], str]:
    """Return what the runtime gives to a shell, with the files in the folder where it runs."""

    def write(folder: str) -> str:
        def target(one: Redirect) -> str:
            return one.target if one.operator == ">&" else f"{folder}/{one.target}"

        return script(
            [
                {
                    "join": command.join.value,
                    "argv": list(command.argv),
                    "redirects": [
                        {"fd": one.descriptor, "operator": one.operator, "target": target(one)}
                        for one in command.redirects
                    ],
                }
                for command in commands
            ]
        )

    return write


@shells
@RUNS
@example(text="a \\\n#b")
@example(text="a ''#c b#c")
@example(text="a b2>x 2 >c")
@example(text="a >x b 2>&1 <c")
@example(text="a HEAD~1 x~ {} {x} x{1}y")
@example(text="a && b || c && a; b | c")
@example(text="a # b\n\n # c\nb &&\n\n#\n c;")
@example(text='a \\a\\~\\$\\\\ "\\a\\$\\`\\"\\\\\'"')
@given(text=texts())
def test_what_is_read_is_what_shells_run(bench: Bench, text: str) -> None:
    assume(check(bench, text))


def words() -> st.SearchStrategy[str]:
    return st.text(
        st.one_of(
            st.sampled_from("ab'\"\\$`*?[]{}()<>|&;#~!=: \t\n-^%é{,}."),
            st.characters(exclude_categories=["Cc", "Cs"]),
        ),
        max_size=8,
    )


def spelled(word: str) -> st.SearchStrategy[str]:
    """Return some spelling of a word that is within what we read."""
    single = quote(word) if word else "''"
    double = '"' + "".join("\\" + c if c in '\\"$`' else c for c in word) + '"'
    ways = [single, double]
    if "\n" not in word and word:
        ways.append("".join("\\" + character for character in word))
    if len(word) > 1:
        ways.append(f"{quote(word[:1])}{quote(word[1:]) if word[1:] else ''}")
    return st.sampled_from(ways)


@st.composite
def written(draw: st.DrawFn) -> tuple[str, tuple[tuple[str, ...], ...]]:
    """Draw commands and some text that means them."""
    text, programs = "", list[tuple[str, ...]]()
    for _ in range(draw(st.integers(1, 3))):
        arguments = draw(st.lists(words(), max_size=3))
        program = draw(st.sampled_from(NAMES))
        programs.append((program, *arguments))
        spellings = [draw(spelled(word)) for word in (program, *arguments)]
        blank = st.sampled_from([" ", "\t", "  ", " \\\n", " \\\n\t"])
        line = spellings[0] + "".join(draw(blank) + one for one in spellings[1:])
        text += line + draw(st.sampled_from([";", " && ", "\n", " | ", " # c'\n\n", "&&", ";\n"]))
    return text + "c", (*programs, ("c",))


@shells
@RUNS
@given(made=written())
def test_every_spelling_is_read(
    bench: Bench, made: tuple[str, tuple[tuple[str, ...], ...]]
) -> None:
    text, programs = made
    commands = read_shell(text).commands
    assert tuple(command.argv for command in commands) == programs
    assert read_shell(write_shell(commands)).commands == commands
    for shell in SHELLS:
        assert bench.run(shell, text).programs == tuple(sorted(programs))


@shells
@RUNS
@given(
    programs=st.lists(
        st.tuples(st.sampled_from(["a", "echo", "test", "printf", "x y", "if", "cd"]), words()),
        min_size=1,
        max_size=3,
    ),
    joins=st.lists(st.sampled_from([";", "&&", "|", "||"]), min_size=2, max_size=2),
)
def test_the_script_runs_programs_and_no_builtin(
    bench: Bench, programs: list[tuple[str, str]], joins: list[str]
) -> None:
    commands = [
        Simple(join=Join(join), argv=argv)
        for join, argv in zip(["", *joins], programs, strict=False)
    ]
    text = script(
        [{"join": one.join.value, "argv": list(one.argv), "redirects": []} for one in commands]
    )
    for shell in SEARCHING:
        assert bench.run(shell, text).programs == expected(commands).programs
