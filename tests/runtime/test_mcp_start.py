"""How `safeconduct mcp` refuses to start, and what it says then."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from safeconduct.call import Document, Profile
from safeconduct.errors import Exit, PolicyError
from safeconduct.policies import both, decide, parse_policy
from safeconduct.runtime.adapters.frames import Frames, TooLong
from safeconduct.runtime.adapters.mcp_server import choose_profile
from safeconduct.runtime.cli import mcp

POLICY = """
version: 1
profiles:
  base: {read: ["$WS/**"]}
  other: {like: base}
tools:
  files.echo: {allow: any, profile: other}
  plain.echo: {allow: any}
"""


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a client that leaves at once."""
    (folder / "ws").mkdir(exist_ok=True)
    (folder / "policy.yaml").write_text(POLICY)
    common = ["--policy", str(folder / "policy.yaml"), "--workspace", str(folder / "ws")]
    return subprocess.run(
        [sys.executable, "-m", "safeconduct", "mcp", *common, *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "XDG_STATE_HOME": str(folder / "state"), "SECRET_NOTE": "from-outside"},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["fs", "wasm", "mcp", "workspace", "a.b", "", "x" * 65])
def test_a_name_that_would_pass_for_another_tool_is_refused(tmp_path: Path, name: str) -> None:
    assert start(tmp_path, "--name", name, "--", "true").returncode == Exit.USAGE


@pytest.mark.parametrize("variable", ["=x", "SAFECONDUCT_SANDBOX=no", "NOT_SET_ANYWHERE", "A-B=1"])
def test_a_variable_that_cannot_be_handed_on_is_refused(tmp_path: Path, variable: str) -> None:
    done = start(tmp_path, "--name", "plain", "--env", variable, "--", "true")
    assert done.returncode == Exit.USAGE


