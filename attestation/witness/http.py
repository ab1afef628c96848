"""Witness step 1: one HTTP/1.1 request, read strictly and bounded (RFC 9112).

Small enough to be looked at whole: no chunked bodies, no folded headers, no second length.
"""

from __future__ import annotations

import re
from asyncio import IncompleteReadError, LimitOverrunError, StreamReader
from dataclasses import dataclass

from .desk import Answer

# LIMIT: request line and headers together.
MAX_HEAD_BYTES = 16 << 10
_MAX_HEADERS = 100
_REQUEST = re.compile(rb"([A-Z]{1,16}) (/[!-~]{0,1023}) HTTP/1\.([01])")
# A name, then no space before the colon: what proxies read differently is refused (RFC 9112 §5.1).
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_LENGTH = re.compile(rb"[0-9]{1,9}")
_REASONS = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    417: "Expectation Failed",
    422: "Unprocessable Entity",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Bad(Exception):
    """A request that gets this answer, after which the connection ends."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.answer = Answer(status=status, body=f"{why}\n".encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. ``again`` tells whether the connection stays open for another."""

    method: str
    target: str
    body: bytes
    again: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The request line and what counts of the headers."""

    method: str
    target: str
    length: int
    again: bool
    expects: bool


async def read_head(reader: StreamReader, *, max_body_bytes: int) -> Head | None:
    """Read up to the empty line; None at the end of input. Raise Bad."""
    try:
        data = await reader.readuntil(b"\r\n\r\n")
    except IncompleteReadError:
        return None
    except LimitOverrunError as error:
        raise Bad(431, "the headers are too large") from error
    lines = data[:-4].split(b"\r\n")
    found = _REQUEST.fullmatch(lines[0])
    if found is None:
        raise Bad(400, "the request line cannot be read")
    headers = _headers(lines[1:])
    if b"transfer-encoding" in headers:
        raise Bad(411, "send a Content-Length")
    length = _length(headers.get(b"content-length", [b"0"]))
    if length > max_body_bytes:
        raise Bad(413, f"a request has at most {max_body_bytes} bytes")
    expected = headers.get(b"expect", [])
    if expected and [one.lower() for one in expected] != [b"100-continue"]:
        raise Bad(417, "only 100-continue can be expected")
    wishes = b",".join(headers.get(b"connection", [])).lower()
    return Head(
        method=found[1].decode(),
        target=found[2].decode(),
        length=length,
        again=found[3] == b"1" and b"close" not in wishes,
        expects=bool(expected),
    )


async def read_body(reader: StreamReader, head: Head) -> Request | None:
    """Read the body that a head announces; None where it is cut off."""
    try:
        body = await reader.readexactly(head.length)
    except IncompleteReadError:
        return None
    return Request(method=head.method, target=head.target, body=body, again=head.again)


def encode_answer(answer: Answer, *, again: bool) -> bytes:
    """Return an answer as bytes on the wire."""
    head = (
        f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}\r\n"
        f"Content-Type: {answer.kind}\r\n"
        f"Content-Length: {len(answer.body)}\r\n"
        f"X-Content-Type-Options: nosniff\r\n"
        f"Connection: {'keep-alive' if again else 'close'}\r\n\r\n"
    )
    return head.encode("ascii") + answer.body


def _headers(lines: list[bytes]) -> dict[bytes, list[bytes]]:
    if len(lines) > _MAX_HEADERS:
        raise Bad(431, "there are too many headers")
    headers: dict[bytes, list[bytes]] = {}
    for line in lines:
        found = _HEADER.fullmatch(line)
        if found is None:
            raise Bad(400, "a header cannot be read")
        headers.setdefault(found[1].lower(), []).append(found[2].strip(b" \t"))
    return headers


def _length(values: list[bytes]) -> int:
    if len(values) != 1 or _LENGTH.fullmatch(values[0]) is None:
        raise Bad(400, "the Content-Length cannot be read")
    return int(values[0])
