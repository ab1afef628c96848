"""Protected, hidden and swapped names of a workspace: the attack works without the barrier and
fails with it.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Outcome, Tier
from safeconduct.errors import SandboxFailed
from safeconduct.runtime.sandbox.shield import Shield

if TYPE_CHECKING:
    from tests.conftest import Box

ROOT = os.geteuid() == 0


def escaped(outcome: Outcome) -> bool:
    return b"ESCAPED" in outcome.stdout


def test_protected_names_stay(box: Box) -> None:
    hooks = box.workspace / ".git" / "hooks"
    hooks.mkdir(parents=True)
    for folder in (hooks.parent, hooks):
        folder.chmod(0o777)
    attack = ("sh", "-c", "echo evil > .git/hooks/post-commit && echo ESCAPED")
    shield = Shield(protected=(str(hooks),), anchors=(str(hooks.parent),))
    assert escaped(box.run(*attack))
    (hooks / "post-commit").unlink()
    assert not escaped(box.run(*attack, shield=shield))
    assert not list(hooks.iterdir())


def test_the_folder_above_a_protected_name_cannot_be_renamed(box: Box) -> None:
    hooks = box.workspace / ".git" / "hooks"
    hooks.mkdir(parents=True)
    for folder in (hooks.parent, hooks):
        folder.chmod(0o777)
    attack = (
        "sh", "-c",
        "mv .git .old && mkdir -p .git/hooks && echo evil > .git/hooks/x && echo ESCAPED",
    )  # fmt: skip
    shield = Shield(protected=(str(hooks),), anchors=(str(hooks.parent),))
    assert not escaped(box.run(*attack, shield=shield))
    assert not (box.workspace / ".old").exists()
    assert escaped(box.run(*attack))


def test_a_second_name_does_not_open_a_protected_file(box: Box) -> None:
    rules = box.workspace / "rules"
    rules.write_text("mine")
    rules.chmod(0o666)
    (box.workspace / "src").mkdir()
    (box.workspace / "src").chmod(0o777)
    attack = ("sh", "-c", "ln rules src/two && echo evil > src/two && echo ESCAPED")
    shield = Shield(protected=(str(rules),), anchors=())
    assert not escaped(box.run(*attack, shield=shield))
    assert rules.read_text() == "mine"
    if not (ROOT and box.tier is Tier.LANDLOCK):  # sysctl fs.protected_hardlinks: not the owner
        assert escaped(box.run(*attack))
        assert rules.read_text() == "evil\n"


def test_hidden_names_cannot_be_read_or_moved(box: Box) -> None:
    keys = box.workspace / "keys"
    keys.mkdir()
    (keys / "one").write_text("SECRET")
    (box.workspace / ".env").write_text("SECRET")
    attack = (
        "sh", "-c",
        "cp -r keys copy; mv .env env; ln .env hard; mv keys other;"
        "grep -rqs SECRET . && echo ESCAPED",
    )  # fmt: skip
    shield = Shield(hidden=(str(keys), str(box.workspace / ".env")))
    assert not escaped(box.run(*attack, shield=shield))
    assert escaped(box.run(*attack))


def test_a_granted_folder_that_became_a_link_is_refused(box: Box, outside: Path) -> None:
    folder = box.workspace / "out"
    folder.mkdir()
    folder.chmod(0o777)
    profile = replace(box.profile(), read=(str(folder),), write=(str(folder),))
    attack = ("sh", "-c", f"cat {folder}/secret | grep -q SECRET && echo ESCAPED")
    assert box.run("true", profile=profile, cwd=str(folder)).ok
    folder.rmdir()
    folder.symlink_to(outside)
    unconfined = subprocess.run(attack, capture_output=True)
    assert b"ESCAPED" in unconfined.stdout
    with pytest.raises(SandboxFailed):
        box.run(*attack, profile=profile, cwd="/usr")
