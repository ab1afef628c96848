"""Policy matching: URLs. One WHATWG parse (ada); the serialisation is judged and dialled.

A URL that two parsers could read differently is refused before it is parsed. Hosts are
compared in their ASCII form, IP addresses in the one spelling ada gives them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

import ada_url

from .globs import Glob, compile_components

MAX_URL_CHARACTERS: Final = 8192
MAX_HOST_CHARACTERS: Final = 253
# RFC 1035 section 2.3.4.
MAX_LABEL: Final = 63
_DEFAULT_PORT: Final = {"http": 80, "https": 443}
# Names that lead to this machine or this network although they are names.
_LOCAL_DOMAINS: Final = frozenset({"localhost", "local", "internal", "arpa", "lan", "onion"})

_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0\\\ud800-\udfff]")
_WEB = re.compile(r"https?://([^/?#]*)([^?#]*)", re.IGNORECASE)
# Bytes that a server may decode into structure (/ \ . ; NUL and controls), and the overlong UTF-8
# (RFC 3629 section 10) and `%u` with four digits that some take for the same.
_TRICK = re.compile(
    r"%(?:2e|2f|5c|3b|7f|[01][0-9a-f]|c[01]|e0%[89]|f0%8|u[0-9a-f])|/\.{1,2};", re.IGNORECASE
)
_ESCAPE = re.compile(r"%[0-9a-f]{2}", re.IGNORECASE)
_ENCODED_WILDCARD = re.compile(r"%(?:2a|3f)", re.IGNORECASE)
_PARTS = re.compile(
    r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([0-9]{1,5}))?(/[^?#]*)(?:\?([^#]*))?"
)
# URLs that are their own one spelling, as most are: lower-case words for a host that cannot be an
# address nor an encoded name, and no character that a parser rewrites, decodes or takes for dots.
_CANONICAL = re.compile(
    r"https?://(?:[a-z][a-z0-9]*\.)+[a-z]{2,}"
    r"/(?:[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*/)*(?:[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)?"
    r"(?:\?[A-Za-z0-9_=&.-]*)?"
)
# What a parser changes nothing of: a label that begins as no number and no encoded name does, and
# a path without escapes, dots and what stands for other things in a URL.
_PLAIN_LABEL = re.compile(r"[a-z][a-z0-9]*", re.ASCII)
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_*-]+(?:/[A-Za-z0-9_*-]+)*", re.ASCII)
_IPV4 = re.compile(r"[0-9]+(?:\.[0-9]+){3}")


class UrlRefused(ValueError):
    """A URL that cannot be judged. ``code`` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Url:
    """The parts of a canonical URL. ``path`` is decoded: `/%61` is one more spelling of `/a`."""

    scheme: str
    host: str
    port: int
    path: str
    query: str | None


def canonical_url(text: str) -> str:
    """Return the one spelling of an http(s) URL, without its fragment, which is never sent.

    Raise UrlRefused for userinfo, a trailing dot, control characters, `\\`, encoded slashes
    and dots in the path, and whatever the WHATWG parser refuses.
    """
    plain = len(text) <= MAX_HOST_CHARACTERS and _CANONICAL.fullmatch(text)
    return text if plain else respell_url(text)


def respell_url(text: str) -> str:
    """Do the same for every URL, as a parser would; UrlRefused as `canonical_url` raises it."""
    if not 0 < len(text) <= MAX_URL_CHARACTERS:
        raise UrlRefused("url.length", f"a URL has 1 to {MAX_URL_CHARACTERS} characters")
    if _FORBIDDEN.search(text):
        raise UrlRefused("url.character", "a URL holds no spaces, controls or backslashes")
    web = _WEB.match(text)
    if web is None:
        raise UrlRefused("url.scheme", "only http:// and https:// URLs are judged")
    authority, path = web[1], web[2]
    if "@" in authority:
        raise UrlRefused("url.userinfo", "a URL holds no user name or password")
    if "%" in authority:
        raise UrlRefused("url.host", "a host is not percent-encoded")
    if _hides_structure(path):
        raise UrlRefused("url.path", "a path holds no encoded dot, slash or control character")
    try:
        href = ada_url.URL(text).href
    except ValueError as error:
        raise UrlRefused("url.invalid", "not a valid URL") from error
    href = href.partition("#")[0]
    parts = _PARTS.fullmatch(href)
    if parts is None or len(href) > MAX_URL_CHARACTERS:
        raise UrlRefused("url.host", "the host is not a plain name or address")
    _refuse_host(authority, parts[2])
    if parts[3] == "0":
        raise UrlRefused("url.port", "port 0 cannot be dialled")
    return href


