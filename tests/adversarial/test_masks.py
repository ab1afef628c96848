"""What hides cannot be written: nothing of one call is found by the next through a mask.

Every mask of a template is a clone of one empty folder or file. Started by an ordinary user, those
belong to the user's programs too.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Limits, Outcome, Profile
from safeconduct.runtime.sandbox.native import Program
from safeconduct.runtime.sandbox.scratch import remove_tree
from safeconduct.runtime.sandbox.shield import Shield

if TYPE_CHECKING:
    from tests.conftest import Box

LEAVE = "chmod 777 {0} 2>/dev/null; echo left-behind > {0}/left 2>/dev/null"
LOOK = "cat {0}/left 2>/dev/null"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A workspace that lies in no file system of a sandbox's own, as most do."""
    made = Path(os.path.realpath(tempfile.mkdtemp(prefix="masks-", dir="/var/tmp")))
    made.chmod(0o777)
    (made / "hidden").mkdir()
    (made / "open").mkdir(mode=0o777)
    (made / "open").chmod(0o777)
    yield made
    remove_tree(str(made))


def run(box: Box, folder: Path, command: str) -> Outcome:
    place = str(folder)
    profile = Profile(name="m", read=(place,), write=(place,), limits=Limits(wall_ms=10_000))
    shield = Shield(hidden=(f"{place}/hidden",))
    program = Program(argv=["sh", "-c", command], cwd="/tmp" if box.tier == "full" else "/usr")
    return box.sandbox.run("call", program, profile, workspace=place, shield=shield)


@pytest.mark.parametrize("name", ["hidden", "/usr/share/keyrings", "/proc/sys"])
def test_a_mask_carries_nothing_to_the_next_call(box: Box, folder: Path, name: str) -> None:
    run(box, folder, LEAVE.format(folder / "open"))
    assert run(box, folder, LOOK.format(folder / "open")).stdout == b"left-behind\n"
    masked = folder / name
    run(box, folder, LEAVE.format(masked))
    assert run(box, folder, LOOK.format(masked)).stdout == b""
    assert not (masked / "left").exists()
