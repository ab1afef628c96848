"""``http.get``: one address, checked and dialled once; its answer read inside a sandbox."""

from __future__ import annotations

import http.server
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from safeconduct import Denied, Runtime, SandboxFailed, ToolFailed
from safeconduct.call import Limits, Profile
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.tools import http as tool

BIG = 3 << 20


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path, remembers who asked."""

    seen: list[str] = []  # noqa: RUF012 - one list for all requests is the point

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.send_response(302 if self.path == "/moved" else 200)
        if self.path == "/moved":
            self.send_header("Location", "http://169.254.169.254/")
        self.end_headers()
        body = b"x" * BIG if self.path == "/big" else b"hello"
        try:
            self.wfile.write(body)
        except OSError:
            return

    def log_message(self, format: str, *args: Any) -> None:  # noqa: ANN401 - its signature
        return


@pytest.fixture
def port() -> Generator[int]:
    Handler.seen.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture
def runtime(port: int, tmp_path: Path) -> Generator[Runtime]:
    (tmp_path / "ws").mkdir()
    policy = tmp_path / "policy.yaml"
    urls = f'["http://127.0.0.1:{port}/**", "https://127.0.0.1:{port}/**", "http://localhost:{port}/**"]'
    policy.write_text(f"version: 1\ntools:\n  http.get: {{allow: {{url: {urls}}}}}\n")
    state = {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}
    environment = {**os.environ, **state}
    with Runtime.from_policy(policy, workspace=tmp_path / "ws", environment=environment) as made:
        try:
            made.call("http.get", url=f"http://127.0.0.1:{port}/probe")
        except SandboxFailed as error:
            if "landlock" in error.step:
                pytest.skip(f"tier landlock cannot reach this interpreter: {error.message}")
            raise
        Handler.seen.clear()
        yield made


def test_a_granted_address_is_fetched(runtime: Runtime, port: int) -> None:
    outcome = runtime.call("http.get", url=f"http://127.0.0.1:{port}/a?b=c")
    assert isinstance(outcome.value, dict)
    assert outcome.value["status"] == 200
    assert outcome.stdout == b"hello"
    assert Handler.seen == ["/a?b=c"]


def test_a_redirect_is_shown_and_not_followed(runtime: Runtime, port: int) -> None:
    outcome = runtime.call("http.get", url=f"http://127.0.0.1:{port}/moved")
    assert isinstance(outcome.value, dict)
    assert outcome.value["status"] == 302
    assert Handler.seen == ["/moved"]


def test_a_long_answer_is_cut_and_says_so(runtime: Runtime, port: int) -> None:
    outcome = runtime.call("http.get", url=f"http://127.0.0.1:{port}/big")
    assert outcome.truncated
    assert len(outcome.stdout) == 1 << 20


def test_another_address_is_denied_before_anything_is_dialled(runtime: Runtime, port: int) -> None:
    with pytest.raises(Denied):
        runtime.call("http.get", url=f"http://127.0.0.2:{port}/")
    assert Handler.seen == []


def test_a_public_name_that_leads_to_loopback_is_refused(
    runtime: Runtime, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rebound(*_: object, **__: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    # Without the check the connection would be made: the same address by its own name is.
    assert runtime.call("http.get", url=f"http://127.0.0.1:{port}/").ok
    Handler.seen.clear()
    monkeypatch.setattr(tool.socket, "getaddrinfo", rebound)
    with pytest.raises(Denied) as refusal:
        tool._dial("rebound.example", port, 5.0)  # pyright: ignore[reportPrivateUsage]
    assert refusal.value.code == "http.private_address"
    assert Handler.seen == []


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::7f00:1",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:db8::1",
        "::127.0.0.1",
        "fec0::1",
        "4000::1",
        "100::1",
        "192.88.99.1",
        "::ffff:192.88.99.1",
        "168.63.129.16",
        "::ffff:168.63.129.16",
    ],
)
def test_no_private_address_hides_behind_a_name(address: str) -> None:
    with pytest.raises(Denied):
        tool._require_public("name.example", address)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_a_public_address_may_stand_behind_a_name(address: str) -> None:
    tool._require_public("name.example", address)  # pyright: ignore[reportPrivateUsage]


def test_a_label_no_resolver_takes_is_a_failed_call(tmp_path: Path) -> None:
    (tmp_path / "ws").mkdir()
    policy = tmp_path / "policy.yaml"
    policy.write_text('version: 1\ntools:\n  http.get: {allow: {url: ["https://**/**"]}}\n')
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}
    with (
        Runtime.from_policy(policy, workspace=tmp_path / "ws", environment=environment) as made,
        pytest.raises(ToolFailed) as failure,
    ):
        made.call("http.get", url=f"https://{'a' * 70}.example/")
    assert failure.value.code == "http.resolve"


def test_resolving_and_dialling_share_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    forever, waited = threading.Event(), list[float]()

    def never(*_: object, **__: object) -> list[object]:
        forever.wait(30)
        return []

    with monkeypatch.context() as patch:
        patch.setattr(tool.socket, "getaddrinfo", never)
        started = time.monotonic()
        with pytest.raises(ToolFailed) as failure:
            tool._dial("slow.example", 80, 0.2)  # pyright: ignore[reportPrivateUsage]
        forever.set()
    assert failure.value.code == "http.resolve"
    assert time.monotonic() - started < 5

    def silent(found: object, seconds: float) -> socket.socket:
        waited.append(seconds)
        threading.Event().wait(seconds)
        raise TimeoutError("timed out")

    def four(*_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 80))] * 4

    monkeypatch.setattr(tool.socket, "getaddrinfo", four)
    monkeypatch.setattr(tool, "_connect", silent)
    with pytest.raises(ToolFailed) as failure:
        tool._dial("silent.example", 80, 0.2)  # pyright: ignore[reportPrivateUsage]
    assert failure.value.code == "http.connect"
    assert len(waited) == 1


def test_the_worker_gets_what_is_left_of_the_wall_limit(
    runtime: Runtime, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    real_run, real_dial = NativeSandbox.run, tool._dial  # pyright: ignore[reportPrivateUsage]

    def run(self: NativeSandbox, call: str, program: Program, profile: Profile, **more: Any) -> Any:  # noqa: ANN401 - hands on
        given.append(profile.limits.wall_ms)
        return real_run(self, call, program, profile, **more)

    def dial(host: str, port: int, seconds: float) -> socket.socket:
        connection = real_dial(host, port, seconds)
        threading.Event().wait(0.3)
        return connection

    monkeypatch.setattr(NativeSandbox, "run", run)
    monkeypatch.setattr(tool, "_dial", dial)
    assert runtime.call("http.get", url=f"http://127.0.0.1:{port}/a").ok
    assert given[0] <= Limits().wall_ms - 300


def test_a_certificate_nobody_vouches_for_is_refused(
    runtime: Runtime, tmp_path: Path, port: int
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ed25519",
            "-nodes",
            "-subj",
            "/CN=127.0.0.1",
            "-days",
            "1",
            "-keyout",
            str(key),
            "-out",
            str(certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        policy = tmp_path / "tls.yaml"
        url = f"https://127.0.0.1:{server.server_address[1]}/"
        policy.write_text(f'version: 1\ntools:\n  http.get: {{allow: {{url: ["{url}**"]}}}}\n')
        environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
        with (
            Runtime.from_policy(policy, workspace=tmp_path / "ws", environment=environment) as made,
            pytest.raises(ToolFailed) as failure,
        ):
            made.call("http.get", url=url)
        assert failure.value.code == "http.protocol"
        assert "certificate" in failure.value.message.lower()
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_does_not_speak_http_is_an_error(runtime: Runtime, tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_garbage, args=(listener,), daemon=True).start()
    number = listener.getsockname()[1]
    policy = tmp_path / "garbage.yaml"
    grant = f'{{allow: {{url: ["http://127.0.0.1:{number}/**"]}}}}'
    policy.write_text(f"version: 1\ntools:\n  http.get: {grant}\n")
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    with (
        listener,
        Runtime.from_policy(policy, workspace=tmp_path / "ws", environment=environment) as made,
        pytest.raises(ToolFailed) as failure,
    ):
        made.call("http.get", url=f"http://127.0.0.1:{number}/")
    assert failure.value.code == "http.protocol"


def _garbage(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(b"\x00\x01garbage\n" * 1000)
