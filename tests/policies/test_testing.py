"""`policy.test.yaml`: what it says, what it demands, and that it means the same everywhere."""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path

import pytest

from safeconduct.call import Effect
from safeconduct.errors import PolicyError
from safeconduct.policies import read_policy_file
from safeconduct.policies.checks.cases import MORNING_MS, Link, beside, parse_cases, read_cases
from safeconduct.policies.checks.testing import Report, require_passing, run_cases

POLICY = """\
version: 1
profiles: {base: {read: ["$WS/**"], hide: ["**/.env"]}}
tools:
  fs.read: {allow: {path: ["$WS/**"]}, id: read}
  fs.write: {ask: {path: ["$WS/src/**"]}, id: write}
  shell.run:
    - {allow: {argv: [git, {in: [log, diff]}, ...]}, id: look}
    - {deny: {argv: [git, push, ...]}, id: no-push}
roles:
  night:
    fs.list: {allow: {path: ["$WS/**"]}, when: "time.hour < 6 and session.calls < 3", id: list}
"""
CASES = """\
- {name: reads, call: {tool: fs.read, arguments: {path: src/a.py}}, expect: allow, rule: read}
- {name: secret, call: {tool: fs.read, arguments: {path: .env}}, expect: deny, code: path.hidden}
- {name: asks, call: {tool: fs.write, arguments: {path: $WS/src/b, content: "1"}}, expect: ask}
- {name: above, call: {tool: fs.write, arguments: {path: $WS/b, content: x}}, expect: deny}
- {name: log, call: {tool: shell.run, arguments: {argv: [git, log]}}, expect: allow, rule: look}
- {name: push, call: {tool: shell.run, arguments: {argv: [git, push]}}, expect: deny, rule: no-push}
- name: at night
  role: night
  call: {tool: fs.list, arguments: {path: src}}
  facts: {time: "2026-01-05T03:00:00Z", calls: 2}
  expect: allow
- {name: by day, role: night, call: {tool: fs.list, arguments: {path: src}}, expect: deny}
"""


def report(tmp_path: Path, cases: str, policy: str = POLICY) -> Report:
    file = tmp_path / "policy.yaml"
    file.write_text(policy)
    return run_cases(read_policy_file(file), parse_cases(cases.encode(), name="t.yaml"))


def wrong(found: Report) -> dict[str, str]:
    return {one.case.name: one.wrong for one in found.failures}


def test_all_is_as_expected_and_nothing_is_left_untried(tmp_path: Path) -> None:
    found = report(tmp_path, CASES)
    assert wrong(found) == {}
    assert found.findings == ()


def test_what_is_not_as_expected_is_said(tmp_path: Path) -> None:
    cases = """\
- {name: effect, call: {tool: fs.read, arguments: {path: a}}, expect: deny}
- {name: rule, call: {tool: fs.read, arguments: {path: a}}, expect: allow, rule: look}
- {name: code, call: {tool: fs.read, arguments: {path: .env}}, expect: deny, code: policy.deny}
- {name: role, role: day, call: {tool: fs.read, arguments: {path: a}}, expect: allow}
"""
    found = report(tmp_path, cases)
    said = wrong(found)
    assert said["effect"].startswith("expected deny, was allow (policy.allow)")
    assert said["rule"] == "expected rule look to decide, but read did (policy.allow)"
    assert said["code"].startswith("expected the code policy.deny, was path.hidden")
    assert "policy.unknown_role" in said["role"]
    failed = [one for one in found.findings if one.code == "test.failed"]
    assert [(one.file, one.line) for one in failed] == [("t.yaml", line) for line in (1, 2, 3, 4)]


