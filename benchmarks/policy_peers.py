"""The peers of bench_decision, each ready to be asked: OPA's server, Rego in process, Cedar.

A peer that is not installed is named with the reason, and never counted. Each is given its policy
and its input ready-made, so only the question and the answer are timed.
"""

from __future__ import annotations

import http.client
import importlib
import json
import os
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safeconduct.call import Document

from .decision_policies import Item
from .opa_wasm import WasmPolicy
from .peer_policies import REGO_PACKAGE, cedar_request, rego_input, to_cedar, to_rego

# Answers `allow`, `ask` or `deny`.
Asked = Callable[[], str]
# LIMIT: how long a server may take until it answers.
_START_S = 20.0
_BUILT = Path(__file__).parents[1] / "build" / "peers" / "opa"


class Missing(Exception):
    """A peer cannot be run here; the text says why."""


@dataclass(slots=True, kw_only=True)
class Peers:
    """The questions of each peer, one for each Document, and why others are missing."""

    asked: dict[str, list[Asked]] = field(default_factory=dict[str, "list[Asked]"])
    missing: dict[str, str] = field(default_factory=dict[str, str])


@contextmanager
def peers(rules: Sequence[Item], documents: Sequence[Document], folder: Path) -> Generator[Peers]:
    """Start every peer that there is; ``folder`` takes their files. Ends what it started."""
    found = Peers()
    workspace = documents[0].workspace
    rego = folder / "policy.rego"
    rego.write_text(to_rego(rules, workspace))
    with ExitStack() as stack:
        makers: dict[str, Callable[[], list[Asked]]] = {
            "opa_server": lambda: _opa_server(stack, rego, documents),
            "opa_wasm": lambda: _opa_wasm(rego, documents),
            "regopy": lambda: _regopy(rego, documents),
            "cedarpy": lambda: _cedar(rules, documents),
        }
        for name, make in makers.items():
            try:
                found.asked[name] = make()
            except (Missing, ImportError) as error:
                found.missing[name] = str(error)
        yield found


def _opa() -> str:
    for candidate in (os.environ.get("OPA"), str(_BUILT), shutil.which("opa")):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise Missing("no opa: run `make peers`, which needs Go, or set OPA")


def _opa_server(stack: ExitStack, rego: Path, documents: Sequence[Document]) -> list[Asked]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [_opa(), "run", "--server", "--addr", f"127.0.0.1:{port}", "--log-level", "error"]
    command += ["--disable-telemetry", str(rego)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(server.wait)
    stack.callback(server.terminate)
    # http.client is the leanest client with a kept connection: what is left is the server.
    connection = http.client.HTTPConnection("127.0.0.1", port)
    stack.callback(connection.close)
    _wait(server, connection)
    path, headers = f"/v1/data/{REGO_PACKAGE}/verdict", {"Content-Type": "application/json"}

    def ask(body: bytes) -> Asked:
        def asked() -> str:
            connection.request("POST", path, body, headers)
            return str(json.loads(connection.getresponse().read())["result"])

        return asked

    return [ask(json.dumps({"input": rego_input(one)}).encode()) for one in documents]


def _wait(server: subprocess.Popen[bytes], connection: http.client.HTTPConnection) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if server.poll() is not None:
            raise Missing(f"opa ended with {server.returncode}")
        try:
            connection.request("GET", "/health")
            connection.getresponse().read()
            return
        except ConnectionError:
            connection.close()
            time.sleep(0.05)
    raise Missing("opa did not answer")


def _opa_wasm(rego: Path, documents: Sequence[Document]) -> list[Asked]:
    bundle = rego.with_name("bundle.tar.gz")
    entry = f"{REGO_PACKAGE}/verdict"
    command = [_opa(), "build", "-t", "wasm", "-e", entry, "-o", str(bundle), str(rego)]
    subprocess.run(command, check=True, capture_output=True)
    with tarfile.open(bundle) as archive:
        member = archive.extractfile("/policy.wasm")
        if member is None:
            raise Missing("opa built no wasm")
        policy = WasmPolicy(member.read())

    def ask(body: bytes) -> Asked:
        return lambda: str(json.loads(policy.evaluate(body))[0]["result"])

    return [ask(json.dumps(rego_input(one)).encode()) for one in documents]


def _regopy(rego: Path, documents: Sequence[Document]) -> list[Asked]:
    # The package has no types.
    engine: Any = importlib.import_module("regopy").Interpreter()
    engine.add_module(rego.name, rego.read_text())
    entry = f"{REGO_PACKAGE}/verdict"
    bundle = engine.build(None, [entry])

    def ask(document: Document) -> Asked:
        value = json.loads(json.dumps(rego_input(document)))

        def asked() -> str:
            engine.set_input(value)
            output = engine.query_bundle_entrypoint(bundle, entry)
            return str(json.loads(str(output))["expressions"][0])

        return asked

    return [ask(document) for document in documents]


def _cedar(rules: Sequence[Item], documents: Sequence[Document]) -> list[Asked]:
    # Half of its types are unknown to a strict checker.
    cedarpy: Any = importlib.import_module("cedarpy")
    workspace = documents[0].workspace
    policies = cedarpy.PolicySet.from_str(to_cedar(rules, workspace))
    entities = cedarpy.Entities.from_json_str("[]")
    asking = frozenset(f"policy{at}" for at, rule in enumerate(rules) if rule.effect == "ask")

    def ask(document: Document) -> Asked:
        request = cedar_request(document)

        def asked() -> str:
            result = cedarpy.is_authorized(request, policies, entities)
            if not result.allowed:
                return "deny"
            return "allow" if asking.isdisjoint(result.diagnostics.reasons) else "ask"

        return asked

    return [ask(document) for document in documents]
