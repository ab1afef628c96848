"""Witness step 1: the HTTP service of a witness (C2SP tlog-witness, "HTTP Interface").

``POST /add-checkpoint``, ``GET /<origin hash>/checkpoint``, and ``…/evidence``, which is ours.
No TLS and no login: a signature decides, and a reverse proxy stands before a public witness.
Whoever keeps a connection without finishing a request is the first to lose it.
"""

from __future__ import annotations

import asyncio
import re
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from .desk import Answer, Witness
from .http import MAX_HEAD_BYTES, Bad, Request, encode_answer, read_body, read_head
from .submission import MAX_BODY_BYTES

# LIMIT: connections at once; beyond it the one that has waited longest for a request is dropped.
MAX_CONNECTIONS = 256
# LIMIT: a whole request must have come by then, counted from the answer before it.
REQUEST_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 10.0
_MAX_REQUESTS = 1000
_LINGER_S, _LINGER_READS = 1.0, 64
_ORIGIN_PATH = re.compile(r"/([0-9a-f]{64})/(checkpoint|evidence)(?:/([a-z0-9-]{1,64}))?")


class WitnessServer:
    """Serves one witness on one address, in one event loop."""

    def __init__(self, witness: Witness, *, request_timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self._witness = witness
        self._request_timeout_s = request_timeout_s
        # One thread: judging waits for the disk, and one head is judged at a time in any case.
        self._desk = ThreadPoolExecutor(1, thread_name_prefix="witness")
        self._waiting: dict[StreamWriter, None] = {}
        self._open: set[StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port. Raise OSError."""
        self._server = await asyncio.start_server(
            self._connected, host, port, limit=MAX_HEAD_BYTES, backlog=MAX_CONNECTIONS
        )
        number: int = self._server.sockets[0].getsockname()[1]
        return number

    async def close(self) -> None:
        """Stop listening; what is being judged is finished and on disk."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.get_running_loop().run_in_executor(None, self._desk.shutdown)

    async def _connected(self, reader: StreamReader, writer: StreamWriter) -> None:
        if len(self._open) >= MAX_CONNECTIONS and not self._make_room():
            writer.transport.abort()
            return
        self._open.add(writer)
        try:
            with suppress(OSError):  # the peer is gone, or as good as; TimeoutError is one
                await self._converse(reader, writer)
        finally:
            self._open.discard(writer)
            self._waiting.pop(writer, None)
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _make_room(self) -> bool:
        """Drop the connection that has waited longest; False where all are being answered."""
        oldest = next(iter(self._waiting), None)
        if oldest is None:
            return False
        self._waiting.pop(oldest)
        self._open.discard(oldest)
        oldest.transport.abort()
        return True

    async def _converse(self, reader: StreamReader, writer: StreamWriter) -> None:
        for _ in range(_MAX_REQUESTS):
            again = False
            try:
                request = await self._next(reader, writer)
                if request is None:
                    return
                again = request.again
                answer = await self._answer(request)
            except Bad as bad:
                answer = bad.answer
            writer.write(encode_answer(answer, again=again))
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await writer.drain()
            if not again:
                await self._linger(reader, writer)
                return

    @staticmethod
    async def _linger(reader: StreamReader, writer: StreamWriter) -> None:
        """Read on a little: closing upon unread bytes would take the answer away, too.

        RFC 9112 §9.6 says why: the reset of a closed socket overtakes what was sent before.
        """
        writer.write_eof()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                for _ in range(_LINGER_READS):
                    if not await reader.read(MAX_HEAD_BYTES):
                        return

    async def _next(self, reader: StreamReader, writer: StreamWriter) -> Request | None:
        self._waiting[writer] = None
        try:
            async with asyncio.timeout(self._request_timeout_s):
                head = await read_head(reader, max_body_bytes=MAX_BODY_BYTES)
                if head is None:
                    return None
                if head.expects and head.length:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                return await read_body(reader, head)
        except TimeoutError as error:
            raise Bad(408, "the request took too long") from error
        finally:
            self._waiting.pop(writer, None)

    async def _answer(self, request: Request) -> Answer:
        judge = self._route(request)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._desk, judge)

    def _route(self, request: Request) -> Callable[[], Answer]:
        if request.target == "/add-checkpoint":
            _require_method(request, "POST")
            return lambda: self._witness.add_checkpoint(request.body)
        found = _ORIGIN_PATH.fullmatch(request.target)
        if found is None or (found[3] and found[2] == "checkpoint"):
            raise Bad(404, "there is nothing here")
        _require_method(request, "GET")
        name, what, piece = found.groups()
        if what == "checkpoint":
            return lambda: self._witness.checkpoint(name)
        return lambda: self._witness.evidence(name, piece or "")


def _require_method(request: Request, method: str) -> None:
    if request.method != method:
        raise Bad(405, f"use {method}")
