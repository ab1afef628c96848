"""Step "adapter": what a confined server says on stderr, made harmless for a terminal or a log.

Control characters are escaped, every line names its server, and a flood is cut: what a log or a
person can take is bounded, and the server is never held up by it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress

_READ_BYTES = 8 << 10
# LIMIT: bytes at once, and per second after that.
_BURST_BYTES = 256 << 10
_RATE_BYTES = 64 << 10


def relay(source: int, target: int, name: str, clock: Callable[[], float] = time.monotonic) -> None:
    """Copy ``source`` to ``target`` until its end, line by line. Blocks."""
    allowance, last, dropped, pending = float(_BURST_BYTES), clock(), 0, b""
    while data := os.read(source, _READ_BYTES):
        now = clock()
        allowance = min(float(_BURST_BYTES), allowance + (now - last) * _RATE_BYTES)
        last = now
        *lines, pending = (pending + data).split(b"\n")
        if len(pending) >= _READ_BYTES:
            lines, pending = [*lines, pending], b""
        for line in lines:
            # What is written counts: an empty line costs a name, an escape four times its byte.
            if len(name) + len(line) > allowance:
                dropped += len(line) + 1
                continue
            said = [f"[{dropped} bytes left out]".encode(), line] if dropped else [line]
            text = b"".join(_line(name, one) for one in said)
            allowance, dropped = allowance - len(text), 0
            _write(target, text)
    if pending or dropped:
        left_out = f" [{dropped} bytes left out]" if dropped else ""
        _write(target, _line(name, pending + left_out.encode()))


def harmless(text: str) -> str:
    """Escape every character that is not printable."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character == "\t" else ascii(character)[1:-1]
        for character in text
    )


def _line(name: str, line: bytes) -> bytes:
    return f"{name}| {harmless(line.decode('utf-8', 'backslashreplace'))}\n".encode()


def _write(target: int, text: bytes) -> None:
    with suppress(OSError):
        while text:
            text = text[os.write(target, text) :]
