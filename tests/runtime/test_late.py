"""Folders that are attached when the call comes, to a sandbox that waited without any."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Profile, Tier
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.shield import Shield

if TYPE_CHECKING:
    from tests.conftest import Box

LOOK = 'for path; do [ -e "$path" ] && echo "$path"; done; mkdir /srv/new /new'


@pytest.fixture
def folders() -> Iterator[tuple[Path, Path]]:
    """Two workspaces below a folder that no sandbox shows by itself."""
    if os.geteuid() != 0 and not os.access("/srv", os.W_OK):
        pytest.skip("only root may make folders in /srv")
    made = (Path(f"/srv/one-{os.getpid()}"), Path(f"/srv/two-{os.getpid()}"))
    for folder in made:
        (folder / "work").mkdir(parents=True)
        folder.chmod(0o755)
        (folder / "work").chmod(0o777)
    yield made
    for folder in made:
        for path in (*(folder / "work").iterdir(), folder / "work", folder):
            path.rmdir() if path.is_dir() else path.unlink()


def _run(sandbox: NativeSandbox, folder: Path, *argv: str) -> bytes:
    granted = str(folder / "work")
    profile = Profile(name="late", read=(granted,), write=(granted,))
    outcome = sandbox.run(
        "late", Program(argv=argv, cwd=granted), profile,
        workspace=granted, shield=Shield(), late=True,
    )  # fmt: skip
    assert outcome.signal is None, outcome
    return outcome.stdout


def test_one_call_does_not_learn_the_folders_of_another(
    box: Box, folders: tuple[Path, Path]
) -> None:
    if box.tier is not Tier.FULL:
        pytest.skip("tier landlock attaches nothing")
    look = ("sh", "-c", LOOK, "sh", *map(str, folders), "/srv/new", "/new")
    for folder in (folders[0], folders[1], folders[0]):
        assert _run(box.sandbox, folder, *look).decode().split() == [str(folder)]


def test_a_late_folder_is_written_and_nothing_beside_it(
    box: Box, folders: tuple[Path, Path]
) -> None:
    if box.tier is not Tier.FULL:
        pytest.skip("tier landlock attaches nothing")
    attack = "echo x > made; mkdir ../beside /srv/beside /beside && echo ESCAPED"
    assert _run(box.sandbox, folders[0], "sh", "-c", attack) == b""
    assert (folders[0] / "work" / "made").read_text() == "x\n"
    assert not (folders[0] / "beside").exists()
