"""Policy matching: hosts and mail addresses in their one spelling. Built on the one URL parser.

A host is judged exactly as the host of a URL is, so `{host: …}` and `{url: …}` cannot disagree:
IDNA form, IP literals in every spelling, no trailing dot, no userinfo, no port.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from .urls import UrlRefused, canonical_url, compile_url, covers_host, is_address, split_url

MAX_HOST_TEXT: Final = 1024
# RFC 5321 §4.5.3.1: a local part has at most 64 octets, a path at most 256 with its brackets.
MAX_LOCAL_CHARACTERS: Final = 64
MAX_ADDRESS_CHARACTERS: Final = 254

# What would end the host, or stand before it, in a URL.
_NO_HOST = re.compile(r"[/?#@%<>,;\"'()*\s]")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*", re.ASCII)
# A dot-atom (RFC 5322 §3.2.3) without what some mailer reads as structure: `%` and `!` route,
# `|` and `/` name programs and files in sendmail, `*` is ours, a leading `-` is an option.
_ATOM = r"[a-z0-9_+'&=~-]+"
_LOCAL = re.compile(rf"(?!-){_ATOM}(?:\.{_ATOM})*", re.ASCII)


def canonical_host(text: str) -> str:
    """Return the one spelling of a host name or IP address; IPv6 stands in brackets.

    Raise UrlRefused for a port, userinfo, a trailing dot, and whatever no URL may have as host.
    """
    if not 0 < len(text) <= MAX_HOST_TEXT:
        raise UrlRefused("host.length", f"a host has 1 to {MAX_HOST_TEXT} characters")
    if _NO_HOST.search(text):
        raise UrlRefused("host.character", "a host is a plain name or address")
    written = f"[{text}]" if _IPV6.fullmatch(text) else text
    if ":" in written and not (written.startswith("[") and written.endswith("]")):
        raise UrlRefused("host.port", "a host has no port")
    url = split_url(canonical_url(f"https://{written}/"))
    if url is None or url.port != 443 or url.path != "/" or url.query is not None:
        raise UrlRefused("host.character", "a host is a plain name or address")
    return url.host


def canonical_email(text: str) -> str:
    """Return the one spelling of one mail address: all lower case, the domain in IDNA form.

    Raise UrlRefused for display names, comments, quoted local parts, several addresses, routes,
    addresses as domains and domains without a dot, which are delivered on this machine.
    """
    if not 0 < len(text) <= MAX_HOST_TEXT:
        raise UrlRefused("email.length", "a mail address has 3 to 254 characters")
    local, at, domain = text.partition("@")
    local = local.lower() if local.isascii() else ""
    if not at or not _LOCAL.fullmatch(local) or len(local) > MAX_LOCAL_CHARACTERS:
        raise UrlRefused("email.local", "a mail address is one plain name@domain")
    try:
        host = canonical_host(domain)
    except UrlRefused as error:
        raise UrlRefused("email.domain", f"the domain of a mail address: {error}") from error
    if is_address(host) or "." not in host:
        raise UrlRefused("email.domain", "the domain of a mail address is a name with a dot")
    if len(local) + 1 + len(host) > MAX_ADDRESS_CHARACTERS:
        raise UrlRefused("email.length", "a mail address has 3 to 254 characters")
    return f"{local}@{host}"


@dataclass(frozen=True, slots=True)
class HostPattern:
    """A host, or as in a URL pattern, one with wildcards: `*` one label, a first `**` several."""

    pattern: str
    labels: tuple[str, ...]

    def covers(self, host: str) -> bool:
        """Tell whether a canonical host matches."""
        return covers_host(self.labels, host)


@dataclass(frozen=True, slots=True)
class EmailPattern:
    """`local@host-pattern`; one `*` in the local part is any run of its characters.

    ``local`` stands before the `*` and ``after`` behind it; None where there is none.
    """

    pattern: str
    local: str
    after: str | None
    host: HostPattern

    def covers(self, local: str, host: str) -> bool:
        """Tell whether the parts of a canonical address match."""
        if self.after is None:
            return local == self.local and self.host.covers(host)
        if len(local) < len(self.local) + len(self.after):
            return False
        ends = local.startswith(self.local) and local.endswith(self.after)
        return ends and self.host.covers(host)


def compile_host(pattern: str) -> HostPattern:
    """Compile a host pattern; raise ValueError saying what is wrong with it."""
    if "*" not in pattern:
        try:
            return HostPattern(pattern, (canonical_host(pattern),))
        except UrlRefused as error:
            raise ValueError(f"is not a host: {error}") from error
    if _NO_HOST.search(pattern.replace("*", "")) or ":" in pattern:
        raise ValueError("is not a host; write for example api.example.org or **.example.org")
    return HostPattern(pattern, compile_url(f"https://{pattern}/").labels)


def compile_email(pattern: str) -> EmailPattern:
    """Compile an address pattern; raise ValueError saying what is wrong with it."""
    local, at, domain = pattern.partition("@")
    local = local.lower() if local.isascii() else ""
    if not at or not local or len(local) > MAX_LOCAL_CHARACTERS:
        raise ValueError("is not name@domain; write for example *@example.org")
    host = compile_host(domain)
    if "*" not in domain and (is_address(host.labels[0]) or "." not in host.labels[0]):
        raise ValueError("has a domain that is not a name with a dot")
    before, wild, after = local.partition("*")
    # LIMIT: one `*`, so that two ends are all there is to compare.
    if "*" in after:
        raise ValueError("has more than one * before the @")
    if not _LOCAL.fullmatch(f"{before}x{after}" if wild else local):
        raise ValueError("has a name that no mail address has")
    return EmailPattern(pattern, before, after if wild else None, host)
