"""Step "adapter": a ``tools/call`` becomes a Call, and what came of it an answer.

Protocol revisions 2025-11-25 and 2026-07-28 agree on everything this file looks at. A retry after
an ``input_required`` result is a new request and so a new Call.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from safeconduct.call import Confinement, Json, Outcome, Usage
from safeconduct.errors import Denied, Error, ProtocolError, ToolFailed
from safeconduct.runtime.pipeline import Admitted, Pipeline

from .jsonrpc import Id, Message, request_frame, result_frame

TOOLS_CALL = "tools/call"
# Parameters that a call may carry. `task` is missing on purpose: its result would come through
# other requests, past the record of this one.
_PARAMS = frozenset({"name", "arguments", "_meta", "inputResponses", "requestState"})
_META = "io.modelcontextprotocol/"
_NAME_CHARACTERS_MAX = 128
# LIMIT: bytes of one response that are kept beside the trace; of more, a digest.
_KEPT_BYTES = 64 << 10
# LIMIT: requests of the client without an answer, and cancelled ones that may still get one. They
# are counted apart: a server need not answer what was cancelled, so those may pile up.
_OPEN_MAX = 1024
_CANCELLED_MAX = 4096
# LIMIT: bytes of the frames of open Calls, and as many of cancelled ones: each is held with its
# arguments until it is answered, by a server that need not answer.
_HELD_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a ``tools/call`` asks for."""

    tool: str
    arguments: Mapping[str, Json]


def is_call(message: Message) -> bool:
    """Tell whether a message calls a tool; refuse what only a lax server would take for one.

    Raises ProtocolError ``mcp.method``.
    """
    if message.method == TOOLS_CALL:
        return True
    if message.method is not None and message.method.casefold() == TOOLS_CALL:
        raise ProtocolError("Refused: tools/call is spelled in lower case.", code="mcp.method")
    return False


def read_call(message: Message) -> Request:
    """Read the parameters of a call. Raises ProtocolError ``mcp.params`` or ``mcp.task``."""
    params = message.params
    if "task" in params:
        raise ProtocolError(
            "Refused: a call as a task cannot be recorded to its end.", code="mcp.task"
        )
    if not params.keys() <= _PARAMS:
        raise _bad("tools/call has a parameter that is not known")
    tool, given = params.get("name"), params.get("arguments")
    if not isinstance(tool, str):
        raise _bad("tools/call names no tool")
    if given is not None and not isinstance(given, Mapping):
        raise _bad("the arguments are not an object")
    arguments: Mapping[str, Json] = given or {}
    if len({name.casefold() for name in arguments}) != len(arguments):
        # A Go server takes the last of them for one field.
        raise _bad("two arguments differ only in case")
    for name, kind in (("_meta", Mapping), ("inputResponses", Mapping), ("requestState", str)):
        if params.get(name) is not None and not isinstance(params[name], kind):
            raise _bad(f"{name} is of another type")
    return Request(tool=tool, arguments=arguments)


def judged_frame(message: Message, frame: bytes, admitted: Admitted) -> bytes:
    """Return the frame of a call as it was judged: the client's own bytes where nothing differs.

    A path, URL, host or address that has several spellings is judged in one of them. The server
    gets that one: it may resolve a relative path from another folder, and read ``0x7f.1`` as a
    name. Raises ProtocolError ``json.too_deep``.
    """
    judged = admitted.document.arguments
    if judged == admitted.call.arguments:
        return frame
    return request_frame(message, {**message.params, "arguments": dict(judged)})


def client_name(message: Message) -> str | None:
    """Return what a client calls itself, if this message says it. Only a label: unproven."""
    meta = message.params.get("_meta")
    info = message.params.get("clientInfo") if message.method == "initialize" else None
    if info is None and isinstance(meta, Mapping):
        info = meta.get(f"{_META}clientInfo")
    name = info.get("name") if isinstance(info, Mapping) else None
    return name[:_NAME_CHARACTERS_MAX] if isinstance(name, str) and name else None


def refusal(message: Message, error: Error) -> bytes:
    """Answer a call that did not run with a tool result, so that the model sees why.

    It is told a code, the rules and one sentence, never what would allow the call.
    """
    assert message.id is not None  # noqa: S101 - a notification is never answered
    rules = list(error.rules) if isinstance(error, Denied) else []
    by = f" Rules: {', '.join(rules)}." if rules else ""
    said: dict[str, Json] = {"safeconduct/code": error.code, "safeconduct/rules": rules}
    result: dict[str, Json] = {
        "content": [{"type": "text", "text": f"{error.message} [{error.code}]{by}"}],
        "isError": True,
        "_meta": said,
    }
    meta = message.params.get("_meta")
    if isinstance(meta, Mapping) and f"{_META}protocolVersion" in meta:
        result["resultType"] = "complete"
    return result_frame(message.id, result)


