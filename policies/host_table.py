"""Policy matching: which of many host patterns may cover a host, without asking each.

INVARIANT: a table leaves out no pattern that covers the host; whoever asks it asks those it
returns again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Generic, TypeVar

T = TypeVar("T")
MIN_ENTRIES: Final = 8


class HostTable(Generic[T]):
    """Values by the labels of their host patterns (`urls.covers_host`). Immutable once made."""

    __slots__ = ("_below", "_exact", "_others")

    def __init__(self, entries: Iterable[tuple[tuple[str, ...], T]]) -> None:
        self._exact: dict[str, list[T]] = {}
        # `**.example.org` by `example.org`, which every host that it covers ends with.
        self._below: dict[str, list[T]] = {}
        self._others: list[T] = []
        for labels, value in entries:
            first, *rest = labels
            if not rest and "*" not in first:
                self._exact.setdefault(first, []).append(value)
            elif first == "**" and rest and not any("*" in label for label in rest):
                self._below.setdefault(".".join(rest), []).append(value)
            else:
                self._others.append(value)

    def find(self, host: str) -> Sequence[T]:
        """Return the values whose pattern may cover a canonical host."""
        if not self._below:
            exact = self._exact.get(host, ())
            return [*exact, *self._others] if self._others else exact
        found = [*self._exact.get(host, ()), *self._others]
        _, dot, rest = host.partition(".")
        while dot:
            found += self._below.get(rest, ())
            _, dot, rest = rest.partition(".")
        return found


def table_of(entries: Sequence[tuple[tuple[str, ...], T]]) -> HostTable[T] | None:
    """Make a table; None where so few are asked one by one as fast, and take less memory."""
    return HostTable(entries) if len(entries) >= MIN_ENTRIES else None
