"""A whole call under limits: what it declares, what it is told, and what the trace says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest

from safeconduct.attestation import TraceWriter, verify_trace
from safeconduct.call import LIMIT_FIELDS, EntryKind, Json, Limits, Usage
from safeconduct.errors import Denied, Exit, LimitExceeded
from safeconduct.runtime.sandbox.cgroup import Cgroups
from safeconduct.runtime.supervisor import Runtime

POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**"], write: ["$WS/**"], limits: {wall: 5s, pids: 16, idle: 4s}}
tools:
  shell.run: {allow: {argv: [sh, ...]}}
"""


def test_every_limit_has_one_word() -> None:
    assert set(LIMIT_FIELDS.values()) == {field.name for field in fields(Limits)}


def test_a_call_declares_what_it_needs_and_the_trace_tells_what_it_used(
    tmp_path: Path,
    workspace: Path,
    cgroups: Cgroups | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if cgroups is None:
        pytest.skip("needs a machine that delegates cgroups")
    outcomes: list[Mapping[str, Json]] = []
    real = TraceWriter.append

    def append(
        self: TraceWriter, kind: EntryKind, body: Mapping[str, Json], **options: object
    ) -> int:
        if kind is EntryKind.CALL_OUTCOME:
            outcomes.append(body)
        return real(self, kind, body, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TraceWriter, "append", append)
    policy, trace = tmp_path / "policy.yaml", tmp_path / "trace"
    policy.write_text(POLICY)
    policy.chmod(0o600)
    environment = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    with Runtime.from_policy(
        policy, workspace=workspace, trace=trace, environment=environment
    ) as runtime:
        needs: Json = {"wall": "300ms", "pids": 64, "memory": "1GiB"}
        with pytest.raises(LimitExceeded) as stopped:
            runtime.call("shell.run", argv=["sh", "-c", "kill -STOP $$"], resources=needs)
        assert stopped.value.limit == "wall"
        # More than the policy's own 16 is not to be had.
        many = ["sh", "-c", "for i in $(seq 40); do sleep 1 & done; exit 1"]
        with pytest.raises(LimitExceeded) as crowded:
            runtime.call("shell.run", argv=many, resources={"pids": 64})
        assert crowded.value.limit == "pids"
        with pytest.raises(Denied) as caught:
            runtime.call("shell.run", argv=["sh", "-c", ":"], resources={"wall": "soon"})
        assert caught.value.code == "call.bad_argument"
    assert [body["limit"] for body in outcomes[:2]] == ["wall", "pids"]
    usage = outcomes[0]["usage"]
    assert isinstance(usage, Mapping)
    assert set(usage) == {field.name for field in fields(Usage)}
    held = outcomes[0]["held"]
    assert isinstance(held, Mapping)
    assert (held["disk"], held["wall"]) == ("polled", "tree")
    assert usage["wall_ms"] in range(300, 5000)
    crowd = outcomes[1]["usage"]
    assert isinstance(crowd, Mapping)
    assert crowd["peak_pids"] == 16
    key = (tmp_path / "state/safeconduct/keys/log.pub").read_text().strip()
    assert verify_trace(trace, [key]).status == Exit.OK
