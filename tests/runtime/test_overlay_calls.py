"""Calls under a profile with ``workspace: overlay``, from the policy to the commit of the set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
from tests.overlay_desk import Desk, seated, start
from tests.overlay_kit import tree

from safeconduct.call import EntryKind, Outcome, Profile, Tier
from safeconduct.errors import SandboxFailed, SandboxUnavailable
from safeconduct.runtime.adapters.mcp_server import Server, confined
from safeconduct.runtime.sandbox.overlay import Conflict


@pytest.fixture
def limits(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "{wall: 20s}"))


@pytest.fixture
def desk(limits: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with seated(monkeypatch, limits) as one:
        yield one


def test_a_call_changes_nothing_until_its_set_is_committed(desk: Desk) -> None:
    before = tree(desk.workspace)
    kept = desk.kept(
        "echo two >> file; rm sub/inner; mkdir new; echo x > new/Makefile; chmod 755 sub/other"
    )
    assert tree(desk.workspace) == before
    assert (kept.created, kept.modified, kept.deleted) == (2, 2, 1)
    assert (kept.count, kept.refused, kept.conflicts) == (5, 0, 0)
    assert set(kept.flagged) == {"new/Makefile", "sub/other"}
    assert kept.workspace == str(desk.workspace)
    assert desk.runtime.changes.names() == [kept.id]
    report = desk.runtime.changes.commit(kept.id)
    assert len(report.applied) == 5
    assert tree(desk.workspace) == {
        name: text for name, text in before.items() if name != "sub/inner"
    } | {"file": "file\ntwo\n", "new": "/", "new/Makefile": "x\n"}
    assert desk.runtime.changes.names() == []


def test_the_trace_says_what_was_kept_and_what_became_of_it(desk: Desk) -> None:
    kept = desk.kept("echo x > Makefile")
    counts = {"created": 1, "modified": 0, "deleted": 0, "refused": 0, "conflicts": 0, "later": 1}
    entry = desk.last(EntryKind.CALL_OUTCOME)
    assert entry.body["changes"] == [{"id": kept.id, **counts}]
    (named,) = cast("list[dict[str, object]]", entry.committed["changed"])
    assert named["flagged"] == ["Makefile"]
    assert named["sha256"] == kept.digest
    desk.runtime.changes.commit(kept.id)
    value = desk.last(EntryKind.CALL_OUTCOME).committed["value"]
    assert value == {"applied": 1, "refused": 0, "later": 1, "kept": 0}
    intent = desk.last(EntryKind.CALL_INTENT).body
    assert (intent["tool"], intent["caller"]) == ("workspace.commit", "operator")


def test_a_call_that_changes_nothing_keeps_nothing(desk: Desk) -> None:
    outcome = desk.run("cat file >/dev/null; touch file; echo x > new; rm new")
    assert outcome.ok
    assert outcome.changes == ()
    assert desk.runtime.changes.names() == []


def test_what_is_rolled_back_is_gone(desk: Desk) -> None:
    before = tree(desk.workspace)
    kept = desk.kept("echo x > new")
    desk.runtime.changes.rollback(kept.id)
    assert tree(desk.workspace) == before
    with pytest.raises(SandboxFailed) as caught:
        desk.runtime.changes.commit(kept.id)
    assert caught.value.code == "workspace.no_changes"


def test_each_call_begins_with_what_the_workspace_is_then(desk: Desk) -> None:
    first = desk.kept("echo mine > file")
    assert desk.run("cat file").stdout == b"file\n"
    (desk.workspace / "file").write_text("theirs\n")
    (desk.workspace / "sub/fresh").write_text("fresh\n")
    outcome = desk.run("cat file sub/fresh; echo more >> file; echo more >> sub/fresh")
    assert outcome.stdout == b"theirs\nfresh\n"
    (second,) = outcome.changes
    assert (second.conflicts, second.modified) == (0, 2)
    desk.runtime.changes.commit(second.id)
    assert (desk.workspace / "file").read_text() == "theirs\nmore\n"
    with pytest.raises(Conflict):
        desk.runtime.changes.commit(first.id)


def test_what_the_base_became_while_the_call_ran_is_a_conflict(desk: Desk) -> None:
    go = desk.folder / "other" / "go"

    def seen() -> None:
        (desk.workspace / "file").write_text("theirs\n")
        go.touch()

    outcome = desk.run(f"echo ready; until [ -e {go} ]; do :; done; echo mine > file", seen=seen)
    (kept,) = outcome.changes
    assert kept.conflicts == 1
    with pytest.raises(Conflict) as caught:
        desk.runtime.changes.commit(kept.id)
    assert caught.value.paths == ("file",)
    assert (desk.workspace / "file").read_text() == "theirs\n"
    assert desk.runtime.changes.names() == [kept.id]


@pytest.mark.parametrize("under", ["sh", "dash"])
def test_what_was_made_in_one_folder_is_not_copied_to_another(desk: Desk, under: str) -> None:
    """``dash`` sees two folders of the workspace through overlays, ``sh`` all of it."""
    (desk.workspace / ".github").mkdir()
    kept = desk.kept("echo made > sub/made", under=(under,))
    place = desk.workspace if under == "sh" else desk.workspace / "sub"
    before = place.rename(f"{desk.folder}/before")
    (desk.workspace / "sub").mkdir(parents=True)
    with pytest.raises(Conflict):
        desk.runtime.changes.commit(kept.id)
    assert os.listdir(desk.workspace / "sub") == []
    shutil.rmtree(place)
    before.rename(place)
    assert desk.runtime.changes.commit(kept.id).applied
    assert (desk.workspace / "sub/made").read_text() == "made\n"


def test_overlays_inside_the_workspace_are_one_set_with_paths_from_its_top(desk: Desk) -> None:
    (desk.workspace / ".github").mkdir()
    kept = desk.kept(
        "echo x > sub/new; echo y > .github/ci.yml; echo z > file || true", under=("dash",)
    )
    found = {change.path: change for change in desk.runtime.changes.load(kept.id).changes}
    assert set(found) == {"sub/new", ".github/ci.yml"}
    assert found[".github/ci.yml"].later == "CI obeys it"
    desk.runtime.changes.commit(kept.id)
    assert (desk.workspace / "sub/new").read_text() == "x\n"
    assert (desk.workspace / ".github/ci.yml").read_text() == "y\n"


def test_an_overlay_elsewhere_is_a_set_of_its_own(desk: Desk) -> None:
    apart = desk.folder / "apart"
    outcome = desk.run(f"echo x > new; echo y > {apart}/new", under=("bash",))
    assert {kept.workspace for kept in outcome.changes} == {str(desk.workspace), str(apart)}
    for kept in outcome.changes:
        assert kept.count == 1
        desk.runtime.changes.commit(kept.id)
    assert (apart / "new").read_text() == "y\n"
    assert (desk.workspace / "new").read_text() == "x\n"


def test_calls_at_the_same_time_have_layers_of_their_own(desk: Desk) -> None:
    script = '[ -z "$(ls -A | grep made)" ] || exit 3; echo NUMBER | tee made-NUMBER > file'

    def one(number: int) -> tuple[int, Outcome]:
        return number, desk.run(script.replace("NUMBER", str(number)))

    with ThreadPoolExecutor(4) as threads:
        for number, outcome in threads.map(one, range(16)):
            assert outcome.ok, outcome.stderr
            (kept,) = outcome.changes
            changes = desk.runtime.changes.load(kept.id).changes
            assert {change.path for change in changes} == {"file", f"made-{number}"}
            with desk.runtime.changes.opened(kept.id) as upper:
                file = os.open("file", os.O_RDONLY, dir_fd=upper)
                try:
                    assert os.read(file, 100) == f"{number}\n".encode()
                finally:
                    os.close(file)
    assert len(set(desk.runtime.changes.names())) == 16


@pytest.mark.parametrize("limits", ["{wall: 20s, disk: 4MiB, inodes: 64}"], indirect=True)
@pytest.mark.parametrize(
    ("script", "limit"),
    [
        ("for n in 1 2 3; do head -c 2000000 /dev/zero > f$n || exit 1; done", "disk"),
        ("for n in $(seq 100); do : > f$n || exit 1; done", "inodes"),
        ("head -c 8000000 /dev/zero > f", "disk"),
    ],
)
def test_room_in_an_overlay_is_a_limit_of_that_name(desk: Desk, script: str, limit: str) -> None:
    before = tree(desk.workspace)
    outcome = desk.run(script)
    assert outcome.limit == limit
    assert str(outcome.confinement.held[limit]) == "tree"
    assert tree(desk.workspace) == before


@pytest.mark.parametrize("limits", ["{wall: 1s}"], indirect=True)
def test_what_a_call_did_until_its_limit_is_kept(desk: Desk) -> None:
    outcome = desk.run("echo x > new; (setsid sleep 60 &); sleep 60")
    assert outcome.limit == "wall"
    assert [kept.created for kept in outcome.changes] == [1]


def test_a_tool_of_ours_never_writes_past_an_overlay(desk: Desk) -> None:
    file = str(desk.workspace / "file")
    for tool, arguments in (
        ("fs.write", {"path": file, "content": "x"}),
        ("fs.write", {"path": str(desk.workspace / "new"), "content": "x"}),
        ("python.run", {"code": "1"}),
    ):
        with pytest.raises(SandboxUnavailable) as caught:
            desk.runtime.call(tool, **arguments)
        assert "overlay" in caught.value.missing
        assert caught.value.hint
    assert tree(desk.workspace)["file"] == "file\n"
    # What a new overlay shows is the workspace itself.
    desk.kept("echo mine > file")
    assert desk.runtime.call("fs.read", path=file).value == "file\n"
    assert "file" in str(desk.runtime.call("fs.list", path=str(desk.workspace)).value)


def test_a_single_file_cannot_be_overlaid(desk: Desk) -> None:
    with pytest.raises(SandboxUnavailable) as caught:
        desk.run("echo x > file", under=("env", "dash"))
    assert caught.value.missing == "overlay:file"
    assert (desk.workspace / "file").read_text() == "file\n"


def test_no_place_is_held_in_a_workspace_behind_an_overlay(desk: Desk) -> None:
    before = tree(desk.workspace)
    outcome = desk.run("ls -A; mkdir .claude && echo x > .claude/settings.json")
    assert outcome.ok, outcome.stderr
    assert tree(desk.workspace) == before
    (kept,) = outcome.changes
    assert kept.refused == kept.count == 1


def test_a_server_has_one_overlay_for_its_life(desk: Desk) -> None:
    profile = next(part.profiles["base"] for part in desk.runtime.policy.parts)
    assert isinstance(profile, Profile)
    server = Server(
        name="s", argv=["sh", "-c", "while read line; do echo $line >> file; cat file; done"],
        profile=profile,
    )  # fmt: skip
    ours, stdin = os.pipe2(os.O_CLOEXEC)[::-1]
    answers, stdout = os.pipe2(os.O_CLOEXEC)
    stderr = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    with confined(desk.runtime, server, (stdin, stdout, stderr)) as running:
        for word in (b"one\n", b"two\n"):
            os.write(ours, word)
            assert os.read(answers, 100).endswith(word)
        assert (desk.workspace / "file").read_text() == "file\n"
        os.close(ours)
        running.channel.receive(20)
    os.close(answers)
    (kept,) = running.changes
    desk.runtime.changes.commit(kept.id)
    assert (desk.workspace / "file").read_text() == "file\none\ntwo\n"


def test_a_server_that_is_ended_leaves_its_changes_too(desk: Desk) -> None:
    profile = next(part.profiles["base"] for part in desk.runtime.policy.parts)
    server = Server(
        name="s", argv=["sh", "-c", "echo x > new; echo ready; exec cat"], profile=profile
    )
    ours, stdin = os.pipe2(os.O_CLOEXEC)[::-1]
    answers, stdout = os.pipe2(os.O_CLOEXEC)
    with confined(desk.runtime, server, (stdin, stdout, os.dup(stdout))) as running:
        assert os.read(answers, 100) == b"ready\n"
    os.close(ours)
    os.close(answers)
    assert [kept.created for kept in running.changes] == [1]


def test_tier_landlock_refuses_by_name(desk: Desk) -> None:
    try:
        runtime = start(desk.folder, Tier.LANDLOCK)
    except SandboxUnavailable as error:
        pytest.skip(f"needs tier landlock: {error.message}")
    with runtime:
        before = tree(desk.workspace)
        with pytest.raises(SandboxUnavailable) as caught:
            runtime.call("shell.run", argv=["sh", "-c", "echo x > new"])
        assert caught.value.missing == "overlay"
        assert caught.value.hint
        with pytest.raises(SandboxUnavailable):
            runtime.call("fs.write", path=str(desk.workspace / "new"), content="x")
        assert tree(desk.workspace) == before
        assert runtime.call("fs.read", path=str(desk.workspace / "file")).value == "file\n"
