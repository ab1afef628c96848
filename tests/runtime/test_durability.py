"""What of a Call is on disk, signed and witnessed before its effect, as its policy says."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.attestation.kit import record_call

from safeconduct.attestation import SignerClient, TraceWriter, verify_trace
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.note import VerifierKey
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.attestation.signing.signer_state import newest_head
from safeconduct.attestation.witness.desk import Witness
from safeconduct.attestation.witness.server import WitnessServer
from safeconduct.attestation.witness.state import WitnessState, origin_hash
from safeconduct.attestation.writing.appending import Clock
from safeconduct.call import Call, Decision, Durability, EntryKind, Json, Outcome, Profile
from safeconduct.errors import ApprovalRequired, Denied, Error, Exit, TraceInvalid
from safeconduct.runtime.supervisor import Runtime

SYNC, BATCH, VOLATILE = Durability.SYNC, Durability.BATCH, Durability.VOLATILE
RULES = """
profiles: {base: {read: ["$WS/**"], write: ["$WS/**"]}}
tools:
  fs.read: {allow: {path: ["$WS/**"]}}
  fs.write: {allow: {path: ["$WS/**"]}, id: write}
  fs.list: {ask: {path: ["$WS/**"]}}
  remote.send: {allow: any}
"""


@dataclass(frozen=True)
class Desk:
    """Runtimes under policies of a test's own, all over one workspace and one state folder."""

    root: Path
    workspace: Path
    held: ExitStack
    told: list[str]

    @property
    def trace(self) -> Path:
        return self.root / "trace"

    def start(self, head: str = "", *, rules: str = RULES, **options: object) -> Runtime:
        policy = self.root / "policy.yaml"
        policy.write_text(f"version: 1\n{head}\n{rules}")
        policy.chmod(0o600)
        environment = {"HOME": str(self.root), "XDG_STATE_HOME": str(self.root / "state")}
        runtime = Runtime.from_policy(
            policy, workspace=self.workspace, trace=self.trace, environment=environment,
            tell=self.told.append, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        return self.held.enter_context(runtime)

    def signed(self) -> int:
        """Return how many entries the signer has signed, as it remembers on its own disk."""
        (memory,) = (self.root / "state/safeconduct/signer").iterdir()
        return newest_head(memory.read_bytes()).size

    def admit(self, runtime: Runtime, tool: str, **arguments: Json) -> int:
        """Admit a Call of a tool that others execute; return what is signed before its effect."""
        with runtime.pipeline.admit(runtime.new_call(tool, arguments)):
            return self.signed()


@pytest.fixture
def desk(tmp_path: Path, workspace: Path) -> Iterator[Desk]:
    with ExitStack() as held:
        yield Desk(tmp_path, workspace, held, [])


Asked = list[tuple[EntryKind, Durability]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Watch how durable the real writer is told to be."""
    seen: Asked = []
    real = TraceWriter.append

    def append(
        self: TraceWriter, kind: EntryKind, body: Mapping[str, Json], **options: object
    ) -> int:
        durability = options.get("durability", VOLATILE)
        assert isinstance(durability, Durability)
        seen.append((kind, durability))
        return real(self, kind, body, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TraceWriter, "append", append)
    return seen


def of(asked: Asked, kind: EntryKind) -> list[Durability]:
    return [durability for one, durability in asked if one is kind]


def yes(call: Call, decision: Decision) -> str:
    return "ann"


class TestDurability:
    def test_local_tools_are_volatile_and_others_on_disk(self, desk: Desk, asked: Asked) -> None:
        runtime = desk.start()
        runtime.call("fs.write", path="a", content="x")
        desk.admit(runtime, "remote.send", to="x")
        assert of(asked, EntryKind.CALL_DECISION) == [VOLATILE, SYNC]

    @pytest.mark.parametrize("durability", [VOLATILE, BATCH, SYNC])
    def test_the_policy_says_it(self, desk: Desk, asked: Asked, durability: Durability) -> None:
        runtime = desk.start(f"trace: {{durability: {durability}}}")
        runtime.call("fs.write", path="a", content="x")
        desk.admit(runtime, "remote.send", to="x")
        assert of(asked, EntryKind.CALL_DECISION) == [durability] * 2

    def test_what_is_denied_waits_for_no_disk(self, desk: Desk, asked: Asked) -> None:
        runtime = desk.start("trace: {durability: sync}")
        for tool in ("fs.read", "other.tool"):
            with pytest.raises(Denied):
                runtime.call(tool, path="../x")
        assert of(asked, EntryKind.CALL_DECISION) == [VOLATILE] * 2

    def test_what_is_only_observed_has_its_effect_after_it(self, desk: Desk, asked: Asked) -> None:
        runtime = desk.start("trace: {irreversible: [other.*]}", observe=True)
        with runtime.pipeline.admit(runtime.new_call("other.tool", {})) as admitted:
            assert admitted.decision.observed
            assert admitted.decision.irreversible
        assert of(asked, EntryKind.CALL_DECISION) == [SYNC]

    def test_a_yes_is_as_durable_as_what_it_allows(self, desk: Desk, asked: Asked) -> None:
        runtime = desk.start("trace: {durability: sync}", approver=yes)
        runtime.call("fs.list", path=".")
        assert of(asked, EntryKind.APPROVAL) == [SYNC]

    def test_nobody_s_answer_needs_no_disk(self, desk: Desk, asked: Asked) -> None:
        runtime = desk.start("trace: {durability: sync}")
        with pytest.raises(ApprovalRequired):
            runtime.call("fs.list", path=".")
        assert of(asked, EntryKind.APPROVAL) == [VOLATILE]


MARKED = RULES.replace("id: write}", "id: write, irreversible: true}")


class TestIrreversible:
    @pytest.mark.parametrize(
        ("head", "rules", "tool"),
        [
            ("", MARKED, "fs.write"),
            ("trace: {irreversible: [fs.write]}", RULES, "fs.write"),
            ("trace: {irreversible: [remote.*]}", RULES, "remote.send"),
        ],
        ids=["rule", "list", "star"],
    )
    def test_it_is_signed_before_the_effect(
        self, desk: Desk, head: str, rules: str, tool: str
    ) -> None:
        runtime = desk.start(head, rules=rules)
        arguments: dict[str, Json] = (
            {"path": "a", "content": "x"} if tool == "fs.write" else {"to": "x"}
        )
        before = desk.admit(runtime, tool, **arguments)
        assert before >= 5  # log.open, session.open, policy.load, intent, decision
        assert desk.admit(runtime, tool, **arguments) >= before + 2

    def test_without_the_mark_it_is_not(self, desk: Desk) -> None:
        # Behind the hot path a signature comes within a second, or after 256 entries.
        runtime = desk.start()
        assert desk.admit(runtime, "fs.write", path="a", content="x") < 5

    def test_a_yes_is_signed_too(self, desk: Desk) -> None:
        signed: list[int] = []

        def person(call: Call, decision: Decision) -> str:
            signed.append(desk.signed())
            return "ann"

        rules = RULES.replace("fs.list: {ask:", "fs.list: {irreversible: true, ask:")
        runtime = desk.start(rules=rules, approver=person)
        assert desk.admit(runtime, "fs.list", path=".") >= 6
        assert signed[0] < 6

    def test_without_a_signer_it_does_not_run(self, desk: Desk) -> None:
        runtime = desk.start(rules=MARKED)
        os.kill(signer_of(), signal.SIGKILL)
        with pytest.raises(TraceInvalid) as caught:
            runtime.call("fs.write", path="a", content="x")
        assert caught.value.code.startswith("signer.")
        assert not (desk.workspace / "a").exists()
        with pytest.raises(Error):
            runtime.close()

    def test_the_trace_says_so_and_verifies(self, desk: Desk) -> None:
        with desk.start(rules=MARKED) as runtime:
            runtime.call("fs.write", path="a", content="x")
        line = (desk.root / "state/safeconduct/keys/log.pub").read_text().strip()
        assert verify_trace(desk.trace, [line]).status is Exit.OK


def signer_of() -> int:
    """Return the process of the one signer that this process has started."""
    found = [
        int(entry.parent.name)
        for entry in Path("/proc").glob("[0-9]*/cmdline")
        if b"signer_process" in entry.read_bytes()
        and f"PPid:\t{os.getpid()}\n" in (entry.parent / "status").read_text()
    ]
    assert len(found) == 1, found
    return found[0]


def past_session(desk: Desk, seconds: float) -> str:
    """Record a session in the trace of a desk that ended at some time in the past."""
    keys = desk.root / "state/safeconduct/keys"
    signer = SignerClient.start(keys / "log.key", state=keys.parent / "signer", forbidden=[])
    clock = Clock(wall_ns=lambda: int(seconds * 1e9))
    with (
        closing(signer),
        TraceWriter.open(
            desk.trace, signer=signer, vault=Vault.open(keys / "vault.key"), clock=clock
        ) as writer,
    ):
        session = writer.open_session("local", "test")
        record_call(writer, session, "c1")
        writer.close_session(session)
    return session


class TestTheLog:
    def test_what_is_older_than_its_days_is_erased_at_the_start(self, desk: Desk) -> None:
        with desk.start():
            pass  # makes the keys
        long_ago = time.time() - 3 * 86_400
        session = past_session(desk, long_ago)
        opened = desk.trace / "openings"
        for path in opened.iterdir():
            os.utime(path, (long_ago, long_ago))
        assert [path for path in opened.iterdir() if session in path.name]
        with desk.start("trace: {retain: 4d}"):
            assert [path for path in opened.iterdir() if session in path.name]
        with desk.start("trace: {retain: 2d}"):
            assert not [path for path in opened.iterdir() if session in path.name]

    def test_beyond_its_quota_nothing_runs(self, desk: Desk) -> None:
        runtime = desk.start("trace: {quota: 1MiB}")
        written, code = 0, ""
        while written < 100 and not code:
            try:
                runtime.call("fs.write", path=f"f{written}", content=os.urandom(32_000).hex())
                written += 1
            except TraceInvalid as error:
                code = error.code
        assert code == "trace.quota"
        assert 0 < written < 100
        assert not (desk.workspace / f"f{written}").exists()

    def test_without_a_quota_they_do(self, desk: Desk) -> None:
        runtime = desk.start()
        for number in range(40):
            runtime.call("fs.write", path=f"f{number}", content=os.urandom(32_000).hex())
        assert (desk.workspace / "f39").exists()

    def test_another_quota_needs_another_start(self, desk: Desk) -> None:
        runtime = desk.start("trace: {quota: 1GiB}")
        policy = desk.root / "policy.yaml"
        policy.write_text(policy.read_text().replace("1GiB", "2GiB"))
        with pytest.raises(Error) as caught:
            runtime.reload()
        assert caught.value.code == "policy.trace"

    def test_another_durability_does_not(self, desk: Desk, asked: Asked) -> None:
        runtime = desk.start("trace: {durability: sync}")
        policy = desk.root / "policy.yaml"
        policy.write_text(policy.read_text().replace("sync", "volatile"))
        runtime.reload()
        desk.admit(runtime, "remote.send", to="x")
        assert of(asked, EntryKind.CALL_DECISION) == [VOLATILE]


@contextmanager
def served(witness: Witness) -> Generator[str]:
    """Serve a witness on a port of its own; yield its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = WitnessServer(witness)
    try:
        port = asyncio.run_coroutine_threadsafe(server.start("127.0.0.1", 0), loop).result(10)
        yield f"http://127.0.0.1:{port}/"
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


class TestWitnesses:
    def trusting(self, desk: Desk, url: str, key: CosigningKey) -> str:
        path = desk.root / "witnesses"
        path.write_text(f"witness w {key.verifier.line} {url}\nquorum w\n")
        return f"trace: {{witness: {{policy: {path}, require: true}}}}"

    def test_a_call_that_needs_one_does_not_run_without(self, desk: Desk) -> None:
        key = CosigningKey(name="w.example", seed=os.urandom(32))
        head = self.trusting(desk, "http://127.0.0.1:9/", key)
        runtime = desk.start(head)
        with pytest.raises(TraceInvalid) as caught:
            runtime.call("fs.write", path="a", content="x")
        assert caught.value.code == "trace.unwitnessed"
        assert not (desk.workspace / "a").exists()

    def test_what_the_operator_does_waits_for_none(self, desk: Desk) -> None:
        key = CosigningKey(name="w.example", seed=os.urandom(32))
        runtime = desk.start(self.trusting(desk, "http://127.0.0.1:9/", key))
        call = runtime.new_call("workspace.keep", {})
        with runtime.pipeline.operate(call, Profile(name="operator")) as admitted:
            runtime.pipeline.settle(admitted, Outcome(call=call.id))

    def test_else_it_runs_and_the_operator_is_told(self, desk: Desk) -> None:
        key = CosigningKey(name="w.example", seed=os.urandom(32))
        head = self.trusting(desk, "http://127.0.0.1:9/", key).replace(", require: true", "")
        with desk.start(head) as runtime:
            runtime.call("fs.write", path="a", content="x")
        assert (desk.workspace / "a").exists()
        assert any("witness" in text for text in desk.told)

    def test_with_one_it_runs_once_its_intent_is_witnessed(self, desk: Desk) -> None:
        with desk.start(rules=MARKED):
            pass  # makes the key that the witness has to know
        line = (desk.root / "state/safeconduct/keys/log.pub").read_text().strip()
        key = CosigningKey(name="w.example", seed=os.urandom(32))
        witness = Witness(key, [VerifierKey.parse(line)], WitnessState(desk.root / "w"))
        with served(witness) as url:
            runtime = desk.start(self.trusting(desk, url, key), rules=MARKED)
            with runtime.pipeline.admit(runtime.new_call("fs.write", {"path": "a", "content": ""})):
                signed = desk.signed()
                held = witness.checkpoint(origin_hash((desk.trace / "origin").read_text().strip()))
            assert int(held.body.splitlines()[1]) == signed
            runtime.call("fs.write", path="b", content="x")
        assert (desk.workspace / "b").read_text() == "x"

    def test_a_file_that_is_none_starts_nothing(self, desk: Desk) -> None:
        with pytest.raises(TraceInvalid) as caught:
            desk.start(f"trace: {{witness: {{policy: {desk.root}/none}}}}")
        assert caught.value.code == "trust.invalid"
        assert not desk.trace.exists()
