"""What does it cost to encrypt an opening, over writing it in plain?

The baseline is the same store without a vault, in the same run, turn by turn. Also: the key of a
new session on disk, and how long it takes to erase one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cryptography

from safeconduct.attestation.folder import Folder
from safeconduct.attestation.privacy.openings import OpeningStore, Salts, Sealed, seal_all
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.call import Json

SESSION = "0123456789abcdef"


def openings() -> dict[str, list[Sealed]]:
    """Return what usual entries have: a document, and an outcome's two outputs."""
    document: Json = {
        "tool": "fs.read",
        "arguments": {"path": "/home/user/project/src/module/name.py"},
        "workspace": "/home/user/project",
    }
    outputs: dict[str, Json | bytes] = {"stdout": b"x" * 200, "stderr": b"y" * 100}
    return {
        "document": seal_all({"document": document}, Salts())[1],
        "outputs": seal_all(outputs, Salts())[1],
    }


def mean_us(work: Callable[[], object], rounds: int) -> float:
    """Return how long one round takes, in a tight loop."""
    start = time.perf_counter_ns()
    for _ in range(rounds):
        work()
    return (time.perf_counter_ns() - start) / rounds / 1000


def sealing(plain: OpeningStore, sealed: OpeningStore, scale: int) -> dict[str, object]:
    """Compare ``lines``, what the hot path does, in turns."""
    numbers: dict[str, object] = {}
    for name, items in openings().items():
        turns = [
            (
                mean_us(lambda items=items: plain.lines(SESSION, 12345, items), 2000),
                mean_us(lambda items=items: sealed.lines(SESSION, 12345, items), 2000),
            )
            for _ in range(5 * scale)
        ]
        base, over = (statistics.median(column) for column in zip(*turns, strict=True))
        numbers[f"{name}_plain_us"] = round(base, 2)
        numbers[f"{name}_sealed_us"] = round(over, 2)
        numbers[f"{name}_added_us"] = round(over - base, 2)
    return numbers


def keys(sealed: OpeningStore, folder: Folder, scale: int) -> dict[str, object]:
    """Time a new session's key, and an erasure of key and opening file, with the disk's syncs."""
    made: list[float] = []
    gone: list[float] = []
    for number in range(20 * scale):
        session = f"session-{number}"
        made.append(mean_us(lambda session=session: sealed.prepare(session), 1))
        sealed.write(session, 1, openings()["document"])
        gone.append(mean_us(lambda session=session: sealed.erase_session(session), 1))
    if folder.names("openings"):
        raise RuntimeError("an erased session left its file")
    return {
        "session_key_us": round(statistics.median(made)),
        "erase_us": round(statistics.median(gone)),
    }


def measure(directory: Path, *, quick: bool) -> dict[str, object]:
    """Run both questions and return the numbers."""
    scale = 1 if quick else 5
    (directory / "trace" / "openings").mkdir(parents=True)
    (directory / "trace" / "origin").write_text("bench.invalid/log\n")
    (directory / "keys").mkdir(mode=0o700)
    vault = Vault.open(directory / "keys" / "vault.key", forbidden=[directory / "trace"])
    with Folder(directory / "trace") as folder:
        plain, sealed = OpeningStore(folder), OpeningStore(folder, vault=vault)
        sealed.prepare(SESSION)
        numbers = sealing(plain, sealed, scale) | keys(sealed, folder, scale)
    return numbers | {
        "versions": {
            "python": platform.python_version(),
            "cryptography": cryptography.__version__,
        },
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release()},
    }


def main() -> int:
    """Print one line per number; with --json, one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a second, wider spread")
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
