"""A log as large as wanted, made without a writer: what `bench_verify` measures on.

The entries have the kinds, fields and sizes of those a Recorder writes (calls that are allowed
and calls that are denied, sessions that overlap), and the folder is laid out as a closed trace.
It is quick because the entries are filled into forms; a test has the verifier agree with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from safeconduct.attestation import SigningKey, generate_key
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.merkle import EMPTY_ROOT, fold, leaf_hash, tile_root
from safeconduct.attestation.tiles import TILE_WIDTH, bundle_path, edge_widths, tile_path

ORIGIN = "bench.invalid/log"
_POLICY = "sha256:" + "5a" * 32
_START_MS = 1_795_280_022_000
_SESSIONS = 8
_CALLS_OF_A_SESSION = 400
_DENIED_EVERY = 9
_RANDOM_BYTES = 1 << 16

_HEAD = '"kind":"%s","mono_ns":%d,"prev":%s,"session":"%s","sseq":%d,"time":%d,"v":1}'
_INTENT = (
    '{"body":{"call":"%s","caller":"local","document":{"commitment":"%s"},"origin":"mcp",'
    '"parent":null,"tool":"fs.read"},'
)
_DECISION = (
    '{"body":{"call":"%s","code":"%s","effect":"%s","enforcement":"object","facts":'
    '{"calls":%d,"denied":0,"now_ms":1795280022306,"role":"coder"},"policy":"' + _POLICY + '",'
    '"profile":"base","rules":["fs.read/1"]},'
)
_OUTCOME = (
    '{"body":{"call":"%s","code":null,"exit_code":null,"held":{},"layers":[],"limit":null,'
    '"signal":null,"status":"ok","tier":null,"truncated":false,"usage":{"cpu_ms":null,"fuel":null,'
    '"oom_kills":null,"peak_memory_bytes":null,"peak_pids":null,"read_bytes":null,'
    '"refused_forks":null,"throttled_ms":null,"wall_ms":1,"written_bytes":null},'
    '"value":{"commitment":"%s"}},'
)
_REFUSED = '{"body":{"call":"%s","code":"policy.no_rule","status":"denied"},'
_LOG_OPEN = (
    '{"body":{"format":"safeconduct/trace/v1","key":"%s","origin":"' + ORIGIN + '",'
    '"signer_isolation":"process","size":0},'
)
_SESSION_OPEN = '{"body":{"caller":"local","origin":"mcp"},'
_POLICY_LOAD = (
    '{"body":{"file":"policy.yaml","policy":"' + _POLICY + '","tier":"full","why":"named"},'
)
_CLOSE = '{"body":{"status":"closed"},'


@dataclass(slots=True)
class _Session:
    name: str
    sseq: int = 0
    prev: str = "null"
    calls: int = 0


@dataclass(slots=True)
class _Tree:
    """Writes bundles and tiles as they fill. No syncs: nobody relies on this log."""

    directory: Path
    size: int = 0
    bundle: list[bytes] = field(default_factory=list[bytes])
    levels: list[list[bytes]] = field(default_factory=lambda: [[]])

    def add(self, data: bytes) -> bytes:
        """Take an entry and return its leaf hash."""
        leaf = leaf_hash(data)
        self.bundle += (len(data).to_bytes(2, "big"), data)
        self.levels[0].append(leaf)
        self.size += 1
        if self.size % TILE_WIDTH == 0:
            self._full()
        return leaf

    def _full(self) -> None:
        index = self.size // TILE_WIDTH - 1
        self._write(bundle_path(index), b"".join(self.bundle))
        self.bundle = []
        level = 0
        while len(self.levels[level]) == TILE_WIDTH:
            hashes, self.levels[level] = self.levels[level], []
            self._write(tile_path(level, index), b"".join(hashes))
            root = tile_root(hashes)
            level, index = level + 1, index // TILE_WIDTH
            if len(self.levels) == level:
                self.levels.append([])
            self.levels[level].append(root)

    def finish(self) -> bytes:
        """Write what is partial and return the root."""
        for level, index, width in edge_widths(self.size):
            if level == 0:
                self._write(bundle_path(index, width), b"".join(self.bundle))
            self._write(tile_path(level, index, width), b"".join(self.levels[level]))
        parts = [part for hashes in reversed(self.levels) for part in _complete(hashes)]
        return fold(parts) if parts else EMPTY_ROOT

    def _write(self, path: str, data: bytes) -> None:
        target = self.directory / path
        if self.size <= TILE_WIDTH or path[-3:] == "000" or ".p/" in path:
            target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            file.write(data)


class _Load:
    """Writes entries of overlapping sessions until there are enough."""

    def __init__(self, tree: _Tree, key_line: str) -> None:
        self._tree, self._key_line = tree, key_line
        self._hex = _random_hex()
        self._started = 0

    def run(self, entries: int) -> None:
        log = _Session(next(self._hex)[:16])
        self._append(log, "log.open", _LOG_OPEN % self._key_line)
        sessions = [self._open() for _ in range(min(_SESSIONS, max(1, entries // 64)))]
        left = len(sessions) + 4  # what closing takes
        while self._tree.size < entries - left:
            for at, session in enumerate(sessions):
                if session.calls == _CALLS_OF_A_SESSION:
                    self._append(session, "session.close", _CLOSE)
                    sessions[at] = self._open()
                self._call(sessions[at])
                if self._tree.size >= entries - left:
                    break
        for session in [*sessions, log]:
            self._append(session, "session.close", _CLOSE)

    def _open(self) -> _Session:
        session = _Session(next(self._hex)[:16])
        self._append(session, "session.open", _SESSION_OPEN)
        self._append(session, "policy.load", _POLICY_LOAD)
        return session

    def _call(self, session: _Session) -> None:
        session.calls += 1
        call = next(self._hex)[:16]
        denied = session.calls % _DENIED_EVERY == 0
        said = ("policy.no_rule", "deny") if denied else ("policy.allow", "allow")
        self._append(session, "call.intent", _INTENT % (call, next(self._hex)))
        self._append(session, "call.decision", _DECISION % (call, *said, session.calls))
        body = _REFUSED % call if denied else _OUTCOME % (call, next(self._hex))
        self._append(session, "call.outcome", body)

    def _append(self, session: _Session, kind: str, body: str) -> None:
        moment = self._tree.size
        head = (kind, 9_000 + moment * 10_000, session.prev, session.name, session.sseq)
        data = (body + _HEAD % (*head, _START_MS + moment // 100)).encode()
        session.prev = f'"{self._tree.add(data).hex()}"'
        session.sseq += 1


def _complete(hashes: list[bytes]) -> list[bytes]:
    """Return the roots of the complete subtrees over some siblings, largest first."""
    parts: list[bytes] = []
    at = 0
    for height in range(len(hashes).bit_length() - 1, -1, -1):
        if len(hashes) >> height & 1:
            parts.append(tile_root(hashes[at : at + (1 << height)]))
            at += 1 << height
    return parts


def _random_hex() -> Iterator[str]:
    while True:
        text = os.urandom(_RANDOM_BYTES).hex()
        for at in range(0, len(text), 64):
            yield text[at : at + 64]


def write_log(directory: Path, entries: int) -> str:
    """Write a closed log of about ``entries`` entries; return the line of the key it signed."""
    key: Final[SigningKey] = generate_key("bench.invalid/key")
    tree = _Tree(directory)
    _Load(tree, key.verifier.line).run(entries)
    head = Checkpoint(origin=ORIGIN, size=tree.size, root=tree.finish())
    (directory / "origin").write_text(f"{ORIGIN}\n")
    (directory / "checkpoint").write_text(f"{head.text()}\n{key.of_log(ORIGIN).sign(head.text())}")
    return key.verifier.line
