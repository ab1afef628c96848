"""Policy matching: which URLs an argument may be."""

from __future__ import annotations

from dataclasses import dataclass, field

from safeconduct.call import Json

from .globs import shared_steps, walk_steps
from .host_table import HostTable, table_of
from .match import spell
from .signatures import Kind
from .urls import UrlPattern, split_url
from .work import HOST_STEPS, spend


@dataclass(frozen=True, slots=True)
class UrlMatcher:
    """`url`: one of the patterns matches the canonical URL."""

    patterns: tuple[UrlPattern, ...]
    # One by itself, without a tuple around it: str.startswith takes both.
    _starts: str | tuple[str, ...] = field(init=False, compare=False, repr=False)
    _table: HostTable[UrlPattern] | None = field(init=False, compare=False, repr=False)
    # Of the pattern that takes most.
    _steps: tuple[int, int] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        starts = tuple(pattern.start for pattern in self.patterns if pattern.start)
        steps = [walk_steps([pattern.path]) for pattern in self.patterns] or [(0, 0)]
        table = table_of([(pattern.labels, pattern) for pattern in self.patterns])
        object.__setattr__(self, "_starts", starts[0] if len(starts) == 1 else starts)
        object.__setattr__(self, "_table", table)
        most = shared_steps(max(x for x, _ in steps), max(y for _, y in steps))
        object.__setattr__(self, "_steps", most)

    def matches(self, value: Json) -> bool:
        if not isinstance(value, str):
            return False
        # One spelling each: what begins so, and holds no fragment, has these very parts.
        if value.startswith(self._starts) and "#" not in value:
            return True
        url = split_url(value)
        if url is None:
            return False
        found = self.patterns if self._table is None else self._table.find(url.host)
        by_component, by_character = self._steps
        steps = by_component * value.count("/") + by_character * len(value)
        spend(len(found) * (steps + HOST_STEPS))
        return any(pattern.matches(url) for pattern in found)

    @property
    def kind(self) -> Kind:
        """What it takes an argument for."""
        return Kind.URL

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(spell(pattern.pattern) for pattern in self.patterns)

    def describe(self) -> str:
        return f"a URL in {', '.join(self.words)}"
