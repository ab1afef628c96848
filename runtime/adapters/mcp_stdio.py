"""Step "adapter": a proxy between an MCP client and one confined server, over stdio.

Frames are forwarded as they came; a parsed copy is judged. ``tools/call`` goes along the pipeline
and reaches the server only if it was allowed and recorded, written anew where its arguments were
judged in another spelling; its response reaches the client only after its Outcome was recorded.
All other messages pass, byte for byte.

One thread per direction keeps the order of frames and lets pipes push back: nothing is queued.
The main thread waits for the first event that ends the session. What arrives from either side is
hostile: a client's frame that is not one plain message is answered with an error and not
forwarded, a server's is dropped. Drops are told on stderr.
"""

from __future__ import annotations

import os
import queue
import secrets
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from safeconduct.call import Call
from safeconduct.errors import Denied, Error, ProtocolError, SandboxFailed, ToolFailed
from safeconduct.runtime.pipeline import Pipeline
from safeconduct.runtime.sandbox.channel import Exit as End
from safeconduct.runtime.sandbox.running import Running

from .frames import Frames, TooLong
from .jsonrpc import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    PARSE_ERROR,
    SERVER_ERROR,
    Id,
    Message,
    error_frame,
    escape_separators,
    parse,
    request_id,
    salvage_answered,
    salvage_id,
)  # fmt: skip
from .mcp_calls import (
    OpenCall,
    OpenRequests,
    client_name,
    is_call,
    judged_frame,
    read_call,
    refusal,
)  # fmt: skip

# LIMIT: bytes of one frame. A server's results carry files and images.
CLIENT_FRAME_BYTES_MAX = 4 << 20
SERVER_FRAME_BYTES_MAX = 16 << 20
# A client waits 2 s between closing our stdin and SIGTERM (the mcp SDK does), so we ask for less.
_GRACE_SECONDS = 1.0
_JOIN_SECONDS = 2.0
# LIMIT: how long a server that reads nothing is waited for once its client has hung up.
_PATIENCE_SECONDS = 5.0
_READ_BYTES = 64 << 10


class Left(StrEnum):
    """Who closed its side of the line."""

    CLIENT = "client"
    SERVER = "server"


