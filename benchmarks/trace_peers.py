"""What others do for one tool call, beside which `bench_trace` measures ours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, cast

from attestroot import ledger
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from mcp_receipt_governed import McpReceiptAdapter  # type: ignore[import-untyped]

Append: TypeAlias = Callable[[str, dict[str, object], bytes], object]

_ARGUMENTS = {"path": "/ws/src/main.py"}
_ALLOW = 'permit(principal, action == Action::"fs.read", resource);'
# Their receipts are kept in a list that is searched for every new one: it is begun anew.
_RECEIPTS_KEPT = 500


def attestroot(directory: Path) -> Callable[[str], object]:
    """Two chained events, before and after the tool, each with its raw bytes in a file."""
    os.environ["ATTESTROOT_HOME"] = str(directory / "attestroot")
    append = cast("Append", ledger.append_event)  # pyright: ignore[reportUnknownMemberType]

    def record(call: str) -> None:
        before = {"hook": "PreToolUse", "call": call, "tool": "fs.read", "input": _ARGUMENTS}
        after = {"hook": "PostToolUse", "call": call, "output": "some text of a file\n"}
        for event in (before, after):
            if append("bench", dict(event), json.dumps(event).encode()) is None:
                raise RuntimeError("attestroot did not record the event")

    return record


def agentmesh(_: Path) -> Callable[[str], object]:
    """One signed receipt of the decision, in memory only."""
    adapters: list[McpReceiptAdapter] = []

    def record(call: str) -> None:
        if not adapters or len(adapters[-1].get_receipts()) >= _RECEIPTS_KEPT:
            adapters.append(McpReceiptAdapter(cedar_policy=_ALLOW, signing_key_hex="a5" * 32))
        receipt = adapters[-1].govern_tool_call("did:mesh:bench", "fs.read", dict(_ARGUMENTS))
        if receipt.signature is None:
            raise RuntimeError(f"agentmesh did not sign {call}")

    return record


def signed_events(directory: Path) -> Callable[[str], object]:
    """Three lines of JSON, chained by hash, each with a signature of its own; written, not synced.

    The least that "every event is signed" can cost in Python.
    """
    from hashlib import sha256

    key = Ed25519PrivateKey.generate()
    fd = os.open(directory / "signed.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    previous = [""]

    def record(call: str) -> None:
        events = (
            {"kind": "call.intent", "call": call, "tool": "fs.read", "arguments": _ARGUMENTS},
            {"kind": "call.decision", "call": call, "effect": "allow", "rules": ["fs.read/1"]},
            {"kind": "call.outcome", "call": call, "status": "ok", "value": "some text of a file"},
        )
        for event in events:
            data = json.dumps({**event, "prev": previous[0]}, sort_keys=True).encode()
            previous[0] = sha256(data).hexdigest()
            line = {"event": data.decode(), "signature": key.sign(data).hex()}
            os.write(fd, json.dumps(line).encode() + b"\n")

    return record
