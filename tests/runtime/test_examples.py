"""The policies of examples/ and the presets at work: what their READMEs say of profiles holds.

`tests/policies/test_presets.py` looks at their decisions; a profile is only seen by what it does.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from safeconduct import Runtime
from safeconduct.errors import ApprovalRequired, Denied, SandboxUnavailable, ToolFailed

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "policies"
# Programs come from /usr; an interpreter elsewhere would have to be granted.
PYTHON = "/usr/bin/python3"
GIT = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org"]


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}


@pytest.fixture
def repository(workspace: Path) -> Path:
    """Make a repository with an environment of its own, as the README says."""
    if not os.path.exists(PYTHON):
        pytest.skip(f"needs {PYTHON}")
    for command in (
        [PYTHON, "-m", "venv", "--without-pip", ".venv"],
        [*GIT, "init", "-q"],
        ["mkdir", "src", "tests"],
        ["touch", "src/app.py", "README.md"],
        [*GIT, "config", "user.name", "A"],
        [*GIT, "config", "user.email", "a@example.org"],
        [*GIT, "add", "src"],
        [*GIT, "commit", "-qm", "first"],
        # Whoever runs this, the user of the sandbox may write wherever its profile lets it.
        ["chmod", "-R", "a+rwX", "."],
    ):
        subprocess.run(command, cwd=workspace, check=True, capture_output=True)
    return workspace


@pytest.fixture
def coding(repository: Path, home: dict[str, str]) -> Iterator[Runtime]:
    policy = EXAMPLES / "python-repository" / "policy.yaml"
    with Runtime.from_policy(policy, workspace=repository, environment=home) as runtime:
        yield runtime


@pytest.mark.parametrize("name", [".git/x", ".venv/x", "README.md", "pyproject.toml"])
def test_what_the_agent_runs_writes_source_and_nothing_else(
    coding: Runtime, repository: Path, name: str
) -> None:
    write = "import sys; open(sys.argv[1], 'a').write('planted')"
    argv = [".venv/bin/python", "-c", write]
    assert coding.call("shell.run", argv=[*argv, "src/x"]).ok
    assert (repository / "src/x").read_text() == "planted"
    refused = coding.call("shell.run", argv=[*argv, name])
    assert (refused.ok, b"Read-only file system" in refused.stderr) == (False, True)
    # The attack is one: without the sandbox it works.
    subprocess.run([PYTHON, "-c", write, name], cwd=repository, check=True)
    assert (repository / name).read_text() == "planted"


def test_a_commit_is_made_and_rewinding_waits_for_a_person(
    coding: Runtime, repository: Path
) -> None:
    coding.call("fs.write", path="src/app.py", content="print(1)\n")
    for argv in (["git", "add", "src"], ["git", "commit", "-qm", "second"]):
        done = coding.call("shell.run", argv=argv)
        assert done.ok, done.stderr
    listed = coding.call("shell.run", argv=["git", "log", "--format=%s"])
    assert listed.stdout == b"second\nfirst\n"
    with pytest.raises(ApprovalRequired):
        coding.call("shell.run", argv=["git", "restore", "src/app.py"])
    with pytest.raises(Denied):
        coding.call("shell.run", argv=["git", "push"])
    # git, told to write somewhere else: the profile that looks has nothing to write.
    coding.call("shell.run", argv=["git", "log", "--output=src/planted"])
    assert not (repository / "src" / "planted").exists()


def test_generated_python_sees_no_file(workspace: Path, home: dict[str, str]) -> None:
    (workspace / "plan").write_text("secret")
    policy = EXAMPLES / "wasm-python" / "policy.yaml"
    with Runtime.from_policy(policy, workspace=workspace, environment=home) as runtime:
        assert runtime.call("python.run", code="sum(input)", input=[1, 2]).value == {"result": 3}
        with pytest.raises(ToolFailed, match="FileNotFoundError"):
            runtime.call("python.run", code=f"open({str(workspace / 'plan')!r}).read()")


def test_python_in_a_wasm_profile_is_refused_and_does_not_fall_back(
    workspace: Path, tmp_path: Path, home: dict[str, str]
) -> None:
    text = (EXAMPLES / "wasm-python" / "policy.yaml").read_text()
    assert text.count("profile: python") == 1
    policy = tmp_path / "policy.yaml"
    policy.write_text(text.replace("profile: python", "profile: wasm"))
    with (
        Runtime.from_policy(policy, workspace=workspace, environment=home) as runtime,
        pytest.raises(SandboxUnavailable, match="needs a native profile"),
    ):
        runtime.call("python.run", code="1")


def test_analysis_reads_data_and_writes_results(workspace: Path, home: dict[str, str]) -> None:
    for name in ("data", "out"):
        (workspace / name).mkdir()
        (workspace / name).chmod(0o777)
    (workspace / "data" / "a.csv").write_text("a,b\n1,2\n")
    policy = ROOT / "policies" / "presets" / "data-analysis.yaml"
    data, result = workspace / "data" / "a.csv", workspace / "out" / "r.json"
    with Runtime.from_policy(policy, workspace=workspace, environment=home) as runtime:
        code = f"rows = list(csv.DictReader(open({str(data)!r})))\n"
        code = f"import csv, json\n{code}json.dump(rows, open({str(result)!r}, 'w'))\nresult = rows"
        rows = [{"a": "1", "b": "2"}]
        assert runtime.call("python.run", code=code).value == {"result": rows}
        assert runtime.call("fs.read", path="out/r.json").value == '[{"a": "1", "b": "2"}]'
        with pytest.raises(ToolFailed, match="Read-only file system"):
            runtime.call("python.run", code=f"open({str(data)!r}, 'w')")
    assert data.read_text() == "a,b\n1,2\n"