# What may end a session: the server's end, who left, a failure, the number of a signal.
Event: TypeAlias = "End | Left | BaseException | int"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Our ends of the pipes: to the client, to the server."""

    client_in: int
    client_out: int
    server_in: int
    server_out: int


class Proxy:
    """Carries one session. ``serve`` returns when it is over."""

    def __init__(
        self, pipeline: Pipeline, running: Running, line: Line, *, start: Call,
        note: Callable[[str], None], events: queue.SimpleQueue[Event],
    ) -> None:  # fmt: skip
        """Prepare to serve; ``events`` also takes the numbers of signals that end the session."""
        self._pipeline, self._running, self._line = pipeline, running, line
        self._start, self._name = start, start.arguments["server"]
        self._note, self._events = note, events
        # Our end alone: the server's is another open file description, pipe(7).
        os.set_blocking(line.server_in, False)
        self._open = OpenRequests()
        self._caller = "mcp-client"
        self.client_left = False
        self._out = threading.Lock()
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._threads = {
            name: threading.Thread(target=self._watched, args=(run,), name=name, daemon=True)
            for name, run in (
                ("from-client", self._from_client),
                ("from-server", self._from_server),
                ("server-end", self._server_end),
            )
        }

    def serve(self) -> End | int:
        """Carry frames until the session ends: the server's End, or the signal that ends it.

        SIGKILL stands for a server that stayed although its client had left. Raises the Error
        that ended the session. The caller ends the sandbox, then calls ``finish``.
        """
        for thread in self._threads.values():
            thread.start()
        deadline: float | None = None
        while True:
            try:
                event = self._events.get(timeout=_until(deadline))
            except queue.Empty:
                if self.client_left:
                    return signal.SIGKILL
                raise ToolFailed("The server hung up.", code="mcp.server_gone") from None
            if isinstance(event, Left):
                self.client_left = self.client_left or event is Left.CLIENT
                deadline = deadline or time.monotonic() + _GRACE_SECONDS
            elif isinstance(event, BaseException):
                raise event
            else:
                return event

    def finish(self, error: Error) -> int:
        """Record ``error`` as the end of every open call and tell the client; return how many.

        Cancelled ones end as ``mcp.cancelled``; the client waits for none of them, so they are
        neither told nor counted. The sandbox must be gone, so that its last responses are all
        there will be.
        """
        os.write(self._stop_write, b"x")
        reader, writer = self._threads["from-server"], self._threads["from-client"]
        reader.join(_JOIN_SECONDS)
        still_open, cancelled = self._open.end()
        calls = [call for call in still_open.values() if call is not None]
        for call in calls:
            call.failed(error)
        for call in cancelled:
            call.failed(_cancelled())
        if not reader.is_alive():  # else the client reads nothing and we would wait for it
            for number in still_open:
                self._answer(error_frame(number, SERVER_ERROR, f"{error.message} [{error.code}]"))
        writer.join(_JOIN_SECONDS)
        return len(calls)

    def _watched(self, run: Callable[[], Event]) -> None:
        """Turn the end of a thread into an event, whatever ended it."""
        try:
            self._events.put(run())
        except BaseException as error:  # the main thread raises it
            self._events.put(error)

    def _server_end(self) -> Event:
        end = self._running.channel.receive()
        if isinstance(end, str):
            return SandboxFailed("The sandbox started twice.", step="channel")
        return end

    # -- from the client ---------------------------------------------------------------------

    def _from_client(self) -> Left:
        frames = Frames(CLIENT_FRAME_BYTES_MAX)
        waiting = select.poll()
        waiting.register(self._line.client_in, select.POLLIN)
        waiting.register(self._stop_read, select.POLLIN)
        try:
            while self._stop_read not in dict(waiting.poll()):
                data = os.read(self._line.client_in, _READ_BYTES)
                if not data:
                    break
                for frame in frames.feed(data):
                    self._client_frame(frame)
        except BrokenPipeError:
            return Left.SERVER
        except ProtocolError as error:
            # Told before we hang up on the server, whose end would otherwise come first.
            self._events.put(error)
            raise
        finally:
            os.close(self._line.server_in)
        return Left.CLIENT

    def _client_frame(self, frame: bytes | TooLong) -> None:
        if isinstance(frame, TooLong):
            self._refuse_long(frame)
            return
        if not frame.strip():
            return
        try:
            message = parse(frame)
        except ProtocolError as error:
            code = PARSE_ERROR if error.code == "json.syntax" else INVALID_REQUEST
            self._refuse(salvage_id(frame), code, error)
            return
        try:
            self._client_message(message, frame)
        except ProtocolError as error:
            code = INVALID_PARAMS if error.code == "mcp.params" else INVALID_REQUEST
            self._refuse(message.id, code, error)

    def _client_message(self, message: Message, frame: bytes) -> None:
        self._caller = client_name(message) or self._caller
        calls = is_call(message)
        if message.method is None or message.id is None:
            if calls:
                raise ProtocolError("Refused: a call without an id.", code="mcp.notification")
            if message.method == "notifications/cancelled":
                self._cancel(message)
            self._forward(frame)
            return
        self._open.hold(message.id)
        call: OpenCall | None = None
        try:
            if calls:
                call, frame = self._admit(message, frame)
        except ProtocolError:
            self._open.release(message.id)
            raise
        except Error as error:
            self._open.release(message.id)
            self._answer(refusal(message, error))
            if not isinstance(error, Denied):
                raise
            return
        if self._open.forwarding(message.id, call):
            self._forward(frame)
        elif call is not None:
            call.failed(ToolFailed("The session is over.", code="mcp.server_gone"))

    def _admit(self, message: Message, frame: bytes) -> tuple[OpenCall, bytes]:
        """Return the open call and the frame that tells the server what was judged."""
        request = read_call(message)
        call = Call(
            id=secrets.token_hex(8),
            tool=f"{self._name}.{request.tool}",
            arguments=request.arguments,
            session=self._start.session,
            caller=self._caller,
            origin="mcp",
            parent=self._start.id,
        )
        context = self._pipeline.admit(call)
        within = self._running.confinement
        opened = OpenCall.admit(self._pipeline, context, within, len(frame))
        try:
            return opened, judged_frame(message, frame, opened.admitted)
        except ProtocolError as error:
            opened.failed(error)
            raise

    def _cancel(self, message: Message) -> None:
        """Keep a cancelled call open: cancelling is a wish, and its answer may be on the way.

        https://modelcontextprotocol.io/specification/2025-11-25/basic/utilities/cancellation
        ("Timing Considerations")
        """
        number = message.params.get("requestId")
        for forgotten in self._open.cancel(request_id(number)):
            forgotten.failed(_cancelled())

    def _refuse_long(self, frame: TooLong) -> None:
        """Answer a frame beyond the limit if its id stands before what is too long."""
        error = ProtocolError(
            f"Refused: a frame is longer than {CLIENT_FRAME_BYTES_MAX} bytes.",
            code="mcp.frame_too_long",
        )
        number = salvage_id(frame.prefix)
        if number is None:
            raise error
        self._refuse(number, INVALID_REQUEST, error)

    def _refuse(self, number: Id | None, code: int, error: ProtocolError) -> None:
        """Answer a frame that is not forwarded; a notification cannot be answered."""
        self._note(f"client: {error.message} [{error.code}]")
        if number is not None:
            self._answer(error_frame(number, code, f"{error.message} [{error.code}]"))

    def _forward(self, frame: bytes) -> None:
        view = memoryview(frame)
        while view:
            try:
                view = view[os.write(self._line.server_in, view) :]
            except BlockingIOError:
                self._wait_for_server()

    def _wait_for_server(self) -> None:
        """Wait until the server takes more. A client that hung up meanwhile has left.

        Nobody reads the client's line now, so its end would go unseen for as long as a server
        pleases. poll(2) tells of it also where something is still to be read.
        """
        taking, either = select.poll(), select.poll()
        for poll in (taking, either):
            poll.register(self._line.server_in, select.POLLOUT)
        either.register(self._line.client_in, select.POLLRDHUP)
        if self._line.server_in in dict(either.poll()):
            return
        if not taking.poll(_PATIENCE_SECONDS * 1000):
            self._events.put(Left.CLIENT)
            taking.poll()

    # -- from the server ---------------------------------------------------------------------

    def _from_server(self) -> Left:
        frames = Frames(SERVER_FRAME_BYTES_MAX)
        while data := os.read(self._line.server_out, _READ_BYTES):
            for frame in frames.feed(data):
                if isinstance(frame, TooLong):
                    raise ProtocolError(
                        f"The server sent a frame longer than {SERVER_FRAME_BYTES_MAX} bytes.",
                        code="mcp.frame_too_long",
                    )
                if frame.strip():
                    self._server_frame(frame)
        return Left.SERVER

    def _server_frame(self, frame: bytes) -> None:
        frame = escape_separators(frame)
        try:
            message = parse(frame)
        except ProtocolError as error:
            self._note(f"server: dropped a frame. {error.message} [{error.code}]")
            self._refuse_answer(salvage_answered(frame), error)
            return
        if message.method is None and message.id is not None:
            asked, call = self._open.take(message.id)
            if not asked:
                self._note("server: dropped a response that nothing asked for")
                return
            if call is not None:
                call.answered(message, frame)
        self._answer(frame)

    def _refuse_answer(self, number: Id | None, error: ProtocolError) -> None:
        """Tell the client that its answer was refused: it would wait for it for ever."""
        asked, call = (False, None) if number is None else self._open.take(number)
        if not asked:
            return
        if call is not None:
            message = "The server's answer is not one plain message."
            call.failed(ToolFailed(message, code="mcp.bad_answer"))
        text = f"The server's answer is refused. {error.message} [{error.code}]"
        self._answer(error_frame(number, SERVER_ERROR, text))

    def _answer(self, frame: bytes) -> None:
        """Write to the client; a client that is gone is noticed by its closed stdin."""
        try:
            with self._out:
                _write(self._line.client_out, frame)
        except BrokenPipeError:
            self._events.put(Left.CLIENT)


def _cancelled() -> ToolFailed:
    return ToolFailed("The client cancelled it, and no answer came.", code="mcp.cancelled")


def _write(fd: int, frame: bytes) -> None:
    view = memoryview(frame)
    while view:
        view = view[os.write(fd, view) :]


def _until(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
