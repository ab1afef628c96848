"""Repository rules that no linter knows: sizes, banned spellings, large files, a changelog."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 500
BLOB_BYTES_MAX = 500_000
LAUNCHER_LINES_MAX = 2500
# How far above an `unsafe` block the note may begin that says why it is sound.
SAFETY_LINES_MAX = 6
CODE = (".py", ".rs")


def tracked() -> list[Path]:
    """Return the files that git knows, links left out."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: there is no list of files to look at")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_functions_are_at_most_seventy_lines() -> None:
    long: list[str] = []
    for path in tracked():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long.append(f"{path.name}:{node.name} {lines}")
    assert not long


def test_a_long_file_says_why_at_its_top() -> None:
    for path in tracked():
        if path.suffix in CODE and path.read_text().count("\n") > FILE_LINES_MAX:
            top = path.read_text()[:1000]
            said = re.search(r"\bone file\b.*\bbecause\b", top, re.IGNORECASE | re.DOTALL)
            assert said, path.name


def test_the_launcher_is_small_and_unsafe_in_one_place() -> None:
    """Lines that are neither blank nor comment, without its tests."""
    count = 0
    for path in sorted((ROOT / "native/launcher/src").glob("*.rs")):
        lines = [line.strip() for line in path.read_text().splitlines()]
        code = [line for line in lines if line and not line.startswith("//")]
        count += len(code) if path.name != "fuzz.rs" else 0
        if path.name != "sys.rs":
            assert not [line for line in code if re.search(r"\bunsafe\b", line)], path.name
            continue
        for number, line in enumerate(lines):
            if re.search(r"\bunsafe\b", line) and not line.startswith("//"):
                above = lines[max(0, number - SAFETY_LINES_MAX) : number]
                assert any(note.startswith("// SAFETY:") for note in above), f"{path}:{number + 1}"
    assert count <= LAUNCHER_LINES_MAX, count


def test_no_large_blobs() -> None:
    assert [path.name for path in tracked() if path.stat().st_size > BLOB_BYTES_MAX] == []


def test_nothing_is_left_for_later_without_a_number() -> None:
    word = re.compile("TO" + r"DO(?! #\d)|FIX" + "ME|Not" + "ImplementedError|to" + r"do!\(")
    found = [
        path.name for path in tracked() if path.suffix in CODE and word.search(path.read_text())
    ]
    assert found == []


def test_no_regular_expression_is_possessive() -> None:
    """They match wrongly before Python 3.11.5: https://github.com/python/cpython/issues/106052."""
    possessive = re.compile(r"[])}][*+?]\+")
    code = [path for path in tracked() if path.suffix == ".py"]
    assert [path.name for path in code if possessive.search(path.read_text())] == []


def test_the_changelog_names_this_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()
