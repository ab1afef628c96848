"""What a hostile tool leaves in its overlay: nothing of it escapes when it is copied out, hangs the
supervisor, or brings rights along. Each attack is first shown to work for a plain copy.
"""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.overlay_kit import MODES, ROOT, Overlay, mounted, tree

from safeconduct.errors import LimitExceeded, SandboxFailed
from safeconduct.policies import PROTECTED
from safeconduct.runtime.cli.terminal import printable
from safeconduct.runtime.sandbox.overlay import (
    Bounds,
    Change,
    Changes,
    Conflict,
    commit,
    diff,
    protects,
    unified,
)
from safeconduct.runtime.sandbox.overlay.content import Moved

MODE = MODES[0] if ROOT else MODES[1]
FILES = {
    "file": "file\n",
    "sub/inner": "inner\n",
    ".git/HEAD": "ref: refs/heads/main\n",
    ".git/config": "[core]\n",
    ".git/hooks/pre-commit": "mine\n",
    "nested/.vscode/settings.json": "{}\n",
    "nested/plain": "plain\n",
}


@pytest.fixture(params=MODES)
def overlay(request: pytest.FixtureRequest) -> Iterator[Overlay]:
    with mounted(str(request.param), FILES) as one:
        yield one


@pytest.fixture
def outside(overlay: Overlay) -> Path:
    folder = overlay.workspace.parent / "outside"
    (folder / "secret").write_text("SECRET")
    return folder


def plain_copy(overlay: Overlay, target: Path) -> None:
    """Copy the upper folder as somebody would who trusts it."""
    source = f"/proc/self/fd/{overlay.upper}/."
    argv = ["timeout", "5", "cp", "-a", source, str(target)]
    subprocess.run(argv, capture_output=True, pass_fds=[overlay.upper], check=False)


def refused(changes: Changes) -> set[str]:
    return {change.path for change in changes.refused}


# Links.


def test_a_link_that_took_a_folders_place_is_not_followed(overlay: Overlay, outside: Path) -> None:
    overlay.run("echo evil > sub/planted")
    changes = overlay.diff()
    # Between diff and commit the folder becomes a link, as another program of the user could do.
    os.rename(overlay.workspace / "sub", overlay.workspace / "sub.old")
    (overlay.workspace / "sub").symlink_to(outside)
    subprocess.run(["sh", "-c", "echo evil > sub/plain"], cwd=overlay.workspace, check=True)
    assert (outside / "plain").exists()
    with pytest.raises((Conflict, SandboxFailed)):
        overlay.commit(changes)
    assert not (outside / "planted").exists()


@pytest.mark.parametrize("point", ["plan", "stage:0", "staged"])
def test_a_link_swapped_in_during_the_commit_is_not_followed(
    overlay: Overlay, outside: Path, point: str
) -> None:
    overlay.run("echo evil > sub/planted; echo evil > sub/inner")

    def swap(reached: str) -> None:
        if reached == point:
            os.rename(overlay.workspace / "sub", overlay.workspace / "sub.old")
            (overlay.workspace / "sub").symlink_to(outside)

    with pytest.raises((Conflict, SandboxFailed)):
        commit(
            overlay.diff(),
            upper=overlay.upper,
            workspace=overlay.base,
            journal=overlay.journal,
            ended=lambda: True,
            reached=swap,
        )
    assert sorted(os.listdir(outside)) == ["secret"]
    assert (overlay.workspace / "sub.old/inner").read_text() == "inner\n"


def test_a_link_in_the_upper_folder_is_copied_as_a_link_and_flagged(
    overlay: Overlay, outside: Path
) -> None:
    overlay.run(
        f"ln -s {outside} abs; ln -s ../../outside up; ln -s sub/../../outside mid; ln -s sub fine;"
        f"mkdir d; ln -s ../../outside/secret d/two; ln -s ../sub/inner d/in; ln -s .. d/top"
    )
    changes = overlay.diff()
    flagged = {change.path for change in changes.later}
    assert flagged == {"abs", "up", "mid", "d/two"}
    overlay.commit(changes)
    assert os.readlink(overlay.workspace / "abs") == str(outside)
    assert os.readlink(overlay.workspace / "d/two") == "../../outside/secret"
    assert (outside / "secret").read_text() == "SECRET"