def _refuse_host(authority: str, host: str) -> None:
    written = authority.partition(":")[0]
    if host.endswith(".") or written.endswith((".", "\u3002", "\uff0e", "\uff61")):
        raise UrlRefused("url.host", "a host does not end with a dot")
    if len(host) > MAX_HOST_CHARACTERS or ".." in host or host.startswith("."):
        raise UrlRefused("url.host", "the host has an empty label or is too long")
    if host.startswith("[::ffff:"):
        # RFC 4291 section 2.5.5.2: the same place as the IPv4 address, which a rule may name.
        raise UrlRefused("url.host", "an IPv4 address is not written as an IPv6 address")


def _hides_structure(path: str) -> bool:
    """Tell whether a path holds structure that is encoded, or escapes that are encoded again.

    A proxy decodes before the server does, and neither knows of the other, so that `/%2561` may be
    `/a`: only one that means the same however often it is decoded is judged.
    """
    if _TRICK.search(path):
        return True
    if "%" not in path:
        return False
    once = unquote(path, "latin-1")
    return _ESCAPE.search(once) is not None or _TRICK.search(once) is not None


def decoded(path: str) -> str:
    """Decode the path of a canonical URL, as it is judged."""
    # INVARIANT: no escape stands for a slash (_hides_structure), so the components stay the same.
    return unquote(path, errors="surrogateescape") if "%" in path else path


def split_url(href: str) -> Url | None:
    """Split a canonical URL; None for any other text. Costs no second parse."""
    parts = _PARTS.fullmatch(href)
    if parts is None:
        return None
    scheme, host, port, path, query = parts.groups()
    return Url(scheme, host, int(port) if port else _DEFAULT_PORT[scheme], decoded(path), query)


@dataclass(frozen=True, slots=True)
class UrlPattern:
    """`scheme://host[:port]/path-glob[?query]`. The query is free unless the pattern has one."""

    pattern: str
    scheme: str
    labels: tuple[str, ...]
    port: int
    path: Glob
    query: str | None
    # How every canonical URL begins that this matches, where the pattern is `host/folder/**`.
    start: str | None = None

    def matches(self, url: Url) -> bool:
        """Tell whether the parts of a canonical URL match."""
        if url.scheme != self.scheme or url.port != self.port:
            return False
        if self.query is not None and url.query != self.query:
            return False
        if not covers_host(self.labels, url.host):
            return False
        return self.path.matches(url.path[1:].split("/"))


def compile_url(pattern: str) -> UrlPattern:
    """Compile a URL pattern; raise ValueError saying what is wrong with it."""
    scheme, found, rest = pattern.partition("://")
    if not found or scheme not in _DEFAULT_PORT:
        raise ValueError("must begin with https:// or http://")
    authority, slash, tail = rest.partition("/")
    if not slash:
        raise ValueError("has no path; end it with /** for every path or / for the root page")
    labels, port = _compile_authority(scheme, authority)
    path, question, query = tail.partition("?")
    if "#" in tail:
        raise ValueError("has a fragment, which is never sent")
    components = _compile_url_path(path)
    glob = Glob(pattern, components)
    start = None if question or glob.folder is None else _start(scheme, labels, port, glob.folder)
    return UrlPattern(pattern, scheme, labels, port, glob, query if question else None, start)


