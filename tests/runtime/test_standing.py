"""What a session is judged by: its role, what it did so far, its budgets, and who only observes."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from safeconduct.attestation import TraceWriter
from safeconduct.call import Call, Decision, Durability, EntryKind, Json
from safeconduct.errors import ApprovalRequired, Denied, PolicyError
from safeconduct.runtime.supervisor import Runtime

Start = Callable[..., Runtime]
Entries = list[tuple[EntryKind, dict[str, Json]]]


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Entries:
    """Watch what the real writer is given."""
    seen: Entries = []
    real = TraceWriter.append

    def append(self: TraceWriter, kind: EntryKind, body: Json, **options: object) -> int:
        assert isinstance(body, dict)
        seen.append((kind, body))
        return real(self, kind, body, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TraceWriter, "append", append)
    return seen


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a runtime over one workspace and one state folder, as often as wanted."""
    workspace = tmp_path / "project"
    workspace.mkdir()
    (workspace / "file").write_text("text")
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    with ExitStack() as stack:

        def run(text: str, **options: object) -> Runtime:
            policy = tmp_path / "policy.yaml"
            policy.write_text("version: 1\n" + text)
            made = Runtime.from_policy(
                policy,
                workspace=workspace,
                environment=environment,
                **options,  # type: ignore[arg-type]
            )
            return stack.enter_context(made)

        yield run


def refused(run: Callable[[], object]) -> str:
    with pytest.raises(Denied) as denied:
        run()
    return denied.value.code


def of(entries: Entries, kind: EntryKind) -> list[dict[str, Json]]:
    return [body for found, body in entries if found is kind]


def test_a_rate_holds_over_runtimes(start: Start, entries: Entries) -> None:
    text = 'tools: {fs.read: {allow: {path: ["$WS/**"]}, rate: 3/h}}\n'
    for _ in range(2):
        runtime = start(text)
        runtime.call("fs.read", path="file")
        runtime.close()
    runtime = start(text)
    runtime.call("fs.read", path="file")
    assert refused(lambda: runtime.call("fs.read", path="file")) == "limit.rate"
    decided, ended = (
        of(entries, EntryKind.CALL_DECISION)[-1],
        of(entries, EntryKind.CALL_OUTCOME)[-1],
    )
    assert decided["effect"] == "allow"
    assert decided["obligations"]
    assert (ended["status"], ended["code"]) == ("denied", "limit.rate")


def test_a_call_that_nobody_approves_uses_no_rate(start: Start) -> None:
    runtime = start('tools: {fs.read: {ask: {path: ["$WS/**"]}, rate: 1/h}}\n')
    for _ in range(3):
        with pytest.raises(ApprovalRequired):
            runtime.call("fs.read", path="file")


def test_a_session_budget_of_calls(start: Start) -> None:
    text = 'tools: {fs.read: {allow: {path: ["$WS/**"]}, budget: {calls: 2/session}}}\n'
    for _ in range(2):
        runtime = start(text)
        runtime.call("fs.read", path="file")
        runtime.call("fs.read", path="file")
        assert refused(partial(runtime.call, "fs.read", path="file")) == ("budget.exhausted")


def test_a_role_is_what_its_rules_grant(start: Start) -> None:
    text = """\
roles:
  reader: {fs.read: {allow: {path: ["$WS/**"]}}}
  writer: {fs.write: {allow: {path: ["$WS/**"]}}}
"""
    reader = start(text, role="reader")
    reader.call("fs.read", path="file")
    assert refused(lambda: reader.call("fs.write", path="new", content="")) == "policy.no_rule"
    writer = start(text, role="writer")
    writer.call("fs.write", path="new", content="")
    assert refused(lambda: writer.call("fs.read", path="file")) == "policy.no_rule"
    nobody = start(text)
    assert refused(lambda: nobody.call("fs.read", path="file")) in (
        "policy.no_rule", "call.unknown_tool",
    )  # fmt: skip
    with pytest.raises(PolicyError) as unknown:
        start(text, role="redaer")
    assert unknown.value.code == "policy.unknown_role"


