"""Commits of an overlay: killed at any point they are completed or restored; two do not meet; and
the command line decides about kept changes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.overlay_kit import AFTER, FILES, MODES, ROOT, SCRIPT, Overlay, mounted, tree

from safeconduct.errors import SandboxFailed
from safeconduct.runtime.sandbox.overlay import (
    Conflict,
    Recovered,
    Snapshot,
    commit,
    recover,
    shelf,
)


@pytest.fixture(params=MODES)
def overlay(request: pytest.FixtureRequest) -> Iterator[Overlay]:
    with mounted(str(request.param), FILES) as one:
        yield one


class Killed(BaseException):
    """Raised where the process is to die."""


def _commit_until(overlay: Overlay, point: int) -> tuple[bool, str]:
    """Commit in a child that is killed when it reaches its ``point``-th point."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def reached(name: str) -> None:
            nonlocal count
            if count == point:
                os.write(write, name.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        try:
            commit(
                overlay.diff(),
                upper=overlay.upper,
                workspace=overlay.base,
                journal=overlay.journal,
                ended=lambda: True,
                reached=reached,
            )
        finally:
            os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as name:
        return os.WIFSIGNALED(status), name.read()


def test_a_commit_killed_at_any_point_is_completed_or_restored() -> None:
    points: list[str] = []
    point, killed = 0, True
    while killed:
        with mounted(MODES[0] if ROOT else MODES[1], FILES, where="/dev/shm") as overlay:
            before = tree(overlay.workspace)
            overlay.run(SCRIPT)
            killed, name = _commit_until(overlay, point)
            points.append(name)
            _check_each_name(tree(overlay.workspace), before)
            done = recover(overlay.journal, overlay.base).done
            if not killed:
                assert done is Recovered.NOTHING
                assert tree(overlay.workspace) == AFTER
                continue
            applied = name == "applied" or name.startswith("finish")
            assert done is (Recovered.COMPLETED if applied else Recovered.RESTORED)
            assert tree(overlay.workspace) == (AFTER if applied else before)
            assert recover(overlay.journal, overlay.base).done is Recovered.NOTHING
            assert sorted(os.listdir(overlay.journal)) == ["lock"]
            if not applied:
                with Snapshot.take(overlay.base) as overlay.snapshot:
                    overlay.commit()
                assert tree(overlay.workspace) == AFTER
        point += 1
    assert {"plan", "staged", "applied"} <= set(points)
    assert len(points) > 35


def _check_each_name(now: dict[str, str], before: dict[str, str]) -> None:
    for name in {*before, *AFTER}:
        assert now.get(name) in (before.get(name), AFTER.get(name)), name


def test_recovering_may_be_killed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from safeconduct.runtime.sandbox.overlay import recovery

    real = recovery._clear  # pyright: ignore[reportPrivateUsage]
    for point in range(8):
        with mounted(MODES[0] if ROOT else MODES[1], FILES, where="/dev/shm") as overlay:
            before = tree(overlay.workspace)
            overlay.run(SCRIPT)
            assert _commit_until(overlay, 22)[1].startswith("apply")
            left = point

            def dying(*args: object, **named: object) -> bool:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return real(*args, **named)  # type: ignore[arg-type]

            with monkeypatch.context() as patch:
                patch.setattr(recovery, "_clear", dying)
                with pytest.raises(Killed):
                    recover(overlay.journal, overlay.base)
            assert recover(overlay.journal, overlay.base).done is Recovered.RESTORED
            assert tree(overlay.workspace) == before


def test_a_new_commit_recovers_the_broken_one_first(overlay: Overlay) -> None:
    overlay.run(SCRIPT)
    assert _commit_until(overlay, 20)[0]
    with Snapshot.take(overlay.base) as overlay.snapshot, pytest.raises(Conflict):
        overlay.commit()  # the diff saw the half of it
    with Snapshot.take(overlay.base) as overlay.snapshot:
        overlay.commit()
    assert tree(overlay.workspace) == AFTER


def test_a_journal_of_another_workspace_is_refused(overlay: Overlay, tmp_path: Path) -> None:
    overlay.run(SCRIPT)
    assert _commit_until(overlay, 20)[0]
    other = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(SandboxFailed) as caught:
            recover(overlay.journal, other)
    finally:
        os.close(other)
    assert caught.value.code == "workspace.journal"
    recover(overlay.journal, overlay.base)


def test_two_commits_do_not_meet(overlay: Overlay) -> None:
    overlay.run("echo x > new")
    overlay.commit(overlay.diff())
    import fcntl

    with (overlay.journal / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SandboxFailed) as caught:
            overlay.commit()
    assert caught.value.code == "workspace.busy"


def _cli(overlay: Overlay, *arguments: str, code: int = 0) -> str:
    state = overlay.workspace.parent / "state"
    done = subprocess.run(
        [sys.executable, "-m", "safeconduct", "changes", *arguments],
        env={**os.environ, "XDG_STATE_HOME": str(state)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def _shelve(overlay: Overlay) -> str:
    folder = overlay.workspace.parent / "state/safeconduct/changes"
    changes = overlay.diff()
    part = shelf.Part(changes=changes, upper=overlay.upper)
    return shelf.shelve(folder, [part], workspace=str(overlay.workspace))[0]


def test_kept_changes_are_shown_and_committed_by_the_command_line(overlay: Overlay) -> None:
    overlay.run(SCRIPT + "printf '\\033[2J\\n' > evil; echo x > Makefile; echo x > .envrc")
    name = _shelve(overlay)
    overlay.holder.communicate()
    (row,) = json.loads(_cli(overlay, "ls", "--json"))
    assert (row["id"], row["changes"], row["later"], row["refused"]) == (name, 22, 2, 1)
    shown = _cli(overlay, "diff", name)
    assert "\x1b" not in shown
    assert "+\\x1b[2J" in shown
    assert "created  Makefile   [later: a build tool obeys it]" in shown
    assert "REFUSED: no tool may write this name" in shown
    assert "21 changes applied, 1 refused" in _cli(overlay, "commit", name)
    assert tree(overlay.workspace) == {**AFTER, "evil": "\x1b[2J\n", "Makefile": "x\n"}
    assert json.loads(_cli(overlay, "ls", "--json")) == []
    assert "workspace.no_changes" in _cli(overlay, "commit", name, code=125)
    assert "workspace.no_changes" in _cli(overlay, "diff", "../../keys", code=125)


def test_kept_changes_are_rolled_back_or_in_conflict(overlay: Overlay) -> None:
    overlay.run(SCRIPT)
    name, other = _shelve(overlay), _shelve(overlay)
    (overlay.workspace / "edit.txt").write_text("theirs")
    before = tree(overlay.workspace)
    assert "workspace.conflict" in _cli(overlay, "commit", name, code=125)
    _cli(overlay, "rollback", name)
    assert tree(overlay.workspace) == before
    assert [row["id"] for row in json.loads(_cli(overlay, "ls", "--json"))] == [other]
