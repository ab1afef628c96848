"""What does recording a call cost, and what does making it durable cost over the disk's own price?

volatile_us            intent + decision + outcome of one call, median; signed between rounds
saturated_us           the same back to back, while the checkpoint thread works: the mean
durable_vs_fdatasync   a durable intent against write + fdatasync of as many bytes, interleaved
durable_entries_per_s_64  64 threads, each entry durable before the next
overhead_pct           what tree, lengths and checkpoints add to the bytes of the entries
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import cryptography
import msgspec

from safeconduct.attestation import SignerClient, TraceWriter, read_entries, write_key
from safeconduct.call import Durability, EntryKind, Json

_POLICY = "0" * 64
_ROUND_CALLS = 60


def record_call(writer: TraceWriter, session: str, call: str) -> None:
    """Record an allowed call of fs.read as the pipeline does."""
    record_intent(writer, session, call, Durability.VOLATILE)
    decision = {"call": call, "effect": "allow", "code": "allowed", "rules": ["fs.read/1"]}
    writer.append(
        EntryKind.CALL_DECISION,
        {**decision, "policy": _POLICY, "enforcement": "object", "profile": "base"},
        session=session,
    )
    writer.append(
        EntryKind.CALL_OUTCOME,
        {"call": call, "status": "ok", "exit_code": None, "usage": {"wall_ms": 1}},
        session=session,
        committed={"value": "some text of a file\n"},
    )


def record_intent(writer: TraceWriter, session: str, call: str, durability: Durability) -> None:
    """Record the intent alone."""
    document: Json = {
        "tool": "fs.read",
        "arguments": {"path": "/ws/src/main.py"},
        "workspace": "/ws",
    }
    writer.append(
        EntryKind.CALL_INTENT,
        {"call": call, "tool": "fs.read", "caller": "local", "origin": "sdk", "parent": None},
        session=session,
        committed={"document": document},
        durability=durability,
    )


def volatile(writer: TraceWriter, rounds: int) -> list[float]:
    """Return the microseconds of each call; checkpoints are made between rounds, untimed."""
    taken: list[float] = []
    session = writer.open_session("local", "bench")
    for number in range(rounds):
        writer.checkpoint()
        for call in range(_ROUND_CALLS):
            start = time.perf_counter_ns()
            record_call(writer, session, f"c{number}.{call}")
            taken.append((time.perf_counter_ns() - start) / 1000)
    writer.close_session(session)
    return taken


def saturated(writer: TraceWriter, calls: int) -> float:
    """Return the mean microseconds of a call when nothing else happens in between."""
    session = writer.open_session("local", "bench")
    start = time.perf_counter_ns()
    for call in range(calls):
        record_call(writer, session, f"s{call}")
    taken = (time.perf_counter_ns() - start) / 1000 / calls
    writer.close_session(session)
    return taken


def durable(writer: TraceWriter, directory: Path, count: int) -> tuple[list[float], list[float]]:
    """Return microseconds of durable intents and of raw write + fdatasync, taken in turns."""
    ours: list[float] = []
    raw: list[float] = []
    session = writer.open_session("local", "bench")
    fd = os.open(directory / "raw", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    block = bytes(420)
    for number in range(count):
        if number % 50 == 0:
            writer.checkpoint()  # so that none falls into the measured stretch
        start = time.perf_counter_ns()
        os.write(fd, block)
        os.fdatasync(fd)
        middle = time.perf_counter_ns()
        record_intent(writer, session, f"d{number}", Durability.SYNC)
        raw.append((middle - start) / 1000)
        ours.append((time.perf_counter_ns() - middle) / 1000)
    os.close(fd)
    writer.close_session(session)
    return ours, raw


def crowd(writer: TraceWriter, threads: int, each: int) -> float:
    """Return durable entries per second of many threads at once."""
    sessions = [writer.open_session("local", "bench") for _ in range(threads)]

    def work(session: str) -> None:
        for number in range(each):
            record_intent(writer, session, f"t{number}", Durability.SYNC)

    workers = [threading.Thread(target=work, args=(session,)) for session in sessions]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return threads * each / (time.perf_counter() - start)


def overhead(trace: Path) -> float:
    """Return how many percent the public files exceed the entries in them."""
    entries = sum(len(msgspec.json.encode(entry)) for _, entry in read_entries(trace))
    public = [
        trace / "checkpoint",
        *(trace / "checkpoints").iterdir(),
        *(trace / "tile").rglob("*"),
    ]
    return 100 * (sum(path.stat().st_size for path in public if path.is_file()) / entries - 1)


def measure(directory: Path, *, quick: bool) -> dict[str, object]:
    """Run all questions in one trace and return the numbers."""
    write_key(directory / "key", "bench.invalid/key")
    signer = SignerClient.start(directory / "key", state=directory / "state")
    scale = 1 if quick else 5
    with TraceWriter.open(directory / "trace", signer=signer) as writer:
        volatile(writer, 2)  # warm up
        calls = volatile(writer, 12 * scale)
        mean = saturated(writer, 1000 * scale)
        ours, raw = durable(writer, directory, 200 * scale)
        rate = crowd(writer, 64, 40 * scale)
    signer.close()
    deciles = statistics.quantiles(calls, n=10)
    return {
        "volatile_us": round(statistics.median(calls), 1),
        "volatile_us_p10_p90": [round(deciles[0], 1), round(deciles[-1], 1)],
        "saturated_us": round(mean, 1),
        "durable_us": round(statistics.median(ours), 1),
        "fdatasync_us": round(statistics.median(raw), 1),
        "durable_vs_fdatasync": round(statistics.median(ours) / statistics.median(raw), 2),
        "durable_entries_per_s_64": round(rate),
        "overhead_pct": round(overhead(directory / "trace"), 1),
        "versions": {
            "python": platform.python_version(),
            "msgspec": msgspec.__version__,
            "cryptography": cryptography.__version__,
        },
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release()},
    }


def main() -> int:
    """Print one line per number; with --json, one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds, wider spread")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--directory", type=Path, help="where to write; decides which disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        numbers = measure(Path(scratch), quick=options.quick)
    for name, value in numbers.items():
        print(f"{name:26} {value}")
    if options.json:
        print(json.dumps(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
