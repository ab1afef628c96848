"""Sub-agents: what they are handed only narrows, ends, and can be taken back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from safeconduct.call import Bound, Call, Decision, Per, Unit
from safeconduct.errors import Denied, PolicyError
from safeconduct.runtime.delegate import Delegate
from safeconduct.runtime.supervisor import Runtime

POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**"], write: ["$WS/**"]}
  look: {read: ["$WS/**"]}
tools:
  fs.read: {allow: {path: ["$WS/**"]}}
  fs.list: {allow: {path: ["$WS/**"]}}
  shell.run: {allow: {argv: [sh, ...]}}
"""
NARROW = 'version: 1\ntools: {fs.read: {allow: {path: ["$WS/docs/**"]}}}\n'
WIDE = "version: 1\ntools: {fs.read: {allow: any}, fs.write: {allow: any}}\n"


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    workspace = tmp_path / "project"
    (workspace / "docs").mkdir(parents=True)
    for name in ("file", "docs/file"):
        (workspace / name).write_text("text")
    for name, text in (("policy", POLICY), ("narrow", NARROW), ("wide", WIDE)):
        (tmp_path / f"{name}.yaml").write_text(text)
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    with Runtime.from_policy(
        tmp_path / "policy.yaml", workspace=workspace, environment=environment
    ) as made:
        yield made


def code(agent: Delegate, tool: str = "fs.read", **arguments: str | list[str]) -> str:
    with pytest.raises(Denied) as denied:
        agent.call(tool, **(arguments or {"path": "file"}))
    return denied.value.code


def test_tools_narrow(runtime: Runtime) -> None:
    reader = runtime.delegate("reader", tools=["fs.*"]).delegate("inner", tools=["*.read", "x.y"])
    assert reader.call("fs.read", path="file").ok
    assert code(reader, "fs.list", path=".") == "capability.tool"
    assert code(reader, "shell.run", argv=["sh", "-c", "true"]) == "capability.tool"


def test_a_policy_narrows_and_never_widens(runtime: Runtime, tmp_path: Path) -> None:
    narrow = runtime.delegate("narrow", policy=tmp_path / "narrow.yaml")
    assert narrow.call("fs.read", path="docs/file").ok
    assert code(narrow) == "policy.no_rule"
    wide = narrow.delegate(
        "wider", policy=runtime.delegate("w", policy=tmp_path / "wide.yaml").capability.policy
    )
    assert code(wide) == "policy.no_rule"
    assert code(wide, "fs.write", path="new", content="") == "policy.no_rule"


def test_a_profile_bounds_where_calls_run(runtime: Runtime) -> None:
    write = ["sh", "-c", "echo x > new"]
    assert runtime.call("shell.run", argv=write).ok
    looker = runtime.delegate("looker", profile="look")
    assert not looker.call("shell.run", argv=["sh", "-c", "echo y > other"]).ok
    assert not (Path(runtime.policy.workspace) / "other").exists()
    with pytest.raises(PolicyError, match="there is no profile"):
        runtime.delegate("x", profile="lokk")


def test_a_profile_bounds_our_own_tools_too(tmp_path: Path) -> None:
    """No sandbox is around them: who is handed a profile that only reads must not write."""
    workspace = tmp_path / "ws"
    (workspace / "docs").mkdir(parents=True)
    for name in ("file", "docs/file", "docs/.env"):
        (workspace / name).write_text("text")
    (tmp_path / "policy.yaml").write_text(
        "version: 1\n"
        'profiles: {base: {read: ["$WS/**"]}, look: {read: ["$WS/docs/**"], hide: ["**/.env"]}}\n'
        "tools: {fs.read: {allow: any}, fs.write: {allow: any}, fs.list: {allow: any}}\n"
    )
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    with Runtime.from_policy(
        tmp_path / "policy.yaml", workspace=workspace, environment=environment
    ) as runtime:
        assert runtime.call("fs.write", path="new", content="").ok
        looker = runtime.delegate("looker", profile="look").delegate("inner")
        assert looker.call("fs.read", path="docs/file").ok
        assert looker.call("fs.list", path="docs").ok
        assert code(looker) == "capability.profile"
        assert code(looker, "fs.list", path=".") == "capability.profile"
        assert code(looker, "fs.write", path="docs/new", content="") == "capability.profile"
        assert code(looker, path="docs/.env") == "path.hidden"


def test_it_ends(runtime: Runtime) -> None:
    brief = runtime.delegate("brief", lasts_ms=1)
    until = time.time() * 1000 + 2
    while time.time() * 1000 < until:
        os.sched_yield()
    assert code(brief) == "capability.expired"
    assert code(brief.delegate("longer", lasts_ms=10**9)) == "capability.expired"


def test_it_is_taken_back_with_all_that_came_from_it(runtime: Runtime) -> None:
    outer = runtime.delegate("outer")
    inner, other = outer.delegate("inner"), runtime.delegate("other")
    assert inner.call("fs.read", path="file").ok
    outer.revoke()
    assert code(outer) == "capability.revoked"
    assert code(inner) == "capability.revoked"
    assert other.call("fs.read", path="file").ok


def test_what_it_may_use_is_counted_apart(runtime: Runtime) -> None:
    two = Bound(id="calls", unit=Unit.CALLS, most=2, per=Per.SESSION, reserve=1)
    agent = runtime.delegate("agent", bounds=[two])
    inner = agent.delegate("inner")
    agent.call("fs.read", path="file")
    inner.call("fs.read", path="file")
    assert code(inner) == "budget.exhausted"
    assert runtime.delegate("fresh", bounds=[two]).call("fs.read", path="file").ok
    runtime.call("fs.read", path="file")


