"""Protected and hidden paths of one workspace, before, during and after calls."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Profile, Tier
from safeconduct.errors import SandboxFailed
from safeconduct.runtime.sandbox import folders, places
from safeconduct.runtime.sandbox.native import Program
from safeconduct.runtime.sandbox.shield import Shield, Shields

if TYPE_CHECKING:
    from tests.conftest import Box

NAMES = (".git/hooks/", ".git/config", ".claude/", ".mcp.json")


def nothing(path: str) -> bool:
    return False


@pytest.fixture
def shields(workspace: Path) -> Iterator[Shields]:
    made = Shields(str(workspace), NAMES)
    yield made
    made.close()


def test_protected_names_that_exist_cannot_be_changed(box: Box, shields: Shields) -> None:
    (box.workspace / ".git" / "hooks").mkdir(parents=True)
    (box.workspace / ".git" / "config").write_text("[core]\n")
    (box.workspace / ".mcp.json").write_text("{}")
    for path in (".git", ".git/hooks", ".git/config", ".mcp.json"):
        (box.workspace / path).chmod(0o777)
    attack = """
for path in .git/hooks/post-commit .git/config .mcp.json .claude/settings.json; do
    (echo evil > $path) 2>/dev/null && echo ESCAPED $path
    rm -rf $path 2>/dev/null; mv $path away 2>/dev/null && echo MOVED $path
done
mv .git away 2>/dev/null && echo MOVED .git
"""
    with shields.raised(box.profile(), nothing) as shield:
        outcome = box.run("sh", "-c", attack, shield=shield)
    assert outcome.stdout == b""
    assert (box.workspace / ".mcp.json").read_text() == "{}"
    assert (box.workspace / ".git" / "config").read_text() == "[core]\n"


def test_a_repository_cannot_be_planted(box: Box, shields: Shields) -> None:
    with shields.raised(box.profile(), nothing) as shield:
        outcome = box.run("sh", "-c", "git init -q . && echo ESCAPED", shield=shield)
    assert b"ESCAPED" not in outcome.stdout
    assert not (box.workspace / ".git" / "hooks").exists()


def test_places_are_held_only_while_needed(workspace: Path, box: Box) -> None:
    shields = Shields(str(workspace), NAMES)
    with shields.raised(box.profile(), nothing):
        assert (workspace / ".claude").is_dir()
    shields.close()
    assert not (workspace / ".claude").exists()
    assert not (workspace / ".git").exists()


def test_a_protected_link_refuses_the_call(box: Box, shields: Shields) -> None:
    (box.workspace / "target").mkdir()
    (box.workspace / ".claude").symlink_to("target")
    with (
        pytest.raises(SandboxFailed) as caught,
        shields.raised(box.profile(), nothing),
    ):
        pytest.fail("the call would run")
    assert caught.value.code == "sandbox.protected_link"


def test_a_protected_file_made_by_a_call_is_set_aside(box: Box, shields: Shields) -> None:
    box.workspace.chmod(0o777)

    def call() -> None:
        with shields.raised(box.profile(), nothing) as shield:
            outcome = box.run("sh", "-c", "echo evil > .mcp.json", shield=shield)
            if not outcome.ok:  # tier landlock makes no new names beside protected ones at all
                (box.workspace / ".mcp.json").write_text("evil")

    with pytest.raises(SandboxFailed) as caught:
        call()
    assert caught.value.code == "sandbox.protected_made"
    assert not (box.workspace / ".mcp.json").exists()


def test_what_takes_the_workspaces_place_is_protected_too(box: Box) -> None:
    attack = """
(echo evil > .mcp.json) 2> /dev/null
for path in .git/hooks/post-commit .claude/settings.json; do
    (mkdir -p $(dirname $path); echo evil > $path) 2> /dev/null && echo ESCAPED $path