def test_a_grant_needs_a_case_for_it_and_one_against_it(tmp_path: Path) -> None:
    kept = "".join(f"{line}\n" for line in CASES.splitlines()[:3])
    found = {(one.code, one.message) for one in report(tmp_path, kept).uncovered}
    assert found == {
        ("test.no_refusal", "no test sees a call refused that write does not grant"),
        ("test.no_grant", "no test sees look grant a call"),
        ("test.no_refusal", "no test sees a call refused that look does not grant"),
        ("test.no_grant", "no test sees list grant a call"),
        ("test.no_refusal", "no test sees a call refused that list does not grant"),
    }


def test_a_refused_call_of_another_program_says_nothing(tmp_path: Path) -> None:
    cases = CASES.replace("[git, push]", "[rm, x]").replace(", rule: no-push", "")
    (finding,) = report(tmp_path, cases).findings
    assert finding.code == "test.no_refusal"
    assert "look" in finding.message


FILES = """\
files: [src/a.py, docs/, {link: out, to: /etc}, {link: in, to: $WS/src}]
tests:
- {name: in, call: {tool: fs.read, arguments: {path: in/a.py}}, expect: deny, code: path.escape}
- {name: out, call: {tool: fs.read, arguments: {path: out/x}}, expect: deny, code: path.escape}
- {name: none, call: {tool: fs.read, arguments: {path: b}}, expect: deny, code: path.not_found}
- {name: folder, call: {tool: fs.read, arguments: {path: docs}}, expect: deny, code: path.not_file}
- {name: file, call: {tool: fs.read, arguments: {path: src/a.py}}, expect: allow}
"""


def test_the_workspace_holds_what_the_file_says(tmp_path: Path) -> None:
    # An absolute link is refused also where it leads back inside: openat2(2), RESOLVE_BENEATH.
    assert wrong(report(tmp_path, FILES)) == {}
    assert wrong(report(tmp_path, FILES)) == {}


def test_it_is_the_same_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = report(tmp_path, CASES + "- {name: x, call: {tool: fs.read}, expect: allow}")
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
    monkeypatch.chdir(tmp_path)
    second = report(tmp_path, CASES + "- {name: x, call: {tool: fs.read}, expect: allow}")
    assert first.to_json() == second.to_json()
    assert str(tmp_path) not in str(first.findings[0].message)


def test_arguments_are_read_as_json_would_be() -> None:
    text = "- {name: a, call: {tool: t, arguments: {a: 3, b: '3', c: true, d: null, e: -0.5,"
    text += " f: no, g: [1, {x: 1e5}]}}, expect: deny}"
    (case,) = parse_cases(text.encode(), name="t").cases
    assert case.arguments == {
        "a": 3,
        "b": "3",
        "c": True,
        "d": None,
        "e": -0.5,
        "f": "no",
        "g": [1, {"x": "1e5"}],
    }
    assert case.expect is Effect.DENY
    assert case.facts.now_ms == MORNING_MS


CALL = "call: {tool: t}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "'tests' is missing"),
        ("{tests: [], more: x}", "unknown key 'more'"),
        ("- x", "expected a map"),
        (f"- {{{CALL}, expect: allow}}", "'name' is missing"),
        (f"- {{name: a, {CALL}, expect: yes}}", "'yes' is no effect"),
        (f"- {{name: a, {CALL}, expect: deny, expected: deny}}", "unknown key 'expected'"),
        ("- {name: a, call: {tool: t, arguments: [x]}, expect: deny}", "the arguments are a map"),
        (f"[{{name: a, {CALL}, expect: deny}}, {{name: a, {CALL}, expect: deny}}]", "two cases"),
        (f"- {{name: a, {CALL}, expect: deny, facts: {{calls: x}}}}", "these facts are none"),
        (f"- {{name: a, {CALL}, expect: deny, facts: {{time: noon}}}}", "these facts are none"),
        ("{files: [../x], tests: []}", "not a name in the workspace"),
        ("{files: [/etc/x], tests: []}", "not a name in the workspace"),
        ("{files: [{link: a/../b, to: c}], tests: []}", "not a name in the workspace"),
        ("{files: [{link: a}], tests: []}", "'to' is missing"),
        ("&a [x]", "anchors are not allowed"),
    ],
)
def test_a_wrong_test_file_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_cases(text.encode(), name="t.yaml")
    assert said in caught.value.message
    assert (caught.value.file, caught.value.line) == ("t.yaml", 1)
    assert caught.value.hint


