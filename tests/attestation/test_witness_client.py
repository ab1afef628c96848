"""Asking a witness that may be anybody: only a true cosignature is taken, in bounded time."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from safeconduct.attestation.note import VerifierKey
from safeconduct.attestation.witness.client import Answered, Asked, Endpoint, ask
from safeconduct.errors import TraceInvalid

from .witness_kit import (  # noqa: TID251 - the tests' own kit
    ALICE,
    NOW,
    OTHER_WITNESS,
    STRANGER,
    WITNESS,
    Desk,
    Log,
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


def ask_at(
    port: int,
    log: Log,
    *,
    old_size: int = 0,
    timeout_s: float = 10.0,
    keys: tuple[VerifierKey, ...] = (ALICE.verifier,),
) -> Asked:
    return ask(
        Endpoint.of(WITNESS.verifier, f"http://127.0.0.1:{port}/"),
        log.note(),
        old_size=old_size,
        tree=log.tiles,
        log_keys=keys,
        timeout_s=timeout_s,
    )


def test_the_size_a_witness_holds_is_learned_from_it(log: Log, desk: Desk) -> None:
    with served(desk.witness) as port:
        for old_size, growth in ((0, 3), (0, 300), (99, 1), (10**9, 0)):
            asked = ask_at(port, log, old_size=old_size)
            assert (asked.answered, asked.size) == (Answered.COSIGNED, log.tiles.size), asked
            assert asked.cosignature is not None
            log.grow(growth)


def test_a_log_that_was_put_back_learns_it_with_evidence(
    log: Log, desk: Desk, tmp_path: Path
) -> None:
    backup = log.fork(tmp_path / "backup")
    log.grow(4)
    with served(desk.witness) as port:
        assert ask_at(port, log).answered is Answered.COSIGNED
        asked = ask_at(port, backup)
    assert (asked.answered, asked.size, asked.cosignature) == (Answered.AHEAD, 9, None)
    assert log.head().text().encode() in asked.evidence


def test_a_forked_log_learns_it_with_evidence(log: Log, desk: Desk, tmp_path: Path) -> None:
    other = log.fork(tmp_path / "fork")
    log.grow(4, salt="truth")
    other.grow(4, salt="lie")
    with served(desk.witness) as port:
        assert ask_at(port, log).answered is Answered.COSIGNED
        for _ in range(2):
            asked = ask_at(port, other)
            assert asked.answered is Answered.FORK
            assert log.head(9).text().encode() in asked.evidence
            other.grow(4, salt="lie")  # of the same size first, then a longer one


def test_a_witness_that_does_not_know_the_log(log: Log, tmp_path: Path) -> None:
    desk = Desk(tmp_path / "state", keys=(STRANGER,))
    with served(desk.witness) as port:
        asked = ask_at(port, log)
    assert (asked.answered, asked.cosignature) == (Answered.REFUSED, None)
    assert asked.why.startswith("HTTP 403")


def test_nobody_is_there(log: Log) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert ask_at(port, log).answered is Answered.UNREACHABLE


def read_request(channel: socket.socket) -> bool:
    """Read one whole request: what is left unread at a close would take the answer away."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = channel.recv(65536)
        if not part:
            return False
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += channel.recv(65536)
    return True


@contextmanager
def impostor(*answers: bytes | Callable[[socket.socket], None]) -> Generator[int]:
    """Answer request after request with these bytes, one connection after another."""
    left = list(answers)

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                channel, _ = listener.accept()
                with channel, suppress(OSError):
                    while left and read_request(channel):
                        answer = left.pop(0)
                        if callable(answer):
                            answer(channel)
                        else:
                            channel.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def answer(status: int, body: bytes, kind: str = "text/plain") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_only_a_true_cosignature_by_the_right_key_is_taken(log: Log, tmp_path: Path) -> None:
    text = log.head().text()
    other = Log(tmp_path / "other", origin="example.org/alice/other")
    other.grow(5)
    good = WITNESS.sign(text, time=NOW).line
    false = {
        "of another key": OTHER_WITNESS.sign(text, time=NOW).line,
        "of another log": WITNESS.sign(other.head().text(), time=NOW).line,
        "of another head of this log": WITNESS.sign(log.head(4).text(), time=NOW).line,
        "without a time": WITNESS.sign(text, time=0).line,
        "the log's own": ALICE.sign(text),
        "cut off": good[:-1],
        "nothing": "",
        "prose": "ok\n",
        "a note": log.note().decode(),
        "an escape": good + "\x1b[2J\n",
        "a false one": good[:-10] + ("A" if good[-10] != "A" else "B") + good[-9:],
    }
    for what, body in false.items():
        with impostor(answer(200, body.encode())) as port:
            asked = ask_at(port, log)
        assert asked.cosignature is None, what
        assert asked.answered in (Answered.REFUSED, Answered.UNREACHABLE), what
    many = false["of another key"] + good
    with impostor(answer(200, many.encode())) as port:
        asked = ask_at(port, log)
    assert asked.cosignature is not None
    assert asked.cosignature.line == good