def _start(scheme: str, labels: tuple[str, ...], port: int, folder: str) -> str | None:
    """Spell the beginning that a whole folder of one host has in every canonical URL."""
    # A plain host is one text here; one with a wildcard is several.
    host = ".".join(labels)
    # A folder with a % in it, once decoded, is not how the URL is spelled.
    if len(labels) != 1 or "*" in host or "%" in folder:
        return None
    shown = "" if port == _DEFAULT_PORT[scheme] else f":{port}"
    return f"{scheme}://{host}{shown}{folder.rstrip('/')}/"


def _compile_authority(scheme: str, authority: str) -> tuple[tuple[str, ...], int]:
    if not authority:
        raise ValueError("has no host")
    host, port = authority, _DEFAULT_PORT[scheme]
    explicit = re.fullmatch(r"(.*):([0-9]{1,5})", authority)
    if explicit and not authority.endswith("]"):
        host, port = explicit[1], int(explicit[2])
    if not 0 < port < 65536:
        raise ValueError("has a port outside 1 to 65535")
    labels = host.split(".") if "*" in host else [host]
    wild = [label for label in labels if "*" in label]
    if any(label not in ("*", "**") for label in wild) or "**" in labels[1:]:
        raise ValueError("has a wildcard that is not a whole label; ** may only come first")
    literal = ".".join(label for label in labels if "*" not in label)
    if not literal:
        return tuple(labels), port
    # The literal labels end the name, or stand between single * labels: each is put in its
    # ASCII form by the same parser that will read the URL.
    if not wild:
        return (_ascii_host(scheme, host),), port
    return tuple(_ascii_host(scheme, x) if "*" not in x else x for x in labels), port


def _ascii_host(scheme: str, host: str) -> str:
    if len(host) <= MAX_LABEL and _PLAIN_LABEL.fullmatch(host):
        return host
    try:
        href = canonical_url(f"{scheme}://{host}/")
    except UrlRefused as error:
        raise ValueError(f"has the host {host!r}: {error}") from error
    parts = _PARTS.fullmatch(href)
    if parts is None or parts[3] is not None or parts[4] != "/":
        raise ValueError(f"has a host that is not one: {host!r}")
    return parts[2]


def _compile_url_path(path: str) -> tuple[str, ...]:
    if path == "":
        return ("",)
    folder = path.endswith("/")
    components = compile_components(path.removesuffix("/"))
    if _hides_structure("/" + path):
        raise ValueError("has an encoded dot, slash or control character in its path")
    if _ENCODED_WILDCARD.search(path):
        raise ValueError("has an encoded * or ?, which would become a wildcard; write *")
    joined = "/".join(components)
    if _PLAIN_PATH.fullmatch(joined):
        return (*components, "") if folder else components
    try:
        written = ada_url.URL(f"https://host.example/{joined}").pathname
    except ValueError as error:
        raise ValueError("has a path that is not valid in a URL") from error
    judged = tuple(decoded(component) for component in written[1:].split("/"))
    if len(judged) != len(components):
        raise ValueError("has a path that a URL parser would rewrite")
    return (*judged, "") if folder else judged


def covers_host(labels: tuple[str, ...], host: str) -> bool:
    """Tell whether a compiled host pattern covers a canonical host."""
    if len(labels) == 1 and "*" not in labels[0]:
        return labels[0] == host
    if is_address(host) or "." not in host:
        # A wildcard never stands for an address in any spelling, nor for a name without a
        # dot, which resolves on the local network.
        return False
    names = host.split(".")
    if names[-1] == "localhost" or (names[-1] in _LOCAL_DOMAINS and "*" in labels[-1]):
        return False
    if labels[0] == "**":
        fixed = labels[1:]
        if len(names) <= len(fixed):
            return False
        labels, names = fixed, names[len(names) - len(fixed) :]
    if len(labels) != len(names):
        return False
    return all(label in ("*", name) for label, name in zip(labels, names, strict=True))


def is_address(host: str) -> bool:
    """Tell whether a canonical host is an IP literal. Every spelling of one became one of these."""
    return host.startswith("[") or _IPV4.fullmatch(host) is not None
