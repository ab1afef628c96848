"""A policy that changes while calls are made: whole or not at all, and no call between two."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from safeconduct.attestation import TraceWriter
from safeconduct.call import Call, Decision, EntryKind
from safeconduct.errors import Denied, PolicyError
from safeconduct.policies import TrustStore, read_policy_file
from safeconduct.runtime.supervisor import Runtime

ALLOWS = """\
version: 1
tools:
  fs.read: {allow: {path: ["$WS/**"]}}
"""
DENIES = """\
version: 1
tools:
  fs.list: {allow: {path: ["$WS/**"]}}
"""
WIDE = "version: 1\ntools: {fs.read: {allow: any}}\n"


class Desk:
    """A workspace with a file, a policy of its own, and what a runtime of it told."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder / "project"
        (self.workspace / ".safeconduct").mkdir(parents=True)
        (self.workspace / "file").write_text("text")
        self.policy = folder / "policy.yaml"
        self.environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state")}
        self.told: list[str] = []
        self.write(ALLOWS)

    def write(self, text: str) -> None:
        """Replace the policy as an editor does."""
        beside = self.policy.with_suffix(".new")
        beside.write_text(text)
        beside.chmod(0o644)
        beside.replace(self.policy)

    def runtime(self, *, watch: bool = True, policy: Path | None = None) -> Runtime:
        return Runtime.from_policy(
            policy or self.policy,
            workspace=self.workspace,
            environment=self.environment,
            watch=watch,
            tell=self.told.append,
        )


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look before each call; what is put off by a quarter of a second is looked at then."""
    monkeypatch.setattr("safeconduct.runtime.reload._LOOK_SECONDS", 0.0)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Collect what the trace says about policies."""
    seen: list[dict[str, object]] = []
    real = TraceWriter.append

    def append(
        self: TraceWriter, kind: EntryKind, body: dict[str, object], **options: object
    ) -> int:
        if kind is EntryKind.POLICY_LOAD:
            seen.append(body)
        return real(self, kind, body, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TraceWriter, "append", append)
    return seen


def test_a_changed_file_counts_from_the_next_call(
    desk: Desk, loaded: list[dict[str, object]]
) -> None:
    with desk.runtime() as runtime:
        first = runtime.policy.version
        runtime.call("fs.read", path="file")
        desk.write(DENIES)
        with pytest.raises(Denied):
            runtime.call("fs.read", path="file")
        assert runtime.policy.version != first
        desk.write(ALLOWS)
        runtime.call("fs.read", path="file")
        assert [one["policy"] for one in loaded] == [first, loaded[1]["policy"], first]
    assert desk.told == []


def test_without_watching_only_reload_counts(desk: Desk) -> None:
    with desk.runtime(watch=False) as runtime:
        desk.write(DENIES)
        runtime.call("fs.read", path="file")
        runtime.reload()
        with pytest.raises(Denied):
            runtime.call("fs.read", path="file")


def _broken(desk: Desk) -> None:
    desk.write("version: 1\ntools: {fs.raed: {allow: any}}\n")


