"""A Call becomes one Document: closed arguments, real paths, no descriptor left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeconduct.call import Call, Effect, Json
from safeconduct.errors import Denied
from safeconduct.policies import (
    BUILT_IN,
    Canonical,
    Policy,
    canonicalize,
    decide,
    parse_policy,
)

TOOLS = b"""\
version: 1
tools:
  fs.read: {allow: {path: ["/**"]}}
  files.read: {allow: {path: {path: ["$WS/**"]}, rest: any}}
  files.fetch: {allow: {url: {url: ["https://**/**"]}, n: {range: [1, 9]}, mode: {in: [r, w]}}}
"""


@pytest.fixture
def policy(workspace: Path) -> Policy:
    return parse_policy(TOOLS, name="p", workspace=workspace)


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


def canonical(policy: Policy, tool: str, /, **arguments: Json) -> Canonical:
    return canonicalize(policy, Call(id="1", tool=tool, arguments=arguments, session="s"))


def refused(policy: Policy, tool: str, /, **arguments: Json) -> str:
    """Return the code of the refusal; what a tool that is not ours takes refuses by its rules."""
    if tool in list(BUILT_IN):
        with pytest.raises(Denied) as caught:
            canonical(policy, tool, **arguments)
        return caught.value.code
    try:
        with canonical(policy, tool, **arguments) as found:
            decision = decide(policy, found.document)
    except Denied as denied:
        return denied.code
    assert decision.effect is Effect.DENY
    return decision.code


def test_arguments_are_closed(policy: Policy) -> None:
    assert refused(policy, "no.such", a=1) == "call.unknown_tool"
    assert refused(policy, "fs.read", path="src", mode="r") == "call.extra_argument"
    assert refused(policy, "fs.read") == "call.missing_argument"
    assert refused(policy, "fs.read", path=7) == "call.bad_argument"
    assert refused(policy, "fs.read", path=["src/main.py"]) == "call.bad_argument"
    assert refused(policy, "fs.write", path="x", content=b"x") == "call.bad_argument"


@pytest.mark.parametrize("tool", [7, None, b"fs.read", [], "\ud800", "fs.read\n"], ids=repr)
def test_what_is_no_name_is_no_tool(policy: Policy, tool: str) -> None:
    assert refused(policy, tool, path="src") == "call.unknown_tool"


def test_no_descriptor_left_is_a_refusal(
    policy: Policy, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def exhausted(path: str, flags: int) -> int:
        if path == "/":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags)

    def gone(fd: int, *, folder: bool) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", exhausted)
        assert refused(policy, "fs.read", path="/etc/passwd") == "path.refused"
        assert refused(policy, "files.read", path="/etc/passwd") == "path.refused"
    with monkeypatch.context() as patch:
        patch.setattr("safeconduct.policies.canonical.check_holds", gone)
        assert refused(policy, "fs.read", path="src/main.py") == "path.refused"


def test_a_frame_of_one_megabyte_is_refused(policy: Policy) -> None:
    assert refused(policy, "fs.write", path="x", content="a" * (1 << 20)) == "call.too_large"
    assert refused(policy, "fs.write", path="x", content="\ud800") == "call.bad_argument"


def test_defaults_are_filled(policy: Policy, workspace: Path) -> None:
    with canonical(policy, "shell.run", argv=["ls"]) as found:
        assert found.document.arguments == {"argv": ["ls"], "cwd": str(workspace)}
    with canonical(policy, "shell.run", argv=["ls"], cwd="src") as found:
        assert found.document.arguments["cwd"] == f"{workspace}/src"
    assert refused(policy, "shell.run", argv=["ls"], cwd="src/main.py") == "path.not_folder"


@pytest.mark.parametrize("argv", [[], [""], ["a\0"], [1], "ls", ["a"] * 2000, ["a" * 140_000]])
def test_argv_is_a_list_of_words(policy: Policy, argv: Json) -> None:
    assert refused(policy, "shell.run", argv=argv) == "call.bad_argument"


def test_wasm_takes_64_bit_integers(policy: Policy) -> None:
    with canonical(
        policy, "wasm.run", module="src/main.py", function="f", arguments=[1 << 62, -(1 << 63)]
    ) as found:
        assert found.document.arguments["arguments"] == [1 << 62, -(1 << 63)]
    for bad in ([1 << 63], [1.0], [True], ["1"], 1):
        code = refused(policy, "wasm.run", module="src/main.py", function="f", arguments=bad)
        assert code == "call.bad_argument"


class TestPaths:
    """Paths are judged as the object they open."""

    def test_spellings_of_one_file_are_one_path(self, policy: Policy, workspace: Path) -> None:
        for text in ("src/main.py", "./src//main.py", f"{workspace}/src/main.py"):
            with canonical(policy, "fs.read", path=text) as found:
                assert found.document.arguments == {"path": f"{workspace}/src/main.py"}
                fd = found.descriptors["path"].fd
                assert fd is not None
                assert os.fstat(fd).st_ino == (workspace / "src/main.py").stat().st_ino

    def test_links_out_of_the_workspace_are_refused(self, policy: Policy, workspace: Path) -> None:
        for name, target in {
            "absolute": "/etc/passwd",
            "relative": "../" * 20 + "etc/passwd",
            "own": str(workspace / "src/main.py"),
        }.items():
            (workspace / name).symlink_to(target)
            assert refused(policy, "fs.read", path=name) == "path.escape"
            assert refused(policy, "fs.write", path=name, content="") == "path.escape"
            assert refused(policy, "files.read", path=name) == "path.escape"
        (workspace / "folder").symlink_to("/etc")
        assert refused(policy, "fs.read", path="folder/passwd") == "path.escape"
        assert refused(policy, "fs.write", path="folder/new", content="") == "path.escape"

    def test_a_link_inside_is_judged_as_its_target(self, policy: Policy, workspace: Path) -> None:
        (workspace / "link").symlink_to("src/main.py")
        with canonical(policy, "fs.read", path="link") as found:
            assert found.document.arguments["path"] == f"{workspace}/src/main.py"

    def test_a_link_outside_is_judged_as_its_target(self, policy: Policy, tmp_path: Path) -> None:
        (tmp_path / "real").write_text("x")
        (tmp_path / "link").symlink_to("real")
        with canonical(policy, "fs.read", path=str(tmp_path / "link")) as found:
            assert found.document.arguments["path"] == os.path.realpath(tmp_path / "real")

    def test_dangling_links_are_refused(self, policy: Policy, workspace: Path) -> None:
        (workspace / "gone").symlink_to("nowhere")
        assert refused(policy, "fs.write", path="gone", content="") == "path.link"
        assert refused(policy, "files.read", path="gone") == "path.link"
        assert refused(policy, "files.read", path="gone/deeper") == "path.link"

    def test_magic_links_and_processes_are_refused(self, policy: Policy) -> None:
        assert refused(policy, "fs.read", path="/proc/self/root/etc/passwd") == "path.link"
        assert refused(policy, "fs.read", path="/proc/self/fd/0") == "path.link"
        assert refused(policy, "fs.read", path="/dev/fd/0") == "path.link"
        assert refused(policy, "fs.read", path="/proc/self/environ") == "path.proc"
        assert refused(policy, "fs.read", path="/proc/1/mem") in ("path.proc", "path.refused")

    def test_only_regular_files_are_read(self, policy: Policy, workspace: Path) -> None:
        os.mkfifo(workspace / "fifo")
        assert refused(policy, "fs.read", path="fifo") == "path.not_file"
        assert refused(policy, "fs.write", path="fifo", content="") == "path.not_file"
        assert refused(policy, "fs.read", path="/dev/zero") == "path.not_file"
        assert refused(policy, "fs.read", path="src") == "path.not_file"
        assert refused(policy, "fs.list", path="src/main.py") == "path.not_folder"

    def test_a_new_file_is_judged_on_its_parent(self, policy: Policy, workspace: Path) -> None:
        (workspace / "link").symlink_to("src")
        with canonical(policy, "fs.write", path="link/new.py", content="x") as found:
            resolved = found.descriptors["path"]
            assert resolved.path == f"{workspace}/src/new.py"
            assert (resolved.fd, resolved.name) == (None, "new.py")
            assert resolved.parent_fd is not None
        assert refused(policy, "fs.write", path="no/such/file", content="") == "path.not_found"
        assert refused(policy, "fs.write", path="src/main.py/x", content="") == "path.not_folder"
        assert refused(policy, "fs.write", path="n" * 300, content="") == "path.too_long"

    def test_a_path_of_a_tool_may_not_exist(self, policy: Policy, workspace: Path) -> None:
        (workspace / "link").symlink_to("src")
        with canonical(policy, "files.read", path="link/a/b/c") as found:
            assert found.document.arguments["path"] == f"{workspace}/src/a/b/c"
            assert not found.descriptors

    @pytest.mark.parametrize(
        "text", ["~/.ssh/id", "file:///etc/passwd", "a\\..\\b", "%2e%2e/x", "$HOME/x", "`id`"]
    )
    def test_what_a_tool_may_expand_is_refused(self, policy: Policy, text: str) -> None:
        assert refused(policy, "files.read", path=text) == "path.ambiguous"

    def test_a_list_of_paths_is_a_list_of_objects(self, policy: Policy, workspace: Path) -> None:
        with canonical(policy, "files.read", path=["src", "new"]) as found:
            assert found.document.arguments["path"] == [f"{workspace}/src", f"{workspace}/new"]
        assert refused(policy, "files.read", path=["src", "../x"]) == "path.dotdot"
        assert refused(policy, "files.read", path=[["src"]]) == "call.bad_argument"

    def test_a_name_that_ends_in_deleted_is_a_name(self, policy: Policy, workspace: Path) -> None:
        (workspace / "x (deleted)").write_text("x")
        with canonical(policy, "fs.read", path="x (deleted)") as found:
            assert found.document.arguments["path"] == f"{workspace}/x (deleted)"

    def test_a_name_that_is_not_unicode_is_refused(self, policy: Policy, workspace: Path) -> None:
        os.mkdir(os.fsencode(workspace) + b"/\xff")
        (workspace / "link").symlink_to(os.fsdecode(b"\xff"))
        assert refused(policy, "fs.list", path="link") == "path.encoding"

    def test_a_workspace_that_moved_is_refused(self, policy: Policy, workspace: Path) -> None:
        workspace.rename(workspace.with_name("moved"))
        assert refused(policy, "fs.read", path="src") == "path.not_found"
        workspace.symlink_to("moved")
        assert refused(policy, "fs.read", path="src") == "path.workspace"

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
    @given(
        st.lists(
            st.sampled_from(["..", ".", "", "src", "out", "loop", "main.py", "new", "etc"]),
            max_size=6,
        ),
        st.booleans(),
    )
    def test_nothing_relative_leaves_the_workspace(
        self, policy: Policy, workspace: Path, parts: list[str], new: bool
    ) -> None:
        for name, target in (("out", "/etc"), ("loop", "loop")):
            if not (workspace / name).is_symlink():
                (workspace / name).symlink_to(target)
        tool, more = ("fs.write", {"content": ""}) if new else ("fs.list", dict[str, str]())
        path = "/".join(parts).lstrip("/")
        try:
            with canonical(policy, tool, path=path, **more) as found:
                judged = str(found.document.arguments["path"])
        except Denied:
            return
        assert judged == str(workspace) or judged.startswith(f"{workspace}/")
        assert os.path.realpath(judged) == judged


def test_values_of_a_tool_have_the_kind_its_rules_say(policy: Policy) -> None:
    with canonical(policy, "files.fetch", url="HTTPS://X.example", n=3, mode="r") as found:
        assert found.document.arguments == {"mode": "r", "n": 3, "url": "https://x.example/"}
    assert refused(policy, "files.fetch", url="http://h./") == "url.host"
    assert refused(policy, "files.fetch", n="3") == "call.bad_argument"
    assert refused(policy, "files.fetch", n=True) == "call.bad_argument"
    assert refused(policy, "files.fetch", mode={"a": "w"}) == "call.bad_argument"
    assert refused(policy, "files.fetch", mode=[["w"]]) == "call.bad_argument"


def test_only_plain_values_pass(policy: Policy) -> None:
    class Sly(str):
        __slots__ = ()

        def startswith(self, *_: object) -> bool:
            return True

    assert refused(policy, "fs.read", path=Sly("src")) == "call.bad_argument"
    cycle: list[Json] = []
    cycle.append(cycle)
    assert refused(policy, "files.read", path="src", x=cycle) == "call.too_deep"
    assert refused(policy, "files.read", path="src", x=float("nan")) == "call.bad_argument"
    assert refused(policy, "files.read", path="src", x=1 << 60) == "call.bad_argument"
    assert refused(policy, "files.read", path="src", x=[0] * 20_000) == "call.too_large"
