"""What goes wrong around the sets of overlays: no room, killed processes, two at the same time."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.overlay_desk import Desk, seated, start
from tests.overlay_kit import tree

from safeconduct.call import EntryKind, Outcome
from safeconduct.errors import Error, SandboxFailed
from safeconduct.runtime.sandbox.overlay import Conflict, shelf
from safeconduct.runtime.supervisor import Runtime


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with seated(monkeypatch) as one:
        yield one


def test_too_many_sets_refuse_the_next_call(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_SETS_MAX", 2)
    desk.kept("echo x > new")
    kept = desk.kept("echo x > new")
    with pytest.raises(SandboxFailed) as caught:
        desk.run("echo x > new")
    assert caught.value.code == "workspace.changes_full"
    assert caught.value.hint
    desk.runtime.changes.rollback(kept.id)
    monkeypatch.setattr(shelf, "_BYTES_MAX", 10)
    with pytest.raises(SandboxFailed):
        desk.run("echo x > new")


def test_what_cannot_be_kept_is_an_error_and_leaves_nothing(desk: Desk) -> None:
    """RLIMIT_FSIZE stands for a full disk, as in test_full_disk.py."""
    before = tree(desk.workspace)
    desk.kept("echo x > new")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY))
    try:
        with pytest.raises(SandboxFailed) as caught:
            desk.run("head -c 4000000 /dev/zero | tr '\\0' x > large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert caught.value.code == "workspace.not_kept"
    assert caught.value.hint
    assert desk.last(EntryKind.CALL_OUTCOME).body["code"] == "workspace.not_kept"
    assert os.listdir(desk.state / "safeconduct/changes") == desk.runtime.changes.names()
    assert tree(desk.workspace) == before


def test_what_a_killed_process_left_half_made_is_swept_after_a_day(desk: Desk) -> None:
    sets = desk.state / "safeconduct" / "changes"
    kept = desk.kept("mkdir new; echo x > new/x")
    old, fresh = sets / ".20200101T000000Z-aaaaaa", sets / ".20200101T000000Z-bbbbbb"
    for draft in (old, fresh):
        shutil.copytree(sets / kept.id, draft)
    os.utime(old, (0, 0))
    with start(desk.folder) as runtime:
        assert runtime.changes.names() == [kept.id]
    assert not old.exists()
    assert fresh.exists()


def test_nothing_is_left_of_an_overlay(desk: Desk) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(
            Path("/proc/self/mounts").read_text().split("\n")
        )

    def all_kinds() -> None:
        desk.kept("echo x > new")
        with pytest.raises(Error):
            desk.run("echo x > file", under=("env", "dash"))

    all_kinds()
    before = held()
    for _ in range(10):
        all_kinds()
    assert held() == before


KILLED = """
import os, signal, sys
from safeconduct.runtime.sandbox.overlay import kernel
from safeconduct.runtime.supervisor import Runtime

point, left = sys.argv[3], int(sys.argv[4])
real = getattr(kernel, point)

def counted(*arguments):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return real(*arguments)

with Runtime.from_policy(sys.argv[1], workspace=sys.argv[2]) as runtime:
    setattr(kernel, point, counted)
    runtime.changes.commit(runtime.changes.names()[0])
"""


@pytest.mark.parametrize(("point", "count"), [("exchange", 0), ("exchange", 1), ("rename_new", 1)])
def test_a_commit_that_was_killed_is_ended_when_the_next_runtime_starts(
    desk: Desk, point: str, count: int
) -> None:
    before = tree(desk.workspace)
    kept = desk.kept(
        "echo a > file; echo b > sub/inner; echo c > new; echo d > sub/new; chmod 750 sub;"
        "rm sub/other"
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(desk.folder / "policy.yaml"),
         str(desk.workspace), point, str(count)],
        env={**os.environ, "XDG_STATE_HOME": str(desk.state)}, cwd="/", check=False, timeout=60,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert tree(desk.workspace) != before
    with start(desk.folder) as runtime:
        assert {path: str(one.done) for path, one in runtime.recovered.items()} == {
            str(desk.workspace): "restored"
        }
        assert tree(desk.workspace) == before
        assert runtime.changes.names() == [kept.id]
    with start(desk.folder) as runtime:
        assert runtime.recovered == {}
        # Restoring moved change times; what the set was made from is still what it is.
        assert len(runtime.changes.commit(kept.id).applied) == kept.count
    after = {"file": "a\n", "sub/inner": "b\n", "new": "c\n", "sub/new": "d\n"}
    assert tree(desk.workspace) == {
        name: text for name, text in (before | after).items() if name != "sub/other"
    }
    assert (desk.workspace / "sub").stat().st_mode & 0o777 == 0o750


def test_a_change_time_alone_is_no_conflict_and_forged_times_hide_none(desk: Desk) -> None:
    touched, forged = desk.workspace / "file", desk.workspace / "sub/inner"
    kept = desk.kept("echo a > file; rm sub/inner; chmod 755 sub/other")
    for path in (touched, forged, desk.workspace / "sub/other"):
        os.link(path, desk.folder / "second")  # moves the change time and nothing else
        (desk.folder / "second").unlink()
    times = forged.stat()
    forged.write_text("INNER\n")
    os.utime(forged, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(Conflict) as caught:
        desk.runtime.changes.commit(kept.id)
    assert caught.value.paths == ("sub/inner",)
    forged.write_text("inner\n")
    os.utime(forged, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(desk.runtime.changes.commit(kept.id).applied) == 3


def test_a_commit_under_way_is_no_broken_one(desk: Desk) -> None:
    journal = desk.runtime.changes.places.commits(str(desk.workspace))
    desk.runtime.changes.commit(desk.kept("echo x > new").id)
    (journal / "commit.jsonl").write_text("")
    import fcntl

    with (journal / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with start(desk.folder) as runtime:
            assert runtime.recovered == {}
    (journal / "commit.jsonl").unlink()


def test_two_runtimes_keep_sets_side_by_side(desk: Desk) -> None:
    with start(desk.folder) as other:
        ready = threading.Barrier(2)

        def one(runtime: Runtime) -> Outcome:
            ready.wait(20)
            return runtime.call("shell.run", argv=["sh", "-c", "echo x > new"])

        with ThreadPoolExecutor(2) as threads:
            outcomes = list(threads.map(one, (desk.runtime, other)))
    assert sorted(kept.id for outcome in outcomes for kept in outcome.changes) == sorted(
        desk.runtime.changes.names()
    )
