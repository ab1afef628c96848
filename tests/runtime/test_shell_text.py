"""Shell text from the Call to the sandbox: what was judged runs, and nothing else of the text."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safeconduct.call import Json, Outcome
from safeconduct.errors import ApprovalRequired, Denied
from safeconduct.runtime.supervisor import Runtime
from safeconduct.runtime.tools.shell_script import script

POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**"], write: ["$WS/src/**"], limits: {wall: 20s}}
tools:
  shell.run:
    - {allow: {argv: [{in: [echo, cat, sh, ln, touch, wc, "true", "false"]}, ...]}}
    - {allow: {argv: [{in: [echo, sh, printf, no-such-program]}, ...], cwd: ["$WS/**"]}}
    - {allow: {argv: [pwd], cwd: ["$WS/**"]}}
    - {ask: {argv: [git, ...]}}
  fs.read: {allow: {path: ["$WS/**"]}}
  fs.write: {allow: {path: ["$WS/**"]}}
"""


@pytest.fixture
def runtime(tmp_path: Path, workspace: Path) -> Iterator[Runtime]:
    (workspace / "src").mkdir()
    (workspace / "src").chmod(0o777)
    (workspace / "kept").write_text("kept\n")
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    policy.chmod(0o600)
    environment = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    with Runtime.from_policy(policy, workspace=workspace, environment=environment) as one:
        yield one


@pytest.fixture
def run(runtime: Runtime) -> Callable[..., Outcome]:
    def perform(command: str, **arguments: Json) -> Outcome:
        return runtime.call("shell.run", command=command, **arguments)

    return perform


Run = Callable[..., Outcome]


def test_joined_commands_run_as_a_shell_would(run: Run, workspace: Path) -> None:
    ended = run("echo 'it''s' \"a  b\" c\\ d && false || echo two; echo three | cat | wc -c; false")
    assert ended.stdout == b"its a  b c d\ntwo\n6\n"
    assert (ended.exit_code, ended.ok) == (1, False)
    assert run("false && echo no; no-such-program || true").exit_code == 0
    assert run("echo a; no-such-program").exit_code == 127
    assert run("cd src && pwd; pwd").stdout == f"{workspace}/src\n".encode() * 2
    assert run("cat | cat; cat", stdin="in").stdout == b"in"


def test_redirections_open_what_was_judged(run: Run, workspace: Path) -> None:
    out = workspace / "src" / "out put"
    ended = run("cd src && echo one > 'out put'; sh -c 'echo two; echo err >&2' >> 'out put' 2>&1")
    assert (ended.stdout, ended.stderr, ended.exit_code) == (b"", b"", 0)
    assert out.read_text() == "one\ntwo\nerr\n"
    assert run("cat < 'src/out put' | wc -l; true").stdout == b"3\n"
    assert run("sh -c 'echo no >&2' 2> /dev/null; cat </dev/null").stderr == b""
    assert run("echo e >&2; echo o").stderr == b"e\n"


def test_words_stay_words(run: Run, workspace: Path) -> None:
    hostile = [
        "$(touch src/p)",
        "`touch src/p`",
        "; touch src/p #",
        "*",
        "~",
        "'",
        '"',
        "\\",
        "a\nb",
    ]
    hostile += ["-n", "{a,b}", "!", "$HOME", "> src/p", "&& touch src/p", "\u2028", "é"]
    for word in hostile:
        quoted = "'" + word.replace("'", "'\\''") + "'"
        # Where the quotes are left out, a shell does something else than print the word.
        assert run(f"printf '[%s]' {quoted}; true").stdout == f"[{word}]".encode()
    assert not (workspace / "src" / "p").exists()


