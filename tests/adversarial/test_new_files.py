"""Attack the files that verbs write, from a program that may write to the same folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from safeconduct.runtime.cli.files import new_file
from safeconduct.runtime.cli.source import UsageError

OURS = b"what was to be written\n"


def part_of(folder: Path) -> Path:
    """Return the name that a file has before it is whole."""
    (found,) = folder.glob(".*.part")
    return found


def test_a_whole_file_gets_its_name(tmp_path: Path) -> None:
    with new_file(tmp_path / "out") as file:
        file.write(OURS)
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out").read_bytes() == OURS
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").stat().st_nlink == 1


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_name_that_was_taken_over_gives_its_name_to_nothing(tmp_path: Path, kind: str) -> None:
    folder, secret = tmp_path / "shared", tmp_path / "secret"
    folder.mkdir()
    secret.write_bytes(b"theirs\n")
    with new_file(folder / "out") as file:
        file.write(OURS)
        part_of(folder).rename(folder / "kept")
        if kind == "file":
            os.link(secret, folder / f".out.{os.getpid()}.part")
        else:
            (folder / f".out.{os.getpid()}.part").symlink_to(secret)
    assert not (folder / "out").is_symlink()
    assert (folder / "out").read_bytes() == OURS
    assert secret.read_bytes() == b"theirs\n"


def write(folder: Path, meanwhile: Callable[[], object]) -> None:
    """Write a file, and let somebody else do something before it is whole."""
    with new_file(folder / "out") as file:
        file.write(OURS)
        meanwhile()


@pytest.mark.parametrize("kind", ["gone", "folder"])
def test_a_part_that_is_gone_is_a_usage_error(tmp_path: Path, kind: str) -> None:
    def take() -> None:
        part = part_of(tmp_path)
        part.unlink()
        if kind == "folder":
            part.mkdir()

    with pytest.raises(UsageError):
        write(tmp_path, take)
    assert not (tmp_path / "out").exists()


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write(tmp_path, lambda: (tmp_path / "out").write_bytes(b"theirs\n"))
    assert (tmp_path / "out").read_bytes() == b"theirs\n"
    assert os.listdir(tmp_path) == ["out"]


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, lambda: 1 // 0)
    assert os.listdir(tmp_path) == []
