"""The verbs of the command line, each run as a process of its own on real components.

One file past 500 lines, because every section works at the same Desk.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from safeconduct.attestation import SignerClient, TraceWriter, write_key
from safeconduct.errors import Exit

POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**"], limits: {wall: 20s}}
  short: {like: base, limits: {wall: 300ms}}
tools:
  fs.read: {allow: {path: ["$WS/**"]}}
  fs.list: {allow: {path: ["$WS/**"]}}
  fs.write: {allow: {path: ["$WS/**"]}}
  shell.run:
    - {allow: {argv: [sh, ...]}}
    - {allow: {argv: [missing-program]}}
    - {allow: {argv: [sleep, ...]}, profile: short}
    - {ask: {argv: [git, push]}}
"""
STRICT = 'version: 1\ntools:\n  fs.read: {allow: {path: ["$WS/**"]}}\n'
# An escape sequence that sets a terminal's title, and a mark that turns the reading direction.
HOSTILE = "\x1b]0;owned\x07\u202egnp.exe"
# LIMIT: seconds for one command; a hang must fail the test, not stop the suite.
SECONDS = 60


@dataclass(frozen=True)
class Done:
    """One finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401 - a parse boundary
        return json.loads(self.out)


@dataclass(frozen=True)
class Desk:
    """A user's folders: a home with state, and a project to work in."""

    root: Path

    @property
    def project(self) -> Path:
        return self.root / "project"

    @property
    def state(self) -> Path:
        return self.root / "state" / "safeconduct"

    @property
    def policy(self) -> Path:
        return self.root / "policy.yaml"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.root / "home"),
            "XDG_STATE_HOME": str(self.root / "state"),
            "XDG_CONFIG_HOME": str(self.root / "config"),
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
        }

    def run(self, *arguments: str | bytes | Path, stdin: bytes = b"", **variables: str) -> Done:
        """Run one command in the project."""
        done = subprocess.run(
            [sys.executable, "-m", "safeconduct", *arguments],
            input=stdin,
            capture_output=True,
            cwd=self.project,
            env={**self.environment, **variables},
            timeout=SECONDS,
            check=False,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def exec(self, *argv: str, options: Sequence[str | Path] = ()) -> Done:
        """Run a program under the policy."""
        return self.run("exec", "--policy", self.policy, *options, "--", *argv)

    def record(self) -> tuple[Path, str]:
        """Record a file written with hostile text and a program that prints it."""
        trace = self.root / "trace"
        content = json.dumps({"path": "a.txt", "content": HOSTILE})
        call = self.run("call", "fs.write", content, "-p", self.policy, "--trace", trace)
        assert call.code == Exit.OK, call.err
        done = self.exec("sh", "-c", "cat a.txt", options=("--trace", trace))
        assert (done.code, done.out) == (Exit.OK, HOSTILE), done.err
        return trace, self.run("keys", "show").out.strip()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    desk = Desk(tmp_path)
    for folder in (desk.project, tmp_path / "home"):
        folder.mkdir()
    desk.policy.write_text(POLICY)
    return desk


# -- the tree ----------------------------------------------------------------------------------


def test_help_names_every_verb_and_loads_none(desk: Desk) -> None:
    code = (
        "import sys; from safeconduct.runtime.cli import run; run(['--help']); "
        "print([name for name in ('safeconduct.policies', 'safeconduct.runtime.supervisor') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    verbs = ("init", "exec", "run", "call", "mcp", "trust", "replay", "doctor", "policy", "trace")
    for verb in verbs:
        assert f"\n  {verb} " in done.stdout
    assert done.stdout.endswith("[]\n")
    assert "verify" in desk.run("trace", "--help").out
    assert desk.run("--version").out.startswith("safeconduct 0.")
    for words in (["policy", "check"], ["trace", "verify"], ["exec"], ["mcp"], ["doctor"]):
        assert desk.run(*words, "--help").code == Exit.OK


def test_verify_loads_no_runtime(desk: Desk) -> None:
    code = (
        "import sys; from safeconduct.runtime.cli import run; "
        "run(['trace', 'verify', 'nothing']); "
        "print([name for name in ('wasmtime', 'pyseccomp', 'rich', "
        "'safeconduct.policies', 'safeconduct.runtime.supervisor', 'safeconduct.runtime.sandbox') "
        "if name in sys.modules])"
    )
    # The trace is named by a path: only a bare name is looked up in the state folder.
    done = subprocess.run(
        [sys.executable, "-c", code.replace("nothing", "./nothing")],
        capture_output=True, text=True, check=True, env=desk.environment,
    )  # fmt: skip
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["policy", "nonsense"],
        ["exec", "--nonsense"],
        ["replay", "x", "--with", "y", "--mode", "reexec"],
        ["policy", "explain"],
        ["call", "fs.read", '{"path": "a", "path": "b"}'],
        ["call", "fs.read", "[]"],
        ["trust", "--show", "--revoke"],
        ["trace", "verify", "x", "--key", "no key"],
    ],
)
def test_usage_errors_exit_2_in_two_lines(desk: Desk, words: list[str]) -> None:
    done = desk.run(*words)
    assert (done.code, done.out) == (Exit.USAGE, "")
    assert len(done.err.splitlines()) == 2
    assert done.err.startswith("safeconduct: ")


