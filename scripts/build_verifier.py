"""Build the wheel `safeconduct-verify`: the verifier alone, in pure Python, for any POSIX system.

    python scripts/build_verifier.py OUT

It holds `attestation/verify/main.py` and whatever that imports, found by reading the imports, as
the package `safeconduct_verify`: beside an installed `safeconduct` neither touches the other.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src/safeconduct"
MAIN = "attestation.verify.main"
PACKAGE = "safeconduct_verify"
# These may not be reached: the wheel must stay what a stranger can read in an evening.
BANNED = (
    "runtime",
    "policies",
    "attestation.writing",
    "attestation.signing",
    "attestation.privacy.vault",
)
# Imported by name when it is needed, which no reading of imports finds.
ALSO = ("attestation.verify.worker",)

PYPROJECT = """\
[build-system]
requires = ["setuptools>=80"]
build-backend = "setuptools.build_meta"

[project]
name = "safeconduct-verify"
version = "{version}"
description = "Verify traces of Safeconduct, offline, with nothing else installed."
readme = "README.md"
requires-python = ">=3.11"
license = "Apache-2.0"
license-files = ["LICENSE"]
classifiers = ["Operating System :: POSIX", "Programming Language :: Python :: 3 :: Only"]
dependencies = {dependencies}

[project.scripts]
safeconduct-verify = "{package}.attestation.verify.main:main"

[tool.setuptools.packages.find]
include = ["{package}*"]
"""
README = """\
# safeconduct-verify

Checks a trace of Safeconduct (a folder with a file `checkpoint` in it), or a proof made from one:

    safeconduct-verify --key 'NAME+HASH+BASE64' TRACE-FOLDER

It works offline, says what it checked and what not, and what to do next. The key line must come
from the log's operator, by another way than the trace itself.
"""


def reached(module: str) -> list[str]:
    """Return the modules of the package that a module imports, itself and theirs included."""
    found: list[str] = []
    waiting = [module, *ALSO]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if name.startswith(BANNED):
            raise SystemExit(f"the verifier must not import {name}")
        found.append(name)
        waiting += imports(name)
    return sorted(found)


def imports(module: str) -> Iterator[str]:
    """Yield what a module imports of the package. What only type checkers read does not count."""
    package = module.rpartition(".")[0]
    tree = ast.parse(path_of(module).read_text())
    for node in walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level == 1:
            home = f"{package}.{node.module}".strip(".") if node.module else package
        elif node.level == 0 and (node.module or "").startswith("safeconduct"):
            home = (node.module or "").removeprefix("safeconduct").removeprefix(".")
        else:
            continue
        for alias in node.names:
            inside = f"{home}.{alias.name}".removeprefix(".")
            yield inside if path_of(inside).exists() else home


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, leaving out what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from walk(child)


def path_of(module: str) -> Path:
    """Return the file of a module of the package."""
    return SOURCE / f"{module.replace('.', '/')}.py"


def lay_out(folder: Path) -> None:
    """Write the wheel's own source tree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [one for one in project["dependencies"] if one.startswith(("cryptography", "msgspec"))]
    text = PYPROJECT.format(version=project["version"], dependencies=wanted, package=PACKAGE)
    (folder / "pyproject.toml").write_text(text)
    (folder / "README.md").write_text(README)
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    for module in reached(MAIN):
        target = folder / PACKAGE / f"{module.replace('.', '/')}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        source = path_of(module).read_text()
        target.write_text(re.sub(r"\b(from|import) safeconduct\b", rf"\1 {PACKAGE}", source))
    for part in {file.parent for file in (folder / PACKAGE).rglob("*.py")} | {folder / PACKAGE}:
        (part / "__init__.py").write_text(
            '"""Part of the verifier of Safeconduct traces, `safeconduct-verify`."""\n'
        )


def build(out: Path) -> Path:
    """Build the wheel into a folder and return its path."""
    with tempfile.TemporaryDirectory() as scratch:
        lay_out(Path(scratch))
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, scratch],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return max(out.glob("safeconduct_verify-*.whl"), key=lambda path: path.stat().st_mtime)


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if len(sys.argv) > 1 else "dist").resolve()))
