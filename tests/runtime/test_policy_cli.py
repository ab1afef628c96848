"""`policy test`, `diff`, `simulate` and `check`: what they print and the code they end with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from safeconduct.errors import Exit

POLICY = """\
version: 1
profiles: {base: {read: ["$WS/**"]}}
tools:
  fs.read: {allow: {path: ["$WS/src/**"]}, id: read}
  fs.write: {ask: {path: ["$WS/src/**"]}, id: write}
"""
CASES = """\
- {name: "reads, <well> & 100%", call: {tool: fs.read, arguments: {path: src/a}}, expect: allow}
- {name: not above, call: {tool: fs.read, arguments: {path: a}}, expect: deny}
- {name: writes, call: {tool: fs.write, arguments: {path: src/a, content: x}}, expect: ask}
- {name: not there, call: {tool: fs.write, arguments: {path: a, content: x}}, expect: deny}
"""
# An escape sequence, and a mark that turns the reading direction.
HOSTILE = "\x1b]0;owned\x07\u202e"
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

    @property
    def xml(self) -> ElementTree.Element:
        return ElementTree.fromstring(self.out)  # noqa: S314 - we wrote it


@dataclass(frozen=True)
class Desk:
    """A folder with a policy, and the commands that look at it."""

    root: Path

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.write_text(text)
        return path

    def run(self, *arguments: str | Path, stdin: str = "") -> Done:
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        done = subprocess.run(
            [sys.executable, "-m", "safeconduct", *arguments],
            input=stdin.encode(),
            capture_output=True,
            cwd=self.root,
            env={
                **kept,
                "HOME": str(self.root.parent),
                "XDG_STATE_HOME": str(self.root.parent / "state"),
                "LANG": "C.UTF-8",
            },
            timeout=SECONDS,
            check=False,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    desk = Desk(Path(os.path.realpath(tmp_path)) / "project")
    desk.root.mkdir()
    desk.write("policy.yaml", POLICY)
    desk.write("policy.test.yaml", CASES)
    return desk


def test_a_policy_that_does_what_its_tests_say(desk: Desk) -> None:
    done = desk.run("policy", "test", "policy.yaml")
    assert (done.code, done.out) == (Exit.OK, "policy.test.yaml: 4 cases, no findings\n")
    suite = desk.run("policy", "test", "policy.yaml", "--format", "junit").xml
    assert suite.attrib == {"tests": "4", "failures": "0"}
    names = [case.get("name") for case in suite.iter("testcase")]
    assert names == ["reads, <well> & 100%", "not above", "writes", "not there"]


def test_failures_and_untried_grants_are_findings(desk: Desk) -> None:
    kept = CASES.replace("expect: allow", "expect: ask").rpartition("- {")[0]
    other = desk.write("other.yaml", kept)
    done = desk.run("policy", "test", "policy.yaml", "--tests", other)
    assert done.code == Exit.FINDINGS
    assert f"{other}:1:3: error test.failed: reads, <well> & 100%: expected ask, was" in done.out
    assert "policy.yaml:4:12: warning test.no_refusal" not in done.out
    assert "policy.yaml:5:13: warning test.no_refusal" in done.out
    assert "policy.yaml:4:12: warning test.no_grant" not in done.out
    annotated = desk.run("policy", "test", "policy.yaml", "--tests", other, "--format", "github")
    assert annotated.code == Exit.FINDINGS
    first, *_ = annotated.out.splitlines()
    assert first.startswith(f"::error file={other},line=1,col=3,title=test.failed::reads, <well> &")
    assert "100%25" in first
    suite = desk.run("policy", "test", "policy.yaml", "--tests", other, "--format", "junit").xml
    assert suite.attrib == {"tests": "4", "failures": "2"}
    failed = [
        case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None
    ]
    assert failed[0] == "reads, <well> & 100%"
    report = desk.run("policy", "test", "policy.yaml", "--tests", other, "--json").json
    assert [one["effect"] for one in report["cases"]] == ["allow", "deny", "ask"]
    assert [one["code"] for one in report["findings"]] == ["test.failed", "test.no_refusal"]


def test_without_tests_there_is_a_way_to_begin(desk: Desk) -> None:
    (desk.root / "policy.test.yaml").unlink()
    done = desk.run("policy", "test", "policy.yaml")
    assert (done.code, done.out) == (Exit.FAILURE, "")
    assert "test.unreadable" in done.err


def test_hostile_text_of_a_test_file_reaches_no_terminal(desk: Desk) -> None:
    name = HOSTILE.encode("unicode_escape").decode()
    text = f'- {{name: "{name}", call: {{tool: t}}, expect: allow}}'
    desk.write("policy.test.yaml", text)
    for form in ("text", "json", "github", "junit"):
        done = desk.run("policy", "test", "policy.yaml", "--format", form)
        assert done.code == Exit.FINDINGS
        assert "\x1b" not in done.out + done.err
        assert "\u202e" not in done.out + done.err


def test_a_name_stays_itself_in_xml(desk: Desk) -> None:
    name = "&#27;&lt; <a b='c'> \u00e9 ]]> \u4e2d"
    desk.write("policy.test.yaml", f'- {{name: "{name}", call: {{tool: t}}, expect: deny}}')
    suite = desk.run("policy", "test", "policy.yaml", "--format", "junit").xml
    assert next(suite.iter("testcase")).get("name") == name


def test_diff_shows_a_call(desk: Desk) -> None:
    wider = desk.write(
        "wider.yaml",
        POLICY.replace('read: {allow: {path: ["$WS/src/', 'read: {allow: {path: ["$WS/'),
    )
    done = desk.run("policy", "diff", "policy.yaml", wider)
    assert done.code == Exit.FINDINGS
    assert f"{wider}:4:12: diff.allows: read allows what was refused" in done.out
    shown = re.search(r'\n  fs\.read \{"path": "(\S+)"\}: deny → allow\n', done.out)
    assert shown
    assert shown[1].startswith(str(desk.root))
    assert "1 times surely, 0 perhaps" in done.out
    assert desk.run("policy", "diff", wider, "policy.yaml").code == Exit.OK
    same = desk.run("policy", "diff", "-", "policy.yaml", stdin=POLICY)
    assert (same.code, same.out) == (Exit.OK, "policy.yaml allows nothing that - refuses\n")
    found = desk.run("policy", "diff", "policy.yaml", wider, "--json").json
    assert (found["wider"], found["certain"]) == (True, True)
    (one,) = found["widenings"]
    assert one["example"] == {"tool": "fs.read", "arguments": {"path": shown[1]}}
    assert (one["old"], one["new"], one["line"]) == ("deny", "allow", 4)


def test_diff_knows_the_presets(desk: Desk) -> None:
    assert desk.run("policy", "diff", "preset:coding-agent", "preset:read-only").code == Exit.OK
    wider = desk.run("policy", "diff", "preset:read-only", "preset:coding-agent")
    assert wider.code == Exit.FINDINGS
    assert "diff.profile" in wider.out
    unknown = desk.run("policy", "diff", "preset:none", "policy.yaml")
    assert (unknown.code, "policy.not_found" in unknown.err) == (Exit.FAILURE, True)


def test_check_prints_for_ci(desk: Desk) -> None:
    text = POLICY + '  fs.list: [{allow: any, id: all}, {deny: {path: ["$WS/x"]}, id: no}]\n'
    text += "  shell.run: [{allow: {argv: [a]}, id: a}, {deny: {argv: [a]}}]\n"
    file = desk.write("doubtful.yaml", text)
    suite = desk.run("policy", "check", file, "--format", "junit")
    assert suite.code == Exit.FINDINGS
    # Warnings do not count, so they do not fail the report either.
    assert suite.xml.attrib == {"tests": "1", "failures": "1"}
    strict = desk.run("policy", "check", file, "--format", "junit", "--strict")
    assert int(strict.xml.attrib["failures"]) > 1
    clean = desk.run("policy", "check", "policy.yaml", "--format", "junit")
    assert (clean.code, clean.xml.attrib) == (Exit.OK, {"tests": "1", "failures": "0"})
    assert "::error file=" in desk.run("policy", "check", file, "--format", "github").out


def test_simulate_says_what_would_have_changed(desk: Desk) -> None:
    (desk.root / "src").mkdir()
    (desk.root / "src" / "a").write_text("x")
    trace = desk.root.parent / "trace"
    for _ in range(2):
        argument = json.dumps({"path": "src/a"})
        call = desk.run("call", "fs.read", argument, "-p", "policy.yaml", "--trace", trace)
        assert call.code == Exit.OK, call.err
    same = desk.run("policy", "simulate", trace, "--policy", "policy.yaml")
    assert (same.code, "2 calls: 2 judged alike (0 of them" in same.out) == (Exit.OK, True)
    strict = desk.write("strict.yaml", "version: 1\ntools: {fs.list: {allow: any}}\n")
    done = desk.run("policy", "simulate", trace, "--policy", strict)
    assert done.code == Exit.FINDINGS
    assert "allow → deny fs.read: Denied (policy.no_rule)" in done.out
    assert "  2 calls: #" in done.out
    assert "advice: under tools in" in done.out
    other = POLICY.replace("base:", "mine:").replace("id: read", "id: read, profile: mine")
    shifted = desk.run(
        "policy", "simulate", trace, "--policy", desk.write("o.yaml", other), "--json"
    )
    assert shifted.code == Exit.OK
    assert [(one["recorded"], one["new"]) for one in shifted.json["shifts"]] == [
        ("base", "mine"),
        ("base", "mine"),
    ]
    assert desk.run("policy", "simulate", desk.root, "-p", strict).code == Exit.TRACE_IO
