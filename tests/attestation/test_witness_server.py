"""The witness's HTTP service under hostile connections: it answers, refuses or drops, and lives."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path

import pytest

from safeconduct.attestation.note import Note
from safeconduct.attestation.witness.server import MAX_CONNECTIONS
from safeconduct.attestation.witness.state import origin_hash

from .witness_kit import (  # noqa: TID251 - the tests' own kit
    WITNESS,
    Desk,
    Log,
    exchange,
    served,
)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    log = Log(tmp_path / "log")
    log.grow(5)
    return log


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "state")


@pytest.fixture
def port(desk: Desk) -> Iterator[int]:
    with served(desk.witness) as port:
        yield port


def post(body: bytes, *headers: str, path: str = "/add-checkpoint") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: witness.example", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:80]
    return int(answer.split(b" ", 2)[1])


def is_dropped(channel: socket.socket) -> bool:
    try:
        return channel.recv(100) == b""
    except ConnectionError:
        return True


def test_a_log_is_cosigned_over_one_connection(log: Log, port: int) -> None:
    http = HTTPConnection("127.0.0.1", port, timeout=10)
    name = origin_hash(log.origin)
    http.request("GET", f"/{name}/checkpoint")
    assert (http.getresponse().read() != b"", http.sock is not None) == (True, True)
    for old in (0, 5, 6):
        http.request("POST", "/add-checkpoint", log.request(old))
        answer = http.getresponse()
        line = answer.read().decode()
        assert answer.status == 200
        (signature,) = Note.parse(f"{log.head().text()}\n{line}".encode()).signatures
        assert WITNESS.verifier.verified(signature, log.head().text())
        log.grow(1)
    http.request("POST", "/add-checkpoint", log.request(0))
    answer = http.getresponse()
    assert (answer.status, answer.read()) == (409, b"7\n")
    assert answer.headers["Content-Type"] == "text/x.tlog.size"
    http.request("GET", f"/{name}/checkpoint")
    assert log.head(7).text().encode() in http.getresponse().read()
    http.request("GET", f"/{name}/evidence")
    assert http.getresponse().read() == b""
    http.close()


@pytest.mark.parametrize(
    ("request_line", "expected"),
    [
        ("GET / HTTP/1.1", 404),
        ("GET /add-checkpoint HTTP/1.1", 405),
        ("DELETE /add-checkpoint HTTP/1.1", 405),
        (f"GET /{'0' * 64}/checkpoint HTTP/1.1", 404),
        (f"GET /{'0' * 64}/evidence HTTP/1.1", 404),
        (f"POST /{'0' * 64}/checkpoint HTTP/1.1", 405),
        (f"GET /{'0' * 64}/checkpoint/x HTTP/1.1", 404),
        (f"GET /{'0' * 64}/evidence/..%2f..%2fcheckpoint HTTP/1.1", 404),
        (f"GET /{'0' * 64}/../lock HTTP/1.1", 404),
        ("GET //etc/passwd HTTP/1.1", 404),
        ("GET http://witness.example/ HTTP/1.1", 400),
        ("GET / HTTP/2.0", 400),
        ("GET / HTTP/1.1 x", 400),
        ("GET  / HTTP/1.1", 400),
        ("get / HTTP/1.1", 400),
        ("GET /\x00 HTTP/1.1", 400),
        ("PRI * HTTP/2.0", 400),
        (f"GET /{'a' * 2000} HTTP/1.1", 400),
        (f"GET /{'a' * 60_000} HTTP/1.1", 431),
        ("", 400),
    ],
)
def test_request_lines(port: int, request_line: str, expected: int) -> None:
    assert status(exchange(port, f"{request_line}\r\nHost: x\r\n\r\n".encode())) == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ("Content-Length: 5\r\nContent-Length: 5", 400),
        ("Content-Length: 5\r\nTransfer-Encoding: chunked", 411),
        ("Transfer-Encoding: chunked", 411),
        ("Transfer-Encoding: identity", 411),
        ("Content-Length: +5", 400),
        ("Content-Length: 5, 5", 400),
        ("Content-Length: 0x5", 400),
        ("Content-Length: -1", 400),
        ("Content-Length: ", 400),
        ("Content-Length : 5", 400),
        ("Content-Length: 999999999", 413),
        ("Content-Length: 99999999999999999999", 400),
        ("Content-Length: 80000", 413),
        ("Expect: 200-ok\r\nContent-Length: 1", 417),
        (" folded: 1", 400),
        ("a: 1\r\n b", 400),
        ("a: 1\nb: 2", 400),
        ("a\x00: 1", 400),
        ("no colon", 400),
        ("\r\n".join(f"h{number}: x" for number in range(101)), 431),
        ("h: " + "x" * 20_000, 431),
    ],
)
def test_headers(port: int, headers: str, expected: int) -> None:
    request = f"POST /add-checkpoint HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\nold 0"
    assert status(exchange(port, request.encode())) == expected


def test_an_oversized_body_is_refused_before_it_is_read(port: int, log: Log) -> None:
    huge = b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n" + b"x" * 500_000
    try:
        answer = exchange(port, huge)
    except ConnectionError:  # the answer may be lost behind so much that is not read
        answer = b""
    assert answer == b"" or status(answer) == 413
    assert status(exchange(port, post(log.request(0)))) == 200


def test_cut_off_and_pipelined_requests(port: int, log: Log, desk: Desk) -> None:
    whole = post(log.request(0))
    for end in (0, 1, 10, len(whole) - 1):
        assert exchange(port, whole[:end]) == b""
    assert desk.state.count == 0
    second = post(log.request(5))
    answers = exchange(port, whole + second + post(b"x", "Connection: close"))
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert answers.count(b"HTTP/1.1 400 ") == 1
    assert exchange(port, b"GET / HTTP/1.0\r\n\r\n" * 2).count(b"HTTP/1.1 404") == 1


def test_a_client_may_wait_for_continue(port: int, log: Log) -> None:
    body = log.request(0)
    head = post(body, "Expect: 100-continue", "Connection: close")[: -len(body)]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as channel:
        channel.sendall(head)
        assert channel.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        channel.sendall(body)
        assert status(channel.recv(4096)) == 200


def test_slow_loris_keeps_nobody_out(port: int, log: Log) -> None:
    """More connections than there is room for, each with half a request that never ends."""
    held: list[socket.socket] = []
    try:
        for _ in range(MAX_CONNECTIONS + 40):
            channel = socket.create_connection(("127.0.0.1", port), timeout=10)
            channel.sendall(b"POST /add-checkpoint HTTP/1.1\r\nX: ")
            held.append(channel)
        began = time.monotonic()
        assert status(exchange(port, post(log.request(0), "Connection: close"))) == 200
        assert time.monotonic() - began < 10
        # The first ones were dropped for the later ones.
        assert is_dropped(held[0])
    finally:
        for channel in held:
            channel.close()


def drip(channel: socket.socket, data: bytes) -> None:
    """Send a byte at a time, one each 20 ms, until something comes back."""
    with suppress(ConnectionError):
        for at in range(len(data)):
            channel.sendall(data[at : at + 1])
            with suppress(TimeoutError):
                channel.recv(4096)
                return


def test_a_request_that_drips_is_cut(desk: Desk, log: Log) -> None:
    whole = post(log.request(0))
    with served(desk.witness, request_timeout_s=0.3) as port:
        for begun in (b"P", whole[:-1]):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as channel:
                channel.sendall(begun)
                answer = channel.recv(4096)
                assert answer == b"" or status(answer) == 408
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout=0.02) as channel:
            drip(channel, whole[:-1])
        assert time.monotonic() - began < 5
        assert desk.state.count == 0
        assert status(exchange(port, whole)) == 200


def test_noise_does_not_end_the_service(port: int, log: Log) -> None:
    dice = random.Random(3)  # noqa: S311 - noise, no secret
    good = post(log.request(0))
    for number in range(150):
        noise = bytearray(good if number % 2 else dice.randbytes(dice.randrange(200)))
        for _ in range(dice.randrange(1, 6)):
            if noise:
                noise[dice.randrange(len(noise))] = dice.randrange(256)
        try:
            answer = exchange(port, bytes(noise))
        except ConnectionError:
            continue
        assert answer == b"" or status(answer) in (
            200,
            400,
            403,
            404,
            405,
            408,
            409,
            411,
            413,
            417,
            422,
            431,
        )
    assert status(exchange(port, post(log.request(5)))) in (200, 409)


def test_evidence_can_be_fetched(port: int, log: Log, tmp_path: Path) -> None:
    other = log.fork(tmp_path / "fork")
    log.grow(1, salt="truth")
    other.grow(1, salt="lie")
    assert status(exchange(port, post(log.request(0)))) == 200
    assert status(exchange(port, post(other.request(6)))) == 422
    name = origin_hash(log.origin)
    listed = exchange(port, f"GET /{name}/evidence HTTP/1.0\r\n\r\n".encode()).split(b"\r\n\r\n")[1]
    piece = listed.decode().strip()
    assert piece.startswith("fork-")
    found = exchange(port, f"GET /{name}/evidence/{piece} HTTP/1.0\r\n\r\n".encode())
    assert log.head().text().encode() in found
    assert other.head().text().encode() in found
    gone = f"GET /{name}/evidence/fork-{'0' * 32} HTTP/1.0\r\n\r\n"
    assert status(exchange(port, gone.encode())) == 404