def test_a_program_that_is_not_shown_names_the_missing_grant(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "server"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    done = start(tmp_path, "--name", "plain", "--", str(program))
    assert done.returncode == Exit.NOT_FOUND
    assert f'profiles: base: read: ["{program.parent}/**"]' in done.stderr


def test_a_program_that_is_nowhere_is_not_found(tmp_path: Path) -> None:
    done = start(tmp_path, "--name", "plain", "--", "no-such-program")
    assert done.returncode == Exit.NOT_FOUND
    assert "tool.not_found" in done.stderr


def test_no_terminal_obeys_what_is_told_of_a_hostile_name(tmp_path: Path) -> None:
    hostile = tmp_path / "\x1b]0;owned\x07\u202e"
    hostile.touch()
    done = start(tmp_path, "--name", "plain", "--", "true", str(hostile))
    assert "\\x1b]0;owned\\x07\\u202e" in done.stderr
    failed = start(tmp_path, "--name", "plain", "--", str(hostile))
    assert "\\x1b]0;owned" in failed.stderr
    assert not {"\x1b", "\x07", "\u202e"} & set(done.stderr + failed.stderr)


def test_a_rule_in_another_profile_than_the_server_is_a_conflict(tmp_path: Path) -> None:
    done = start(tmp_path, "--name", "files", "--", "true")
    assert done.returncode == Exit.FAILURE
    assert "mcp.profile_conflict" in done.stderr
    assert "--profile other" in done.stderr
    assert start(tmp_path, "--name", "files", "--profile", "other", "--", "true").returncode == 0


def test_an_unknown_profile_is_refused(tmp_path: Path) -> None:
    done = start(tmp_path, "--name", "plain", "--profile", "none", "--", "true")
    assert done.returncode == Exit.FAILURE
    assert "mcp.profile_unknown" in done.stderr


OWN = """
profiles:
  base: {read: ["$WS/**"], write: ["$WS/**"]}
  files: {read: ["$WS/docs/**"]}
"""
DOCS = ("/w/docs",)


def narrowed(project: str, asked: str | None = None) -> Profile:
    """Choose for the server ``files`` under the user's own policy and an untrusted project's."""
    mine, theirs = (
        parse_policy(f"version: 1\n{text}".encode(), name=name, workspace=Path("/w"))
        for name, text in (("own", OWN), ("project", project))
    )
    return choose_profile(both(mine, theirs), "files", asked)


@pytest.mark.parametrize(
    "project",
    [
        "",
        "profiles: {}",
        'profiles: {base: {read: ["/**"], write: ["/**"]}}',
        'profiles: {other: {read: ["/**"], write: ["/**"]}}',
        'profiles: {files: {read: ["/**"], write: ["/**"]}}',
    ],
)
def test_an_untrusted_project_never_widens_a_servers_profile(project: str) -> None:
    for asked in (None, "files"):
        profile = narrowed(project, asked)
        assert profile.write == ()
        assert profile.read in (DOCS, ())  # nothing, where the project's default grants nothing


def test_a_project_without_the_servers_profile_does_not_lead_the_users_own_to_base() -> None:
    assert narrowed('profiles: {base: {read: ["/**"], write: ["/**"]}}').read == DOCS


def test_a_profile_that_only_the_project_has_chooses_nothing_in_the_users_own() -> None:
    project = 'profiles: {base: {read: ["/**"]}, wide: {read: ["/**"], write: ["/**"]}}'
    assert (narrowed(project, "wide").read, narrowed(project, "wide").write) == (DOCS, ())
    assert narrowed(project, "base").write == ()
    with pytest.raises(PolicyError) as caught:
        narrowed(project, "none")
    assert caught.value.code == "mcp.profile_unknown"
    assert "base, files, wide" in caught.value.hint


def test_a_server_runs_where_its_calls_are_judged() -> None:
    text = "version: 1\n{}\ntools: {{files.x: {{allow: any}}, '*.y': {{allow: any}}}}"
    profiles = "profiles: {base: {read: [/b]}, files: {read: [/f]}, docs: {read: [/d]}}"
    for servers, read in (
        ("", ("/f",)),
        ("servers: {files: {run: [srv]}}", ("/f",)),
        ("servers: {files: {run: [srv], profile: docs}}", ("/d",)),
    ):
        written = text.format(f"{profiles}\n{servers}")
        judged = parse_policy(written.encode(), name="policy.yaml", workspace=Path("/w"))
        named = judged.servers["files"].profile if servers else None
        assert choose_profile(judged, "files", named).read == read
        for tool in ("files.x", "files.y"):
            decision = decide(judged, Document(tool=tool, arguments={}, workspace="/w"))
            assert decision.profile is not None
            assert decision.profile.read == read
        # Another profile than the one its calls are judged in is refused.
        with pytest.raises(PolicyError) as caught:
            choose_profile(judged, "files", "base")
        assert caught.value.code == "mcp.profile_conflict"


def test_only_the_variables_that_were_named_reach_the_server(tmp_path: Path) -> None:
    show = ["--", "sh", "-c", "env >&2"]
    assert "from-outside" not in start(tmp_path, "--name", "plain", *show).stderr
    given = ["--env", "SECRET_NOTE", "--env", "OTHER=a=b"]
    done = start(tmp_path, "--name", "plain", *given, *show)
    assert "plain| SECRET_NOTE=from-outside" in done.stderr
    assert "plain| OTHER=a=b" in done.stderr


def test_the_exit_code_is_the_servers(tmp_path: Path) -> None:
    assert start(tmp_path, "--name", "plain", "--", "sh", "-c", "exit 7").returncode == 7
    killed = start(tmp_path, "--name", "plain", "--", "sh", "-c", "kill -9 $$")
    assert killed.returncode == Exit.SIGNAL + 9


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_frames_are_the_same_however_they_arrive(size: int) -> None:
    data = b"one\n\ntwo two\n" + b"x" * 50 + b"\nlast\nrest"
    frames = Frames(20)
    found = [
        frame for at in range(0, len(data), size) for frame in frames.feed(data[at : at + size])
    ]
    assert found[:3] == [b"one\n", b"\n", b"two two\n"]
    assert isinstance(found[3], TooLong)
    assert found[3].prefix == b"x" * 20
    assert found[4:] == [b"last\n"]


SERVERS = """
version: 1
profiles:
  base: {read: ["$WS/**"]}
  other: {like: base}
servers:
  named: {run: [sh, -c, "exit 7"], profile: other}
tools:
  "named.*": {allow: any}
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["named"], 7, ""),
        (["--name", "named", "--", "sh", "-c", "exit 7"], 7, ""),
        (["--name", "named", "--", "sh", "-c", "exit 8"], Exit.FAILURE, "mcp.server_other"),
        (["--profile", "base", "named"], Exit.FAILURE, "mcp.profile_conflict"),
        (["nmaed"], Exit.FAILURE, "mcp.server_unknown"),
        (["sh", "-c", "true"], Exit.USAGE, "--name"),
    ],
)
def test_a_server_that_the_policy_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.setattr(f"{__name__}.POLICY", SERVERS)
    done = start(tmp_path, *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "grants no tool" not in done.stderr


CALL = (
    '{{"jsonrpc":"2.0","id":{},"method":"tools/call",'
    '"params":{{"name":"echo","arguments":{{}}}}}}\n'
)
WAITS = SERVERS.replace('"exit 7"', '"echo ready >&2; cat >&2"')


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (", profile: other}", "}", "the profile of the running server named"),
        ("cat >", "true; cat >", "the command of the running server named"),
        ("named: {run", "others: {run", "There is no server"),
        ("  named:", "  # The same.\n  named:", None),
    ],
)
def test_what_would_start_another_server_needs_a_new_start(
    tmp_path: Path, before: str, after: str, said: str | None
) -> None:
    (tmp_path / "ws").mkdir()
    policy = tmp_path / "policy.yaml"
    policy.write_text(WAITS)
    policy.chmod(0o644)
    common = ["--policy", str(policy), "--workspace", str(tmp_path / "ws")]
    with subprocess.Popen(
        [sys.executable, "-m", "safeconduct", "mcp", *common, "named"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        _until(process, b"ready")
        assert before in WAITS
        policy.write_text(WAITS.replace(before, after))
        for _ in range(200):
            process.send_signal(signal.SIGUSR1)
        told = ""
        # A signal that just came may be handled after the next call, but is after some.
        for number in range(1, 100):
            process.stdin.write(CALL.format(number).encode())
            process.stdin.flush()
            # The server gets it once it was judged, and says so on stderr.
            told += _until(process, b"tools/call").decode()
            if said is None or told:
                break
        process.communicate(timeout=60)
    assert process.returncode >= 0
    assert ("the policy in force stays" in told) is (said is not None)
    assert (said or "") in told


def _until(process: subprocess.Popen[bytes], wanted: bytes) -> bytes:
    """Read what it tells up to a line that holds something."""
    late = threading.Timer(60, process.kill)
    late.start()
    told = b""
    assert process.stderr is not None
    try:
        while wanted not in (line := process.stderr.readline()):
            assert line, told
            told += line
    finally:
        late.cancel()
    return told


def test_no_signal_to_load_a_policy_ends_what_begins_or_ends() -> None:
    """Its default would kill us before the Trace is signed."""
    with mcp._signals(queue.SimpleQueue()):  # pyright: ignore[reportPrivateUsage]
        os.kill(os.getpid(), signal.SIGUSR1)