def test_no_link_is_made_through_another(tmp_path: Path) -> None:
    """A project's tests run whenever its policy is loaded anew, and would plant links anywhere."""
    (tmp_path / "victim").mkdir()
    text = f"{{files: [{{link: d, to: {tmp_path}/victim}}, {{link: d/x, to: /etc}}], tests: []}}"
    with pytest.raises(PolicyError, match="below another one") as error:
        report(tmp_path, text)
    assert error.value.code == "test.files"
    assert not [*(tmp_path / "victim").iterdir()]


@pytest.mark.parametrize("depth", [65, 500, 2000])
def test_a_name_that_is_too_deep_is_refused(tmp_path: Path, depth: int) -> None:
    deep = "a/" * depth + "b"
    for text in (
        f"{{files: [{deep}], tests: []}}",
        f"{{files: [{{link: {deep}, to: b}}], tests: []}}",
        f"- {{name: n, call: {{tool: fs.read, arguments: {{path: {deep}}}}}, expect: deny}}",
    ):
        with pytest.raises(PolicyError, match="more than 64 folders") as error:
            report(tmp_path, text)
        assert error.value.code == "test.files"


def test_many_files_take_no_time_that_grows_with_their_square(tmp_path: Path) -> None:
    names = ", ".join(f"f{number}/a" for number in range(4000))
    began = time.process_time()
    report(tmp_path, f"{{files: [{names}], tests: []}}")
    # Comparing each with each took over a minute.
    assert time.process_time() - began < 15


def test_links_are_made_last() -> None:
    cases = parse_cases(b"{files: [{link: d, to: /etc}, d/x], tests: []}", name="t")
    assert cases.files == (Link(name="d", target="/etc"), "d/x")
    with pytest.raises(PolicyError) as caught:
        report(Path(os.devnull).parent / "shm", "{files: [{link: d, to: /etc}, d/x], tests: []}")
    assert caught.value.code == "test.files"


def test_a_policy_of_one_workspace_is_tested_there(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a").touch()
    policy = f"workspace: {os.path.realpath(tmp_path)}/own\n{POLICY}"
    cases = "- {name: a, call: {tool: fs.read, arguments: {path: $WS/a}}, expect: allow}\n"
    cases += "- {name: b, call: {tool: fs.read, arguments: {path: b}}, expect: allow}\n"
    assert "path.not_found" in wrong(report(tmp_path, cases, policy))["b"]
    with pytest.raises(PolicyError) as caught:
        report(tmp_path, FILES, policy)
    assert caught.value.code == "policy.workspace"


def test_beside_and_require_passing(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    file = read_policy_file(path)
    require_passing(file)
    tests = beside(path)
    assert tests == tmp_path / "policy.test.yaml"
    # What is only untried keeps no policy from coming into force.
    tests.write_text(CASES.splitlines()[0])
    require_passing(file)
    tests.write_text(CASES.replace("expect: ask", "expect: allow"))
    with pytest.raises(PolicyError) as caught:
        require_passing(file)
    assert caught.value.code == "policy.tests"
    assert (caught.value.file, caught.value.line) == (str(tests), 3)


def test_a_test_file_is_a_plain_file(tmp_path: Path) -> None:
    fifo = tmp_path / "policy.test.yaml"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, tmp_path / "missing"):
        with pytest.raises(PolicyError) as caught:
            read_cases(path)
        assert caught.value.code == "test.unreadable"


def test_the_example_of_the_document(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "policy-tools.md").read_text()
    (policy,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (cases,) = re.findall(r"^```yaml test\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert report(tmp_path, cases, policy).findings == ()