def test_a_policy_that_comes_into_force_binds_it_too(runtime: Runtime, tmp_path: Path) -> None:
    agent = runtime.delegate("agent", tools=["fs.read"])
    assert agent.call("fs.read", path="file").ok
    (tmp_path / "policy.yaml").write_text(NARROW)
    runtime.reload()
    assert code(agent) == "policy.no_rule"
    assert agent.call("fs.read", path="docs/file").ok
    (tmp_path / "policy.yaml").write_text(WIDE)
    runtime.reload()
    # What it was handed stays the bound of what it may.
    assert agent.call("fs.read", path="file").ok
    assert code(agent, path="/etc/hostname") == "policy.no_rule"


def test_what_is_handed_on_after_a_policy_came_into_force_is_bound_by_it(
    runtime: Runtime, tmp_path: Path
) -> None:
    before = runtime.delegate("before")
    (tmp_path / "policy.yaml").write_text(NARROW)
    runtime.reload()
    for agent in (runtime.delegate("after"), before.delegate("inner"), before):
        assert code(agent) == "policy.no_rule"
        assert agent.call("fs.read", path="docs/file").ok


def test_the_paths_of_its_own_policy_are_brought_to_one_spelling(tmp_path: Path) -> None:
    """The session's policy does not say that it is a path, so nothing else would."""
    workspace = tmp_path / "ws"
    (workspace / "secrets").mkdir(parents=True)
    (workspace / "a").mkdir()
    for name in ("secrets/k", "a/file"):
        (workspace / name).write_text("text")
    base = 'version: 1\nprofiles: {base: {read: ["$WS/**"]}}\n'
    (tmp_path / "policy.yaml").write_text(base + "tools: {readit: {allow: {p: any}}}\n")
    (tmp_path / "own.yaml").write_text(
        base + 'tools: {readit: [{allow: {p: {path: ["$WS/a/**"]}}}, '
        '{deny: {p: {path: ["$WS/secrets/**"]}}}]}\n'
    )
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    with Runtime.from_policy(
        tmp_path / "policy.yaml", workspace=workspace, environment=environment
    ) as runtime:

        @runtime.tool()
        def readit(p: str) -> str:
            return Path(p).read_text()

        dodging = f"{workspace}/a/../secrets/k"
        assert runtime.call("readit", p=dodging).value == "text"
        agent = runtime.delegate("agent", policy=tmp_path / "own.yaml")
        assert agent.call("readit", p=f"{workspace}/a/file").value == "text"
        assert agent.call("readit", p="a/file").ok
        for path in (dodging, "secrets/k", "./secrets/k", f"{workspace}//secrets/k"):
            with pytest.raises(Denied):
                agent.call("readit", p=path)
        # Nor where a policy came into force since it was handed on.
        (tmp_path / "policy.yaml").write_text(base + "tools: {readit: {allow: any}}\n")
        runtime.reload()
        assert code(agent, "readit", p=dodging) == "path.dotdot"
        (tmp_path / "policy.yaml").write_text(base + "tools: {readit: {allow: {p: [x]}}}\n")
        runtime.reload()
        assert code(agent, "readit", p="x") == "capability.policy"


def test_nobody_makes_calls_in_the_name_of_another(runtime: Runtime) -> None:
    agent = runtime.delegate("agent")
    seen: list[str] = []
    begin = runtime.standing.begin

    def watched(call: Call) -> object:
        seen.append(call.caller)
        return begin(call)

    runtime.standing.begin = watched  # type: ignore[assignment, method-assign]
    agent.perform(runtime.new_call("fs.read", {"path": "file"}))
    assert seen == ["agent"]


@pytest.mark.parametrize(
    "bound",
    [
        Bound(id="x", unit=Unit.CALLS, most=1, per=Per.SESSION, reserve=-100),
        Bound(id="x", unit=Unit.CALLS, most=1, per=Per.SESSION, reserve=0),
        Bound(id="x", unit=Unit.CALLS, most=10**30, per=Per.DAY, reserve=1),
        Bound(id="x", unit=Unit.CALLS, most=1, per=Per.WINDOW, reserve=1),
        Bound(id="x", unit=Unit.CALLS, most=1, per=Per.WINDOW, reserve=1, window_ms=0),
    ],
)
def test_a_bound_that_bounds_nothing_is_refused(runtime: Runtime, bound: Bound) -> None:
    with pytest.raises(PolicyError) as error:
        runtime.delegate("agent", bounds=[bound])
    assert error.value.code == "capability.invalid"


ASKS = 'version: 1\ntools: {fs.read: {ask: {path: ["$WS/**"]}}}\n'


@pytest.mark.parametrize("ending", ["revoked", "expired"])
def test_a_yes_brings_back_nothing_that_ended_while_a_person_thought(
    tmp_path: Path, ending: str
) -> None:
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "file").write_text("text")
    (tmp_path / "policy.yaml").write_text(ASKS)
    agents: list[Delegate] = []

    def think(call: Call, decision: Decision) -> str:
        if ending == "revoked":
            agents[0].revoke()
        until = agents[0].capability.expires_ms or 0
        while time.time() * 1000 <= until:
            os.sched_yield()
        return "a person"

    with Runtime.from_policy(
        tmp_path / "policy.yaml", workspace=tmp_path / "ws", approver=think,
        environment={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
    ) as runtime:  # fmt: skip
        agents.append(runtime.delegate("agent", lasts_ms=200 if ending == "expired" else None))
        assert code(agents[0]) == f"capability.{ending}"
