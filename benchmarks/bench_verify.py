"""How fast is a log verified, on one core and on all, and what does it take to prove one entry?

entries_per_s      one process, hashing and parsing every entry: the best of some rounds
entries_per_cpu_s  the same by the processor time it took: on a machine that others work on
seconds_10m        a log of ten million entries (2.5 GB and more) on all processors, `--quick`: no
rss_mb             the peaks of the verifier and of each of its workers, added up
proof_bytes_10m    a .tlog-proof of one entry of that log, cosigned by one witness
generated_s        how long writing the log took

The log is made by benchmarks/trace_load.py, in a folder that is removed afterwards; `--keep DIR`
leaves it there, or finds it there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cryptography
import msgspec

from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import Note
from safeconduct.attestation.proofs.proof import prove_entry
from safeconduct.attestation.verify.worker import usable_cpus

from .trace_load import write_log

_SMALL_ENTRIES = 200_000
_LARGE_ENTRIES = 10_000_000
_ROUNDS = 5
_RUN = """
import json, os, resource, sys, time
from pathlib import Path
from safeconduct.attestation.verify.verification import verify_trace
start, cpu = time.perf_counter(), sum(os.times()[:4])
report = verify_trace(Path(sys.argv[1]), [sys.argv[2]], jobs=int(sys.argv[3]))
taken, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu
assert report.status == 0, report.findings
own, worker = (resource.getrusage(who).ru_maxrss for who in
               (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps({"seconds": taken, "cpu_s": cpu, "size": report.size,
                  "rss_mb": (own + worker * int(sys.argv[3])) / 1024}))
"""


def verify(trace: Path, key: str, jobs: int) -> dict[str, float]:
    """Verify in a fresh process; return seconds, processor time, entries and memory."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(trace), key, str(jobs)],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def prepared(directory: Path, entries: int) -> tuple[Path, str, float]:
    """Return a log of that size, its key line, and how long it took to write."""
    trace, line = directory / f"log-{entries}", directory / f"log-{entries}.pub"
    if line.exists():
        return trace, line.read_text().strip(), 0.0
    trace.mkdir(parents=True)
    start = time.perf_counter()
    key = write_log(trace, entries)
    line.write_text(f"{key}\n")
    return trace, key, time.perf_counter() - start


def proof_bytes(trace: Path) -> int:
    """Return the length of a proof of an entry in the middle, under a head with a cosignature."""
    path = trace / "checkpoint"
    signed = path.read_bytes()
    note = Note.parse(signed)
    witness = CosigningKey("witness.example/w1", os.urandom(32))
    path.write_bytes(signed + witness.sign(note.text, time=int(time.time())).line.encode())
    try:
        with Folder(trace) as folder:
            size = int(note.text.split("\n")[1])
            return len(prove_entry(folder, size // 2)[0].encode())
    finally:
        path.write_bytes(signed)


def measure(directory: Path, *, quick: bool) -> dict[str, object]:
    """Answer all questions and return the figures."""
    trace, key, taken = prepared(directory, _SMALL_ENTRIES)
    rounds = [verify(trace, key, 1) for _ in range(_ROUNDS)]
    figures: dict[str, object] = {
        "entries_per_s": round(max(one["size"] / one["seconds"] for one in rounds)),
        "entries_per_cpu_s": round(max(one["size"] / one["cpu_s"] for one in rounds)),
    }
    jobs = usable_cpus()
    if not quick:
        trace, key, taken = prepared(directory, _LARGE_ENTRIES)
        verify(*prepared(directory, _SMALL_ENTRIES)[:2], jobs)  # warm up
        large = verify(trace, key, jobs)
        figures["seconds_10m"] = round(large["seconds"], 1)
        figures["rss_mb"] = round(large["rss_mb"], 1)
        figures["proof_bytes_10m"] = proof_bytes(trace)
    else:
        figures["rss_mb"] = round(verify(trace, key, jobs)["rss_mb"], 1)
    return {
        **figures,
        "generated_s": round(taken, 1),
        "details": {"jobs": jobs, "seconds": [round(one["seconds"], 3) for one in rounds]},
        "machine": {
            "cpus": jobs,
            "kernel": platform.release(),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
            "msgspec": msgspec.__version__,
            "cryptography": cryptography.__version__,
        },
    }


def main() -> int:
    """Print one line per figure; with --json, one object as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="no log of ten million entries")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--directory", type=Path, help="where to write; it needs 6 GB")
    parser.add_argument("--keep", type=Path, help="keep the logs in this folder and use them again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        figures = measure(options.keep or Path(scratch), quick=options.quick)
    for name, value in figures.items():
        print(f"{name:20} {value}")
    if options.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
