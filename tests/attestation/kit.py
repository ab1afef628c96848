"""What the attestation tests share: real keys, real signer processes and real traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safeconduct.attestation import Report, SignerClient, TraceWriter, verify_trace
from safeconduct.call import EntryKind, Json

NAME = "example.org/alice"


@dataclass(frozen=True)
class Bench:
    """A place to make traces: a key, where its signer keeps state, a trace folder to be."""

    root: Path
    key_line: str

    @property
    def key(self) -> Path:
        return self.root / "alice.key"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def trace(self) -> Path:
        return self.root / "trace"

    def signer(self, forbidden: Sequence[Path] = ()) -> SignerClient:
        return SignerClient.start(self.key, state=self.state, forbidden=[self.trace, *forbidden])

    def verify(self, trace: Path | None = None) -> Report:
        return verify_trace(trace or self.trace, [self.key_line])


def record_call(writer: TraceWriter, session: str, call: str, *, path: str = "/ws/a") -> int:
    """Record one whole allowed call and return the index of its intent."""
    document: Json = {"tool": "fs.read", "arguments": {"path": path}, "workspace": "/ws"}
    intent = writer.append(
        EntryKind.CALL_INTENT,
        {"call": call, "tool": "fs.read", "caller": "local", "origin": "sdk", "parent": None},
        session=session,
        committed={"document": document},
    )
    writer.append(
        EntryKind.CALL_DECISION,
        {
            "call": call,
            "effect": "allow",
            "code": "allowed",
            "rules": ["r1"],
            "policy": "0" * 64,
            "enforcement": "object",
        },
        session=session,
    )
    writer.append(
        EntryKind.CALL_OUTCOME,
        {"call": call, "status": "ok"},
        session=session,
        committed={"value": "text", "stdout": b"out", "stderr": b""},
    )
    return intent


def write_trace(bench: Bench, *, calls: int, sessions: int = 1, trace: Path | None = None) -> Path:
    """Write a whole trace, cleanly closed, and return its folder."""
    directory = trace or bench.trace
    signer = bench.signer()
    try:
        with TraceWriter.open(directory, signer=signer) as writer:
            ids = [writer.open_session("local", "sdk") for _ in range(sessions)]
            for number in range(calls):
                record_call(writer, ids[number % sessions], f"c{number}")
            for session in ids:
                writer.close_session(session)
    finally:
        signer.close()
    return directory