def test_a_link_through_a_link_of_the_base_is_flagged(overlay: Overlay, outside: Path) -> None:
    (overlay.workspace / "way").symlink_to(outside)
    overlay.run("ln -s way/secret two")
    assert [change.path for change in overlay.diff().later] == ["two"]


def test_a_tool_cannot_read_a_file_through_a_link_as_the_supervisor(
    overlay: Overlay, outside: Path
) -> None:
    os.chmod(outside / "secret", 0o600)
    overlay.run(f"rm file; ln -s {outside}/secret file; ln -s {outside} dir")
    overlay.commit()
    assert (overlay.workspace / "file").is_symlink()
    assert (overlay.workspace / "dir").is_symlink()


# Names.


def test_protected_names_are_refused_in_every_spelling(overlay: Overlay) -> None:
    overlay.run(
        "mkdir -p .claude .VSCODE a/.git/hooks .Safeconduct '.git ' b/.Git c/GIT~1"
        " \"$(printf 'd/.g\\342\\200\\214it')\" e/.git;"
        "for f in .claude/settings.json .VSCODE/tasks.json a/.git/hooks/post-commit .mcp.json"
        " .ENVRC .Safeconduct/policy.yaml '.git /config' b/.Git/config c/GIT~1/config .gitmodules"
        ' e/.git/HEAD e/.git/fsmonitor .git/info; do echo evil > "$f"; done;'
        "echo evil > \"$(printf 'd/.g\\342\\200\\214it')/config\"; echo 'gitdir: evil' > sub/.git;"
        "echo fine > .git/index; mkdir -p .git/objects/aa; echo fine > .git/objects/aa/bb"
    )
    changes = overlay.diff()
    invisible = "d/.g\u200cit/config"
    assert refused(changes) == {
        ".claude", ".VSCODE", ".ENVRC", ".Safeconduct", ".mcp.json", ".gitmodules", ".git /config",
        "a/.git/hooks", "b/.Git/config", "c/GIT~1/config", invisible, "e/.git/fsmonitor",
        "sub/.git", ".git/info",
    }  # fmt: skip
    overlay.commit(changes)
    now = tree(overlay.workspace)
    assert not any("evil" in text for name, text in now.items() if name != "e/.git/HEAD")
    assert now[".git/objects/aa/bb"] == "fine\n"


def test_a_deletion_of_what_is_protected_is_refused(overlay: Overlay) -> None:
    before = tree(overlay.workspace)
    overlay.run("rm -rf .git nested; echo file > nested")
    changes = overlay.diff()
    assert {".git", "nested"} <= refused(changes)
    overlay.commit(changes)
    assert tree(overlay.workspace) == before


def test_a_renamed_protected_folder_stays_where_it_was(overlay: Overlay) -> None:
    overlay.run("mv nested other; mv .git/hooks .git/old")
    overlay.commit()
    assert (overlay.workspace / "nested/.vscode/settings.json").exists()
    assert (overlay.workspace / ".git/hooks/pre-commit").read_text() == "mine\n"
    assert not (overlay.workspace / "other/.vscode").exists()
    assert (overlay.workspace / "other/plain").read_text() == "plain\n"


def test_hostile_names_reach_no_terminal(overlay: Overlay) -> None:
    overlay.run(
        "echo x > \"$(printf 'a\\nb')\"; echo x > \"$(printf '\\033[2Jc')\";"
        "echo x > \"$(printf 'd\\377e')\"; echo x > \"$(printf '\\342\\200\\256f')\";"
        "printf 'one\\033]0;title\\007\\r\\n' > text; echo x > -rf; echo x > ' '"
    )
    changes = overlay.diff()
    assert len(changes) == 7
    for change in changes:
        assert Change.from_json(change.to_json()) == change
        shown = [printable(change.path), *(unified(change, overlay.upper, overlay.base) or [])]
        assert all(printable(line).isprintable() for line in shown)
    overlay.commit(changes)
    names = os.listdir(os.fsencode(overlay.workspace))
    assert {b"a\nb", b"\x1b[2Jc", b"d\xffe", "\u202ef".encode(), b"-rf", b" "} <= set(names)


