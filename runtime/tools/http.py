"""Step "execute": ``http.get``, one request to the one address that was checked.

The supervisor resolves and dials, so the address checked is the address used (no rebinding), and
hands the connected socket to a worker in a sandbox that can make no socket of its own. TLS and
HTTP, the parts that read hostile bytes, happen there. No redirect is followed: the caller sees it
and may make it a Call of its own, which is judged again.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import time
from dataclasses import replace
from typing import cast
from urllib.parse import urlsplit

from safeconduct.call import Json, Outcome, Profile
from safeconduct.errors import Denied, ToolFailed
from safeconduct.runtime.sandbox.interpreter import base_grants, interpreter
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.shield import Shield

from . import http_worker
from .task import Task

_CONNECT_SECONDS_MAX = 10.0
# LIMIT: addresses of one name that are tried.
_ADDRESSES_MAX = 4
_HEAD_BYTES_MAX = 64 << 10

# IPv6 addresses that carry an IPv4 one, which may be private: NAT64 (RFC 6052, 8215), 6to4.
_TUNNELS = tuple(
    ipaddress.ip_network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16")
)


def get(task: Task, sandbox: NativeSandbox) -> Outcome:
    """Fetch the judged URL: ``value`` holds status and headers, ``stdout`` the body.

    Raises Denied where a name leads to an address that needs a grant of its own, and ToolFailed
    where the server cannot be reached or does not speak HTTP.
    """
    url = urlsplit(str(task.document.arguments["url"]))
    host, port = str(url.hostname), url.port or (443 if url.scheme == "https" else 80)
    seconds = min(_CONNECT_SECONDS_MAX, task.profile.limits.wall_ms / 1000)
    with _dial(host, port, seconds) as connection:
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        script = os.path.realpath(http_worker.__file__)
        program = Program(
            argv=[*interpreter(), script, url.scheme, host, url.netloc, target],
            cwd="/",
            descriptors=[connection.fileno()],
        )
        limits = replace(
            task.profile.limits, output_bytes=task.profile.limits.output_bytes + _HEAD_BYTES_MAX
        )
        profile = Profile(name=task.profile.name, read=(*base_grants(), script), limits=limits)
        outcome = sandbox.run(
            task.call, program, profile, workspace=task.document.workspace, shield=Shield()
        )
    return _answer(outcome, task.profile.limits.output_bytes)


def _dial(host: str, port: int, seconds: float) -> socket.socket:
    """Connect to the first address of ``host`` that may be used; the rest are not tried blindly."""
    deadline = time.monotonic() + seconds
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ToolFailed(f"{host} cannot be resolved: {error}.", code="http.resolve") from error
    reason: OSError | None = None
    for family, kind, protocol, _, address in found[:_ADDRESSES_MAX]:
        _require_public(host, str(address[0]))
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            reason = error
            continue
        connection.settimeout(None)
        return connection
    raise ToolFailed(f"{host} port {port} cannot be reached: {reason}.", code="http.connect")


def _require_public(host: str, address: str) -> None:
    """Refuse a private, loopback, link-local or metadata address behind a public name.

    An address that the URL itself spells out, and ``localhost``, were granted by name: the URL
    matcher covers them with no wildcard.
    """
    bare = ipaddress.ip_address(address.split("%")[0])
    mapped = getattr(bare, "ipv4_mapped", None) or bare
    spelled = host.strip("[]")
    if spelled in (address, str(bare)):
        return
    if spelled == "localhost" and mapped.is_loopback:
        return
    tunnelled = any(bare in network for network in _TUNNELS if network.version == bare.version)
    if not mapped.is_global or mapped.is_multicast or tunnelled:
        raise Denied(
            f"{host} leads to {address}, which is not a public address.",
            code="http.private_address",
        )


def _answer(outcome: Outcome, limit: int) -> Outcome:
    """Split what the worker wrote: one line of JSON, then the body. All of it is hostile."""
    head, newline, body = outcome.stdout.partition(b"\n")
    if outcome.limit is not None:
        return replace(outcome, stdout=b"")
    if not outcome.ok or not newline or len(head) > _HEAD_BYTES_MAX:
        text = ascii(outcome.stderr[-200:].decode(errors="replace"))
        raise ToolFailed(f"The server's answer could not be read: {text}", code="http.protocol")
    try:
        parsed = cast("Json", json.loads(head))
    except ValueError as error:
        raise ToolFailed("The worker's answer is unreadable.", code="http.protocol") from error
    cut = outcome.truncated or len(body) > limit
    return replace(outcome, value=parsed, stdout=body[:limit], stderr=b"", truncated=cut)
