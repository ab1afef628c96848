"""The ``fs.*`` tools: they work on the object that was judged, whatever its name is by now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from safeconduct.call import Document, Json, Limits, Profile
from safeconduct.errors import LimitExceeded, ToolFailed
from safeconduct.runtime.tools import files
from safeconduct.runtime.tools.task import Task


@dataclass
class Judged:
    """A path argument after judgement: the object, or the folder to make it in."""

    path: str
    fd: int | None = None
    parent_fd: int | None = None
    name: str | None = None

    def close(self) -> None:
        for fd in (self.fd, self.parent_fd):
            if fd is not None:
                os.close(fd)


@pytest.fixture
def judge() -> Iterator[Callable[[Path], Judged]]:
    made: list[Judged] = []

    def resolve(path: Path) -> Judged:
        item = Judged(str(path))
        if os.path.lexists(path):
            item.fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        else:
            item.parent_fd = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
            item.name = path.name
        made.append(item)
        return item

    yield resolve
    for item in made:
        item.close()


def task(item: Judged, limits: Limits | None = None, **arguments: Json) -> Task:
    profile = Profile(name="p", limits=limits or Limits())
    document = Document(tool="fs", arguments=arguments, workspace="/")
    return Task(call="c", document=document, profile=profile, objects={"path": item})


def test_read_is_bounded_and_says_so(judge: Callable[[Path], Judged], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a" * 100)
    outcome = files.read(task(judge(tmp_path / "file"), Limits(output_bytes=10)))
    assert (outcome.stdout, outcome.truncated) == (b"a" * 10, True)
    (tmp_path / "file").write_bytes(b"\xff")
    assert files.read(task(judge(tmp_path / "file"))).value is None


def test_a_swapped_name_changes_nothing(judge: Callable[[Path], Judged], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("judged")
    (tmp_path / "secret").write_text("secret")
    item = judge(tmp_path / "file")
    (tmp_path / "file").rename(tmp_path / "away")
    (tmp_path / "file").symlink_to(tmp_path / "secret")
    assert files.read(task(item)).value == "judged"
    files.write(task(item, content="new"))
    assert (tmp_path / "secret").read_text() == "secret"
    assert (tmp_path / "away").read_text() == "new"


def test_what_is_no_file_is_not_opened(judge: Callable[[Path], Judged], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("pipe", "link", "."):
        for tool in (files.read, files.write):
            with pytest.raises(ToolFailed):
                tool(task(judge(tmp_path / name), content="x"))


def test_a_file_with_two_names_is_not_written(
    judge: Callable[[Path], Judged], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    os.link(tmp_path / "file", tmp_path / "second")
    with pytest.raises(ToolFailed) as caught:
        files.write(task(judge(tmp_path / "file"), content="x"))
    assert caught.value.code == "tool.hard_link"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_new_file_is_made_only_where_nothing_came_between(
    judge: Callable[[Path], Judged], tmp_path: Path
) -> None:
    assert files.write(task(judge(tmp_path / "new"), content="é")).value == 2
    item = judge(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "planted")
    with pytest.raises(ToolFailed):
        files.write(task(item, content="x"))
    assert not (tmp_path / "planted").exists()


def test_more_than_the_disk_limit_is_not_written(
    judge: Callable[[Path], Judged], tmp_path: Path
) -> None:
    with pytest.raises(LimitExceeded):
        files.write(task(judge(tmp_path / "new"), Limits(disk_bytes=3), content="four"))
    assert not (tmp_path / "new").exists()


def test_a_listing_is_bounded_and_printable(
    judge: Callable[[Path], Judged], tmp_path: Path
) -> None:
    for name in (b"plain", b"new\nline", b"\xff", b"\x1b[2J"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).touch()
    (tmp_path / "folder").mkdir()
    outcome = files.list_folder(task(judge(tmp_path)))
    assert (outcome.value, outcome.truncated) == (["folder/", "plain"], True)
    with pytest.raises(ToolFailed):
        files.list_folder(task(judge(tmp_path / "plain")))


@pytest.mark.parametrize(
    ("names", "hidden", "shown", "cut"),
    [
        (["a", "b", "c"], "", 3, False),
        (["a", "b", "c", "d"], "", 3, True),
        (["a", "b", ".x"], ".", 2, False),
        ([".x", ".y", ".z", ".w", "a", "b"], ".", None, True),
        (["a", "\x1b"], "\x1b", 1, False),
        (["a", "\x1b"], "", 1, True),
    ],
)
def test_a_listing_says_when_it_leaves_something_out(
    judge: Callable[[Path], Judged], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    names: list[str], hidden: str, shown: int | None, cut: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(files, "_ENTRIES_MAX", 3)
    for name in names:
        (tmp_path / name).touch()
    looked: list[str] = []

    def hides(path: str) -> bool:
        looked.append(path)
        return bool(hidden) and os.path.basename(path).startswith(hidden)

    outcome = files.list_folder(replace(task(judge(tmp_path)), hides=hides))
    assert outcome.truncated is cut
    assert isinstance(outcome.value, list)
    assert shown is None or len(outcome.value) == shown
    assert len(looked) <= 3
