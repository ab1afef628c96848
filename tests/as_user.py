"""Start a program as an ordinary user who can read the given folders, wherever they lie.

Run by root as `unshare --mount python as_user.py UID FOLDER… -- argv`. An interpreter below a
private home folder is out of every other user's reach: in a mount namespace of its own, what is in
the way is covered by an empty folder in which only the given ones are shown.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main(uid: int, folders: list[str], argv: list[str]) -> None:
    """Show the folders, become the user, execute."""
    mount("--make-rprivate", "/")
    opened = {folder: os.open(folder, os.O_PATH) for folder in folders}
    for folder in folders:
        for parent in reversed(Path(folder).parents):
            if parent.exists() and not parent.stat().st_mode & 0o001:
                mount("-t", "tmpfs", "-o", "mode=0755", "cover", str(parent))
    for folder, fd in opened.items():
        if not os.path.isdir(folder):
            os.makedirs(folder)
            own = f"/proc/{os.getpid()}/fd/{fd}"
            mount("--no-canonicalize", "--bind", own, folder)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.execv(argv[0], argv)  # noqa: S606 - argv is the test's own


def mount(*arguments: str) -> None:
    """Call mount(8)."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True, timeout=10)


if __name__ == "__main__":
    split = sys.argv.index("--")
    main(int(sys.argv[1]), sys.argv[2:split], sys.argv[split + 1 :])
