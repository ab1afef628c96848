"""What an older kernel cannot do: it is said, and nothing runs with less."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

from safeconduct.errors import SandboxFailed, SandboxUnavailable

from .desk import policy, put_up, run
from .registry import STOCK, USER_UID, check

# mount_setattr(2): tmpfs can be id-mapped since this kernel; overlayfs cannot on any.
_TMPFS_ID_MAPPED = (6, 3)


@check(*STOCK, uids=(0, USER_UID))
def a_workspace_on_any_file_system() -> None:
    """An ordinary user's may be anywhere; root's needs an id-mapped mount, or nothing runs."""
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    ordinary = os.geteuid() != 0
    places = (
        (Path.cwd(), True),
        (Path("/dev/shm"), ordinary or release >= _TMPFS_ID_MAPPED),
        (Path("/var/tmp"), ordinary),
    )
    for parent, possible in places:
        folder = Path(tempfile.mkdtemp(dir=parent))
        folder.joinpath("given").write_text("given")
        refusal = _refusal(folder)
        assert (not refusal) is possible, (parent, refusal)


def _refusal(folder: Path) -> str:
    """Say why no program could use the folder. What fails must fail before it started."""
    script = f"cat {folder}/given; echo >{folder}/made"
    try:
        with put_up(policy(), workspace=folder) as runtime:
            outcome = run(runtime, "sh", "-c", script)
    except (SandboxFailed, SandboxUnavailable) as error:
        assert not (folder / "made").exists()
        return error.message
    assert (outcome.ok, outcome.stdout) == (True, b"given"), outcome
    assert (folder / "made").stat().st_uid == os.geteuid()
    return ""
