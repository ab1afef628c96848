"""Inside Python tools: one call. Read it, run it, answer, end. All of it is confined by now.

The code that runs here can change anything in this process, this file's functions included: what
is sent is the call's own result and no more, and the supervisor reads it as hostile bytes.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import traceback
from contextlib import suppress
from typing import Any, NoReturn, cast

VERSION = 1
READY = b"+"
# LIMIT: bytes of one call; arguments were bounded to 1 MiB before they were judged.
CALL_BYTES_MAX = 4 << 20
_MESSAGE_CHARACTERS_MAX = 2000
_RUN, _FUNCTION = "<python.run>", "<tool>"


def serve(channel: int) -> NoReturn:
    """Take the one call that arrives on ``channel``, answer it and end this process."""
    os.write(channel, READY)
    reply = _answer(_receive(channel))
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    view = memoryview(len(reply).to_bytes(4, "little") + reply)
    with suppress(OSError):
        while view:
            view = view[os.write(channel, view) :]
    os._exit(0)


def _receive(channel: int) -> dict[str, Any]:
    length = int.from_bytes(_read(channel, 4), "little")
    if length > CALL_BYTES_MAX:
        os._exit(2)
    return cast("dict[str, Any]", json.loads(_read(channel, length)))


def _read(channel: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = os.read(channel, count - len(data))
        if not part:
            os._exit(0)  # nobody wants this fork any more
        data += part
    return bytes(data)


def _answer(call: dict[str, Any]) -> bytes:
    try:
        value = _run_function(call) if call["function"] else _run_code(call)
    # SystemExit and KeyboardInterrupt included: whatever the code raises is its own failure.
    except BaseException as error:
        return _failure("raised", error)
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError, MemoryError) as error:
        return _failure("result", error)
    return b'{"type":"done","value":' + text.encode("ascii") + b"}"


def _run_code(call: dict[str, Any]) -> dict[str, Any]:
    """Run a snippet: its result is the variable ``result``, or else its last expression."""
    tree = ast.parse(call["source"], _RUN)
    last: ast.Expression | None = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(cast("ast.Expr", tree.body.pop()).value)
    namespace: dict[str, Any] = {"__name__": "__main__", "input": call["input"]}
    exec(compile(tree, _RUN, "exec"), namespace)  # noqa: S102 - what this process is for
    value = eval(compile(last, _RUN, "eval"), namespace) if last else None  # noqa: S307
    return {"result": namespace.get("result", value)}


def _run_function(call: dict[str, Any]) -> object:
    namespace: dict[str, Any] = {"__name__": "__tool__"}
    exec(compile(call["source"], _FUNCTION, "exec"), namespace)  # noqa: S102 - as above
    return namespace[call["function"]](**call["input"])


def _failure(kind: str, error: BaseException) -> bytes:
    """Describe an error within a bound; its own ``__str__`` may fail or lie."""
    try:
        message = str(error)[:_MESSAGE_CHARACTERS_MAX]
    except BaseException as another:
        message = f"(its message raised {type(another).__name__})"
    line = 0
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename in (_RUN, _FUNCTION):
            line = frame.lineno or 0
    if isinstance(error, SyntaxError):
        line = error.lineno or 0
    body = {"type": kind, "error": type(error).__name__[:200], "message": message, "line": line}
    return json.dumps(body).encode("ascii")