@pytest.mark.parametrize(
    "kind", ["fifo", "folder", "binary", "huge", "missing", "not-utf8", "ansi"]
)
def test_no_bad_input_ends_in_a_traceback(desk: Desk, kind: str) -> None:
    path = os.fsencode(desk.root / kind)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    elif kind in ("binary", "huge"):
        Path(os.fsdecode(path)).write_bytes(
            b"\x00\xff\x1b[31m" * (1 if kind == "binary" else 1 << 19)
        )
    path = b"\xff\xfe" if kind == "not-utf8" else b"\x1b[31m" if kind == "ansi" else path
    for words in (
        ["policy", "check", path],
        ["policy", "explain", path],
        ["policy", "explain", "--policy", path, desk.policy],
        ["trust", "--yes", path],
        ["trace", "show", path],
        ["trace", "verify", path],
        ["trace", "verify", "x", "--trust", path],
        ["replay", path, "--with", path],
        ["keys", "new", path, "--name", "not a name"],
        ["init", "--preset", path],
        ["call", "fs.read", b"@" + path],
        ["exec", "--policy", path, "--", "true"],
        ["exec", "--workspace", path, "--policy", path, "--", "true"],
        [path],
    ):
        done = desk.run(*words)
        assert done.code not in (Exit.OK, Exit.BUG), (words, done)
        assert "Traceback" not in done.err
        assert "\x1b" not in done.out + done.err


def test_closed_streams_and_a_reader_that_left(desk: Desk) -> None:
    command = f"{sys.executable} -m safeconduct policy schema"
    for shell, code in ((f"{command} >&-", 0), (f"{command} <&- >&- 2>&-", 0)):
        done = subprocess.run(["sh", "-c", shell], env=desk.environment, check=False)
        assert done.returncode == code
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
        env=desk.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, Exit.SIGNAL + 13)
    assert done.stderr == ""


# -- exec and call -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "status"),
    [
        (["sh", "-c", "exit 7"], 7, "failed"),
        (["sh", "-c", "exit 124"], 124, "failed"),
        (["sh", "-c", "kill -TERM $$"], Exit.SIGNAL + 15, "failed"),
        (["sleep", "30"], Exit.LIMIT, "limit"),
        (["rm", "x"], Exit.DENIED, "denied"),
        (["git", "push"], Exit.DENIED, "denied"),
        (["missing-program"], Exit.NOT_FOUND, "failed"),
    ],
)
def test_exec_exit_codes_and_the_file_that_tells_them_apart(
    desk: Desk, argv: list[str], code: int, status: str
) -> None:
    file = desk.root / "outcome.json"
    done = desk.exec(*argv, options=("--outcome", file))
    assert done.code == code, done.err
    outcome = json.loads(file.read_text())
    assert (outcome["exit"], outcome["status"], outcome["ok"]) == (code, status, False)


