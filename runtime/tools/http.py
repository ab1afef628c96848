"""Step "execute": ``http.get``, one request to the one address that was checked.

The supervisor resolves and dials, so the address checked is the address used (no rebinding), and
hands the connected socket to a worker in a sandbox that can make no socket of its own. TLS and
HTTP, the parts that read hostile bytes, happen there. No redirect is followed: the caller sees it
and may make it a Call of its own, which is judged again. The wall limit holds for all of it: the
worker gets what resolving and dialling have left.
"""

from __future__ import annotations

import ipaddress
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, TypeAlias
from urllib.parse import urlsplit

import msgspec

from safeconduct.call import Json, Outcome, Profile
from safeconduct.errors import Denied, LimitExceeded, ToolFailed
from safeconduct.runtime.sandbox.interpreter import base_grants, interpreter
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.shield import Shield

from . import http_worker
from .task import Task

# LIMIT: resolving and dialling together, or the wall limit where that is shorter.
_CONNECT_SECONDS_MAX = 10.0
# LIMIT: addresses of one name that are tried.
_ADDRESSES_MAX = 4
_HEAD_BYTES_MAX = 64 << 10

# All of the IPv6 space that is given out for public use (RFC 4291 section 2.4 and IANA's registry);
# NAT64 (RFC 6052, 8215), mapped and site-local addresses lie outside of it.
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
# Within it, addresses that carry an IPv4 one, which may be private: Teredo (RFC 4380), 6to4.
_TUNNELS_IPV6 = (ipaddress.IPv6Network("2001::/32"), ipaddress.IPv6Network("2002::/16"))
# The anycast address of 6to4 relays (RFC 7526) leads to whoever says that it is one.
_RELAYS_IPV4 = ipaddress.IPv4Network("192.88.99.0/24")
# The host of a virtual machine on Azure, with its state and secrets: public by its number alone.
# https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
_HOST_OF_AZURE = ipaddress.IPv4Address("168.63.129.16")

# What getaddrinfo(3) gives for one address; the address itself differs by family.
_Found: TypeAlias = (
    "tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str | int | bytes, ...]]"
)


class _Head(msgspec.Struct, forbid_unknown_fields=True):
    """What the worker says of an answer before its body. No more of it is believed, RFC 9110."""

    status: Annotated[int, msgspec.Meta(ge=100, le=999)]
    headers: list[tuple[str, str]]


_heads: msgspec.json.Decoder[_Head] = msgspec.json.Decoder(_Head)


def get(task: Task, sandbox: NativeSandbox) -> Outcome:
    """Fetch the judged URL: ``value`` holds status and headers, ``stdout`` the body.

    Raises Denied where a name leads to an address that needs a grant of its own, ToolFailed where
    the server cannot be reached or does not speak HTTP, and LimitExceeded where reaching it took
    the whole wall limit.
    """
    started = time.monotonic()
    wall_ms = task.profile.limits.wall_ms
    url = urlsplit(str(task.document.arguments["url"]))
    host, port = str(url.hostname), url.port or (443 if url.scheme == "https" else 80)
    with _dial(host, port, min(_CONNECT_SECONDS_MAX, wall_ms / 1000)) as connection:
        left_ms = wall_ms - int((time.monotonic() - started) * 1000)
        if left_ms <= 0:
            raise LimitExceeded(f"Reaching {host} took the whole wall limit.", limit="wall")
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        script = os.path.realpath(http_worker.__file__)
        program = Program(
            argv=[*interpreter(), script, url.scheme, host, url.netloc, target],
            cwd="/",
            descriptors=[connection.fileno()],
        )
        output_bytes = task.profile.limits.output_bytes + _HEAD_BYTES_MAX
        limits = replace(task.profile.limits, wall_ms=left_ms, output_bytes=output_bytes)
        profile = Profile(name=task.profile.name, read=(*base_grants(), script), limits=limits)
        outcome = sandbox.run(
            task.call, program, profile, workspace=task.document.workspace, shield=Shield()
        )
    return _answer(outcome, task.profile.limits.output_bytes)


def _dial(host: str, port: int, seconds: float) -> socket.socket:
    """Connect to the first address of ``host`` that may be used; the rest are not tried blindly."""
    deadline = time.monotonic() + seconds
    reason: OSError = TimeoutError("timed out")
    for found in _resolve(host, port, deadline)[:_ADDRESSES_MAX]:
        _require_public(host, str(found[4][0]))
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            return _connect(found, left)
        except OSError as error:
            reason = error
    raise ToolFailed(f"{host} port {port} cannot be reached: {reason}.", code="http.connect")


def _connect(found: _Found, seconds: float) -> socket.socket:
    family, kind, protocol, _, address = found
    connection = socket.socket(family, kind, protocol)
    try:
        connection.settimeout(seconds)
        connection.connect(address)
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection


def _resolve(host: str, port: int, deadline: float) -> Sequence[_Found]:
    """Look a name up, waiting for it until ``deadline``.

    getaddrinfo(3) takes no time limit and cannot be interrupted, so it runs in a thread that is
    left to end by the resolver's own bounds (resolv.conf(5), timeout and attempts).
    """
    answers: queue.SimpleQueue[Sequence[_Found] | Exception] = queue.SimpleQueue()
    arguments = (host.strip("[]"), port, answers)
    threading.Thread(target=_look_up, args=arguments, name="http-resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty as error:
        raise ToolFailed(f"{host} was not resolved in time.", code="http.resolve") from error
    if isinstance(answer, Exception):
        raise ToolFailed(f"{host} cannot be resolved: {answer}.", code="http.resolve") from answer
    return answer


def _look_up(
    host: str, port: int, answers: queue.SimpleQueue[Sequence[_Found] | Exception]
) -> None:
    try:
        answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    # A label of more than 63 bytes is a UnicodeError of Python's own encoder, not the resolver's.
    except (OSError, ValueError) as error:
        answers.put(error)


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
    if not _is_public(mapped):
        raise Denied(
            f"{host} leads to {address}, which is not a public address.",
            code="http.private_address",
        )


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if not address.is_global or address.is_multicast:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return address not in _RELAYS_IPV4 and address != _HOST_OF_AZURE
    return address in _PUBLIC_IPV6 and not any(address in network for network in _TUNNELS_IPV6)


def _answer(outcome: Outcome, limit: int) -> Outcome:
    """Split what the worker wrote: one line of JSON, then the body. All of it is hostile."""
    head, newline, body = outcome.stdout.partition(b"\n")
    if outcome.limit is not None:
        return replace(outcome, stdout=b"")
    if not outcome.ok or not newline or len(head) > _HEAD_BYTES_MAX:
        text = ascii(outcome.stderr[-200:].decode(errors="replace"))
        raise ToolFailed(f"The server's answer could not be read: {text}", code="http.protocol")
    try:
        said = _heads.decode(head)
    except (ValueError, RecursionError) as error:
        raise ToolFailed("The worker's answer is unreadable.", code="http.protocol") from error
    cut = outcome.truncated or len(body) > limit
    headers: list[Json] = [list(field) for field in said.headers]
    value: Json = {"status": said.status, "headers": headers}
    return replace(outcome, value=value, stdout=body[:limit], stderr=b"", truncated=cut)