def _torn(desk: Desk) -> None:
    desk.write(DENIES[: len(DENIES) // 2] + "{")


def _gone(desk: Desk) -> None:
    desk.policy.unlink()


def _anybodys(desk: Desk) -> None:
    desk.write(DENIES)
    desk.policy.chmod(0o666)


def _fifo(desk: Desk) -> None:
    desk.policy.unlink()
    os.mkfifo(desk.policy)


def _failing(desk: Desk) -> None:
    """A policy whose own tests do not expect what it says now."""
    desk.policy.with_name("policy.test.yaml").write_text(
        "- {name: reads, call: {tool: fs.read, arguments: {path: file}}, expect: allow}\n"
    )
    desk.write(DENIES)


@pytest.mark.parametrize("spoil", [_failing, _broken, _torn, _gone, _anybodys, _fifo])
def test_a_bad_file_leaves_the_old_policy(
    desk: Desk, loaded: list[dict[str, object]], spoil: Callable[[Desk], None]
) -> None:
    with desk.runtime() as runtime:
        before = runtime.policy.version
        spoil(desk)
        for _ in range(3):
            runtime.call("fs.read", path="file")
        assert runtime.policy.version == before
        with pytest.raises(PolicyError) as error:
            runtime.reload()
        assert loaded[-1] == {"policy": before, "kept": error.value.code}
        # Told once for the change, and once more because somebody asked.
        assert len(desk.told) == 2
        assert all(line.startswith("the policy in force stays: ") for line in desk.told)
        if desk.policy.is_fifo():
            desk.policy.unlink()
        desk.policy.with_name("policy.test.yaml").unlink(missing_ok=True)
        desk.write(DENIES + "# again\n")
        with pytest.raises(Denied):
            runtime.call("fs.read", path="file")


def test_a_project_policy_that_changed_is_not_trusted(desk: Desk) -> None:
    project = desk.workspace / ".safeconduct" / "policy.yaml"
    project.write_text(ALLOWS)
    store = TrustStore.of(desk.environment)
    store.pin(project, read_policy_file(project).digest)
    here = Path.cwd()
    os.chdir(desk.workspace)
    try:
        with Runtime.from_policy(
            environment=desk.environment, watch=True, tell=desk.told.append
        ) as runtime:
            runtime.call("fs.read", path="file")
            project.write_text(DENIES)
            runtime.call("fs.read", path="file")
            assert "nobody has trusted it" in desk.told[0]
            store.pin(project, read_policy_file(project).digest)
            runtime.reload()
            with pytest.raises(Denied):
                runtime.call("fs.read", path="file")
    finally:
        os.chdir(here)


def test_the_files_in_force_cannot_be_swapped_for_others(desk: Desk) -> None:
    """A project's policy that appears later would win; it waits for the next start."""
    own = Path(desk.environment["XDG_STATE_HOME"]).parent / "config"
    (own / "safeconduct").mkdir(parents=True)
    (own / "safeconduct" / "policy.yaml").write_text(ALLOWS)
    environment = {**desk.environment, "XDG_CONFIG_HOME": str(own)}
    here = Path.cwd()
    os.chdir(desk.workspace)
    try:
        with Runtime.from_policy(environment=environment, workspace=desk.workspace) as runtime:
            (desk.workspace / ".safeconduct" / "policy.yaml").write_text(DENIES)
            with pytest.raises(PolicyError) as error:
                runtime.reload()
            assert error.value.code in ("policy.other_file", "policy.untrusted")
            runtime.call("fs.read", path="file")
    finally:
        os.chdir(here)


def test_each_decision_belongs_to_exactly_one_version(desk: Desk) -> None:
    """Decide again and again while the policy is replaced by ones whose verdict is known."""
    # The long form: SAFECONDUCT_RELOADS=100 for 100 replacements under 100,000 decisions.
    replacements = int(os.environ.get("SAFECONDUCT_RELOADS", "10"))
    decisions = 1000 * replacements
    versions: dict[str, bool] = {}
    seen: Counter[tuple[str, bool]] = Counter()
    from safeconduct.policies import canonicalize, decide

    with desk.runtime() as runtime:
        standing = runtime.standing
        call = Call(id="c", tool="fs.read", arguments={"path": "file"}, session=runtime.session)
        stop = threading.Event()
        made = [0] * 4
        failures: list[BaseException] = []

        def work(mine_at: int) -> None:
            mine: Counter[tuple[str, bool]] = Counter()
            try:
                while not stop.is_set():
                    policy, facts = standing.begin(call)
                    with canonicalize(policy, call) as canonical:
                        decision: Decision = decide(policy, canonical.document, facts)
                    mine[decision.policy, decision.effect == "allow"] += 1
                    made[mine_at] += 1
            except BaseException as error:
                failures.append(error)
                raise
            finally:
                seen.update(mine)

        versions[runtime.policy.version] = True
        threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for number in range(replacements):
            while sum(made) < decisions * number // replacements and not failures:
                threads[0].join(0.001)
            allows = number % 2 == 1
            text = (ALLOWS if allows else DENIES) + f"# {number}\n"
            desk.write(text)
            runtime.reload()
            versions[runtime.policy.version] = allows
        while sum(made) < decisions and not failures:
            threads[0].join(0.001)
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert sum(seen.values()) >= decisions
    assert len(versions) == replacements + 1
    assert {version for version, _ in seen} <= set(versions)
    assert all(versions[version] == allowed for version, allowed in seen)


EXTENDS = "version: 1\nextends: base.yaml\n"


def test_a_policy_that_extends_another_is_replaced_too(desk: Desk) -> None:
    wider = desk.policy.with_name("base.yaml")
    wider.write_text(ALLOWS)
    wider.chmod(0o644)
    desk.write(EXTENDS + ALLOWS.partition("\n")[2])
    with desk.runtime() as runtime:
        runtime.call("fs.read", path="file")
        desk.write(EXTENDS + DENIES.partition("\n")[2])
        with pytest.raises(Denied):
            runtime.call("fs.read", path="file")
        desk.write(EXTENDS + ALLOWS.partition("\n")[2])
        runtime.call("fs.read", path="file")
        wider.write_text(DENIES)
        with pytest.raises(Denied):
            runtime.call("fs.read", path="file")
    assert desk.told == []


@pytest.mark.parametrize("named", ["option", "variable"])
def test_a_relative_name_means_the_same_file_wherever_the_process_goes(
    desk: Desk, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a tool lays down in a folder that the process goes to must not come into force."""
    planted = desk.workspace / "policy.yaml"
    planted.write_text("version: 1\ntools: {fs.read: {allow: any}}\n")
    planted.chmod(0o644)
    monkeypatch.chdir(desk.policy.parent)
    if named == "variable":
        desk.environment["SAFECONDUCT_POLICY"] = "policy.yaml"
    with Runtime.from_policy(
        "policy.yaml" if named == "option" else None,
        workspace=desk.workspace, environment=desk.environment, watch=True,
    ) as runtime:  # fmt: skip
        monkeypatch.chdir(desk.workspace)
        runtime.reload()
        with pytest.raises(Denied):
            runtime.call("fs.read", path="/etc/hostname")


def test_what_is_no_error_of_ours_leaves_the_old_policy_too(
    desk: Desk, loaded: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = desk.policy.with_name("gone")
    gone.mkdir()
    with desk.runtime() as runtime:
        before = runtime.policy.version
        monkeypatch.chdir(gone)
        gone.rmdir()
        desk.write(DENIES)
        runtime.call("fs.read", path="file")
        assert loaded[-1] == {"policy": before, "kept": "policy.unloadable"}
        assert len(desk.told) == 1
        monkeypatch.chdir("/")
        runtime.reload()
        with pytest.raises(Denied):
            runtime.call("fs.read", path="file")


def test_nobody_who_could_be_told_is_no_reason_to_end_a_call(desk: Desk) -> None:
    def closed(text: str) -> None:
        raise BrokenPipeError(text)

    with Runtime.from_policy(
        desk.policy, workspace=desk.workspace, environment=desk.environment, watch=True,
        tell=closed,
    ) as runtime:  # fmt: skip
        _broken(desk)
        assert runtime.call("fs.read", path="file").ok


def test_the_trace_has_a_version_before_any_call_is_judged_by_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[EntryKind, object, str]] = []
    real = TraceWriter.append
    with desk.runtime() as runtime:

        def append(
            self: TraceWriter, kind: EntryKind, body: dict[str, object], **options: object
        ) -> int:
            seen.append((kind, body["policy"], runtime.standing.policy.version))
            return real(self, kind, body, **options)  # type: ignore[arg-type]

        before = runtime.policy.version
        desk.write(DENIES)
        with monkeypatch.context() as watched:
            watched.setattr(TraceWriter, "append", append)
            runtime.reload()
        assert seen == [(EntryKind.POLICY_LOAD, runtime.policy.version, before)]


def test_no_tool_changes_the_tests_that_a_new_policy_must_pass(desk: Desk) -> None:
    """They could keep a policy that takes something away from ever coming into force."""
    policy = desk.workspace / "policy.yaml"
    policy.write_text(
        'version: 1\nprofiles: {base: {read: ["$WS/**"], write: ["$WS/**"]}}\n'
        "tools: {shell.run: {allow: {argv: [sh, ...]}}, fs.write: {allow: any}}\n"
    )
    policy.chmod(0o644)
    tests = policy.with_name("policy.test.yaml")
    tests.write_text("[]\n")
    with desk.runtime(policy=policy) as runtime:
        assert not runtime.call("shell.run", argv=["sh", "-c", "echo bad > policy.test.yaml"]).ok
        with pytest.raises(Denied):
            runtime.call("fs.write", path="policy.test.yaml", content="bad")
        assert tests.read_text() == "[]\n"


def test_a_link_never_leads_to_a_file_that_tools_may_write(desk: Desk) -> None:
    """Only what the files were at the start is out of reach of programs."""
    first, planted = desk.workspace / "first.yaml", desk.workspace / "planted.yaml"
    desk.policy.replace(first)
    desk.policy.symlink_to(first)
    grants = 'version: 1\nprofiles: {base: {read: ["$WS/**"], write: ["$WS/**"]}}\n'
    first.write_text(grants + "tools: {shell.run: {allow: {argv: [sh, ...]}}}\n")
    with desk.runtime() as runtime:
        assert not runtime.call("shell.run", argv=["sh", "-c", "echo x > first.yaml"]).ok
        plant = f"printf '%s' '{WIDE}' > planted.yaml && chmod 644 planted.yaml"
        assert runtime.call("shell.run", argv=["sh", "-c", plant]).ok
        assert "fs.read" in planted.read_text()
        desk.policy.unlink()
        desk.policy.symlink_to(planted)
        with pytest.raises(PolicyError) as error:
            runtime.reload()
        assert error.value.code == "policy.other_file"
        with pytest.raises(Denied):
            runtime.call("fs.read", path="/etc/hostname")


def test_a_link_may_lead_to_another_file_out_of_reach(desk: Desk) -> None:
    """As where a whole folder of configuration is replaced by turning one link."""
    other = desk.policy.with_name("other.yaml")
    other.write_text(DENIES)
    other.chmod(0o644)
    desk.policy.replace(desk.policy.with_name("first.yaml"))
    desk.policy.symlink_to("first.yaml")
    with desk.runtime() as runtime:
        runtime.call("fs.read", path="file")
        desk.policy.unlink()
        desk.policy.symlink_to("other.yaml")
        with pytest.raises(Denied):
            runtime.call("fs.read", path="file")