def test_strange_answers(log: Log) -> None:
    size = "text/x.tlog.size"
    strange: list[tuple[bytes, ...]] = [
        (b"",),
        (b"\x00" * 100,),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 5000,),
        (b"HTTP/1.1 200 OK\r\n" + b"a" * 100_000,),
        (answer(200, b"x" * 1_000_000),),
        (answer(302, b"") + b"",),
        (answer(500, b"\x1b[31m"),),
        (answer(409, b"5\n"),),
        (answer(409, b"05\n", size),),
        (answer(409, b"-1\n", size),),
        (answer(409, b"9" * 5000 + b"\n", size),),
        (answer(409, b"3\n", size), answer(409, b"2\n", size)) * 4,
        (answer(409, b"6\n", size), answer(200, b"nothing to show")),
        (answer(422, b""), answer(404, b"")),
        (answer(409, b"900\n", size), answer(200, log.note())),
    ]
    for answers in strange:
        with impostor(*answers) as port:
            asked = ask_at(port, log, timeout_s=3.0)
        assert asked.cosignature is None, answers
        assert not asked.evidence, answers
        assert asked.answered in (Answered.UNREACHABLE, Answered.REFUSED), (answers, asked)


def test_an_accusation_needs_a_head_that_our_key_signed(log: Log, tmp_path: Path) -> None:
    lies = Log(tmp_path / "lies")
    lies.grow(50, salt="lie")
    size = answer(409, b"50\n", "text/x.tlog.size")
    with impostor(size, answer(200, lies.note(key=STRANGER))) as port:
        assert ask_at(port, log).answered is Answered.REFUSED
    with impostor(size, answer(200, lies.note())) as port:
        assert ask_at(port, log).answered is Answered.AHEAD
    other = Log(tmp_path / "other", origin="example.org/alice/other")
    other.grow(50)
    with impostor(size, answer(200, other.note())) as port:
        assert ask_at(port, log).answered is Answered.REFUSED


def test_an_answer_that_drips_is_cut_at_the_deadline(log: Log) -> None:
    def drip(channel: socket.socket) -> None:
        for _ in range(1000):
            channel.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            channel.settimeout(0.02)
            with suppress(TimeoutError):
                if channel.recv(1) == b"":
                    return

    def silence(channel: socket.socket) -> None:
        channel.settimeout(15)
        channel.recv(1)

    for slow in (drip, silence):
        with impostor(slow) as port:
            began = time.monotonic()
            asked = ask_at(port, log, timeout_s=0.5)
            assert time.monotonic() - began < 5
        assert asked.answered is Answered.UNREACHABLE
        assert "time" in asked.why


def self_signed(folder: Path) -> Path:
    """Make a certificate for localhost, its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = folder / "localhost.pem"
    plain = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(plain + certificate.public_bytes(Encoding.PEM))
    return file


def test_https_asks_only_whom_its_certificate_names(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    line = WITNESS.sign(log.head().text(), time=NOW).line

    def behind_tls(channel: socket.socket) -> bool:
        with context.wrap_socket(channel, server_side=True) as inner:
            read_request(inner)
            inner.sendall(answer(200, line.encode()))
        return True

    def asked(host: str) -> Asked:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve() -> None:
                with suppress(OSError):
                    behind_tls(listener.accept()[0])

            thread = Thread(target=serve, daemon=True)
            thread.start()
            port: int = listener.getsockname()[1]
            endpoint = Endpoint.of(WITNESS.verifier, f"https://{host}:{port}/prefix/")
            assert (endpoint.secure, endpoint.prefix) == (True, "/prefix")
            found = ask(
                endpoint,
                log.note(),
                old_size=0,
                tree=log.tiles,
                log_keys=[ALICE.verifier],
                timeout_s=5.0,
            )
            thread.join(10)
        return found

    assert "certificate verify failed" in asked("localhost").why
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    assert asked("localhost").answered is Answered.COSIGNED
    assert "certificate verify failed" in asked("127.0.0.1").why


@pytest.mark.parametrize(
    "url",
    [
        "",
        "witness.example",
        "ftp://witness.example",
        "file:///etc/passwd",
        "http://",
        "http://user:secret@witness.example/",
        "http://witness.example/?q",
        "http://witness.example/#f",
        "http://witness.example:port/",
        "http://witness.example:99999/",
        "http://[::1/",
        "http://w\u00edtness.example/",
        "http://witness.example/a\nb",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(TraceInvalid) as refused:
        Endpoint.of(WITNESS.verifier, url)
    assert refused.value.code == "witness.url"
    assert "secret" not in refused.value.message
