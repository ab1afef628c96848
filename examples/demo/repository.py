"""The small real repository that the demo's agent works on, made anew for each run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import wasmtime

BUG = "sum(prices) * percent_off // 100"
FIX = "sum(prices) * (100 - percent_off) // 100"
_FILES = {
    "README.md": "# Basket\n\nAdds up prices.\n",
    ".gitignore": "tools/*.wasm\n",
    "src/__init__.py": "",
    "src/basket.py": f'''"""Prices of a basket, in cents."""


def total(prices: list[int], percent_off: int = 0) -> int:
    """Return the sum of the prices, less the discount."""
    return {BUG}
''',
    "tests/__init__.py": "",
    "tests/test_basket.py": '''"""The tests of the basket."""

import unittest

from src.basket import total


class TotalTest(unittest.TestCase):
    def test_no_discount(self) -> None:
        self.assertEqual(total([250, 750]), 1000)

    def test_discount(self) -> None:
        self.assertEqual(total([250, 750], percent_off=10), 900)
''',
}
_GIT_SECONDS = 20
_TOOL_TEXT = Path(__file__).with_name("tool.wat")


def create(folder: Path, home: Path) -> None:
    """Write the repository, its Wasm tool, and a first commit where git is installed."""
    for name, text in _FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    tools = folder / "tools"
    tools.mkdir()
    (tools / "tool.wasm").write_bytes(wasmtime.wat2wasm(_TOOL_TEXT.read_text()))
    git = shutil.which("git")
    if git is not None:
        _commit(git, folder, home)


def _commit(git: str, folder: Path, home: Path) -> None:
    # Nobody's own git configuration takes part: it could sign, or run hooks.
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(home),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    who = ["-c", "user.name=demo", "-c", "user.email=demo@localhost"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "A basket"]):
        subprocess.run(
            [git, *arguments], cwd=folder, env=environment, check=True, timeout=_GIT_SECONDS
        )