def test_names_that_differ_by_case_or_form_are_different_files(overlay: Overlay) -> None:
    overlay.run(
        "echo 1 > Name; echo 2 > name; echo 3 > NAME;"
        "echo 4 > \"$(printf 'e\\314\\201')\"; echo 5 > \"$(printf '\\303\\251')\""
    )
    overlay.commit()
    now = tree(overlay.workspace)
    assert (now["Name"], now["name"], now["NAME"]) == ("1\n", "2\n", "3\n")
    assert (now["e\u0301"], now["\u00e9"]) == ("4\n", "5\n")


def test_deep_folders_are_refused_not_followed_down(overlay: Overlay) -> None:
    overlay.run(
        "python3 -c \"\nimport os\nfor _ in range(600): os.mkdir('d' * 16); os.chdir('d' * 16)\n"
        "open('bottom', 'w').close()\n\""
    )
    changes = overlay.diff()
    assert len(changes) == 65
    assert len(refused(changes)) == 1
    overlay.commit(changes)
    assert len(tree(overlay.workspace)) == len(FILES) + 5 + 64
    argv = ["rm", "-rf", str(overlay.workspace / "dddddddddddddddd")]
    subprocess.run(argv, check=True)


# Kinds of files.


def test_a_fifo_where_a_file_was_stops_nobody(overlay: Overlay, tmp_path: Path) -> None:
    overlay.run("rm file; mkfifo file sub/pipe; mkdir many; mkfifo many/p")
    started = time.monotonic()
    changes = overlay.diff()
    assert refused(changes) == {"file", "sub/pipe", "many/p"}
    overlay.commit(changes)
    assert time.monotonic() - started < 5
    assert (overlay.workspace / "file").read_text() == "file\n"
    assert not (overlay.workspace / "sub/pipe").exists()
    plain_copy(overlay, tmp_path)
    assert stat.S_ISFIFO((tmp_path / "file").lstat().st_mode)


def test_sockets_and_devices_are_not_copied(overlay: Overlay, tmp_path: Path) -> None:
    overlay.run(
        "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('sock')\"", uid=None
    )
    expected = {"sock"}
    if overlay.marks == "trusted":
        overlay.run("mknod disk b 7 0; mknod null c 1 3")
        expected |= {"disk", "null"}
    assert refused(overlay.diff()) == expected
    overlay.commit()
    assert not any(os.path.lexists(overlay.workspace / name) for name in expected)
    plain_copy(overlay, tmp_path)
    assert stat.S_ISSOCK((tmp_path / "sock").lstat().st_mode)


def test_set_id_bits_and_open_modes_are_masked(overlay: Overlay, tmp_path: Path) -> None:
    overlay.run(
        "cp /bin/true tool; chmod 6777 tool; mkdir d; chmod 7777 d; echo x > d/f; chmod 666 d/f;"
        "echo x >> file; chmod 4666 file; echo x > none; chmod 0 none; mkdir no; chmod 0 no"
    )
    plain_copy(overlay, tmp_path)
    assert (tmp_path / "tool").stat().st_mode & stat.S_ISUID
    changes = overlay.diff()
    assert {change.path: change.later for change in changes}["tool"] == "it can be executed"
    overlay.commit(changes)

    def mode(name: str) -> int:
        return stat.S_IMODE((overlay.workspace / name).stat().st_mode)

    assert [mode(name) for name in ("tool", "d", "d/f", "file", "none", "no")] == [
        0o775, 0o775, 0o664, 0o664, 0o400, 0o700,
    ]  # fmt: skip


def test_what_the_tool_owns_belongs_to_the_workspaces_owner() -> None:
    if not ROOT:
        pytest.skip("needs root: without it there is one uid only")
    with mounted("root", FILES) as other:
        os.chown(other.workspace, 1234, 1235)
        other.run("chmod 777 .")
        other.run("echo x > new; mkdir d; echo y > d/z; ln -s x d/l", uid=4242)
        assert os.stat("new", dir_fd=other.upper).st_uid == 4242
        other.commit()
        for name in ("new", "d", "d/z", "d/l"):
            status = (other.workspace / name).lstat()
            assert (status.st_uid, status.st_gid) == (1234, 1235)