def test_exec_hands_on_output_and_a_redirected_file(desk: Desk) -> None:
    done = desk.exec("sh", "-c", "echo out; echo err >&2")
    assert (done.code, done.out, done.err) == (Exit.OK, "out\n", "err\n")
    given = desk.root / "given"
    for data, code, out in (
        (b"text\n", 0, b"text\n"),
        (b"\xff", 2, b""),
        (b"a" * (2 << 20), 2, b""),
    ):
        given.write_bytes(data)
        with given.open("rb") as stdin:
            command = [sys.executable, "-m", "safeconduct", "exec", "-p", desk.policy]
            got = subprocess.run(
                [*command, "--", "sh", "-c", "cat"],
                stdin=stdin, capture_output=True, cwd=desk.project, env=desk.environment,
                check=False,
            )  # fmt: skip
        assert (got.returncode, got.stdout) == (code, out), got.stderr


def test_outcome_file_follows_no_link(desk: Desk) -> None:
    precious = desk.root / "precious"
    precious.write_text("kept")
    (desk.project / "link").symlink_to(precious)
    os.link(precious, desk.project / "second-name")
    for name in ("link", "second-name"):
        done = desk.exec("sh", "-c", "true", options=("--outcome", name))
        assert done.code == Exit.USAGE
    assert precious.read_text() == "kept"


def test_unwritable_policy_state_is_our_failure(desk: Desk) -> None:
    assert desk.exec("true", options=("--policy", "absent.yaml")).code == Exit.FAILURE
    done = desk.run("exec", "--", "true")
    assert (done.code, "policy.not_found" in done.err) == (Exit.FAILURE, True)


def test_call_prints_values(desk: Desk) -> None:
    (desk.project / "a.txt").write_text("hello\n")
    call = ["call", "-p", str(desk.policy)]
    assert desk.run(*call, "fs.read", '{"path": "a.txt"}').out == "hello\n"
    assert desk.run(*call, "fs.list", "-", stdin=b'{"path": "."}').out == "a.txt\n"
    (desk.root / "call.json").write_text('{"path": "b.txt", "content": "abc"}')
    assert desk.run(*call, "fs.write", f"@{desk.root / 'call.json'}").out == "3\n"
    found = desk.run(*call, "fs.read", '{"path": "b.txt"}', "--json").json
    assert (found["ok"], found["value"], found["stdout"]) == (True, "abc", {"text": "abc"})
    shell = desk.run(*call, "shell.run", '{"argv": ["sh", "-c", "echo hi; exit 3"]}', "--json")
    assert (shell.code, shell.json["exit_code"], shell.json["stdout"]) == (3, 3, {"text": "hi\n"})


@pytest.mark.parametrize(
    ("tool", "arguments", "code"),
    [
        ("fs.read", '{"path": "../policy.yaml"}', "path.dotdot"),
        ("fs.read", '{"path": "absent"}', "path.not_found"),
        ("fs.read", "{}", "call.missing_argument"),
        ("fs.read", '{"path": "a", "mode": "r"}', "call.extra_argument"),
        ("no.tool", "{}", "call.unknown_tool"),
    ],
)
def test_call_is_denied_with_a_code(desk: Desk, tool: str, arguments: str, code: str) -> None:
    done = desk.run("call", tool, arguments, "-p", desk.policy, "--json")
    assert done.code == Exit.DENIED
    assert (done.json["status"], done.json["error"]["code"]) == ("denied", code)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("verb", ["exec", "call"])
