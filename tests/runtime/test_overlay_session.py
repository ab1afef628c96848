"""Calls under a profile with ``workspace: session-overlay``: one overlay for all of a session.

They stay in one file because each of them needs the same policy, desk and helpers.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
from tests.overlay_desk import Desk, seated, start
from tests.overlay_kit import AFTER, FILES, SCRIPT, fill, tree

from safeconduct.call import EntryKind, KeptChanges, Outcome, Tier
from safeconduct.errors import SandboxFailed, SandboxUnavailable
from safeconduct.runtime.adapters.mcp_server import Server, confined
from safeconduct.runtime.sandbox.overlay import Change, Conflict

POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**"], write: ["$WS/**"], workspace: session-overlay, limits: LIMITS}
  small: {like: base, limits: {disk: 2MiB, inodes: 128}}
  part: {like: base, write: ["$WS/sub/**"]}
  looks: {like: base, write: ["APART/**"]}
  each: {like: base, workspace: overlay}
  hides: {like: base, hide: ["$WS/sub/**"]}
tools:
  fs.read: {allow: {path: ["$WS/**"]}}
  fs.list: {allow: {path: ["$WS/**"]}}
  fs.write: {allow: {path: ["$WS/**"]}}
  python.run: {allow: {code: any}}
  shell.run:
    - {allow: {argv: [sh, -c, any]}}
    - {allow: {argv: [dash, -c, any]}, profile: small}
    - {allow: {argv: [bash, -c, any]}, profile: part}
    - {allow: {argv: [env, sh, -c, any]}, profile: looks}
    - {allow: {argv: [env, dash, -c, any]}, profile: each}
    - {allow: {argv: [env, bash, -c, any]}, profile: hides}
"""
SMALL, PART, LOOKS = ("dash",), ("bash",), ("env", "sh")
EACH, HIDES = ("env", "dash"), ("env", "bash")


@pytest.fixture
def limits(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "{wall: 20s}"))