done
"""

    def attacked() -> None:
        # Tier landlock lets nothing new be made at the top at all; elsewhere it is set aside.
        with suppress(SandboxFailed), shields.raised(box.profile(), nothing) as one:
            assert box.run("sh", "-c", attack, shield=one).stdout == b""
        assert not (box.workspace / ".mcp.json").exists()

    with closing(Shields(str(box.workspace), NAMES)) as shields:
        attacked()
        before = box.workspace.rename(f"{box.workspace}-before")
        box.workspace.mkdir()
        box.workspace.chmod(0o777)
        attacked()
        attacked()
        assert (before / ".claude").is_dir(), "what is held there is not what was made by a call"
    try:
        assert not (before / ".claude").exists()
        assert not (box.workspace / ".claude").exists()
    finally:
        shutil.rmtree(before)


def test_a_link_in_the_workspaces_place_is_not_followed(
    box: Box, shields: Shields, outside: Path
) -> None:
    before = box.workspace.rename(f"{box.workspace}-before")
    try:
        box.workspace.symlink_to(outside)
        with pytest.raises(SandboxFailed) as caught, shields.raised(box.profile(), nothing):
            pass
        assert caught.value.code == "workspace.missing"
        assert os.listdir(outside) == ["secret"]
    finally:
        box.workspace.unlink()
        before.rename(box.workspace)


def test_a_profile_that_only_reads_needs_no_places(box: Box, shields: Shields) -> None:
    profile = replace(box.profile(), write=())
    with shields.raised(profile, nothing) as shield:
        assert shield.protected == ()
    assert os.listdir(box.workspace) == []


@pytest.mark.parametrize("name", [".env", "new\nline.env", os.fsdecode(b"\xff.env")])
def test_hidden_names_are_found_at_any_depth(box: Box, shields: Shields, name: str) -> None:
    deep = box.workspace / "a" / "b"
    deep.mkdir(parents=True)
    (deep / name).write_text("SECRET")
    (deep / "shown").write_text("shown")

    def hides(path: str) -> bool:
        return path.endswith(".env")

    profile = replace(box.profile(), hide=("**/*.env",))
    with shields.raised(profile, hides) as shield:
        assert shield.hidden == (str(deep / name),)
        outcome = box.run("sh", "-c", "cat a/b/* a/b/.* 2>/dev/null", shield=shield)
    assert outcome.stdout == b"shown"


def test_what_is_absent_is_absent(box: Box) -> None:
    keys = box.workspace / "keys"
    keys.mkdir()
    (keys / "log.key").write_text("SECRET")
    shields = Shields(str(box.workspace), (), [str(keys)])
    try:
        assert shields.refuses(str(keys / "log.key"))
        assert not shields.refuses(str(box.workspace / "keys2"))
        with shields.raised(box.profile(), nothing) as shield:
            outcome = box.run("sh", "-c", "cat keys/log.key; ls keys", shield=shield)
        assert b"SECRET" not in outcome.stdout
        # Landlock rules reach downwards, so in that tier alone the names can still be listed.
        assert (b"log.key" in outcome.stdout) == (box.tier is Tier.LANDLOCK)
    finally:
        shields.close()


def _at_rest(shields: Shields, profile: Profile, hides: Callable[[str], bool]) -> Shield:
    """Raise shields until the same one comes twice: it is remembered then."""
    deadline, before = time.monotonic() + 5, None
    while time.monotonic() < deadline:
        with shields.raised(profile, hides) as shield:
            if shield is before:
                return shield
            before = shield
    raise AssertionError("it was never remembered")


def test_a_remembered_shield_sees_what_comes_and_goes(workspace: Path, shields: Shields) -> None:
    def hides(path: str) -> bool:
        return path.rpartition("/")[2].startswith(".env")

    profile = Profile(name="p", write=(str(workspace),), hide=("**/.env*",))
    deep, moved = workspace / "a" / "b", workspace / "c"
    deep.mkdir(parents=True)
    for _ in range(3):
        assert not _at_rest(shields, profile, hides).hidden
        (deep / ".env").write_text("secret")
        with shields.raised(profile, hides) as shield:
            assert shield.hidden == (str(deep / ".env"),)
        assert _at_rest(shields, profile, hides).hidden == (str(deep / ".env"),)
        deep.rename(moved)
        with shields.raised(profile, hides) as shield:
            assert shield.hidden == (str(moved / ".env"),)
        (moved / ".env").unlink()
        moved.rename(deep)


@pytest.mark.parametrize("name", [".mcp.json", ".git/config"])
def test_a_remembered_shield_sets_aside_what_appears(
    workspace: Path, shields: Shields, name: str
) -> None:
    profile = Profile(name="p", write=(str(workspace),))
    path = workspace / name

    def call() -> None:
        with shields.raised(profile, nothing):
            before = path.parent.stat()
            path.write_text("evil")
            # All times that can be set are set back.
            os.utime(path.parent, ns=(before.st_atime_ns, before.st_mtime_ns))

    _at_rest(shields, profile, nothing)
    with pytest.raises(SandboxFailed):
        call()
    assert not path.exists()


@pytest.mark.parametrize("count", [60, 300])
def test_many_protected_places_in_a_sandbox_bound_late(box: Box, count: int) -> None:
    """Each is a mount that is handed over as a descriptor, of which a datagram holds 253."""
    held = [box.workspace / f"held{number}" for number in range(count)]
    for place in held:
        place.mkdir()
    shield = Shield(protected=tuple(map(str, held)))
    program = Program(
        argv=("sh", "-c", f"echo x > held{count - 1}/evil; echo x > fine"), cwd=str(box.workspace)
    )
    box.sandbox.prepare(box.profile())
    outcome = box.sandbox.run(
        "call", program, box.profile(), workspace=str(box.workspace), shield=shield, late=True
    )
    assert not (held[-1] / "evil").exists()
    # In tier landlock a folder that holds protected names takes no new ones.
    assert (box.workspace / "fine").exists() == (box.tier is Tier.FULL), outcome.stderr


def test_places_are_held_where_they_cannot_be_marked(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no such attributes here")

    # As tmpfs before Linux 6.6 has it, and many network file systems.
    monkeypatch.setattr(os, "setxattr", unsupported)
    monkeypatch.setattr(os, "getxattr", unsupported)
    names = (".git/config", ".git/hooks/", ".git/info/attributes", ".claude/")
    shields = Shields(str(box.workspace), names)
    attack = "mkdir -p .git/hooks .git/info; echo x > .git/config; mv .git away"
    for _ in range(3):
        with shields.raised(box.profile(), nothing) as shield:
            assert shield.protected == tuple(
                str(box.workspace / name) for name in (".claude", ".git")
            )
            assert not box.run("sh", "-c", attack, shield=shield).ok
    shields.close()
    assert not list(box.workspace.iterdir())


def test_a_link_on_the_way_to_a_protected_name_is_not_taken_for_absent(
    workspace: Path, tmp_path: Path
) -> None:
    (workspace / ".git").mkdir()
    (tmp_path / "config").write_text("evil")
    shields = Shields(str(workspace), (".git/config", ".mcp.json"))

    def call() -> None:
        with shields.raised(Profile(name="p", write=(str(workspace),)), nothing):
            (workspace / ".git").rename(workspace / "moved")
            (workspace / ".git").symlink_to(tmp_path)
            (workspace / ".mcp.json").write_text("evil")

    with pytest.raises(SandboxFailed) as caught:
        call()
    shields.close()
    assert caught.value.code == "sandbox.protected_made"
    assert (tmp_path / "config").exists()
    # One name that cannot be judged saves none of the others.
    assert not (workspace / ".mcp.json").exists()


def test_a_path_that_cannot_be_looked_at_is_not_taken_for_absent(workspace: Path) -> None:
    assert places.look(str(workspace / "gone" / "deeper")) is None
    (workspace / "file").touch()
    assert places.look(str(workspace / "file" / "below")) is None
    (workspace / "round").symlink_to("round")
    with pytest.raises(SandboxFailed):
        places.look(str(workspace / "round" / "below"))


def test_rights_are_added_to_open_folders_of_our_own_alone(workspace: Path) -> None:
    closed, other = workspace / "closed", workspace / "other"
    for folder in (closed, other):
        folder.mkdir()
        folder.chmod(0o060)
    opened = os.open(closed, folders.HANDLE)
    try:
        assert folders.admit(opened, folders.SEARCH)
        assert stat.S_IMODE(closed.stat().st_mode) & 0o777 == 0o160
        closed.rename(workspace / "moved")
        closed.symlink_to(other)
        assert folders.admit(opened, folders.LIST)
    finally:
        os.close(opened)
    assert stat.S_IMODE((workspace / "moved").stat().st_mode) & 0o777 == 0o560
    assert stat.S_IMODE(other.stat().st_mode) & 0o777 == 0o060
    with pytest.raises(NotADirectoryError):
        os.close(os.open(closed, folders.HANDLE))
    if os.geteuid() == 0:
        os.chown(other, 1, 1)
        opened = os.open(other, folders.HANDLE)
        assert not folders.admit(opened, folders.LIST)
        os.close(opened)
