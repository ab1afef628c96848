"""``safeconduct witness``: cosign other people's logs, so that nobody can fork or shorten them.

A witness is worth something to others only where the log's operator has no say: on another
machine, under another account. Run under the operator's own, its name must say so.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from safeconduct.attestation.cosignature import CosigningKey
from safeconduct.attestation.note import VerifierKey
from safeconduct.attestation.verify.trust import speaks_for
from safeconduct.attestation.witness.desk import Witness
from safeconduct.attestation.witness.keyfile import load_witness_key, write_witness_key
from safeconduct.attestation.witness.server import WitnessServer
from safeconduct.attestation.witness.state import WitnessState
from safeconduct.errors import Exit, TraceInvalid
from safeconduct.runtime.places import Places

from .places import refuse_inside_sandbox
from .source import UsageError, read_file
from .terminal import print_line, tell

# LIMIT: log keys of one witness.
_LOGS_MAX = 1000
_LINE_BYTES_MAX = 4096
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]{2,64}\]|[A-Za-z0-9.-]{1,253}):([0-9]{1,5})")
_LOOPBACK = ("127.", "[::1]", "localhost")


def witness(
    listen: Annotated[
        str, typer.Option("--listen", help="HOST:PORT to serve HTTP on; port 0 takes a free one.")
    ],
    state: Annotated[
        Path, typer.Option("--state", help="The folder of what it cosigned. Never lose it.")
    ],
    key: Annotated[Path, typer.Option("--key", help="The witness's private key file.")],
    log: Annotated[
        list[str], typer.Option("--log", help="The key line of a log to watch. Repeatable.")
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", help="Make a new key with this name, such as example.net/witness."),
    ] = None,
) -> int:
    """Serve a C2SP tlog-witness until it is ended with Ctrl-C or SIGTERM.

    It cosigns a log's checkpoint only if that extends every one it cosigned before, and keeps
    what contradicts them. It serves plain HTTP: put a reverse proxy with TLS before it.
    """
    refuse_inside_sandbox("witness")
    host, port = _address(listen)
    logs = _logs(log)
    # The name is judged before a key is made with it, and again as the key file has it.
    signing = load_witness_key(key) if name is None else _made(key, name, logs)
    _refuse_hidden_operator(signing, logs, key)
    _harden()
    kept = WitnessState(state)
    try:
        server = WitnessServer(Witness(signing, logs, kept))
        asyncio.run(_serve(server, host, port, signing))
    except OSError as error:
        raise UsageError(
            f"{listen} cannot be listened on: {error.strerror}", hint="choose another --listen"
        ) from error
    finally:
        kept.close()
    return Exit.OK


async def _serve(server: WitnessServer, host: str, port: int, key: CosigningKey) -> None:
    ended = asyncio.Event()
    for one in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(one, ended.set)
    bound = await server.start(host.strip("[]"), port)
    print_line(f"witness {key.verifier.line}")
    print_line(f"listening on http://{host}:{bound}")
    _flush()
    if not host.startswith(_LOOPBACK):
        tell("this is plain HTTP", "put a reverse proxy with TLS before it")
    try:
        await ended.wait()
    finally:
        await server.close()


def _flush() -> None:
    """Hand over the port at once to whoever reads it from a pipe."""
    print(end="", flush=True)


def _address(listen: str) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(listen)
    if found is None or int(found[2]) > 65535:
        raise UsageError(
            f"--listen {listen} is no HOST:PORT", hint="write for example --listen 127.0.0.1:8479"
        )
    return found[1], int(found[2])


def _logs(lines: Sequence[str]) -> list[VerifierKey]:
    if len(lines) > _LOGS_MAX:
        raise UsageError(f"{len(lines)} logs are too many", hint=f"watch at most {_LOGS_MAX}")
    try:
        return [VerifierKey.parse(line.strip()) for line in lines]
    except TraceInvalid as error:
        raise UsageError(
            f"a --log line is wrong: {error.message}",
            code=error.code,
            hint="the log's operator prints it with `safeconduct keys show`",
        ) from error


def _made(path: Path, name: str, logs: Sequence[VerifierKey]) -> CosigningKey:
    try:
        _refuse_hidden_operator(CosigningKey(name, bytes(32)), logs, path)
        return write_witness_key(path, name)
    except TraceInvalid as error:
        raise UsageError(error.message, code=error.code, hint=error.hint) from error


def _refuse_hidden_operator(key: CosigningKey, logs: Sequence[VerifierKey], path: Path) -> None:
    """Refuse to vouch for this account's own log under a name that looks like somebody else's."""
    if any(key.verifier.public == log.public for log in logs):
        raise TraceInvalid(
            "the witness's key is a log's own key",
            code="witness.operator",
            hint="make one of its own with --name",
        )
    watched = {log.public for log in logs}
    # The name in a --log line may be any: a verifier goes by the one the operator hands out.
    for own in _own_log_keys(path):
        if own.public in watched and not speaks_for(own.name, key.name):
            raise TraceInvalid(
                f"this account holds the key of the log {own.name}: its witness would vouch for"
                " itself",
                code="witness.operator",
                hint=f"run it under another account, or name its key {own.name}/witness:"
                " verifiers then know that it adds no trust",
            )


def _own_log_keys(path: Path) -> list[VerifierKey]:
    """Return the log keys of this account: its own, and those beside the witness's key file."""
    files = [Places.of(os.environ).public_key, *sorted(path.absolute().parent.glob("*.pub"))[:100]]
    found: list[VerifierKey] = []
    for file in files:
        try:
            line = read_file(file, _LINE_BYTES_MAX).decode("ascii").strip()
            found.append(VerifierKey.parse(line))
        except (UsageError, TraceInvalid, UnicodeDecodeError, OSError):
            continue  # no key of a log
    return found


def _harden() -> None:
    from safeconduct.attestation.signing.signer_process import harden

    harden()
