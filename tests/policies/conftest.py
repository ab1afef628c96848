"""A workspace on disk and a judge over it: what every policy test needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from safeconduct.call import Call, Decision, Json
from safeconduct.policies import canonicalize, decide, parse_policy

Judge = Callable[..., Decision]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = Path(os.path.realpath(tmp_path)) / "work"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "main.py").write_text("print('hello')\n")
    (folder / ".git" / "hooks").mkdir(parents=True)
    return folder


@pytest.fixture
def judge(workspace: Path) -> Judge:
    """Judge ``tool`` with keyword arguments under the text of a ``tools:`` block."""

    def run(tools: str, tool: str, /, **arguments: Json) -> Decision:
        text = f"version: 1\ntools:\n{tools}"
        policy = parse_policy(text.encode(), name="policy.yaml", workspace=workspace)
        call = Call(id="1", tool=tool, arguments=arguments, session="s")
        with canonicalize(policy, call) as canonical:
            return decide(policy, canonical.document)

    return run
