"""Benchmarks: each asks a question, and a run gives the figures it promises. No time is judged."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "benchmarks").glob("bench_*.py"))
FIGURES = {
    "bench_start": {"warm_ratio", "late_bound_ratio", "cold_ratio", "vs_bwrap"},
    "bench_call": {"call_ratio", "fs_read_us"},
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_first_line_is_a_question_and_the_document_lists_it(file: Path) -> None:
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    assert docstring.splitlines()[0].endswith("?")
    assert f"`python -m benchmarks.{file.stem}`" in (ROOT / "docs/benchmarks.md").read_text()


@pytest.mark.parametrize("name", FIGURES)
def test_the_last_line_is_the_figures_as_json(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", "--alone"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() >= FIGURES[name] | {"details", "machine"}
    assert found["machine"].keys() >= {"root", "tier", "kernel", "load", "shield"}