@pytest.fixture
def desk(limits: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with seated(monkeypatch, limits, POLICY) as one:
        yield one


def ran(desk: Desk, script: str, under: tuple[str, ...] = ("sh",)) -> bytes:
    """Run a script that must succeed; it leaves no set by itself."""
    outcome = desk.run(script, under=under)
    assert outcome.ok, outcome.stderr
    assert outcome.changes == ()
    return outcome.stdout


def pending(desk: Desk) -> dict[str, Change]:
    """Return what the session changed so far in its workspace, by path."""
    found = desk.runtime.changes.session()
    assert all(one.workspace == str(desk.workspace) for one in found)
    return {change.path: change for one in found for change in one.changes}


def keep(desk: Desk) -> KeptChanges:
    (kept,) = desk.runtime.changes.keep_session()
    return kept


def test_a_later_call_sees_what_earlier_calls_changed(desk: Desk) -> None:
    before = tree(desk.workspace)
    # The control: with an overlay of its own it does not.
    assert desk.run("echo x > new", under=EACH).ok
    assert desk.run("cat new", under=EACH).exit_code == 1
    ran(desk, "echo one > new; rm sub/inner; echo more >> file; mkdir -p a/b; echo y > a/b/c")
    ran(desk, "echo two >> new; mv a/b/c a/d; chmod 600 file; [ ! -e sub/inner ]")
    assert ran(desk, "cat new file a/d; ls a; ls sub") == b"one\ntwo\nfile\nmore\ny\nb\nd\nother\n"
    assert tree(desk.workspace) == before


def test_the_session_is_shown_kept_and_committed_as_one_set(desk: Desk) -> None:
    before = tree(desk.workspace)
    ran(desk, "echo two >> file; rm sub/inner")
    assert {path: str(change.kind) for path, change in pending(desk).items()} == {
        "file": "modified",
        "sub/inner": "deleted",
    }
    ran(desk, "mkdir new; echo x > new/Makefile")
    assert set(pending(desk)) == {"file", "sub/inner", "new", "new/Makefile"}
    kept = keep(desk)
    assert (kept.created, kept.modified, kept.deleted) == (2, 1, 1)
    assert kept.flagged == ("new/Makefile",)
    assert desk.runtime.changes.names() == [kept.id]
    # What is kept and not committed is in no overlay any more.
    assert pending(desk) == {}
    assert ran(desk, "cat file; ls") == b"file\nfile\nsub\n"
    assert tree(desk.workspace) == before
    desk.runtime.changes.commit(kept.id)
    assert (desk.workspace / "file").read_text() == "file\ntwo\n"
    assert not (desk.workspace / "sub/inner").exists()
    assert ran(desk, "cat file new/Makefile") == b"file\ntwo\nx\n"
    assert desk.runtime.changes.keep_session() == ()


def test_every_kind_of_change_lasts_over_calls(desk: Desk) -> None:
    for name in ("file", "sub/inner", "sub/other"):
        (desk.workspace / name).unlink()
    (desk.workspace / "sub").rmdir()
    fill(desk.workspace, FILES)
    for line in SCRIPT.strip().splitlines():
        ran(desk, f"set -e; {line}")
        ran(desk, "find . >/dev/null; touch touched; rm touched")
    desk.runtime.changes.commit(keep(desk).id)
    git = {name: text for name, text in tree(desk.workspace).items() if name.startswith(".git")}
    assert tree(desk.workspace) == AFTER | git


def test_what_is_left_at_the_end_is_kept(desk: Desk) -> None:
    ran(desk, "echo x > new")
    desk.runtime.close()
    (kept,) = desk.runtime.kept
    assert (kept.created, kept.workspace) == (1, str(desk.workspace))
    desk.runtime.close()
    assert len(desk.runtime.kept) == 1
    assert not (desk.workspace / "new").exists()
    with start(desk.folder) as later:
        assert later.changes.names() == [kept.id]
        assert later.call("shell.run", argv=["sh", "-c", "ls"]).stdout == b"file\nsub\n"
        later.changes.commit(kept.id)
    assert (desk.workspace / "new").read_text() == "x\n"


def test_an_end_in_the_middle_of_a_call_keeps_nothing_and_says_so(desk: Desk) -> None:
    before, begun = tree(desk.workspace), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(desk.run, "echo x > new; echo go; exec sleep 60", seen=begun.set)
        assert begun.wait(20)
        with pytest.raises(SandboxFailed) as caught:
            desk.runtime.close()
        assert caught.value.code == "workspace.session_in_use"
        assert first.exception(20) is not None
    assert desk.runtime.kept == ()
    assert desk.runtime.changes.names() == []
    assert tree(desk.workspace) == before


def test_the_session_can_be_rolled_back(desk: Desk) -> None:
    before = tree(desk.workspace)
    ran(desk, "rm -r sub; echo x > new")
    desk.runtime.changes.rollback_session()
    assert pending(desk) == {}
    assert ran(desk, "cat sub/inner; ls") == b"inner\nfile\nsub\n"
    desk.runtime.close()
    assert desk.runtime.kept == ()
    assert tree(desk.workspace) == before


def test_the_trace_says_what_was_kept(desk: Desk) -> None:
    ran(desk, "echo x > Makefile")
    assert "changes" not in desk.last(EntryKind.CALL_OUTCOME).body
    kept = keep(desk)
    assert desk.last(EntryKind.CALL_INTENT).body["tool"] == "workspace.keep"
    counts = {"created": 1, "modified": 0, "deleted": 0, "refused": 0, "conflicts": 0, "later": 1}
    entry = desk.last(EntryKind.CALL_OUTCOME)
    assert entry.body["changes"] == [{"id": kept.id, **counts}]
    (named,) = cast("list[dict[str, object]]", entry.committed["changed"])
    assert (named["flagged"], named["sha256"]) == (["Makefile"], kept.digest)
    ran(desk, "echo x > Makefile")
    desk.runtime.changes.rollback_session()
    assert desk.last(EntryKind.CALL_INTENT).body["tool"] == "workspace.rollback"
    ran(desk, "echo x > Makefile")
    desk.runtime.close()
    outcomes = [entry for entry in desk.entries if entry.kind is EntryKind.CALL_OUTCOME]
    (kept,) = desk.runtime.kept
    assert outcomes[-1].body["changes"] == [{"id": kept.id, **counts}]


def test_calls_at_the_same_time_take_turns(desk: Desk) -> None:
    ran(desk, "echo 0 > count")
    # Each would lose the others' additions if two of them ran at a time.
    script = "n=$(cat count); for i in 1 2 3; do cat file > /dev/null; done; echo $((n+1)) > count"

    def one(number: int) -> Outcome:
        return desk.run(script, under=(("sh",), SMALL)[number % 2])

    with ThreadPoolExecutor(4) as threads:
        for outcome in threads.map(one, range(16)):
            assert outcome.ok, outcome.stderr
    assert ran(desk, "cat count") == b"16\n"
    assert set(pending(desk)) == {"count"}


def test_a_call_waits_no_longer_than_it_may_take(desk: Desk) -> None:
    begun, said = threading.Event(), "echo begun; cat file; exec sleep 60"
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(desk.run, said, seen=begun.set)
        assert begun.wait(20)
        with pytest.raises(SandboxFailed) as caught:
            desk.runtime.call("shell.run", argv=["sh", "-c", "true"], resources={"wall": "200ms"})
        assert caught.value.code == "workspace.session_in_use"
        for deed in (desk.runtime.changes.session, desk.runtime.changes.keep_session):
            with pytest.raises(SandboxFailed) as caught:
                deed()
            assert caught.value.code == "workspace.session_in_use"
        desk.runtime.native.close()
        assert first.exception(20) is not None or not first.result().ok


@pytest.mark.parametrize("limits", ["{wall: 1s}"], indirect=True)
def test_what_a_call_did_until_its_limit_stays_in_the_session(desk: Desk) -> None:
    outcome = desk.run("echo x > new; (setsid sleep 60 &); sleep 60")
    assert (outcome.limit, outcome.changes) == ("wall", ())
    assert ran(desk, "cat new") == b"x\n"
    assert set(pending(desk)) == {"new"}


def test_a_call_whose_sandbox_is_killed_leaves_its_changes_in_the_session(desk: Desk) -> None:
    killed = threading.Event()

    def kill() -> None:
        if not killed.is_set():
            killed.set()
            for pid in _offspring(os.getpid()):
                if _name(pid) == "sh":
                    os.kill(_parent(pid), signal.SIGKILL)

    with pytest.raises(SandboxFailed):
        desk.run("echo x > new; sleep 60 & echo ready; wait", seen=kill)
    assert killed.is_set()
    assert ran(desk, "cat new; echo y >> new") == b"x\n"
    assert set(pending(desk)) == {"new"}


def test_nothing_is_compared_while_somebody_could_still_write(desk: Desk) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: to look into a sandbox")
    ran(desk, "echo x > new")
    begun = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(desk.run, "echo go; exec sleep 1", seen=begun.set)
        assert begun.wait(20)
        pids = [pid for pid in _offspring(os.getpid()) if _name(pid) in ("sh", "sleep")]
        fd = os.open(f"/proc/{pids[0]}/root{desk.workspace}", os.O_RDONLY)
        assert first.result(20).ok
    try:
        # No process of the call lives; the overlay does.
        with pytest.raises(SandboxFailed) as caught:
            desk.runtime.changes.session()
        assert caught.value.code == "workspace.session_in_use"
    finally:
        os.close(fd)
    assert set(pending(desk)) == {"new"}


def test_no_call_can_take_the_workspace_away_from_the_next(desk: Desk) -> None:
    for script in ("chmod 0 .", "rm -rf * .git; mkdir old; ln -s /etc file", "chmod 7000 . old"):
        desk.run(script)
        assert desk.run("ls; echo x > new").ok
    # What the overlay itself marks its layer with is out of a program's reach in the next one too.
    code = """import os
for name in ("user.overlay.opaque", "user.overlay.redirect", "trusted.overlay.redirect"):
    try:
        os.setxattr("sub", name, b"/etc")
    except OSError:
        pass
"""
    ran(desk, "rm -r old; mkdir -p sub")
    desk.run(f"python3 - <<'END'\n{code}END")
    assert ran(desk, "ls sub") == b""
    desk.runtime.changes.rollback_session()
    desk.run(f"python3 - <<'END'\n{code}END")
    assert ran(desk, "ls sub") == b"inner\nother\n"


def test_the_launcher_may_die_between_two_calls(desk: Desk) -> None:
    ran(desk, "echo x > new")
    for pid in _offspring(os.getpid()):
        if _name(pid).startswith("safeconduct-lau"):
            os.kill(pid, signal.SIGKILL)
    try:
        found = ran(desk, "cat new; echo y >> new").decode()
    except SandboxFailed as error:
        found = error.code
    # Without root the layer belonged to the user namespace of the launcher that died.
    assert found == ("x\n" if os.geteuid() == 0 else "workspace.session_lost")
    assert keep(desk).created == 1
    ran(desk, "[ ! -e new ]")


@pytest.mark.parametrize("limits", ["{wall: 20s, disk: 4MiB, inodes: 256}"], indirect=True)
def test_disk_and_inodes_bound_the_whole_session(desk: Desk) -> None:
    ran(desk, "head -c 3000000 /dev/zero > one")
    outcome = desk.run("head -c 3000000 /dev/zero > two")
    assert outcome.limit == "disk"
    assert str(outcome.confinement.held["disk"]) == "tree"
    with pytest.raises(SandboxFailed) as caught:
        desk.run("true", under=SMALL)
    assert caught.value.code == "workspace.session_full"
    ran(desk, "rm one two")
    outcome = desk.run("head -c 3000000 /dev/zero > one", under=SMALL)
    assert outcome.limit == "disk"
    ran(desk, "rm -f one; head -c 3000000 /dev/zero > one; rm one")
    ran(desk, "for n in $(seq 200); do : > f$n; done")
    assert desk.run("for n in $(seq 100); do : > g$n || exit 1; done").limit == "inodes"
    with pytest.raises(SandboxFailed) as caught:
        desk.run("true", under=SMALL)
    assert caught.value.code == "workspace.session_full"


def test_what_changed_outside_since_the_session_began_is_a_conflict(desk: Desk) -> None:
    (desk.workspace / "sub/inner").write_text("early\n")
    ran(desk, "cat file sub/inner")
    (desk.workspace / "file").write_text("outside\n")
    # It sees what nobody in the session has changed, and may have read it before.
    assert ran(desk, "cat file; echo mine >> file; echo x > sub/inner") == b"outside\n"
    found = pending(desk)
    assert found["file"].conflict
    assert found["sub/inner"].conflict is None
    kept = keep(desk)
    assert kept.conflicts == 1
    with pytest.raises(Conflict):
        desk.runtime.changes.commit(kept.id)
    assert (desk.workspace / "file").read_text() == "outside\n"


def test_a_folder_that_is_another_one_now_is_no_part_of_the_session(desk: Desk) -> None:
    apart = desk.folder / "apart"
    ran(desk, f"echo x > {apart}/new", under=LOOKS)
    apart.rename(desk.folder / "aside")
    apart.mkdir()
    with pytest.raises(SandboxFailed) as caught:
        desk.run("true", under=LOOKS)
    assert caught.value.code == "workspace.session_lost"
    desk.runtime.changes.rollback_session()
    ran(desk, f"[ ! -e {apart}/new ]", under=LOOKS)


def test_a_commit_in_the_middle_of_a_session_is_no_conflict_with_itself(desk: Desk) -> None:
    ran(desk, "echo one >> file")
    desk.runtime.changes.commit(keep(desk).id)
    assert ran(desk, "cat file; echo two >> file") == b"file\none\n"
    desk.runtime.changes.commit(keep(desk).id)
    assert (desk.workspace / "file").read_text() == "file\none\ntwo\n"


def test_what_a_session_may_not_write_is_never_copied_out(desk: Desk) -> None:
    ran(desk, "mkdir -p .claude deep/.git/hooks; echo x > .claude/settings.json; mkfifo fifo")
    ran(desk, "echo evil > deep/.git/hooks/pre-commit; ln -s /etc link; echo x > plain")
    assert desk.run("echo x > .git/config").exit_code
    # What one call of the session may not reach is not copied out for the others either.
    ran(desk, "[ ! -r sub/inner ]", under=HIDES)
    ran(desk, "echo x > sub/inner")
    refused = {path for path, change in pending(desk).items() if change.refused}
    assert refused == {".claude", "fifo", "deep/.git/hooks", "sub"}
    before = tree(desk.workspace)
    desk.runtime.changes.commit(keep(desk).id)
    after = {"deep": "/", "deep/.git": "/", "link": "->/etc", "plain": "x\n"}
    assert tree(desk.workspace) == before | after


def test_profiles_have_to_write_to_the_same_folders(desk: Desk) -> None:
    ran(desk, "ls", under=LOOKS)
    ran(desk, "echo x > sub/new")
    for under in (PART, LOOKS):
        with pytest.raises(SandboxUnavailable) as caught:
            desk.run("cat sub/new", under=under)
        assert caught.value.missing == "overlay:session"
        assert caught.value.hint
    assert ran(desk, "cat sub/new", under=SMALL) == b"x\n"
    # An overlay of a call's own shows the workspace, and is no part of the session.
    assert desk.run("cat sub/new", under=EACH).exit_code == 1


def test_a_server_has_the_overlay_for_its_life(desk: Desk) -> None:
    ran(desk, "echo before > new")
    profile = next(part.profiles["base"] for part in desk.runtime.policy.parts)
    server = Server(
        name="s", argv=["sh", "-c", "echo after >> new; cat new; exec cat"], profile=profile
    )
    ours, stdin = os.pipe2(os.O_CLOEXEC)[::-1]
    answers, stdout = os.pipe2(os.O_CLOEXEC)
    with confined(desk.runtime, server, (stdin, stdout, os.dup(stdout))) as running:
        assert os.read(answers, 100) == b"before\nafter\n"
        with pytest.raises(SandboxFailed) as caught:
            desk.run("cat new")
        assert caught.value.code == "workspace.session_in_use"
    os.close(ours)
    os.close(answers)
    assert running.changes == ()
    assert ran(desk, "cat new") == b"before\nafter\n"


def test_a_tool_of_ours_shows_and_writes_no_workspace_where_a_session_is_promised(
    desk: Desk,
) -> None:
    ran(desk, "echo mine > file")
    file = str(desk.workspace / "file")
    for tool, arguments in (
        ("fs.read", {"path": file}),
        ("fs.list", {"path": str(desk.workspace)}),
        ("fs.write", {"path": file, "content": "x"}),
        ("python.run", {"code": "1"}),
    ):
        with pytest.raises(SandboxUnavailable) as caught:
            desk.runtime.call(tool, **arguments)
        assert "overlay" in caught.value.missing
        assert caught.value.hint
    assert (desk.workspace / "file").read_text() == "file\n"


def test_a_tool_reaches_neither_the_layer_nor_its_mount(desk: Desk) -> None:
    ran(desk, "echo x > new")
    found = ran(
        desk,
        "ls /.stage 2>&1; find / -xdev -maxdepth 3 -name upper 2>/dev/null; ls /proc/self/fd; "
        "mount -t tmpfs t /tmp 2>&1 || true",
    ).decode()
    assert "upper" not in found
    assert found.count("\n") < 12, found
    # Both would be changed through it, had the tool its own user in all of the layer.
    assert desk.run("touch /.stage/x").exit_code
    ran(desk, "set -- $(stat -c '%u %u' new); [ $1 = $(id -u) ]")


def test_nothing_is_left_of_it(desk: Desk) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    ran(desk, "echo x > new")
    desk.runtime.changes.rollback_session()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        ran(desk, "echo x >> new")
    desk.runtime.changes.rollback_session()
    assert len(os.listdir("/proc/self/fd")) == before
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_a_killed_supervisor_keeps_nothing_and_leaves_nothing(desk: Desk) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.overlay_desk import start\n"
        f"runtime = start(Path({str(desk.folder)!r}))\n"
        "runtime.call('shell.run', argv=['sh', '-c', 'echo x > new'])\n"
        "print(*runtime.native._launcher.pids, flush=True); sys.stdin.read()"
    )
    before = tree(desk.workspace)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
    ) as other:  # fmt: skip
        assert other.stdout is not None
        pids = [int(pid) for pid in other.stdout.readline().split()]
        assert pids
        other.kill()
    for pid in pids:
        _await_end(pid)
    assert tree(desk.workspace) == before
    assert desk.runtime.changes.names() == []


