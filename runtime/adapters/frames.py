"""Step "adapter": bytes of a peer become frames, one line each, bounded before anything parses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from safeconduct.errors import ProtocolError

# LIMIT: bytes thrown away while looking for the end of a frame that was refused as too long.
_SKIPPED_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class TooLong:
    """A frame beyond the limit. ``prefix`` is what was held of it; the rest is thrown away."""

    prefix: bytes


class Frames:
    """Splits a stream at newlines. Holds at most ``limit`` bytes and one read at a time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = bytearray()
        self._skipping = False
        self._skipped = 0

    def feed(self, data: bytes) -> Iterator[bytes | TooLong]:
        """Yield every frame that ``data`` completes, newline included, in order.

        Raises ProtocolError ``mcp.frame_too_long`` where a frame seems to have no end.
        """
        *complete, rest = data.split(b"\n")
        for part in complete:
            yield from self._more(part)
            if self._skipping:
                self._skipping, self._skipped = False, 0
                continue
            self._held += b"\n"
            yield self._take()
        yield from self._more(rest)

    def _more(self, part: bytes) -> Iterator[TooLong]:
        if self._skipping:
            self._skipped += len(part)
            if self._skipped > _SKIPPED_BYTES_MAX:
                raise ProtocolError("A frame has no end.", code="mcp.frame_too_long")
            return
        self._held += part
        if len(self._held) > self._limit:
            self._skipping = True
            yield TooLong(self._take()[: self._limit])

    def _take(self) -> bytes:
        taken, self._held = bytes(self._held), bytearray()
        return taken
