"""What does recording a call cost, and what does making it durable cost over the disk's own price?

volatile_us            intent + outcome of a call, as the Recorder writes them: median
volatile_three_us      intent + decision + outcome: what the pipeline records of a call
volatile_sandboxed_us  the three of a program's call, with its sandbox's layers, limits and use
volatile_encrypted_us  the three, openings encrypted with a vault
saturated_us           the three back to back, while signing goes on: the mean
durable_vs_fdatasync   a durable intent against write + fdatasync of as many bytes
judged_vs_fdatasync    a durable intent + decision, as the Recorder writes them
signed_vs_fdatasync    the same, and a signed head over them before the effect
durable_entries_per_s_64        64 threads, each entry durable before the next
durable_entries_per_s_64_tasks  64 tasks of one event loop
overhead_pct           what the public files add to the bytes of the entries

It writes in a temporary folder; SAFECONDUCT_BENCH_DIRECTORY names one on another disk.
Beside it, in the same rounds, what others do per call (trace_peers.py): attestroot and a log that
signs each event write files as ours does; agentmesh signs one receipt and keeps it in memory.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from safeconduct.attestation import SignerClient, TraceWriter, read_entries, write_key
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.call import (
    Call,
    Confinement,
    Decision,
    Document,
    Durability,
    Effect,
    Enforcement,
    EntryKind,
    Facts,
    Held,
    Json,
    Outcome,
    Profile,
    Tier,
    Usage,
)  # fmt: skip
from safeconduct.runtime.record import Recorder

from . import harness, trace_peers

_POLICY = "sha256:" + "5a" * 32
_ROUND_CALLS = 40
_PEER_CALLS = 4
_LAYERS = (
    "user", "mount", "pid", "net", "ipc", "uts", "cgroup", "landlock-abi7", "seccomp",
    "no-capabilities", "cgroup-v1", "own-uid",
)  # fmt: skip
_HELD = {
    "wall": Held.TREE, "cpu": Held.TREE, "memory": Held.TREE, "pids": Held.TREE,
    "files": Held.PROCESS, "disk": Held.TREE, "inodes": Held.TREE, "depth": Held.TREE,
    "file": Held.PROCESS, "output": Held.TREE, "idle": Held.NONE,
}  # fmt: skip
_CONFINED = Confinement(tier=Tier.FULL, layers=_LAYERS, held=_HELD)
_UNCONFINED = Confinement(tier=None)
_INTENT: dict[str, Json] = {"tool": "fs.read", "caller": "local", "origin": "sdk", "parent": None}
_READ: dict[str, Json] = {"path": "/ws/src/main.py"}
_RUN: dict[str, Json] = {"argv": ["pytest", "-q"], "cwd": "/ws", "timeout": None}
_USED = Usage(
    wall_ms=812, cpu_ms=640, throttled_ms=0, peak_memory_bytes=48_234_496, oom_kills=0,
    peak_pids=3, refused_forks=0, read_bytes=0, written_bytes=12_288,
)  # fmt: skip


_FACTS = Facts(now_ms=1_795_280_022_000)

_Entry: TypeAlias = "tuple[dict[str, Json], dict[str, Json | bytes]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A call and what came of it, as the pipeline has them when it records."""

    call: Call
    document: Document
    decision: Decision
    outcome: Outcome


def made(name: str, *, program: bool = False, durable: bool = False, signed: bool = False) -> Made:
    """Return an allowed call of a tool that we execute ourselves, or of a ``program``."""
    tool, arguments = ("shell.run", _RUN) if program else ("fs.read", _READ)
    outcome = Outcome(call=name, value="some text of a file\n", confinement=_UNCONFINED)
    if program:
        outcome = Outcome(
            call=name, exit_code=0, stdout=b"3 passed\n", usage=_USED, confinement=_CONFINED
        )
    decision = Decision(
        effect=Effect.ALLOW,
        policy=_POLICY,
        code="allowed",
        reason="",
        rules=(f"{tool}/1",),
        profile=Profile(name="base"),
        enforcement=Enforcement.OBJECT,
        durability=Durability.SYNC if durable or signed else Durability.VOLATILE,
        irreversible=signed,
    )
    return Made(
        call=Call(id=name, tool=tool, arguments=arguments, session="bench"),
        document=Document(tool=tool, arguments=arguments, workspace="/ws"),
        decision=decision,
        outcome=outcome,
    )