def test_a_signal_ends_the_call_and_signs_the_trace(
    desk: Desk, verb: str, number: signal.Signals
) -> None:
    marker = f"signalled{os.getpid()}"
    argv = ["sh", "-c", f"echo started; sleep 50; : {marker}"]
    words = ["exec", "-p", desk.policy, "--trace", desk.root / "trace", "--", *argv]
    if verb == "call":
        given = json.dumps({"argv": argv})
        words = ["call", "shell.run", given, "-p", desk.policy, "--trace", desk.root / "trace"]
    with subprocess.Popen(
        [sys.executable, "-m", "safeconduct", *words],
        stdout=subprocess.PIPE, cwd=desk.project, env=desk.environment,
        # Whoever runs the tests may have them ignored (nohup), which a child inherits.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        process.send_signal(number)
        assert process.wait(SECONDS) == Exit.SIGNAL + number
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            assert marker.encode() not in entry.read_bytes()
    key = desk.run("keys", "show").out.strip()
    done = desk.run("trace", "verify", desk.root / "trace", "--key", key)
    assert done.code == Exit.OK, done.out
    assert os.listdir(desk.project) == []


@pytest.mark.parametrize(("ends", "code"), [(False, Exit.OK), (True, Exit.SIGNAL + 15)])
def test_a_signal_waits_until_things_are_put_up(ends: bool, code: int) -> None:
    program = f"""
import os, signal
from safeconduct.runtime.cli.signals import Termination
with Termination() as termination:
    if {ends}:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
    print("put up", flush=True)
    try:
        with termination.interrupting():
            print("ran", flush=True)
    finally:
        print("taken down", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    lines = ["put up", "taken down"] if ends else ["put up", "ran", "taken down"]
    assert done.stdout.split("\n")[:-1] == lines


def test_a_signal_that_was_ignored_stays_ignored(desk: Desk) -> None:
    command = f"trap '' HUP; exec {sys.executable} -m safeconduct exec -p {desk.policy} -- "
    with subprocess.Popen(
        ["sh", "-c", command + "sh -c 'echo started; sleep 0.2; echo ended'"],
        stdout=subprocess.PIPE, cwd=desk.project, env=desk.environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.read() == b"ended\n"
        assert process.wait(SECONDS) == Exit.OK


def test_nothing_is_imported_from_the_current_folder(desk: Desk) -> None:
    evil = f"open({str(desk.root / 'imported')!r}, 'a').write(__name__)\n"
    for name in ("typer", "msgspec", "anyio", "yaml", "wasmtime", "http", "json", "ssl", "queue"):
        (desk.project / f"{name}.py").write_text(evil)
    (desk.project / "file").write_text("x")
    # Python alone would take them: the folder is a real danger.
    subprocess.run(
        [sys.executable, "-c", "import typer"], cwd=desk.project, env=desk.environment, check=True
    )
    assert (desk.root / "imported").read_text() == "typer"
    (desk.root / "imported").unlink()
    assert desk.exec("sh", "-c", "echo hi").out == "hi\n"
    done = desk.run("call", "fs.read", '{"path": "file"}', "-p", desk.policy)
    assert (done.code, done.out) == (Exit.OK, "x"), done.err
    assert not (desk.root / "imported").exists()


# -- policies and trust ------------------------------------------------------------------------


def test_check_prints_findings_in_every_format(desk: Desk) -> None:
    assert desk.run("policy", "check", desk.policy, "--format", "github").code == Exit.OK
    bad = desk.root / "bad.yaml"
    bad.write_text("version: 1\ntools:\n  fs.read: {alow: any}\n")
    done = desk.run("policy", "check", bad)
    assert done.code == Exit.FINDINGS
    assert done.out.startswith(f"{bad}:3:")
    assert "\n  fix: " in done.out
    (found,) = desk.run("policy", "check", bad, "--json").json
    assert (found["level"], found["line"], found["file"]) == ("error", 3, str(bad))
    assert f"::error file={bad},line=3," in desk.run("policy", "check", bad, "--format=github").out


def test_check_counts_warnings_only_when_strict(desk: Desk) -> None:
    (desk.root / "empty.yaml").write_text("version: 1\ntools: {}\n")
    done = desk.run("policy", "check", desk.root / "empty.yaml")
    assert (done.code, "warning" in done.out) == (Exit.OK, True)
    assert desk.run("policy", "check", desk.root / "empty.yaml", "--strict").code == Exit.FINDINGS


def test_explain_names_rules_lines_and_profile(desk: Desk) -> None:
    explain = ["policy", "explain", "-", "-p", str(desk.policy)]
    allowed = desk.run(*explain, stdin=b'{"tool": "shell.run", "arguments": {"argv": ["sh"]}}')
    assert allowed.code == Exit.OK
    assert f"{desk.policy}:10" in allowed.out
    assert f"read       {desk.project}" in allowed.out
    denied = desk.run(*explain, stdin=b'{"tool": "shell.run", "arguments": {"argv": ["rm"]}}')
    assert denied.code == Exit.FINDINGS
    assert denied.out.startswith("deny shell.run (policy.no_rule)")
    assert "advice" in denied.out
    asked = b'{"tool": "shell.run", "arguments": {"argv": ["git", "push"]}}'
    assert desk.run(*explain, "--json", stdin=asked).json["effect"] == "ask"
    refused = desk.run(*explain, stdin=b'{"tool": "fs.read", "arguments": {"path": "../x"}}')
    assert (refused.code, "path.dotdot" in refused.out) == (Exit.FINDINGS, True)
    for wrong in (b"[]", b"{}", b'{"tool": 1}', b'{"tool": "a", "more": 1}', b"\xff", b"{"):
        assert desk.run(*explain, stdin=wrong).code == Exit.USAGE


def test_explain_and_trust_refuse_inside_a_sandbox(desk: Desk) -> None:
    for words in (["policy", "explain", "-"], ["trust", "--yes"], ["init"]):
        done = desk.run(*words, SAFECONDUCT_SANDBOX="full")
        assert (done.code, "sandbox.inside" in done.err) == (Exit.DENIED, True)


def test_schema_is_json(desk: Desk) -> None:
    assert "tools" in desk.run("policy", "schema").json["properties"]


def test_a_project_policy_counts_only_while_its_very_bytes_are_trusted(desk: Desk) -> None:
    assert desk.run("init", "--preset", "read-only").code == Exit.OK
    policy = desk.project / ".safeconduct" / "policy.yaml"
    again = desk.run("init")
    assert (again.code, "policy.exists" in again.err) == (Exit.FAILURE, True)
    untrusted = desk.run("exec", "--", "ls")
    assert (untrusted.code, "policy.untrusted" in untrusted.err) == (Exit.FAILURE, True)
    unasked = desk.run("trust", stdin=b"y\n")
    assert (unasked.code, "no terminal" in unasked.err) == (Exit.USAGE, True)
    shown = desk.run("trust", "--show")
    assert shown.code == Exit.OK
    assert "not trusted" in shown.out
    assert "allow fs.read" in shown.out
    assert desk.run("trust", "--yes").code == Exit.OK
    assert desk.run("trust", "--show", "--json").json["trusted"] is True
    trusted = desk.run("exec", "--", "ls")
    assert (trusted.code, "using" in trusted.err) == (Exit.OK, True), trusted.err
    policy.write_text(policy.read_text() + "# changed\n")
    assert "policy.untrusted" in desk.run("exec", "--", "ls").err
    assert desk.run("trust", "--yes").code == Exit.OK
    assert "no longer" in desk.run("trust", "--revoke").out
    assert "policy.untrusted" in desk.run("exec", "--", "ls").err


FAR = """\
version: 1
profiles:
  base: {read: ["$WS/**", "/etc/**"], write: ["/srv/far/**"], hide: ["**/.env*"]}
tools:
  fs.read: {allow: {path: [PATTERNS]}}
  shell.run: {allow: {argv: [git, {in: [log, push]}, ...]}}
"""


def test_trust_shows_all_that_one_agrees_to(desk: Desk) -> None:
    patterns = [f"/opt/{'x' * 30}/{number}/**" for number in range(20)] + ["/root/.ssh/**"]
    policy = desk.project / ".safeconduct" / "policy.yaml"
    policy.parent.mkdir()
    policy.write_text(FAR.replace("PATTERNS", ", ".join(patterns)))
    shown = desk.run("trust", "--show").out
    lines = shown.splitlines()
    assert lines[1] == "  outside the workspace:"
    reach = lines[2 : lines.index(next(line for line in lines if "digest" in line))]
    assert len(reach) == len(patterns) + 2
    for path in (*patterns, "reads /etc", "writes /srv/far"):
        assert any(f"{path}, which is outside the workspace" in line for line in reach), path
    for pattern in patterns:
        assert f"        {pattern}" in lines
    for text in ("{in: [log, push]}, ...]", "read  ", "write /srv/far", "hide  /**/.env*"):
        assert text in shown
    assert "…" not in shown
    found = desk.run("trust", "--show", "--json").json
    assert len(found["outside"]) == len(reach)
    assert found["profiles"][0]["read"] == [str(desk.project.resolve()), "/etc"]
    assert all(pattern in found["grants"][0] for pattern in patterns)


def test_trust_shows_and_pins_all_files_and_every_role(desk: Desk) -> None:
    folder = desk.project / ".safeconduct"
    folder.mkdir()
    wide = "version: 1\ntools: {mail.*: {allow: {to: any}, rate: 5/h}}\nservers: {m: {run: [mm]}}\n"
    (folder / "wide.yaml").write_text(wide)
    (folder / "policy.yaml").write_text(
        "version: 1\nextends: wide.yaml\ntools: {fs.list: {allow: any}}\n"
        "roles: {a: {mail.send: {ask: any, when: 'session.calls < 5'}}}\n"
    )
    shown = desk.run("trust", "--show").out
    for text in ("ask   mail.send with any", "in role a, when session.calls < 5", "server m  mm"):
        assert text in shown
    assert "allow mail.* to any value, rate 5/h" in shown
    assert desk.run("trust", "--yes").code == Exit.OK
    asked = (desk.root / "call.json", '{"tool": "fs.list", "arguments": {"path": "."}}')
    asked[0].write_text(asked[1])
    assert desk.run("policy", "explain", str(asked[0])).code == Exit.FINDINGS
    (folder / "wide.yaml").write_text(wide + "# changed\n")
    assert "policy.untrusted" in desk.run("policy", "explain", str(asked[0])).err


def test_trust_shows_a_workspace_that_was_moved(desk: Desk) -> None:
    policy = desk.project / ".safeconduct" / "policy.yaml"
    policy.parent.mkdir()
    policy.write_text(f"{STRICT}workspace: {desk.root}\n")
    assert "the workspace itself is" in desk.run("trust", "--show", "--json").json["outside"][0]
    policy.write_text(STRICT)
    assert desk.run("trust", "--show", "--json").json["outside"] == []


@pytest.mark.parametrize("linked", [".safeconduct", ".safeconduct/policy.yaml"])
def test_a_policy_behind_a_link_is_neither_trusted_nor_used(desk: Desk, linked: str) -> None:
    other = desk.root / "other"
    (other / ".safeconduct").mkdir(parents=True)
    (other / ".safeconduct" / "policy.yaml").write_text(STRICT)
    assert desk.run("trust", "--yes", other / ".safeconduct" / "policy.yaml").code == Exit.OK
    link = desk.project / linked
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(other / linked)
    own = desk.project / ".safeconduct" / "policy.yaml"
    for words in (["trust", "--yes"], ["trust", "--yes", own], ["exec", "--", "ls"]):
        done = desk.run(*words)
        assert (done.code, "policy.link" in done.err) == (Exit.FAILURE, True), done.err


def test_init_follows_no_link(desk: Desk) -> None:
    elsewhere = desk.root / "elsewhere"
    elsewhere.mkdir()
    (desk.project / ".safeconduct").symlink_to(elsewhere)
    assert desk.run("init").code == Exit.FAILURE
    assert list(elsewhere.iterdir()) == []


# -- traces ------------------------------------------------------------------------------------


def test_verify_needs_a_key_that_the_verifier_brings(desk: Desk, tmp_path: Path) -> None:
    trace, key = desk.record()
    verify = ["trace", "verify", str(trace)]
    without = desk.run(*verify)
    assert without.code == Exit.UNTRUSTED
    assert key.split("+")[0] in without.out
    assert "that claim came with it" in without.out
    assert f"safeconduct trace verify --key 'NAME+HASH+BASE64' {trace}" in without.out
    assert desk.run(*verify, "--key", key).code == Exit.OK
    stranger = write_key(tmp_path / "stranger", "example.org/stranger")
    assert desk.run(*verify, "--key", stranger).code == Exit.UNTRUSTED
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    assert desk.run(*verify, "--trust", trusted).code == Exit.USAGE
    (trusted / "log.pub").write_text(f"# the lab's log\n{key}\n")
    report = desk.run(*verify, "--trust", trusted, "--json").json
    # The first verification is remembered: that is what makes it L2 and not L1.
    assert (report["status"], report["level"], report["verdict"]) == (0, 2, "OK")
    report = desk.run(*verify, "--trust", trusted, "--json", "--no-remember").json
    assert (report["status"], report["level"]) == (0, 1)


def test_keys_inside_the_trace_are_never_trust(desk: Desk) -> None:
    trace, key = desk.record()
    keys = trace / "keys"
    keys.mkdir()
    (keys / "log.pub").write_text(key)
    (desk.root / "way-in").symlink_to(keys)
    outside = desk.root / "outside"
    outside.mkdir()
    (outside / "log.pub").symlink_to(keys / "log.pub")
    for folder in (keys, trace, desk.root / "way-in", outside):
        assert desk.run("trace", "verify", trace, "--trust", folder).code == Exit.USAGE


def test_verify_tells_tampered_from_incomplete_from_unreadable(desk: Desk) -> None:
    trace, key = desk.record()
    tampered = desk.root / "tampered"
    shutil.copytree(trace, tampered)
    for bundle in (tampered / "tile" / "entries").rglob("*"):
        if bundle.is_file():
            data = bytearray(bundle.read_bytes())
            data[len(data) // 2] ^= 1
            bundle.write_bytes(data)
    done = desk.run("trace", "verify", tampered, "--key", key)
    assert (done.code, "finding" in done.out) == (Exit.TAMPERED, True)
    assert desk.run("trace", "verify", desk.root / "absent", "--key", key).code == Exit.TRACE_IO
    half, line = _unfinished(desk.root)
    done = desk.run("trace", "verify", half, "--key", line)
    assert (done.code, "session.open" in done.out) == (Exit.INCOMPLETE, True)


def _unfinished(root: Path) -> tuple[Path, str]:
    """Copy a trace while a session is under way."""
    line = write_key(root / "other.key", "example.org/other")
    signer = SignerClient.start(
        root / "other.key", state=root / "signer", forbidden=[root / "live"]
    )
    try:
        with TraceWriter.open(root / "live", signer=signer) as writer:
            writer.open_session("local", "test")
            writer.checkpoint()
            shutil.copytree(root / "live", root / "half")
    finally:
        signer.close()
    return root / "half", line


def test_show_and_ls_escape_what_a_terminal_would_obey(desk: Desk) -> None:
    trace, _ = desk.record()
    for done in (desk.run("trace", "show", trace), desk.run("trace", "show", trace, "--json")):
        assert done.code == Exit.OK
        assert not {"\x1b", "\x07", "\u202e"} & set(done.out)
    story = desk.run("trace", "show", trace).out
    assert r"stdout| \x1b]0;owned\x07\u202egnp.exe" in story
    assert "allow (policy.allow) by" in story
    kept = desk.state / "traces"
    (kept / "link").symlink_to(trace)
    shutil.copytree(trace, kept / HOSTILE.replace("/", ""))
    listed = desk.run("trace", "ls")
    assert r"\x1b]0;owned" in listed.out
    assert not {"\x1b", "\x07", "\u202e"} & set(listed.out)
    (row,) = desk.run("trace", "ls", "--json").json
    assert (row["sessions"], row["policies"]) == (2, [str(desk.policy)])


def test_show_selects_a_session_or_a_call(desk: Desk) -> None:
    trace, _ = desk.record()
    entries = desk.run("trace", "show", trace, "--json").json
    (intent, other) = (one for one in entries if one["kind"] == "call.intent")
    assert intent["opened"]["document"]["value"]["arguments"]["content"] == HOSTILE
    only = desk.run("trace", "show", trace, "--call", intent["body"]["call"], "--json").json
    assert [one["kind"] for one in only] == ["call.intent", "call.decision", "call.outcome"]
    some = desk.run("trace", "show", trace, "--session", other["session"], "--json").json
    assert {one["session"] for one in some} == {other["session"]}
    assert desk.run("trace", "show", trace, "--call", "absent").code == Exit.USAGE
    assert desk.run("trace", "show", desk.project).code == Exit.TRACE_IO


def test_ls_of_nothing_and_of_damaged_traces(desk: Desk) -> None:
    assert (desk.run("trace", "ls").code, desk.run("trace", "ls", "--json").json) == (0, [])
    broken = desk.state / "traces" / "broken"
    broken.mkdir(parents=True)
    (broken / "checkpoint").write_bytes(b"\xff\x00")
    (row,) = desk.run("trace", "ls", "--json").json
    assert row["error"].startswith("note.invalid")


def test_replay_lists_changed_decisions(desk: Desk) -> None:
    trace, _ = desk.record()
    same = desk.run("replay", trace, "--with", desk.policy)
    assert (same.code, "2 judged alike" in same.out) == (Exit.OK, True)
    (desk.root / "strict.yaml").write_text(STRICT)
    strict = ["replay", str(trace), "--mode", "policy", "--with", str(desk.root / "strict.yaml")]
    stricter = desk.run(*strict)
    assert stricter.code == Exit.FINDINGS
    assert "allow → deny" in stricter.out
    report = desk.run(*strict, "--json").json
    assert [one["tool"] for one in report["changes"]] == ["fs.write", "shell.run"]
    for file in (trace / "openings").iterdir():
        file.unlink()
    erased = desk.run("replay", trace, "--with", desk.policy)
    assert (erased.code, "2 undecidable" in erased.out) == (Exit.FINDINGS, True)
    assert desk.run("replay", desk.project, "--with", desk.policy).code == Exit.TRACE_IO


# -- keys and doctor ---------------------------------------------------------------------------


def test_keys_show_makes_none_and_new_overwrites_none(desk: Desk) -> None:
    none = desk.run("keys", "show")
    assert (none.code, "key.missing" in none.err) == (Exit.FAILURE, True)
    assert not desk.state.exists()
    path = desk.root / "my.key"
    made = desk.run("keys", "new", path, "--name", "example.org/alice")
    assert made.code == Exit.OK
    assert made.out.startswith("example.org/alice+")
    assert "PRIVATE" not in made.out + made.err
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    assert desk.run("keys", "new", path, "--name", "example.org/bob").code == Exit.USAGE
    assert path.read_bytes() == before


def test_doctor_says_which_tier_is_in_force(desk: Desk) -> None:
    done = desk.run("doctor", "--json")
    layers = {layer["name"]: layer for layer in done.json["layers"]}
    assert {"landlock", "cgroups", "seccomp", "launcher", "signer", "user namespaces"} <= set(
        layers
    )
    tier = done.json["tier"]
    assert done.code == (Exit.OK if tier else Exit.FAILURE)
    assert [name for name in ("full", "landlock") if layers[f"tier {name}"]["used"]] == [tier]
    assert all(layer["available"] or layer["get"] for layer in layers.values())
    assert desk.run("doctor").out.startswith("layer\tavailable\tused")


# -- on a terminal -----------------------------------------------------------------------------


def _on_terminal(desk: Desk, *arguments: str | Path, answer: bytes = b"") -> tuple[int, str]:
    """Run one command on a pseudo-terminal, answer it, and return its code and what it showed."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "safeconduct", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=desk.project, env=desk.environment,
    ) as process:  # fmt: skip
        os.close(theirs)
        os.write(ours, answer)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:
            pass  # EIO: the last process has closed the terminal, pty(7)
        finally:
            os.close(ours)
        return process.wait(SECONDS), shown.decode()


def test_trust_asks_on_a_terminal_and_only_y_is_yes(desk: Desk) -> None:
    assert desk.run("init").code == Exit.OK
    for answer, code in ((b"\n", Exit.DENIED), (b"n\n", Exit.DENIED), (b"y\n", Exit.OK)):
        got, shown = _on_terminal(desk, "trust", answer=answer)
        assert (got, "[y/N]" in shown) == (code, True)
    assert desk.run("trust", "--show", "--json").json["trusted"] is True


def test_a_terminal_gets_output_escaped_and_tables(desk: Desk) -> None:
    trace, _ = desk.record()
    shell = ("exec", "-p", desk.policy, "--", "sh", "-c", "cat a.txt; echo")
    for words in (shell, ("call", "-p", desk.policy, "fs.read", '{"path": "a.txt"}')):
        code, shown = _on_terminal(desk, *words)
        assert (code, r"\x1b]0;owned\x07\u202egnp.exe" in shown) == (Exit.OK, True)
        assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    (desk.state / "traces" / "\x1b]0;x").mkdir()
    code, shown = _on_terminal(desk, "trace", "ls")
    assert (code, r"\x1b]0;x" in shown) == (Exit.OK, True)
    assert "\x1b]" not in shown
    assert trace.exists()
