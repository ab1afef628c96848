"""kill -9 at random moments, of who records and of who signs, round after round on one log.

SAFECONDUCT_KILL_ROUNDS says how many rounds; SAFECONDUCT_KILL_SEED repeats a run's choices.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from safeconduct.attestation import Checkpoint, TraceWriter, read_entries, write_key
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.note import Note
from safeconduct.attestation.proofs.proof import StoredTree
from safeconduct.call import EntryKind
from safeconduct.errors import Exit, TraceInvalid

from .kit import NAME, Bench  # noqa: TID251 - the tests' own kit

ROUNDS = int(os.environ.get("SAFECONDUCT_KILL_ROUNDS", "8"))
SEED = int(os.environ.get("SAFECONDUCT_KILL_SEED", "0")) or random.SystemRandom().randrange(
    1, 10**9
)
_TIMEOUT_S = 60.0
# A log grows with each round, and is read whole after each.
_ROUNDS_OF_A_LOG = 25

# The recorder: a supervisor with three threads, each with a session of its own. What it prints was
# acknowledged. Its first line is the signer's pid.
_CHILD = """
import os, sys, threading
from pathlib import Path
from safeconduct.attestation import SignerClient, TraceWriter
from safeconduct.call import Durability, EntryKind
trace, key, state, name = sys.argv[1:]
signer = SignerClient.start(Path(key), state=Path(state), forbidden=[Path(trace)])
writer = TraceWriter.open(Path(trace), signer=signer)
os.write(1, f"{signer.pid}\\n".encode())

def work(thread):
    session = writer.open_session("local", "sdk")
    kinds = [Durability.VOLATILE, Durability.SYNC, Durability.BATCH]
    for number in range(100_000):
        call = f"{name}.{thread}.{number}"
        writer.append(
            EntryKind.CALL_INTENT,
            {"call": call, "tool": "t", "caller": "l", "origin": "o"},
            session=session,
            committed={"document": {"tool": "t", "arguments": {}, "workspace": "/"}},
            durability=kinds[number % 3],
        )
        os.write(1, f"{call}\\n".encode())
        if number % 17 == 5:
            writer.sign()
        if number % 3:
            writer.append(EntryKind.CALL_OUTCOME, {"call": call, "status": "ok"}, session=session)
        if number % 61 == 60:
            writer.close_session(session)
            session = writer.open_session("local", "sdk")

def run(thread):
    try:
        work(thread)
    except Exception as error:
        os.write(1, f"!{getattr(error, 'code', error)}\\n".encode())

threads = [threading.Thread(target=run, args=(one,)) for one in range(3)]
[one.start() for one in threads]
[one.join() for one in threads]
"""


def start(bench: Bench, name: str) -> subprocess.Popen[bytes]:
    source = str(Path(__file__).parents[2] / "src")
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, bench.trace, bench.key, bench.state, name],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": source, "PATH": os.environ["PATH"]},
    )


def run_and_kill(bench: Bench, name: str, chance: random.Random) -> tuple[set[str], str]:
    """Let it record for a random while, kill it or its signer; return what it acknowledged."""
    child = start(bench, name)
    assert child.stdout is not None
    output = os.fdopen(os.dup(child.stdout.fileno()), "rb", buffering=0)
    said = output.readline()
    victim = chance.choice(["recorder", "signer", "both"])
    ends = time.monotonic() + chance.choice([0.0, 0.02, 0.1, 0.3, 1.2]) * chance.random()
    while (left := ends - time.monotonic()) > 0:
        if select.select([output], [], [], left)[0]:
            said += output.read(65536)
    if victim in ("signer", "both"):
        os.kill(int(said.split(b"\n", 1)[0]), signal.SIGKILL)
    if victim in ("recorder", "both"):
        child.kill()
    while part := output.read(65536):
        said += part
    child.wait(_TIMEOUT_S)
    output.close()
    child.stdout.close()
    lines = said[: said.rfind(b"\n") + 1].decode().split("\n")[1:-1]
    refusals = {line for line in lines if line.startswith("!")}
    assert refusals <= {"!signer.lost", "!trace.write_failed"}, refusals
    return {line for line in lines if not line.startswith("!")}, victim


def notes_in(trace: Path) -> dict[tuple[int, bytes], str]:
    """Return (size, root) of every signed head that stands in the folder now."""
    found: dict[tuple[int, bytes], str] = {}
    for path in [trace / "checkpoint", *(trace / "checkpoints").iterdir()]:
        try:
            head = Checkpoint.parse(Note.parse(path.read_bytes()).text)
        except (OSError, TraceInvalid):
            continue
        found[head.size, head.root] = path.name
    return found


def test_rounds_of_kill_9_lose_nothing_and_contradict_nothing(tmp_path: Path) -> None:
    chance = random.Random(SEED)  # noqa: S311 - nothing secret depends on it
    for first in range(0, ROUNDS, _ROUNDS_OF_A_LOG):
        root = tmp_path / str(first)
        root.mkdir()
        bench = Bench(root, write_key(root / "alice.key", NAME))
        kill_in_rounds(bench, range(first, min(first + _ROUNDS_OF_A_LOG, ROUNDS)), chance)
        shutil.rmtree(root)


def kill_in_rounds(bench: Bench, rounds: range, chance: random.Random) -> None:
    """Record, kill and take up one log again and again; look at all that was said and signed."""
    acknowledged: set[str] = set()
    heads: dict[tuple[int, bytes], str] = {}
    for number in rounds:
        told = f"seed {SEED}, round {number}"
        said, victim = run_and_kill(bench, f"r{number}", chance)
        acknowledged |= said
        heads |= notes_in(bench.trace)
        signer = bench.signer()
        with TraceWriter.open(bench.trace, signer=signer) as writer:
            last = signer.last(writer.origin)
            heads[last.size, last.root] = f"signer, round {number}"
        signer.close()
        heads |= notes_in(bench.trace)
        report = bench.verify()
        assert report.status == Exit.OK, (told, victim, report.findings)
    intents = {
        entry.body["call"]
        for _, entry in read_entries(bench.trace)
        if entry.kind is EntryKind.CALL_INTENT
    }
    assert acknowledged <= intents, f"seed {SEED}: lost {sorted(acknowledged - intents)[:5]}"
    with Folder(bench.trace) as folder:
        tree = StoredTree(folder, max(size for size, _ in heads))
        for (size, root), where in heads.items():
            assert tree.root(size) == root, f"seed {SEED}: {where} signed another tree of {size}"
