"""What a program tries through an overlay of a real call, started by root and by an ordinary user:
each attack first works without the barrier. What a hostile layer holds is test_copy_out.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from tests.overlay_kit import fill, tree

TESTS = Path(__file__).resolve().parents[1]
ORDINARY = 64_001
USERS = ("root", "ordinary") if os.geteuid() == 0 else ("ordinary",)
POLICY = """\
version: 1
require: {tier: full}
profiles:
  base: {read: ["$WS/**", "SHOWN/**"], write: ["$WS/**"], workspace: overlay, limits: {wall: 20s}}
  plain: {like: base, workspace: direct}
tools:
  shell.run:
    - {allow: {argv: [sh, -c, any]}}
    - {allow: {argv: [dash, -c, any]}, profile: plain}
"""
FILES = {
    "file": "file\n",
    "sub/inner": "inner\n",
    ".git/HEAD": "ref: refs/heads/main\n",
    ".git/config": "[core]\n",
    ".safeconduct/policy.yaml": POLICY,
}


@dataclass(frozen=True)
class Desk:
    """The command line, run by somebody, over one workspace."""

    folder: Path
    owner: int

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"

    def argv(self, *arguments: str) -> list[str]:
        argv = [sys.executable, "-m", "safeconduct", *arguments]
        if self.owner == os.geteuid():
            return argv
        shown = [sys.prefix, sys.base_prefix, str(TESTS.parent)]
        script = str(TESTS / "as_user.py")
        start = ["unshare", "--mount", sys.executable, script, str(self.owner), *shown, "--"]
        return [*start, *argv]

    @property
    def environment(self) -> dict[str, str]:
        home = str(self.folder / "home")
        return {**os.environ, "HOME": home, "XDG_STATE_HOME": home, "XDG_CONFIG_HOME": home}

    def cli(self, *arguments: str, code: int = 0) -> str:
        """Run the command line; return what it prints."""
        done = subprocess.run(
            self.argv(*arguments), env=self.environment, cwd="/", capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip
        if "tier full" in done.stderr:
            pytest.skip(f"needs tier full: {done.stderr}")
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def run(self, script: str, *, shell: str = "sh", code: int = 0) -> str:
        """Run a script through `safeconduct exec`."""
        policy = ["--policy", str(self.folder / "policy.yaml"), "--workspace", str(self.workspace)]
        return self.cli("exec", *policy, "--", shell, "-c", script, code=code)

    def sets(self) -> list[dict[str, object]]:
        """Return the kept sets, newest first."""
        return cast("list[dict[str, object]]", json.loads(self.cli("changes", "ls", "--json")))

    def kept(self, script: str) -> str:
        """Run a script that leaves one new set and return its name."""
        (name,) = re.findall(r"safeconduct changes diff (\S+)", self.run(script))
        return str(name)


@pytest.fixture(params=USERS)
def desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    owner = ORDINARY if request.param == "ordinary" and os.geteuid() == 0 else os.geteuid()
    if owner != os.geteuid() and shutil.which("unshare") is None:
        pytest.skip("needs unshare to start as an ordinary user")
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="attacks-", dir="/var/tmp")))
    try:
        folder.chmod(0o755)
        for name in ("workspace", "outside", "shown", "home"):
            (folder / name).mkdir()
        (folder / "outside/secret").write_text("SECRET")
        policy = POLICY.replace("SHOWN", str(folder / "shown"))
        fill(folder / "workspace", FILES | {".safeconduct/policy.yaml": policy})
        (folder / "policy.yaml").write_text(policy)
        subprocess.run(["chown", "-R", f"{owner}:{owner}", str(folder)], check=True)
        yield Desk(folder, owner)
    finally:
        shutil.rmtree(folder)


def test_a_set_is_looked_at_committed_and_rolled_back(desk: Desk) -> None:
    before = tree(desk.workspace)
    first = desk.kept("echo two >> file; echo x > Makefile; rm sub/inner")
    second = desk.kept("echo x > new")
    assert tree(desk.workspace) == before
    shown = desk.cli("changes", "diff", first)
    assert "created  Makefile   [later: a build tool obeys it]" in shown
    assert "+two" in shown
    assert "3 changes applied, 0 refused" in desk.cli("changes", "commit", first)
    desk.cli("changes", "rollback", second)
    after = {name: text for name, text in before.items() if name != "sub/inner"}
    assert tree(desk.workspace) == after | {"file": "file\ntwo\n", "Makefile": "x\n"}
    assert (desk.workspace / "Makefile").stat().st_uid == desk.owner
    assert desk.sets() == []


def test_a_server_leaves_a_set_when_it_ends(desk: Desk) -> None:
    policy = ["--policy", str(desk.folder / "policy.yaml"), "--workspace", str(desk.workspace)]
    said = desk.cli("mcp", *policy, "--name", "s", "--", "sh", "-c", "echo x > new; exit 7", code=7)
    (name,) = re.findall(r"safeconduct changes diff (\S+)", said)
    assert not (desk.workspace / "new").exists()
    desk.cli("changes", "commit", str(name))
    assert (desk.workspace / "new").read_text() == "x\n"


def test_an_overlay_looks_like_the_folder_under_it_and_follows_nothing(desk: Desk) -> None:
    desk.workspace.chmod(0o750)
    shown = desk.run("stat -c '%a %U' .; grep ' - overlay ' /proc/self/mountinfo")
    assert shown.startswith("750 agent\n")
    options = shown.partition(" - overlay ")[2].split()[1].split(",")
    assert "redirect_dir=nofollow" in options
    assert ("userxattr" in options) == (desk.owner != 0)
    assert not {"metacopy=on", "index=on", "xino=on", "nfs_export=on"} & set(options)


def test_a_folder_that_became_a_link_after_the_call_leads_nowhere(desk: Desk) -> None:
    name = desk.kept("echo evil > sub/planted; echo evil > sub/inner")
    (desk.workspace / "sub").rename(desk.workspace / "sub.old")
    (desk.workspace / "sub").symlink_to(desk.outside)
    assert (desk.workspace / "sub/secret").read_text() == "SECRET"
    said = desk.cli("changes", "commit", name, code=125)
    assert "workspace." in said
    assert sorted(os.listdir(desk.outside)) == ["secret"]


def test_a_link_that_the_call_put_in_a_folders_place_is_copied_as_a_link(desk: Desk) -> None:
    script = f"rm -r sub && ln -s {desk.outside} sub && echo evil > sub/planted; ls sub >&2; true"
    said = desk.run(script)
    assert "planted" not in os.listdir(desk.outside)
    assert "secret" not in said
    name = str(desk.sets()[0]["id"])
    assert "may lead out of the workspace" in desk.cli("changes", "diff", name)
    desk.cli("changes", "commit", name)
    assert (desk.workspace / "sub").is_symlink()
    assert sorted(os.listdir(desk.outside)) == ["secret"]


def test_hooks_and_rules_made_in_an_overlay_are_flagged_and_stay_out(desk: Desk) -> None:
    script = (
        "mkdir .git/hooks && echo evil > .git/hooks/post-commit && chmod +x .git/hooks/post-commit;"
        "mkdir -p a/.git/hooks .claude; echo evil > a/.git/hooks/post-commit;"
        "echo evil > .claude/settings.json; echo evil > .mcp.json; echo fine > fine; true"
    )
    unconfined = desk.folder / "unconfined"
    shutil.copytree(desk.workspace, unconfined)
    subprocess.run(["sh", "-c", script], cwd=unconfined, check=True)
    assert (unconfined / ".git/hooks/post-commit").exists()
    name = desk.kept(script)
    shown = desk.cli("changes", "diff", name)
    for path in (".git/hooks/", "a/.git/hooks/", ".mcp.json"):
        assert f"{path}   [REFUSED" in shown
    desk.cli("changes", "commit", name)
    found = tree(desk.workspace)
    assert found["fine"] == "fine\n"
    assert not [path for path in found if "hooks" in path or "settings" in path or "mcp" in path]


def test_the_policy_in_force_cannot_be_replaced_through_an_overlay(desk: Desk) -> None:
    rules = desk.workspace / ".safeconduct/policy.yaml"
    before = rules.read_text()
    script = (
        "echo evil > .safeconduct/policy.yaml; rm -rf .safeconduct; mv .safeconduct old;"
        "mkdir -p .safeconduct; echo evil > .safeconduct/policy.yaml;"
        "mkdir -p Sub .SAFECONDUCT; echo evil > .SAFECONDUCT/policy.yaml; echo x > Sub/x; true"
    )
    name = desk.kept(script)
    desk.cli("changes", "commit", name)
    assert rules.read_text() == before
    assert not (desk.workspace / ".SAFECONDUCT/policy.yaml").exists()
    assert (desk.workspace / "Sub/x").exists()


SEARCH = """
for place in / /.stage /.stage/* /proc/*/root /proc/*/cwd /tmp /dev/shm; do
  timeout 5 find $place -xdev -name 'made-*' 2>/dev/null; ls -A $place 2>/dev/null
done | grep made- && echo ESCAPED
true
"""


@pytest.mark.parametrize("shell", ["sh", "dash"])
def test_no_other_sandbox_sees_what_a_call_makes(desk: Desk, shell: str) -> None:
    go = desk.folder / "shown" / "go"
    script = f"echo SECRET > made-here; echo ready; until [ -e {go} ]; do :; done"

    def seen(own: str) -> bool:
        """Search from another sandbox while a call lives that has made its file."""
        policy = ["--policy", str(desk.folder / "policy.yaml"), "--workspace", str(desk.workspace)]
        process = subprocess.Popen(
            desk.argv("exec", *policy, "--", own, "-c", script), env=desk.environment, cwd="/",
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            return "ESCAPED" in desk.run(
                SEARCH + f"ls -A {desk.workspace} | grep made- && echo ESCAPED; true", shell=shell
            )
        finally:
            go.touch()
            process.communicate(timeout=60)
            go.unlink()
            (desk.workspace / "made-here").unlink(missing_ok=True)

    assert seen("dash")  # written directly, everybody sees it
    assert not seen("sh")


def test_the_marks_of_an_overlay_cannot_be_forged(desk: Desk) -> None:
    """A folder marked as opaque would be copied out as a deletion of all that it does not hold."""
    script = """python3 - <<'END'
import os
def mark(path, name, value):
    try:
        os.setxattr(path, name, value, follow_symlinks=False)
    except OSError as error:
        print(path, name, error.strerror)
os.chmod("sub", 0o750)
os.mkdir("fresh")
open("empty", "w").close()
for space in ("user", "trusted"):
    for path in ("sub", "fresh", "empty", "file"):
        mark(path, space + ".overlay.opaque", b"y")
        mark(path, space + ".overlay.whiteout", b"")
        mark(path, space + ".overlay.redirect", b"/.git")
        mark(path, space + ".overlay.metacopy", b"")
        mark(path, space + ".overlay.origin", b"x" * 40)
try:
    os.mknod("sub/inner2", 0o020000, 0)
except OSError as error:
    print(error.strerror)
END
"""
    name = desk.kept(script)
    changes = json.loads(desk.cli("changes", "diff", name, "--json"))
    assert not [change for change in changes if change["kind"] == "deleted"]
    desk.cli("changes", "commit", name)
    found = tree(desk.workspace)
    assert found["sub/inner"] == "inner\n"
    assert found["file"] == "file\n"
    assert not [
        mark
        for path in desk.workspace.rglob("*")
        for mark in os.listxattr(path, follow_symlinks=False)
        if "overlay" in mark
    ]


def test_the_base_is_out_of_reach_while_an_overlay_lies_over_it(desk: Desk) -> None:
    before = tree(desk.workspace)
    script = """
for lower in $(tr , '\\n' < /proc/self/mountinfo | sed -n s/lowerdir=//p) /.stage /.stage/65; do
  echo evil > $lower/planted; echo evil > $lower/file; rm -rf $lower/sub
done 2>/dev/null
mkdir -p m; mount --bind / m; umount $PWD; umount -l $PWD; mount -o remount,rw /
unshare -Urm umount -l $PWD
ls / | head -50 > listing
true
"""
    desk.run(script)
    assert tree(desk.workspace) == before


def test_what_cannot_be_read_back_is_still_decided_about(desk: Desk) -> None:
    """Modes that keep their owner out, names that no encoding has, and special files."""
    name = desk.kept(
        "mkdir locked; echo x > locked/in; chmod 000 locked/in; chmod 000 locked;"
        "printf x > \"$(printf 'n\\377\\033]0;x')\"; mkfifo fifo; chmod 000 file; echo ok > ok"
    )
    shown = desk.cli("changes", "diff", name)
    assert "\x1b" not in shown
    desk.cli("changes", "commit", name)
    assert (desk.workspace / "locked/in").read_text() == "x\n"
    assert not (desk.workspace / "fifo").exists()
    assert os.path.exists(os.fsencode(desk.workspace) + b"/n\xff\x1b]0;x")
