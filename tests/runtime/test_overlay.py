"""Overlays of a workspace: what a diff says, what a commit does, and what is a conflict."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.overlay_kit import AFTER, FILES, MODES, ROOT, SCRIPT, Overlay, mounted, tree

from safeconduct.errors import LimitExceeded, SandboxFailed
from safeconduct.runtime.sandbox.overlay import (
    Bounds,
    Change,
    Conflict,
    Kind,
    Node,
    Snapshot,
    unified,
)


@pytest.fixture(params=MODES)
def overlay(request: pytest.FixtureRequest) -> Iterator[Overlay]:
    with mounted(str(request.param), FILES) as one:
        yield one


def test_a_diff_names_every_change_and_nothing_else(overlay: Overlay) -> None:
    overlay.run(SCRIPT)
    changes = overlay.diff()
    assert {change.path: (str(change.kind), str(change.node)) for change in changes} == {
        "edit.txt": ("modified", "file"),
        "gone.txt": ("deleted", "file"),
        "link": ("modified", "symlink"),
        "mode.sh": ("mode", "file"),
        "old": ("deleted", "folder"),
        "old/sub": ("deleted", "folder"),
        "old/sub/y": ("deleted", "file"),
        "old/x": ("deleted", "file"),
        "renew/is": ("created", "file"),
        "renew/was": ("deleted", "file"),
        "src/a.py": ("modified", "file"),
        "src/deep": ("mode", "folder"),
        "src/new": ("created", "folder"),
        "src/new/l": ("created", "symlink"),
        "src/new/n": ("created", "file"),
        "swap": ("modified", "folder"),
        "swap/in": ("created", "file"),
        "turns": ("modified", "file"),
        "turns/inner": ("deleted", "file"),
    }
    assert not changes.conflicts
    assert not changes.refused
    edit = changes.find("edit.txt")
    assert edit is not None
    assert edit.before == hashlib.sha256(FILES["edit.txt"].encode()).hexdigest()
    assert edit.after == hashlib.sha256(AFTER["edit.txt"].encode()).hexdigest()
    assert all(Change.from_json(change.to_json()) == change for change in changes)


def test_a_commit_makes_the_workspace_what_the_tool_saw(overlay: Overlay) -> None:
    overlay.run(SCRIPT)
    report = overlay.commit()
    assert tree(overlay.workspace) == AFTER
    assert len(report.applied) == 19
    assert not report.kept
    assert stat.S_IMODE((overlay.workspace / "mode.sh").stat().st_mode) == 0o755
    assert stat.S_IMODE((overlay.workspace / "src/deep").stat().st_mode) == 0o750
    owner = overlay.workspace.stat()
    for path in overlay.workspace.rglob("*"):
        assert (path.lstat().st_uid, path.lstat().st_gid) == (owner.st_uid, owner.st_gid)
    assert sorted(os.listdir(overlay.journal)) == ["lock"]


def test_without_a_commit_nothing_changes(overlay: Overlay) -> None:
    before = tree(overlay.workspace)
    overlay.run(SCRIPT)
    overlay.diff()
    assert tree(overlay.workspace) == before


def test_nothing_is_committed_while_a_process_lives(overlay: Overlay) -> None:
    overlay.run("echo x > new")
    overlay.alive = True
    with pytest.raises(SandboxFailed) as caught:
        overlay.commit()
    assert caught.value.code == "workspace.busy"
    assert not (overlay.workspace / "new").exists()


def _write(workspace: Path) -> None:
    (workspace / "edit.txt").write_text("theirs\n")


def _replace(workspace: Path) -> None:
    # Same size and an old time of change that utimes can forge; the change time cannot.
    status = (workspace / "edit.txt").stat()
    (workspace / "new").write_text("ONE\ntwo\nthree\n")
    os.utime(workspace / "new", ns=(status.st_mtime_ns, status.st_mtime_ns))
    os.replace(workspace / "new", workspace / "edit.txt")


def _swap_folder(workspace: Path) -> None:
    (workspace / "src").rename(workspace / "src.old")
    (workspace / "other").rename(workspace / "src")


def _point_link(workspace: Path) -> None:
    (workspace / "link").unlink()
    (workspace / "link").symlink_to("theirs")


CONFLICTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("echo x >> edit.txt", _write, "edit.txt"),
    ("echo x >> edit.txt", _replace, "edit.txt"),
    ("echo x > t; mv t edit.txt", _write, "edit.txt"),
    ("echo x >> edit.txt", lambda ws: (ws / "edit.txt").unlink(), "edit.txt"),
    ("rm edit.txt", _write, "edit.txt"),
    ("chmod 700 edit.txt", lambda ws: (ws / "edit.txt").chmod(0o444), "edit.txt"),
    ("rm -r old", lambda ws: (ws / "old/sub/y").write_text("theirs"), "old/sub/y"),
    ("rm -r old", lambda ws: (ws / "old/sub/new").write_text("theirs"), "old/sub"),
    ("rm -r renew; mkdir renew", lambda ws: (ws / "renew/n").write_text("theirs"), "renew/n"),
    ("echo x > fresh", lambda ws: (ws / "fresh").write_text("theirs"), "fresh"),
    ("mkdir fresh", lambda ws: (ws / "fresh").mkdir(), "fresh"),
    ("echo x > src/fresh", _swap_folder, "src"),
    ("ln -sfn swap link", _point_link, "link"),
]


@pytest.mark.parametrize(("script", "theirs", "path"), CONFLICTS)
@pytest.mark.parametrize("mode", MODES)
def test_what_somebody_else_changed_is_a_conflict_and_nothing_is_applied(
    mode: str, script: str, theirs: Callable[[Path], object], path: str
) -> None:
    with mounted(mode, {**FILES, "other": None, "other/a.py": "other\n"}) as overlay:
        overlay.run(script + "\necho x > innocent")
        theirs(overlay.workspace)
        before = tree(overlay.workspace)
        with pytest.raises(Conflict) as caught:
            overlay.commit()
        assert path in caught.value.paths
        assert caught.value.code == "workspace.conflict"
        assert tree(overlay.workspace) == before


@pytest.mark.parametrize(("script", "theirs", "path"), CONFLICTS)
def test_a_change_between_diff_and_commit_is_a_conflict_too(
    script: str, theirs: Callable[[Path], object], path: str
) -> None:
    with mounted(MODES[0] if ROOT else MODES[1], {**FILES, "other/a.py": "other\n"}) as overlay:
        overlay.run(script + "\necho x > innocent")
        changes = overlay.diff()
        assert not changes.conflicts
        theirs(overlay.workspace)
        before = tree(overlay.workspace)
        if path in ("src", "renew/n"):  # only a new name beside it: nothing of theirs is displaced
            overlay.commit(changes)
            now = tree(overlay.workspace)
            assert now.get("renew/n", "theirs") == "theirs"
            assert now["src.old/a.py" if path == "src" else "src/a.py"] == "a\n"
            return
        with pytest.raises(Conflict):
            overlay.commit(changes)
        assert tree(overlay.workspace) == before


def test_a_file_replaced_inside_and_removed_outside_counts_as_new(overlay: Overlay) -> None:
    # The upper folder does not tell it from a new one: stated in docs/workspace.md.
    overlay.run("echo x > t; mv t edit.txt")
    (overlay.workspace / "edit.txt").unlink()
    assert overlay.kinds() == {"edit.txt": "created"}


def test_a_file_changed_and_renamed_inside_is_new_where_its_folder_stayed(
    overlay: Overlay,
) -> None:
    overlay.run(
        "echo x >> edit.txt; mv edit.txt src/moved; echo x >> src/a.py; mv src/a.py src/b.py"
    )
    changes = overlay.diff()
    assert not changes.conflicts
    (overlay.workspace / "src/theirs").write_text("theirs")
    assert [change.path for change in overlay.diff().conflicts] == ["src/moved"]
    overlay.commit(changes)
    assert (overlay.workspace / "src/b.py").read_text() == "a\nx\n"


def test_what_lies_in_an_opaque_folder_is_opaque_too(overlay: Overlay) -> None:
    # The overlay marks only the outermost folder, here `src`.
    overlay.run("rm -r src; mkdir -p src/deep; echo x > src/deep/new")
    assert overlay.kinds() == {
        "src/a.py": "deleted", "src/b.py": "deleted", "src/deep/c.py": "deleted",
        "src/deep/new": "created",
    }  # fmt: skip
    overlay.commit()
    assert os.listdir(overlay.workspace / "src/deep") == ["new"]


def test_what_others_do_beside_it_is_no_conflict(overlay: Overlay) -> None:
    overlay.run("echo x >> edit.txt; echo n > src/n; rm gone.txt; chmod 700 src/a.py")
    (overlay.workspace / "theirs").write_text("theirs")
    (overlay.workspace / "src/b.py").write_text("theirs")
    (overlay.workspace / "src/c.py").write_text("theirs")
    overlay.commit()
    assert (overlay.workspace / "src/n").read_text() == "n\n"
    assert (overlay.workspace / "src/b.py").read_text() == "theirs"


def test_a_base_changed_between_two_calls_is_a_conflict(overlay: Overlay) -> None:
    # The second call copies the new content up, but the first may have read the old one.
    overlay.run("cat edit.txt > /dev/null")
    (overlay.workspace / "edit.txt").write_text("theirs\n")
    overlay.run("echo x > edit.txt")
    assert [change.path for change in overlay.diff().conflicts] == ["edit.txt"]


def test_a_file_written_right_before_the_overlay_began_is_no_conflict(overlay: Overlay) -> None:
    workspace = overlay.workspace
    for round in range(50):
        path = workspace / f"f{round}"
        path.write_text("x")
        with Snapshot.take(overlay.base) as snapshot:
            assert snapshot.still(path.stat())
            path.write_text("y")
            assert not snapshot.still(path.stat())
            assert not snapshot.still((workspace / f"f{round}").stat())


def test_a_rollback_is_closing_the_descriptors(overlay: Overlay) -> None:
    before = tree(overlay.workspace)
    overlay.run(SCRIPT)
    assert len(overlay.diff()) == 19
    overlay.holder.communicate()
    assert tree(overlay.workspace) == before


def test_the_text_of_a_change(overlay: Overlay) -> None:
    overlay.run(SCRIPT + "printf 'a\\0b' > binary; printf x > short")
    shown = {change.path: unified(change, overlay.upper, overlay.base) for change in overlay.diff()}
    assert shown["edit.txt"] == [
        "--- a/edit.txt", "+++ b/edit.txt", "@@ -1,3 +1,4 @@", " one", " two", " three", "+four",
    ]  # fmt: skip
    assert shown["gone.txt"] == ["--- a/gone.txt", "+++ /dev/null", "@@ -1,1 +0,0 @@", "-gone"]
    assert shown["src/new/n"] == ["--- /dev/null", "+++ b/src/new/n", "@@ -0,0 +1,1 @@", "+n"]
    assert shown["binary"] is None
    assert shown["link"] is None
    assert (shown["short"] or [])[-1] == "+\\ No newline at end of file"


def test_lines_far_down_keep_their_numbers(overlay: Overlay) -> None:
    overlay.run("seq 1000 > n; cp n m; sed -i 's/^500$/x/' m")
    overlay.commit()
    with mounted(overlay.mode, {"n": (overlay.workspace / "n").read_text()}) as other:
        other.run("sed -i 's/^500$/x/' n")
        (change,) = other.diff()
        lines = unified(change, other.upper, other.base)
        assert lines is not None
        assert lines[2:] == [
            "@@ -497,7 +497,7 @@",
            " 497",
            " 498",
            " 499",
            "-500",
            "+x",
            " 501",
            " 502",
            " 503",
        ]


@pytest.mark.parametrize("size", [1_200, 30_000])
def test_hostile_text_is_compared_in_bounded_time(overlay: Overlay, size: int) -> None:
    overlay.run(f"yes a | head -{size} > text; yes b | head -{size // 2} >> text")
    (change,) = overlay.diff()
    lines = unified(change, overlay.upper, overlay.base)
    assert lines is not None
    assert len(lines) == size + size // 2 + 3


def test_limits_of_a_diff(overlay: Overlay) -> None:
    overlay.run("mkdir many; cd many; seq 300 | xargs touch")
    with pytest.raises(LimitExceeded) as caught:
        overlay.diff(Bounds(entries=200))
    assert caught.value.limit == "changes"
    with pytest.raises(LimitExceeded, match="1000 bytes of names"):
        overlay.diff(Bounds(text_bytes=1000))
    overlay.run("rm -r many; ln -s $(printf %03000d 0) long")
    with pytest.raises(LimitExceeded, match="2000 bytes of names"):
        overlay.diff(Bounds(text_bytes=2000))
    overlay.run("rm long; mkdir -p d/d/d/d; echo x > d/d/d/d/x; echo 0123456789 > big")
    changes = overlay.diff(Bounds(depth=3, read_bytes=5))
    assert {change.path for change in changes.refused} == {"d/d/d/d", "big"}


def test_the_same_overlay_commits_more_than_once_only_after_a_new_snapshot(
    overlay: Overlay,
) -> None:
    overlay.run("echo x >> edit.txt")
    changes = overlay.diff()
    overlay.commit(changes)
    with pytest.raises(Conflict):
        overlay.commit(changes)
    assert overlay.diff().find("edit.txt") is None  # both sides say the same by now


def test_metadata_of_the_replaced_file_stays(overlay: Overlay) -> None:
    with mounted(overlay.mode, {"f": "x\n"}) as other:
        os.setxattr(other.workspace / "f", "user.note", b"mine")
        with Snapshot.take(other.base) as other.snapshot:
            other.run("echo y >> f")
            other.commit()
        assert os.getxattr(other.workspace / "f", "user.note") == b"mine"
        assert os.listxattr(other.workspace / "f") == ["user.note"]


def test_kinds_and_nodes_are_what_the_documents_say() -> None:
    assert [str(kind) for kind in Kind] == ["created", "modified", "deleted", "mode"]
    assert [str(node) for node in Node] == ["file", "folder", "symlink", "special"]


_RANDOM = """
import os, random, shutil, sys
at = random.Random(int(sys.argv[1]))
names = [a + b for a in ("", "p/", "q/", "p/r/") for b in ("one", "two", "three", "p", "q", "r")]
for _ in range(60):
    what, one, other = at.randrange(9), at.choice(names), at.choice(names)
    try:
        if what == 0: open(one, "w").write(other)
        elif what == 1: open(one, "a").write(other)
        elif what == 2: os.unlink(one)
        elif what == 3: os.mkdir(one)
        elif what == 4: shutil.rmtree(one)
        elif what == 5: shutil.move(one, other) if not other.startswith(one + "/") else None
        elif what == 6: os.symlink(other, one)
        elif what == 7: os.chmod(one, at.choice((0o700, 0o750, 0o755)), follow_symlinks=True)
        elif what == 8: os.replace(one, other)
    except (OSError, shutil.Error):
        pass
"""


@pytest.mark.parametrize("mode", MODES)
def test_a_commit_makes_exactly_what_the_merged_view_showed(mode: str) -> None:
    start: dict[str, str | None] = {
        "one": "1", "p/one": "p1", "p/two": "p2", "p/r/one": "r1", "p/r/p/x": "x", "q/three": "q3",
        "q/r": "->../one", "r/one": "->nowhere",
    }  # fmt: skip
    for seed in range(15):
        with mounted(mode, start, where="/dev/shm") as overlay:
            overlay.run(f"python3 - {seed} <<'END'\n{_RANDOM}END\n")
            merged = modes(Path(f"/proc/{overlay.holder.pid}/root{overlay.stage}/mnt"))
            assert merged != modes(overlay.workspace)
            overlay.commit()
            assert modes(overlay.workspace) == merged, seed


def modes(folder: Path) -> dict[str, tuple[str, int]]:
    """Return what a folder holds with the modes of files and folders."""
    return {
        name: (text, 0 if text.startswith("->") else stat.S_IMODE((folder / name).stat().st_mode))
        for name, text in tree(folder).items()
    }