def test_when_sees_the_session(start: Start) -> None:
    text = """\
tools:
  fs.read: {allow: {path: ["$WS/**"]}, when: "session.calls < 2 and session.denied == 0"}
"""
    runtime = start(text)
    runtime.call("fs.read", path="file")
    runtime.call("fs.read", path="file")
    assert refused(lambda: runtime.call("fs.read", path="file")) == "policy.no_rule"
    other = start(text)
    assert refused(lambda: other.call("fs.read", path="absent")) == "path.not_found"
    assert refused(lambda: other.call("fs.read", path="file")) == "policy.no_rule"


def test_observing_records_what_would_be_refused(start: Start, entries: Entries) -> None:
    text = """\
profiles: {base: {read: ["$WS/**"]}}
tools:
  fs.read:
    - {ask: {path: ["$WS/file"]}}
    - {deny: {path: ["$WS/secret"]}}
"""
    runtime = start(text, observe=True)
    (Path(runtime.policy.workspace) / "secret").write_text("s")
    assert runtime.call("fs.read", path="file").ok
    assert runtime.call("fs.list", path=".").value
    assert runtime.call("shell.run", argv=["true"]).ok
    assert refused(lambda: runtime.call("fs.read", path="secret")) == "policy.deny"
    decisions = of(entries, EntryKind.CALL_DECISION)
    assert [(one["effect"], one.get("observed", False)) for one in decisions] == [
        ("ask", True), ("deny", True), ("deny", True), ("deny", False),
    ]  # fmt: skip
    outcomes = of(entries, EntryKind.CALL_OUTCOME)
    assert [one["status"] for one in outcomes] == ["ok", "ok", "ok", "denied"]


def test_observing_still_confines(start: Start) -> None:
    runtime = start('profiles: {base: {read: ["$WS/**"]}}\ntools: {}\n', observe=True)
    outcome = runtime.call("shell.run", argv=["sh", "-c", "echo x > new"])
    assert outcome.exit_code != 0
    assert not (Path(runtime.policy.workspace) / "new").exists()
    hidden = refused(lambda: runtime.call("fs.write", path=".git/hooks/pre-commit", content=""))
    assert hidden.startswith("path.")


def test_observing_judges_tools_that_the_policy_does_not_speak_of(start: Start) -> None:
    def admit(runtime: Runtime, tool: str) -> bool:
        with runtime.pipeline.admit(runtime.new_call(tool, {"path": "../x", "n": 1})) as admitted:
            return admitted.decision.observed

    text = 'profiles: {base: {read: ["$WS/**"]}}\ntools: {}\n'
    assert admit(start(text, observe=True), "server.tool")
    assert refused(lambda: admit(start(text, observe=True), "fs.raed")) == "call.unknown_tool"
    assert refused(lambda: admit(start(text), "server.tool")) == "call.unknown_tool"


def test_approved_calls_do_not_exceed_a_rate(start: Start) -> None:
    """Each was asked about in a second of its own, and a person says yes to all at once."""
    answer = threading.Event()
    asked: queue.SimpleQueue[float] = queue.SimpleQueue()

    def approve(call: Call, decision: Decision) -> str:
        asked.put(time.monotonic())
        assert answer.wait(60)
        return "a person"

    runtime = start('tools: {fs.read: {ask: {path: ["$WS/**"]}, rate: 1/s}}\n', approver=approve)
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run() -> None:
        try:
            runtime.call("fs.read", path="file")
        except Denied as denied:
            ended.put(denied.code)
        else:
            ended.put("ran")

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
        # The next one is asked about only once this one has left the window.
        until = asked.get(timeout=60) + 1.1
        while time.monotonic() < until:
            answer.wait(0.05)
    began = time.monotonic()
    answer.set()
    for thread in threads:
        thread.join()
    counted = Counter(ended.get(timeout=60) for _ in threads)
    assert counted["ran"] == 1 or time.monotonic() - began > 1
    assert counted["ran"] + counted["limit.rate"] == 3


def test_an_approver_that_breaks_uses_nothing(start: Start) -> None:
    answers: list[str | None] = ["a person", None]

    def approve(call: Call, decision: Decision) -> str | None:
        answer = answers.pop()
        if answer is None:
            raise ValueError("no screen")
        return answer

    text = 'tools: {fs.read: {ask: {path: ["$WS/**"]}, budget: {calls: 1/session}}}\n'
    runtime = start(text, approver=approve)
    with pytest.raises(ValueError, match="no screen"):
        runtime.call("fs.read", path="file")
    assert runtime.call("fs.read", path="file").ok