@dataclass(slots=True, kw_only=True)
class OpenCall:
    """A Call that was admitted and forwarded, until its response comes or never will.

    A cancelled one is still open: the server may have done the work before it heard of it.
    """

    pipeline: Pipeline
    admitted: Admitted
    context: AbstractContextManager[Admitted]
    confinement: Confinement
    frame_bytes: int = 0
    started: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    @classmethod
    def admit(
        cls,
        pipeline: Pipeline,
        context: AbstractContextManager[Admitted],
        within: Confinement,
        frame_bytes: int,
    ) -> OpenCall:
        """Enter ``pipeline.admit``; raises as that does."""
        admitted = context.__enter__()
        return cls(
            pipeline=pipeline, admitted=admitted, context=context, confinement=within,
            frame_bytes=frame_bytes,
        )  # fmt: skip

    def answered(self, message: Message, frame: bytes) -> None:
        """Record the Outcome that the server's response tells. Raises TraceInvalid."""
        result = message.result
        if message.error is not None:
            # Servers answer a cancelled request with an error, so this is how cancelling looks.
            code = "mcp.cancelled" if self.cancelled else "mcp.error"
            self.failed(ToolFailed("The server answered with an error.", code=code))
        elif isinstance(result, Mapping) and result.get("isError") not in (None, False):
            self.failed(ToolFailed("The tool reported an error.", code="mcp.tool_error"))
        else:
            try:
                self.pipeline.settle(self.admitted, self._outcome(frame))
            finally:
                self.context.__exit__(None, None, None)

    def failed(self, error: Error) -> None:
        """Record that there is no Outcome. Raises TraceInvalid."""
        self.context.__exit__(type(error), error, None)

    def _outcome(self, frame: bytes) -> Outcome:
        """Keep the response as the server wrote it; of a long one the beginning and a digest."""
        cut = len(frame) > _KEPT_BYTES
        digest = hashlib.sha256(frame).hexdigest() if cut else ""
        return Outcome(
            call=self.admitted.call.id,
            value={"bytes": len(frame), "sha256": digest} if cut else None,
            stdout=frame[:_KEPT_BYTES],
            truncated=cut,
            usage=Usage(wall_ms=int((time.monotonic() - self.started) * 1000)),
            confinement=self.confinement,
        )


class OpenRequests:
    """The client's requests without an answer. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # None: held while it is judged, so that a server that guesses ids cannot answer it.
        self._open: dict[Id, OpenCall | Id | None] = {}
        self._cancelled: OrderedDict[Id, OpenCall | None] = OrderedDict()
        self._open_bytes = self._cancelled_bytes = 0
        self._ended = False

    def hold(self, number: Id) -> None:
        """Take an id. Raises ProtocolError ``mcp.id_reused`` or ``mcp.too_many_open``."""
        with self._lock:
            if number in self._open or number in self._cancelled:
                raise ProtocolError("Refused: this id is in use.", code="mcp.id_reused")
            if len(self._open) >= _OPEN_MAX or self._open_bytes >= _HELD_BYTES_MAX:
                raise ProtocolError(
                    f"Refused: {len(self._open)} requests have no answer yet.",
                    code="mcp.too_many_open",
                )
            self._open[number] = None

    def release(self, number: Id) -> None:
        """Give back an id that we answer ourselves."""
        with self._lock:
            self._open.pop(number, None)

    def forwarding(self, number: Id, call: OpenCall | None) -> bool:
        """Let the server answer this id from now on; False when the session has ended."""
        with self._lock:
            if self._ended:
                return False
            self._open[number] = number if call is None else call
            self._open_bytes += _size(call)
            return True

    def take(self, number: Id) -> tuple[bool, OpenCall | None]:
        """Return whether a response with this id was asked for, and the Call it ends."""
        with self._lock:
            if number in self._cancelled:
                call = self._cancelled.pop(number)
                self._cancelled_bytes -= _size(call)
                return True, call
            return self._taken(number)

    def cancel(self, number: Id) -> list[OpenCall]:
        """Note that the client waits no longer; id and Call stay open, as an answer may come.

        Returns Calls to close: those cancelled longest ago, where too many have no answer.
        """
        with self._lock:
            asked, call = self._taken(number)
            if not asked:
                return []
            if call is not None:
                call.cancelled = True
            self._cancelled[number] = call
            self._cancelled_bytes += _size(call)
            forgotten: list[OpenCall | None] = []
            while len(self._cancelled) > _CANCELLED_MAX or self._cancelled_bytes > _HELD_BYTES_MAX:
                # From here on its answer is dropped as one that nothing asked for.
                forgotten.append(self._cancelled.popitem(last=False)[1])
                self._cancelled_bytes -= _size(forgotten[-1])
            return [call for call in forgotten if call is not None]

    def _taken(self, number: Id) -> tuple[bool, OpenCall | None]:
        found = self._open.get(number)
        if found is None:
            return False, None
        del self._open[number]
        call = found if isinstance(found, OpenCall) else None
        self._open_bytes -= _size(call)
        return True, call

    def end(self) -> tuple[dict[Id, OpenCall | None], list[OpenCall]]:
        """Take everything that is still open, and the Calls that were cancelled.

        Nothing can be opened any more, and no response is taken for asked.
        """
        with self._lock:
            self._ended = True
            taken, self._open = self._open, {}
            cancelled = [call for call in self._cancelled.values() if call is not None]
            self._cancelled.clear()
        still_open = {
            number: found if isinstance(found, OpenCall) else None
            for number, found in taken.items()
            if found is not None
        }
        return still_open, cancelled


def _size(call: OpenCall | None) -> int:
    return 0 if call is None else call.frame_bytes


def _bad(what: str) -> ProtocolError:
    return ProtocolError(f"Refused: {what}.", code="mcp.params")
