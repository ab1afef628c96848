"""What the witness tests share: a log that signs whatever it is told to, and a served witness."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from safeconduct.attestation import Checkpoint, SigningKey
from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import leaf_hash
from safeconduct.attestation.tiles import TileStore
from safeconduct.attestation.witness.desk import Answer, Witness
from safeconduct.attestation.witness.server import WitnessServer
from safeconduct.attestation.witness.state import WitnessState
from safeconduct.attestation.witness.submission import encode_submission
from safeconduct.errors import TraceInvalid

ALICE = SigningKey("example.org/alice", b"\x01" * 32)
STRANGER = SigningKey("example.org/alice", b"\x02" * 32)
WITNESS = CosigningKey("witness.example/w1", b"\x03" * 32)
OTHER_WITNESS = CosigningKey("witness.example/w2", b"\x04" * 32)
NOW = 1_700_000_000


class Log:
    """A log of the tests' own: its operator signs forks and old heads as gladly as the truth."""

    def __init__(self, directory: Path, *, key: SigningKey = ALICE, origin: str = "") -> None:
        self.directory, self.key, self.origin = directory, key, origin or key.name
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("tile/entries", "checkpoints", "journal"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self.folder = Folder(directory)
        self.tiles = TileStore(self.folder)

    def grow(self, count: int, *, salt: str = "") -> None:
        """Append entries; another ``salt`` makes another history."""
        entries = [f"{salt}{self.tiles.size + number}".encode() for number in range(count)]
        self.tiles.append([(entry, leaf_hash(entry)) for entry in entries])
        self.tiles.flush()

    def fork(self, directory: Path) -> Log:
        """Return a copy that may grow otherwise."""
        shutil.copytree(self.directory, directory)
        other = Log(directory, key=self.key, origin=self.origin)
        other.tiles = TileStore.load(other.folder, self.tiles.size)
        return other

    def head(self, size: int = -1) -> Checkpoint:
        size = self.tiles.size if size < 0 else size
        return Checkpoint(origin=self.origin, size=size, root=self.tiles.root_at(size))

    def note(self, size: int = -1, *, key: SigningKey | None = None, extra: str = "") -> bytes:
        text = self.head(size).text() + extra
        return f"{text}\n{(key or self.key).of_log(self.origin).sign(text)}".encode()

    def request(self, old_size: int, size: int = -1) -> bytes:
        size = self.tiles.size if size < 0 else size
        proof = self.tiles.prove_consistency(old_size, size) if old_size <= size else []
        return encode_submission(old_size, proof, self.note(size))


@dataclass
class Clock:
    """A clock that stands where it is put."""

    now: float = NOW

    def __call__(self) -> float:
        return self.now


class Desk:
    """A witness without HTTP, over a state folder that can be opened again."""

    def __init__(self, directory: Path, *, keys: tuple[SigningKey, ...] = (ALICE,)) -> None:
        self.directory, self.clock, self.keys = directory, Clock(), keys
        self.open()

    def open(self) -> None:
        state = WitnessState(self.directory)
        logs = [key.verifier for key in self.keys]
        try:
            self.witness = Witness(WITNESS, logs, state, clock=self.clock)
        except TraceInvalid:
            state.close()
            raise
        self.state = state

    def reopen(self) -> None:
        self.state.close()
        self.open()

    def add(self, body: bytes) -> Answer:
        return self.witness.add_checkpoint(body)


@contextmanager
def served(witness: Witness, *, request_timeout_s: float = 30.0) -> Generator[int]:
    """Serve a witness in a thread on a free port, and yield the port."""
    loop = asyncio.new_event_loop()
    server = WitnessServer(witness, request_timeout_s=request_timeout_s)
    port = loop.run_until_complete(server.start("127.0.0.1", 0))
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield port
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def exchange(port: int, data: bytes) -> bytes:
    """Send bytes as they are and return everything that comes back until the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as channel:
        channel.sendall(data)
        channel.shutdown(socket.SHUT_WR)
        parts: list[bytes] = []
        while part := channel.recv(65536):
            parts.append(part)
    return b"".join(parts)