def test_extended_attributes_stay_behind(overlay: Overlay, tmp_path: Path) -> None:
    script = "import os; os.setxattr('new', 'user.evil', b'1'); os.setxattr('file', 'user.e', b'1')"
    overlay.run(f'echo x > new; echo x >> file; python3 -c "{script}"')
    if overlay.marks == "trusted":
        capability = "0100000202200000000000000000000000000000"
        code = f"os.setxattr('cap', 'security.capability', bytes.fromhex('{capability}'))"
        overlay.run(f'cp /bin/true cap; python3 -c "import os; {code}"')
        plain_copy(overlay, tmp_path)
        assert "security.capability" in os.listxattr(tmp_path / "cap")
    overlay.commit()
    for path in overlay.workspace.rglob("*"):
        assert os.listxattr(path, follow_symlinks=False) == []


def test_hard_links_lead_nowhere(overlay: Overlay) -> None:
    with mounted(overlay.mode, {"f": "x\n"}) as other:
        secret = other.workspace.parent / "outside/secret"
        os.link(other.workspace / "f", secret)
        other.snapshot.close()
        other.snapshot = type(other.snapshot).take(other.base)
        other.run("echo evil >> f; chmod 777 f; echo n > n; ln n m")
        other.commit()
        assert secret.read_text() == "x\n"
        assert stat.S_IMODE(secret.stat().st_mode) & 0o111 == 0
        assert (other.workspace / "f").read_text() == "x\nevil\n"
        assert (other.workspace / "n").stat().st_nlink == 1


def test_only_a_mode_does_not_reach_the_other_name_of_a_file() -> None:
    with mounted(MODE, {"f": "x\n"}) as overlay:
        other = overlay.workspace.parent / "outside/name"
        os.link(overlay.workspace / "f", other)
        overlay.snapshot.close()
        overlay.snapshot = type(overlay.snapshot).take(overlay.base)
        overlay.run("chmod 777 f")
        overlay.commit()
        assert stat.S_IMODE((overlay.workspace / "f").stat().st_mode) == 0o775
        assert stat.S_IMODE(other.stat().st_mode) == 0o644


# Marks of the overlay itself.


def test_a_tool_cannot_forge_the_marks_of_the_overlay(overlay: Overlay) -> None:
    script = (
        "import os\n"
        "for name in ('user.overlay.opaque', 'user.overlay.whiteout', 'user.overlay.origin'):\n"
        "  for path in ('sub', 'empty', '.'):\n"
        "    try: os.setxattr(path, name, b'y')\n"
        "    except OSError: pass\n"
    )
    overlay.run(f": > empty; : > sub/new\npython3 - <<'END'\n{script}END\n")
    changes = overlay.diff()
    assert {change.path: str(change.kind) for change in changes} == {
        "empty": "created", "sub/new": "created",
    }  # fmt: skip
    if overlay.marks == "trusted":
        # Read as the other kind of mount would, the forged mark deletes what lies below.
        wrong = diff(
            overlay.upper, overlay.base, overlay.snapshot, marks="user",
            protected=protects(PROTECTED),
        )  # fmt: skip
        assert ("sub/inner", "deleted") in {(one.path, str(one.kind)) for one in wrong}
    overlay.commit(changes)
    assert (overlay.workspace / "sub/inner").read_text() == "inner\n"


# Amounts.


def test_a_huge_sparse_file_is_refused_alone(overlay: Overlay) -> None:
    overlay.run("truncate -s 200G huge; truncate -s 40M hole; echo x > small")
    started = time.monotonic()
    changes = overlay.diff(Bounds(read_bytes=100 << 20))
    assert refused(changes) == {"huge"}
    overlay.commit(changes)
    assert time.monotonic() - started < 10
    hole = (overlay.workspace / "hole").stat()
    assert hole.st_size == 40 << 20
    assert hole.st_blocks < 1000
    assert not (overlay.workspace / "huge").exists()


