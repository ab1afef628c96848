"""Documents: every policy in them loads, the README's program runs, every link leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from safeconduct.policies import load_policy

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(document: Path, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


POLICIES = [
    pytest.param(text, id=f"{document.name}-{number}")
    for document in DOCUMENTS
    for number, text in enumerate(blocks(document, "yaml"))
]


def test_there_are_policies_to_look_at() -> None:
    assert len(POLICIES) >= 2


@pytest.mark.parametrize("text", POLICIES)
def test_every_policy_in_the_documents_loads(text: str, tmp_path: Path) -> None:
    file = tmp_path / "document.yaml"
    file.write_text(text)
    policy = load_policy(file, workspace=tmp_path)
    assert policy.version.startswith("sha256:")


def test_the_readme_program_runs(tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    (program,) = blocks(readme, "python")
    (tmp_path / "policy.yaml").write_text(blocks(readme, "yaml")[0])
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("hello from the project")
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "hello from the project" in done.stdout
    assert "policy.no_rule" in done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_file_that_is_named_exists(document: Path) -> None:
    for target in re.findall(r"`(tests/[\w/]+\.py)`", document.read_text()):
        assert (ROOT / target).exists(), target
