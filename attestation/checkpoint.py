"""Step "record": a Checkpoint, the signed head of the tree (C2SP tlog-checkpoint).

The text is three lines: origin, size in decimal, root hash in base64. Extension lines are refused:
we write none, and none of ours may carry meaning that a foreign verifier ignores.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from safeconduct.errors import TraceInvalid

from .merkle import HASH_BYTES, MAX_SIZE
from .note import decode_base64, encode_base64

# LIMIT: an origin is one line of printable ASCII; it is shown on terminals and in file headers.
_ORIGIN = re.compile(r"[!-~]{1,200}")
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


def require_origin(origin: str) -> str:
    """Return the origin if it is one we write and accept: 1-200 printable ASCII, no space or +."""
    if _ORIGIN.fullmatch(origin) is None or "+" in origin:
        raise TraceInvalid(
            f"{origin[:80]!r} is no log origin",
            code="trace.origin",
            hint="use 1 to 200 printable ASCII characters without space or '+'",
        )
    return origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The head of a log: ``root`` is the 32-byte Merkle root over the first ``size`` entries."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """Return the note text that is signed, with its final newline."""
        return f"{self.origin}\n{self.size}\n{encode_base64(self.root)}\n"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Parse a note text strictly. Raise TraceInvalid ``checkpoint.invalid``."""
        lines = text.split("\n")
        if len(lines) != 4 or lines[3]:
            raise TraceInvalid("a checkpoint has three lines", code="checkpoint.invalid")
        origin, size, root = lines[:3]
        if _SIZE.fullmatch(size) is None or int(size) > MAX_SIZE:
            raise TraceInvalid("the checkpoint's size is no size", code="checkpoint.invalid")
        digest = decode_base64(root, code="checkpoint.invalid")
        if len(digest) != HASH_BYTES:
            raise TraceInvalid("the checkpoint's root is no hash", code="checkpoint.invalid")
        return cls(origin=require_origin(origin), size=int(size), root=digest)
