"""Real overlay mounts for tests: as root in a private mount namespace, and rootless in one of an
own user namespace, where a tool's commands run and the supervisor only holds two descriptors.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from safeconduct.policies import PROTECTED
from safeconduct.runtime.sandbox.overlay import (
    Bounds,
    Changes,
    CommitReport,
    Marks,
    Snapshot,
    commit,
    diff,
    protects,
)

MODES = ("root", "user")
ROOT = os.geteuid() == 0
_USER = "tester"
_OPTIONS = "redirect_dir=nofollow,metacopy=off,index=off"
_HOLD = """
set -e
mount -t tmpfs -o size=256m,mode=0777 tmpfs "$2"
mkdir "$2/upper" "$2/work" "$2/mnt"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work,$3" "$2/mnt"
echo ready
exec cat
"""

# A project, what a tool does to it, and what it is then.
FILES = {
    "keep.txt": "keep\n",
    "edit.txt": "one\ntwo\nthree\n",
    "gone.txt": "gone\n",
    "mode.sh": "#!/bin/sh\n",
    "swap": "a file\n",
    "src/a.py": "a\n",
    "src/b.py": "b\n",
    "src/deep/c.py": "c\n",
    "old/x": "x\n",
    "old/sub/y": "y\n",
    "renew/was": "was\n",
    "renew/same": "same\n",
    "turns/inner": "inner\n",
    "link": "->keep.txt",
}
SCRIPT = """
echo four >> edit.txt
rm gone.txt
chmod 755 mode.sh
rm swap; mkdir swap; echo in > swap/in
echo aa > tmp; mv tmp src/a.py
mkdir src/new; echo n > src/new/n; ln -s ../a.py src/new/l
chmod 750 src/deep
rm -r old
rm -r renew; mkdir renew; echo same > renew/same; echo is > renew/is
rm -r turns; echo file > turns
ln -sfn edit.txt link
touch keep.txt
"""
AFTER = {
    "edit.txt": "one\ntwo\nthree\nfour\n",
    "keep.txt": "keep\n",
    "link": "->edit.txt",
    "mode.sh": "#!/bin/sh\n",
    "renew": "/",
    "renew/is": "is\n",
    "renew/same": "same\n",
    "src": "/",
    "src/a.py": "aa\n",
    "src/b.py": "b\n",
    "src/deep": "/",
    "src/deep/c.py": "c\n",
    "src/new": "/",
    "src/new/l": "->../a.py",
    "src/new/n": "n\n",
    "swap": "/",
    "swap/in": "in\n",
    "turns": "file\n",
}


@dataclass
class Overlay:
    """One mounted overlay over a workspace, and what a supervisor has of it."""

    workspace: Path
    stage: Path
    holder: subprocess.Popen[str]
    enter: list[str]
    marks: Marks
    snapshot: Snapshot
    upper: int
    base: int
    journal: Path
    alive: bool = field(default=False)

    @property
    def mode(self) -> str:
        return "root" if self.marks == "trusted" else "user"

    def run(self, script: str, *, uid: int | None = None) -> None:
        """Run shell commands inside, in the merged workspace; they must succeed."""
        own = (
            [] if uid is None else ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        )
        argv = [*self.enter, *own, "sh", "-ec", f"cd '{self.stage}/mnt'\n{script}"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    def diff(self, bounds: Bounds | None = None) -> Changes:
        return diff(
            self.upper,
            self.base,
            self.snapshot,
            marks=self.marks,
            protected=protects(PROTECTED),
            bounds=bounds,
        )

    def commit(self, changes: Changes | None = None) -> CommitReport:
        return commit(
            changes if changes is not None else self.diff(),
            upper=self.upper,
            workspace=self.base,
            journal=self.journal,
            ended=lambda: not self.alive,
        )

    def kinds(self) -> dict[str, str]:
        return {change.path: str(change.kind) for change in self.diff()}


def needs(mode: str) -> None:
    """Skip by name what this machine or user cannot mount."""
    if mode == "root" and not ROOT:
        pytest.skip("needs root: an overlay without a user namespace")
    argv = [*_credentials(mode), "unshare", "-Urm", "true"]
    if mode == "user" and subprocess.run(argv, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs user namespaces")


@contextmanager
def mounted(
    mode: str, files: Mapping[str, str | None], *, where: str = "/var/tmp"
) -> Generator[Overlay]:
    """Make a workspace of ``files`` (None is a folder) and mount an overlay over it."""
    needs(mode)
    top = Path(os.path.realpath(tempfile.mkdtemp(prefix="overlay-", dir=where)))
    top.chmod(0o755)
    workspace, stage = top / "workspace", top / "stage"
    for folder in (workspace, stage, top / "outside"):
        folder.mkdir()
    fill(workspace, files)
    credentials = _credentials(mode)
    if credentials:
        entry = pwd.getpwnam(_USER)
        for path in (workspace, *workspace.rglob("*"), stage):
            os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)
    base = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY)
    snapshot = Snapshot.take(base)
    options = _OPTIONS + (",userxattr" if mode == "user" else "")
    spaces = ["unshare", "-Urm"] if mode == "user" else ["unshare", "-m"]
    holder = subprocess.Popen(
        [*credentials, *spaces, "sh", "-c", _HOLD, "sh", str(workspace), str(stage), options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    upper = -1
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        upper = os.open(f"/proc/{holder.pid}/root{stage}/upper", os.O_RDONLY | os.O_DIRECTORY)
        enter = [*credentials, "nsenter", "-t", str(holder.pid), "-m"]
        enter += ["-U", "--preserve-credentials"] if mode == "user" else []
        yield Overlay(
            workspace, stage, holder, enter, "user" if mode == "user" else "trusted",
            snapshot, upper, base, top / "journal",
        )  # fmt: skip
    finally:
        holder.communicate()  # the end of its input ends the holder, and its mounts with it
        for fd in (upper, base):
            if fd >= 0:
                os.close(fd)
        snapshot.close()
        subprocess.run(["chmod", "-R", "u+rwX", str(top)], capture_output=True, check=False)
        shutil.rmtree(top)


def fill(folder: Path, files: Mapping[str, str | None]) -> None:
    """Make files; None is a folder, a text after `->` a link."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            path.mkdir(exist_ok=True)
        elif text.startswith("->"):
            path.symlink_to(text[2:])
        else:
            path.write_text(text)


def tree(folder: Path) -> dict[str, str]:
    """Return what a folder holds: text, ``->`` and a link's target, or `/` for a folder."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"->{path.readlink()}"
        else:
            found[name] = "/" if path.is_dir() else path.read_text(errors="replace")
    return found


def _credentials(mode: str) -> list[str]:
    if mode == "user" and ROOT:
        try:
            pwd.getpwnam(_USER)
        except KeyError:
            pytest.skip(f"needs an ordinary user named {_USER}")
        return ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"]
    return []