class Recording:
    """Calls recorded as the pipeline does."""

    def __init__(self, writer: TraceWriter) -> None:
        self.writer = writer
        self.recorder = Recorder(writer, caller="local", origin="bench")

    def judged(self, one: Made) -> None:
        """Record intent and decision; after it, the effect may happen."""
        self.recorder.intent(one.call, one.document)
        self.recorder.decision(one.call, one.decision, _FACTS)
        if one.decision.irreversible:
            self.recorder.before_effect(one.decision)

    def whole(self, one: Made) -> None:
        """Record all three entries of a call."""
        self.recorder.intent(one.call, one.document)
        self.recorder.decision(one.call, one.decision, _FACTS)
        self.recorder.outcome(one.call, one.outcome)

    def two(self, one: Made) -> None:
        """Record intent and outcome alone."""
        self.recorder.intent(one.call, one.document)
        self.recorder.outcome(one.call, one.outcome)


def volatile(
    recording: Recording,
    sealed: Recording,
    peers: Mapping[str, Callable[[str], object]],
    rounds: int,
) -> dict[str, list[float]]:
    """Return microseconds per call of each subject, in turns; signing is done between, untimed."""
    subjects: dict[str, Callable[[Made], object]] = {
        "volatile": recording.two,
        "volatile_three": recording.whole,
        "volatile_sandboxed": recording.whole,
        "volatile_encrypted": sealed.whole,
        **{name: partial(_by_name, peer) for name, peer in peers.items()},
    }
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name, subject in subjects.items():
            count = _PEER_CALLS if name in peers else _ROUND_CALLS
            program = name == "volatile_sandboxed"
            calls = [made(f"{name}.{number}.{at}", program=program) for at in range(count + 1)]
            recording.writer.checkpoint()
            sealed.writer.checkpoint()
            subject(calls.pop())
            for call in calls:
                begun = time.perf_counter_ns()
                subject(call)
                taken[name].append((time.perf_counter_ns() - begun) / 1000)
    return taken


def _by_name(peer: Callable[[str], object], one: Made) -> None:
    peer(one.call.id)


def saturated(recording: Recording, calls: int) -> float:
    """Return the mean microseconds of a call when nothing else happens in between."""
    ready = [made(f"s{call}") for call in range(calls)]
    begun = time.perf_counter_ns()
    for call in ready:
        recording.whole(call)
    return (time.perf_counter_ns() - begun) / 1000 / calls