def test_many_names_of_one_file_do_not_multiply_it(overlay: Overlay) -> None:
    overlay.run(
        "head -c 1000000 /dev/zero > f; i=0; while [ $i -lt 99 ]; do ln f f$i; i=$((i+1)); done"
    )
    changes = overlay.diff(Bounds(read_bytes=10_000_000))
    assert len(changes.refused) == 90


def test_a_hundred_thousand_entries() -> None:
    with mounted(MODE, FILES, where="/dev/shm") as overlay:  # a disk would take a minute
        overlay.run(
            "python3 -c \"\nfor d in range(10):\n  import os; os.mkdir(f'm{d}')\n"
            "  for n in range(10000): open(f'm{d}/{n}', 'w').close()\n\""
        )
        with pytest.raises(LimitExceeded):
            overlay.diff(Bounds(entries=50_000))
        assert len(os.listdir("/proc/self/fd")) < 100
        changes = overlay.diff()
        assert len(changes) == 100_010
        overlay.commit(changes)
        assert sum(len(os.listdir(overlay.workspace / f"m{d}")) for d in range(10)) == 100_000


# Something that still moves.


@pytest.mark.parametrize(
    "moves",
    [
        "echo more >> new",
        "rm new; mkfifo new",
        "rm new; ln -s /etc/passwd new",
        "rm new; mkdir new",
        "rm new",
        "echo NEW > new",
    ],
)
def test_an_upper_folder_that_moves_after_the_diff_is_refused(overlay: Overlay, moves: str) -> None:
    before = tree(overlay.workspace)
    overlay.run("echo new > new; echo x >> file")
    changes = overlay.diff()
    overlay.run(moves)
    with pytest.raises(SandboxFailed) as caught:
        overlay.commit(changes)
    assert isinstance(caught.value, Moved) or caught.value.code == "workspace.commit"
    assert tree(overlay.workspace) == before


Act = Callable[[Path], object]


def _rewrite(inner: Path) -> None:
    inner.write_text("theirs")


def _replace(inner: Path) -> None:
    (inner.parent / "new").write_text("theirs")
    os.replace(inner.parent / "new", inner)


def _pipe(inner: Path) -> None:
    inner.unlink()
    os.mkfifo(inner)


@pytest.mark.parametrize("point", ["plan", "stage:1", "staged", "apply:0"])
@pytest.mark.parametrize("theirs", [_rewrite, _replace, _pipe])
def test_what_somebody_writes_during_the_commit_survives(point: str, theirs: Act) -> None:
    with mounted(MODE, FILES) as overlay:
        overlay.run("echo evil > file; echo evil > sub/inner")

        def write(reached: str) -> None:
            if reached == point:
                theirs(overlay.workspace / "sub/inner")

        with pytest.raises(Conflict):
            commit(
                overlay.diff(), upper=overlay.upper, workspace=overlay.base,
                journal=overlay.journal, ended=lambda: True, reached=write,
            )  # fmt: skip
        inner = overlay.workspace / "sub/inner"
        assert stat.S_ISFIFO(inner.lstat().st_mode) or inner.read_text() == "theirs"
        assert (overlay.workspace / "file").read_text() == "file\n"
        assert not [name for name in os.listdir(overlay.workspace) if "safeconduct" in name]


def test_an_exchange_is_taken_back_where_the_last_instant_was_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safeconduct.runtime.sandbox.overlay import kernel

    with mounted(MODE, FILES) as overlay:
        overlay.run("echo evil > file; rm sub/inner")
        real = {"exchange": kernel.exchange, "rename_new": kernel.rename_new}

        def late(folder: int, one: str, other: str) -> None:
            # After the last look and before the rename: only what was displaced can tell.
            (overlay.workspace / "file").write_text("theirs")
            monkeypatch.undo()
            real["exchange"](folder, one, other)

        monkeypatch.setattr(kernel, "exchange", late)
        with pytest.raises(Conflict):
            overlay.commit()
        assert (overlay.workspace / "file").read_text() == "theirs"
        assert (overlay.workspace / "sub/inner").read_text() == "inner\n"