def test_what_a_text_hides_is_refused_before_anything_runs(run: Run, workspace: Path) -> None:
    for hidden in ("echo $(touch src/p)", "echo `touch src/p`", "echo a\ntouch src/p & wait"):
        # The attack works where a shell is given the text.
        subprocess.run(["sh", "-c", hidden], cwd=workspace, check=False, stdout=subprocess.DEVNULL)
        (workspace / "src" / "p").unlink()
        with pytest.raises(Denied) as caught:
            run(f"touch src/first; {hidden}")
        assert caught.value.code == "shell.unparsed"
    for text in (
        "touch src/first; git push",
        "touch src/first && echo a > .git",
        "touch src/p; ls",
    ):
        with pytest.raises(Denied):
            run(text)
    with pytest.raises(ApprovalRequired):
        run("touch src/first | git push")
    assert os.listdir(workspace / "src") == []


def test_the_policy_in_force_is_written_by_no_redirection(
    tmp_path: Path, workspace: Path, runtime: Runtime
) -> None:
    policy = workspace / "src" / "rules.yaml"
    policy.write_text(POLICY)
    environment = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    with Runtime.from_policy(policy, workspace=workspace, environment=environment) as other:
        for text in ("echo a > src/rules.yaml", "true; echo a 2>> src/rules.yaml"):
            with pytest.raises(Denied) as caught:
                other.call("shell.run", command=text)
            assert caught.value.code == "path.protected"
    assert policy.read_text() == POLICY
    runtime.call("shell.run", command="echo a > src/rules.yaml")  # there it is a file like any
    assert policy.read_text() == "a\n"


def test_programs_run_and_no_builtin_of_the_shell(run: Run) -> None:
    # A builtin kill of dash prints another list; `echo` of dash reads backslashes, the program not.
    assert run("echo 'a\\tb'; true").stdout == b"a\\tb\n"
    assert run("echo --version; true").stdout != b"--version\n"


def test_the_sandbox_holds_where_a_path_changed_after_it_was_judged(
    run: Run, workspace: Path
) -> None:
    link = "ln -s ../kept src/way"
    subprocess.run(["sh", "-c", f"{link} && echo lost > src/way"], cwd=workspace, check=True)
    assert (workspace / "kept").read_text() == "lost\n"  # so it works without the sandbox
    (workspace / "kept").write_text("kept\n")
    (workspace / "src" / "way").unlink()
    ended = run(f"{link} && echo lost > src/way")
    assert not ended.ok
    assert (workspace / "kept").read_text() == "kept\n"


def test_the_trace_and_the_script_hold_what_was_judged() -> None:
    commands: list[Json] = [
        {"join": "", "argv": ["a", "it's"], "redirects": []},
        {
            "join": "|",
            "argv": ["b"],
            "redirects": [
                {"fd": 1, "operator": ">>", "target": "/x y"},
                {"fd": 2, "operator": ">&", "target": "1"},
            ],
        },
    ]
    assert script(commands) == "(exec 'a' 'it'\\''s') | (exec 'b' 1>>'/x y' 2>&1)"


BROKEN: list[Json] = [
    {"join": "&", "argv": ["a"], "redirects": []},
    {"join": ";", "argv": ["a"], "redirects": []},
    {"join": "", "argv": [], "redirects": []},
    {"join": "", "argv": [""], "redirects": []},
    {"join": "", "argv": ["-a"], "redirects": []},
    {"join": "", "argv": ["a\0"], "redirects": []},
    {"join": "", "argv": ["a"], "redirects": [{"fd": 3, "operator": ">", "target": "/x"}]},
    {"join": "", "argv": ["a"], "redirects": [{"fd": 0, "operator": ">", "target": "/x"}]},
    {"join": "", "argv": ["a"], "redirects": [{"fd": 1, "operator": ">", "target": "x"}]},
    {"join": "", "argv": ["a"], "redirects": [{"fd": 1, "operator": ">|", "target": "/x"}]},
    {"join": "", "argv": ["a"], "redirects": [{"fd": 1, "operator": ">&", "target": "/x"}]},
    {"join": "", "argv": ["a"], "redirects": [{"fd": 1, "operator": ">&", "target": "1"}]},
]


@pytest.mark.parametrize("command", BROKEN, ids=json.dumps)
def test_no_script_is_written_for_what_no_text_is_read_into(command: Json) -> None:
    with pytest.raises(ValueError, match=r"."):
        script([command])
