"""Logs made by hand: any entries, a consistent tree over them and any key's signature."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.merkle import CompactRange, leaf_hash, tile_root
from safeconduct.attestation.note import SigningKey
from safeconduct.attestation.tiles import TILE_WIDTH, bundle_path, join_bundle, tile_path

_encoder = msgspec.json.Encoder(order="deterministic")

Fields = dict[str, object]


def spell(entry: object) -> bytes:
    """Spell an entry canonically, whatever is in it."""
    return _encoder.encode(entry)


def chain(entries: Sequence[Fields]) -> list[bytes]:
    """Number entries and chain them, session by session, as a careful forger would."""
    last: dict[object, tuple[int, str]] = {}
    spelled: list[bytes] = []
    for entry in entries:
        name = entry["session"]
        first = entry["kind"] in ("log.open", "session.open") and name not in last
        number, prev = last.get(name, (-1, None)) if not first else (-1, None)
        data = spell({**entry, "sseq": number + 1, "prev": prev})
        spelled.append(data)
        last[name] = (number + 1, leaf_hash(data).hex())
        if entry["kind"] == "session.close":
            del last[name]
    return spelled


def lay_out(trace: Path, entries: Sequence[bytes]) -> bytes:
    """Write bundles and tiles over any entries, replacing those there are; return the root."""
    shutil.rmtree(trace / "tile", ignore_errors=True)
    edge = CompactRange()
    hashes = [leaf_hash(data) for data in entries]
    for leaf in hashes:
        edge.push(leaf)
    for start in range(0, len(entries), TILE_WIDTH):
        part = entries[start : start + TILE_WIDTH]
        _write(trace / bundle_path(start // TILE_WIDTH, len(part)), join_bundle(part))
    level = 0
    while hashes:
        above: list[bytes] = []
        for start in range(0, len(hashes), TILE_WIDTH):
            part = hashes[start : start + TILE_WIDTH]
            _write(trace / tile_path(level, start // TILE_WIDTH, len(part)), b"".join(part))
            if len(part) == TILE_WIDTH:
                above.append(tile_root(part))
        level, hashes = level + 1, above
    return edge.root()


def sign(trace: Path, head: Checkpoint, *keys: SigningKey) -> None:
    """Put a signed head into the folder."""
    lines = "".join(key.of_log(head.origin).sign(head.text()) for key in keys)
    (trace / "checkpoint").write_text(f"{head.text()}\n{lines}")


def forge(trace: Path, entries: Sequence[bytes], key: SigningKey, origin: str) -> Checkpoint:
    """Write a whole log: a tree over any entries, signed."""
    trace.mkdir(exist_ok=True)
    head = Checkpoint(origin=origin, size=len(entries), root=lay_out(trace, entries))
    sign(trace, head, key)
    (trace / "origin").write_text(f"{origin}\n")
    return head


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def entry(kind: str, session: str, body: Fields, at: int = 0) -> Fields:
    """Return an entry that is not chained yet."""
    return {
        "body": body,
        "kind": kind,
        "mono_ns": at * 1000,
        "session": session,
        "time": 1_795_280_000_000 + at,
        "v": 1,
    }


def call(session: str, name: str, at: int = 0) -> list[Fields]:
    """Return the entries of one allowed call."""
    intent: Fields = {
        "call": name,
        "caller": "local",
        "document": {"commitment": "ab" * 32},
        "origin": "sdk",
        "parent": None,
        "tool": "fs.read",
    }
    decision: Fields = {
        "call": name,
        "code": "policy.allow",
        "effect": "allow",
        "enforcement": "object",
        "policy": "sha256:" + "0" * 64,
        "rules": ["r1"],
    }
    outcome: Fields = {"call": name, "status": "ok", "usage": {"wall_ms": 1}}
    return [
        entry("call.intent", session, intent, at),
        entry("call.decision", session, decision, at + 1),
        entry("call.outcome", session, outcome, at + 2),
    ]


def opening(origin: str, key_line: str = "claimed") -> Fields:
    """Return the log.open of a run of the log."""
    body: Fields = {
        "format": "safeconduct/trace/v1",
        "key": key_line,
        "origin": origin,
        "signer_isolation": "process",
        "size": 0,
    }
    return entry("log.open", "run-1", body)
