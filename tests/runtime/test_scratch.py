"""Removal of private folders that a program filled to resist it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from safeconduct.errors import SandboxFailed
from safeconduct.runtime.sandbox import scratch
from safeconduct.runtime.sandbox.scratch import Scratches, remove_tree


def test_a_tree_is_removed_and_no_link_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "link").symlink_to(kept)
    (tree / "a" / "link").symlink_to(kept / "file")
    os.mkfifo(tree / "a" / "pipe")
    (tree / "a" / "b").chmod(0)
    (tree / "a").chmod(0)
    tree.chmod(0)
    remove_tree(str(tree))
    assert not tree.exists()
    assert (kept / "file").read_text() == "mine"


def test_a_tree_deeper_than_any_path_is_removed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    code = "import os\nfor _ in range(2000): os.mkdir('d' * 200); os.chdir('d' * 200)"
    subprocess.run(["python3", "-c", code], cwd=tree, check=True)
    remove_tree(str(tree))
    assert not tree.exists()


def test_a_missing_tree_is_fine_and_a_link_is_not_taken_for_one(tmp_path: Path) -> None:
    remove_tree(str(tmp_path / "missing"))
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OSError, match="Not a directory"):
        remove_tree(str(tmp_path / "link"))


def test_what_could_not_be_removed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratches = Scratches()
    for name in ("first", "second"):
        os.mkdir(f"{scratches.base}/{name}")
    real = scratch.remove_tree

    def fail(path: str) -> None:
        raise OSError(24, "Too many open files", path)

    monkeypatch.setattr(scratch, "remove_tree", fail)
    with pytest.raises(SandboxFailed):
        scratches.remove("first")
    monkeypatch.setattr(scratch, "remove_tree", real)
    scratches.remove("second")
    assert os.listdir(scratches.base) == []
    scratches.close()
    assert os.listdir(tmp_path) == []