@pytest.mark.parametrize(
    "verb", [("exec", "--"), ("call", "shell.run"), ("mcp", "--name", "s", "--")]
)
def test_the_command_line_tells_what_was_kept(desk: Desk, verb: tuple[str, ...]) -> None:
    argv = ["sh", "-c", "echo x > new"]
    given = [json.dumps({"argv": argv})] if verb[0] == "call" else argv
    done = subprocess.run(
        [sys.executable, "-m", "safeconduct", verb[0], "--policy", str(desk.folder / "policy.yaml"),
         "--workspace", str(desk.workspace), *verb[1:], *given],
        env={**os.environ, "XDG_STATE_HOME": str(desk.state)}, cwd="/",
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (name,) = desk.runtime.changes.names()
    assert f"1 changes of {desk.workspace} are kept as {name}" in done.stderr
    assert not (desk.workspace / "new").exists()


def test_tier_landlock_refuses_by_name(desk: Desk) -> None:
    try:
        runtime = start(desk.folder, Tier.LANDLOCK)
    except SandboxUnavailable as error:
        pytest.skip(f"needs tier landlock: {error.message}")
    with runtime:
        with pytest.raises(SandboxUnavailable) as caught:
            runtime.call("shell.run", argv=["sh", "-c", "echo x > new"])
        assert caught.value.missing == "overlay"
        assert runtime.changes.session() == ()
    assert runtime.kept == ()


def _offspring(pid: int) -> list[int]:
    found: list[int] = []
    waiting = [pid]
    while waiting:
        task = waiting.pop()
        try:
            for thread in os.listdir(f"/proc/{task}/task"):
                text = Path(f"/proc/{task}/task/{thread}/children").read_text()
                waiting += [int(child) for child in text.split()]
        except OSError:
            continue
        found.append(task)
    return found[1:]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _parent(pid: int) -> int:
    """Return the init of a sandbox, the first of its pid namespace, from a process in it."""
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        if fields["NSpid"].split()[-1] == "1":
            return pid
        pid = int(fields["PPid"])


def _await_end(pid: int) -> None:
    """Wait until a process that is not ours is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], 20)[0], f"{pid} still lives"
    finally:
        os.close(fd)