def test_observing_keeps_what_any_part_of_the_policy_denies(start: Start, tmp_path: Path) -> None:
    wider = tmp_path / "wider.yaml"
    wider.write_text('version: 1\ntools: {fs.list: {allow: {path: ["$WS/**"]}}}\n')
    text = 'extends: wider.yaml\ntools: {fs.read: {deny: {path: ["$WS/file"]}}}\n'
    runtime = start(text, observe=True)
    refused(lambda: runtime.call("fs.read", path="file"))


def test_observing_dodges_no_deny_of_a_tool_that_only_a_narrower_file_speaks_of(
    start: Start, tmp_path: Path
) -> None:
    """It has no spelling in the wider file, so a deny of a path would be judged on raw text."""
    wider = tmp_path / "wider.yaml"
    wider.write_text("version: 1\ntools: {other: {allow: any}}\n")
    text = """\
extends: wider.yaml
profiles: {base: {read: ["$WS/**"]}}
tools: {server.read: [{allow: {p: any}}, {deny: {p: {path: ["$WS/secrets/**"]}}}]}
"""
    runtime = start(text, observe=True)
    workspace = runtime.policy.workspace

    def admit(path: str) -> bool:
        with runtime.pipeline.admit(runtime.new_call("server.read", {"p": path})) as admitted:
            return admitted.decision.observed

    assert admit(f"{workspace}/file")
    for path in ("secrets/k", f"{workspace}/secrets/k", f"{workspace}/a/../secrets/k"):
        refused(partial(admit, path))


def test_observing_keeps_bounds_and_marks_of_every_part(
    start: Start, entries: Entries, tmp_path: Path
) -> None:
    """That another file does not grant it takes back nothing of what one says of it."""
    wider = tmp_path / "wider.yaml"
    rule = '{allow: {path: ["$WS/**"]}, budget: {calls: 1/session}, irreversible: true}'
    wider.write_text(f"version: 1\ntools: {{fs.read: {rule}}}\n")
    text = 'extends: wider.yaml\nprofiles: {base: {read: ["$WS/**"]}}\ntools: {}\n'
    runtime = start(text, observe=True)
    assert runtime.call("fs.read", path="file").ok
    (decided,) = of(entries, EntryKind.CALL_DECISION)
    assert (decided["observed"], decided["irreversible"]) == (True, True)
    assert refused(lambda: runtime.call("fs.read", path="file")) == "budget.exhausted"


def test_observing_keeps_the_mark_of_a_rule_that_asks(start: Start) -> None:
    text = """\
profiles: {base: {read: ["$WS/**"]}}
tools: {fs.read: {ask: {path: ["$WS/**"]}, irreversible: true}}
"""
    runtime = start(text, observe=True)
    with runtime.pipeline.admit(runtime.new_call("fs.read", {"path": "file"})) as admitted:
        assert admitted.decision.durability is Durability.SYNC


def test_observing_goes_no_further_than_the_profile(start: Start, tmp_path: Path) -> None:
    """Around our own file tools is no sandbox, and no rule has named what they would open."""
    text = """\
profiles: {base: {read: ["$WS/**"], write: ["$WS/out/**"], hide: ["**/.env"]}}
tools: {}
"""
    runtime = start(text, observe=True)
    workspace = Path(runtime.policy.workspace)
    (workspace / "out" / ".vscode").mkdir(parents=True)
    for name in (".env", "out/.env"):
        (workspace / name).write_text("SECRET")
    assert runtime.call("fs.read", path="file").ok
    assert runtime.call("fs.write", path="out/new", content="").ok
    for path in (".env", "out/.env", "/etc/passwd", str(tmp_path / "policy.yaml")):
        assert refused(partial(runtime.call, "fs.read", path=path)) == "policy.no_rule"
    assert refused(lambda: runtime.call("fs.list", path="/etc")) == "policy.no_rule"
    for path in ("new", ".envrc", ".mcp.json", "out/.env", "out/.vscode/x", str(tmp_path / "x")):
        refused(partial(runtime.call, "fs.write", path=path, content=""))
    for host in ("127.0.0.1", "[::1]", "localhost", "169.254.169.254", "8.8.8.8"):
        url = f"http://{host}:9/"
        assert refused(partial(runtime.call, "http.get", url=url)) == "policy.no_rule"