def durable(recording: Recording, directory: Path, count: int) -> dict[str, list[float]]:
    """Return microseconds of raw write + fdatasync, and of what is durable or signed, in turns."""
    fd = os.open(directory / "raw", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    block = bytes(700)
    writer, session = recording.writer, recording.recorder.session

    def raw(_: None) -> None:
        os.write(fd, block)
        os.fdatasync(fd)

    def intent(entry: _Entry) -> None:
        body, committed = entry
        writer.append(
            EntryKind.CALL_INTENT,
            body,
            session=session,
            committed=committed,
            durability=Durability.SYNC,
        )

    subjects: dict[str, Callable[[Any], object]] = {
        "fdatasync": raw,
        "durable": intent,
        "judged": recording.judged,
        "signed": recording.judged,
    }
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(count):
        if number % 25 == 0:
            recording.writer.checkpoint()  # so that few fall into the measured stretch
        ready = {
            "fdatasync": None,
            "durable": _entry(f"e{number}"),
            "judged": made(f"d{number}", durable=True),
            "signed": made(f"i{number}", signed=True),
        }
        for name, subject in subjects.items():
            one = ready[name]
            begun = time.perf_counter_ns()
            subject(one)
            taken[name].append((time.perf_counter_ns() - begun) / 1000)
    os.close(fd)
    return taken


def _entry(name: str) -> _Entry:
    document: Json = {"tool": "fs.read", "arguments": _READ, "workspace": "/ws"}
    return {**_INTENT, "call": name}, {"document": document}


def crowd(writer: TraceWriter, threads: int, each: int) -> float:
    """Return durable entries per second of many threads at once."""
    sessions = [writer.open_session("local", "bench") for _ in range(threads)]

    def work(session: str) -> None:
        for number in range(each):
            body, committed = _entry(f"t{number}")
            writer.append(
                EntryKind.CALL_INTENT,
                body,
                session=session,
                committed=committed,
                durability=Durability.SYNC,
            )

    workers = [threading.Thread(target=work, args=(session,)) for session in sessions]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return threads * each / (time.perf_counter() - begun)


def crowd_of_tasks(writer: TraceWriter, tasks: int, each: int) -> float:
    """Return the same for tasks of one event loop."""
    sessions = [writer.open_session("local", "bench") for _ in range(tasks)]

    async def work(session: str) -> None:
        for number in range(each):
            body, committed = _entry(f"a{number}")
            await writer.append_async(
                EntryKind.CALL_INTENT, body, session=session, committed=committed
            )

    async def all_of_them() -> float:
        begun = time.perf_counter()
        await asyncio.gather(*(work(session) for session in sessions))
        return tasks * each / (time.perf_counter() - begun)

    return asyncio.run(all_of_them())


def overhead(trace: Path) -> dict[str, float]:
    """Return by how many percent the public files exceed the entries in them, in all and by part.

    A hash of 32 bytes for each entry, which lets a reader name the one that was changed, is most
    of it: the longer an entry, the smaller its share.
    """
    sizes = [len(msgspec.json.encode(entry)) for _, entry in read_entries(trace)]
    entries = sum(sizes)
    bundles = _bytes_below(trace / "tile" / "entries")
    hashes = _bytes_below(trace / "tile") - bundles
    heads = _bytes_below(trace / "checkpoints") + (trace / "checkpoint").stat().st_size
    parts = {"lengths": bundles - entries, "hashes": hashes, "checkpoints": heads}
    percent = {f"overhead_pct_{name}": 100 * part / entries for name, part in parts.items()}
    whole = 100 * sum(parts.values()) / entries
    return {"overhead_pct": whole, **percent, "entry_bytes": entries / len(sizes)}


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(directory: Path, *, quick: bool) -> tuple[dict[str, object], dict[str, object]]:
    """Run all questions and return figures and details."""
    write_key(directory / "key", "bench.invalid/key")
    signer = SignerClient.start(directory / "key", state=directory / "state")
    vault = Vault.open(directory / "vault.key")
    scale = 1 if quick else 5
    peers = {
        "attestroot": trace_peers.attestroot(directory),
        "agentmesh": trace_peers.agentmesh(directory),
        "signed_events": trace_peers.signed_events(directory),
    }
    with (
        TraceWriter.open(directory / "trace", signer=signer) as writer,
        TraceWriter.open(directory / "sealed", signer=signer, vault=vault) as sealed,
    ):
        recording = Recording(writer)
        calls = volatile(recording, Recording(sealed), peers, 10 * scale)
        mean = saturated(recording, 1000 * scale)
        disk = durable(recording, directory, 60 * scale)
        threads = [crowd(writer, 64, 40 * scale) for _ in range(3)]
    # A log of its own: all these calls stay open, and a log has only so many (chain.MAX_OPEN).
    with TraceWriter.open(directory / "tasks", signer=signer) as writer:
        tasks = [crowd_of_tasks(writer, 64, 40 * scale) for _ in range(3)]
    with TraceWriter.open(directory / "usual", signer=signer) as writer:
        recording = Recording(writer)
        for number in range(1000 * scale):
            recording.whole(made(f"c{number}", program=number % 2 == 1))
    signer.close()
    price = statistics.median(disk["fdatasync"])
    spare = overhead(directory / "usual")
    ours = {f"{name}_us": _median(calls[name]) for name in calls if name not in peers}
    figures: dict[str, object] = {
        **ours,
        "saturated_us": round(mean, 1),
        "durable_vs_fdatasync": round(statistics.median(disk["durable"]) / price, 2),
        "judged_vs_fdatasync": round(statistics.median(disk["judged"]) / price, 2),
        "signed_vs_fdatasync": round(statistics.median(disk["signed"]) / price, 2),
        "durable_entries_per_s_64": round(statistics.median(threads)),
        "durable_entries_per_s_64_tasks": round(statistics.median(tasks)),
        **{name: round(value, 1) for name, value in spare.items()},
        **{f"{name}_us": _median(calls[name]) for name in peers},
    }
    details: dict[str, object] = {
        **{f"{name}_us": harness.spread(calls[name], scale=1) for name in calls},
        **{f"{name}_us": harness.spread(disk[name], scale=1) for name in disk},
        "entries_per_s_64": [round(one) for one in threads],
        "entries_per_s_64_tasks": [round(one) for one in tasks],
        "versions": {
            name: version(name)
            for name in ("msgspec", "cryptography", "attestroot", "agentmesh-mcp-receipts")
        },
    }
    return figures, details


def _median(samples: list[float]) -> float:
    return round(statistics.median(samples), 1)


def main() -> int:
    """Print one line per number; with --json, one object as the last line."""
    chosen = harness.options(__doc__)
    with tempfile.TemporaryDirectory(dir=os.environ.get("SAFECONDUCT_BENCH_DIRECTORY")) as scratch:
        figures, details = measure(Path(scratch), quick=chosen.quick)
    harness.finish(__doc__ or "", figures, details, chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
