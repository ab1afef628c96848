"""Policy lattice: patterns of hosts, URLs and mail addresses. A yes is sure; a doubt is a no.

A host pattern is a tuple of labels as `UrlPattern` holds them: one literal host, or labels with
`*` (one label) and a leading `**` (one or more).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from safeconduct.policies.globs import Glob
from safeconduct.policies.hosts import EmailPattern, HostPattern
from safeconduct.policies.urls import UrlPattern, covers_host

from .inclusion import Language, search

Labels: TypeAlias = tuple[str, ...]


def is_literal(labels: Labels) -> bool:
    """Tell whether a host pattern is one host."""
    return len(labels) == 1 and "*" not in labels[0]


def host_subsumes(wide: Labels, narrow: Labels) -> bool:
    """Tell whether every host that ``narrow`` matches, ``wide`` surely matches too."""
    if wide == narrow:
        return True
    if is_literal(narrow):
        return covers_host(wide, narrow[0])
    if is_literal(wide):
        return False
    # What a wildcard never stands for (urls.py) depends on the last label, which the example has.
    if not covers_host(wide, example_hosts(narrow)[0]):
        return False
    if wide[0] != "**":
        return (
            narrow[0] != "**"
            and len(wide) == len(narrow)
            and all(one in ("*", other) for one, other in zip(wide, narrow, strict=True))
        )
    fixed = wide[1:]
    least = len(narrow) - (narrow[0] == "**")
    if least < len(fixed) or (narrow[0] != "**" and least == len(fixed)):
        return False
    tail = narrow[len(narrow) - len(fixed) :] if fixed else ()
    return all(one in ("*", other) for one, other in zip(fixed, tail, strict=True))


def host_disjoint(one: Labels, other: Labels) -> bool:
    """Tell whether surely no host matches both."""
    if is_literal(one):
        return not covers_host(other, one[0])
    if is_literal(other):
        return not covers_host(one, other[0])
    first, second = (labels[1:] if labels[0] == "**" else labels for labels in (one, other))
    pairs = zip(reversed(first), reversed(second), strict=False)
    if any("*" not in (mine, theirs) and mine != theirs for mine, theirs in pairs):
        return True
    if one[0] == "**":
        return other[0] != "**" and len(other) <= len(first)
    if other[0] == "**":
        return len(one) <= len(second)
    return len(one) != len(other)


def url_subsumes(wide: Sequence[UrlPattern], narrow: Sequence[UrlPattern]) -> bool:
    """Tell whether every URL of the second patterns surely lies in the first."""
    return all(_url_covered(wide, pattern) for pattern in narrow)


def _url_covered(wide: Sequence[UrlPattern], narrow: UrlPattern) -> bool:
    fitting = [
        one.path.components
        for one in wide
        if (one.scheme, one.port) == (narrow.scheme, narrow.port)
        and one.query in (None, narrow.query)
        and host_subsumes(one.labels, narrow.labels)
    ]
    if not fitting:
        return False
    paths = Language([narrow.path.components])
    return search([paths], [Language(fitting)], empty_names=True).none


def url_disjoint(one: Sequence[UrlPattern], other: Sequence[UrlPattern]) -> bool:
    """Tell whether surely no URL lies in both."""
    return all(_apart(first, second) for first in one for second in other)


def _apart(one: UrlPattern, other: UrlPattern) -> bool:
    if (one.scheme, one.port) != (other.scheme, other.port):
        return True
    if None not in (one.query, other.query) and one.query != other.query:
        return True
    if host_disjoint(one.labels, other.labels):
        return True
    return _no_common_path(one.path, other.path)


def _no_common_path(one: Glob, other: Glob) -> bool:
    paths = [Language([glob.components]) for glob in (one, other)]
    return search(paths, [], empty_names=True).none


def hosts_subsume(wide: Sequence[HostPattern], narrow: Sequence[HostPattern]) -> bool:
    """Tell whether every host of the second patterns surely lies in the first; none are all."""
    if not wide or not narrow:
        return not wide
    return all(any(host_subsumes(one.labels, pattern.labels) for one in wide) for pattern in narrow)


def hosts_disjoint(one: Sequence[HostPattern], other: Sequence[HostPattern]) -> bool:
    """Tell whether surely no host lies in both."""
    pairs = [(first.labels, second.labels) for first in one for second in other]
    return bool(pairs) and all(host_disjoint(first, second) for first, second in pairs)


def emails_subsume(wide: Sequence[EmailPattern], narrow: Sequence[EmailPattern]) -> bool:
    """Tell whether every address of the second patterns surely lies in the first; none are all."""
    if not wide or not narrow:
        return not wide
    return all(_address_covered(wide, pattern) for pattern in narrow)


def _address_covered(wide: Sequence[EmailPattern], narrow: EmailPattern) -> bool:
    fitting = [_local(one) for one in wide if host_subsumes(one.host.labels, narrow.host.labels)]
    return bool(fitting) and search([Language([_local(narrow)])], [Language(fitting)]).none


def emails_disjoint(one: Sequence[EmailPattern], other: Sequence[EmailPattern]) -> bool:
    """Tell whether surely no address lies in both."""
    pairs = [(first, second) for first in one for second in other]
    return bool(pairs) and all(
        host_disjoint(first.host.labels, second.host.labels)
        or search([Language([_local(first)]), Language([_local(second)])], []).none
        for first, second in pairs
    )


def _local(pattern: EmailPattern) -> tuple[str, ...]:
    """Return the part before the @ as one component of a path pattern: `*` means the same."""
    return (pattern.pattern.partition("@")[0].lower(),)


def example_hosts(labels: Labels) -> list[str]:
    """Return some hosts that the pattern may match."""
    if is_literal(labels):
        return [labels[0]]
    found = [
        ".".join(deep if label == "**" else name if label == "*" else label for label in labels)
        for name, deep in (("a", "a"), ("x", "x.y"), ("www", "www"), ("evil", "evil.test"))
    ]
    return [*dict.fromkeys(found)]
