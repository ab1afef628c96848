"""Policy step 3: the rules of one tool, filed by what their matchers demand of an argument.

INVARIANT: `candidates` holds every rule that can grant or restrict a Call; a rule is filed under
keys one of which the argument must have, or under none and is then always a candidate. Whether
it matches is still the rule's own word, so a wrong key can only be too wide, never a grant.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from safeconduct.call import Json

from .index_keys import MAX_KEYS, Hit, Lookup, Span, Table, keys_of

if TYPE_CHECKING:
    from .binding import Rule

# Fewer rules are judged faster one by one than looked up.
MIN_RULES: Final = 6
# One way to file a rule: the argument, how it is looked up, the keys.
_Filing: TypeAlias = "tuple[str, Lookup, frozenset[Hashable]]"


@dataclass(frozen=True, slots=True, eq=False)
class RuleIndex:
    """The rules of one tool. Pure data: it remembers nothing of what it was asked."""

    rules: tuple[Rule, ...]
    always: tuple[int, ...]
    # The argument, how it is looked up, in what, and how long the keys are.
    tables: tuple[tuple[str, Lookup, Table, Span], ...]
    # The one there is, where every rule is in it.
    only: tuple[str, Lookup, Table, Span] | None = field(init=False)

    def __post_init__(self) -> None:
        alone = len(self.tables) == 1 and not self.always
        object.__setattr__(self, "only", self.tables[0] if alone else None)

    def candidates(self, arguments: Mapping[str, Json]) -> Sequence[Rule]:
        """Return the rules that may match these arguments, in the order of the file."""
        only, rules = self.only, self.rules
        if only is not None:
            name, look_up, table, span = only
            hits = look_up(arguments[name], table, span) if name in arguments else ()
        elif not self.tables:
            return rules
        else:
            hits = self._hits(arguments)
        if not hits:
            return ()
        first = hits[0]
        if len(hits) > 1:
            return [rules[at] for at in sorted({at for hit in hits for at in _places(hit)})]
        return (rules[first],) if type(first) is int else [rules[at] for at in _places(first)]

    def _hits(self, arguments: Mapping[str, Json]) -> Sequence[Hit]:
        hits: list[Hit] = [self.always] if self.always else []
        for name, look_up, table, span in self.tables:
            if name in arguments:
                hits.extend(look_up(arguments[name], table, span))
        return hits


def _places(hit: Hit) -> tuple[int, ...]:
    return (hit,) if isinstance(hit, int) else hit


def index_rules(rules: Sequence[Rule]) -> RuleIndex:
    """File each rule under the keys that the fewest others have."""
    kept = tuple(rules)
    if len(kept) < MIN_RULES:
        return RuleIndex(kept, (), ())
    filings = [list(_filings(rule)) for rule in kept]
    crowd: dict[tuple[str, Lookup, Hashable], int] = {}
    for options in filings:
        for name, look_up, keys in options:
            for key in keys:
                place = (name, look_up, key)
                crowd[place] = crowd.get(place, 0) + 1
    always: list[int] = []
    tables: dict[tuple[str, Lookup], dict[Hashable, list[int]]] = {}
    for at, options in enumerate(filings):
        if not options:
            always.append(at)
            continue
        if len(options) > 1:
            options.sort(key=lambda option: _crowding(option, crowd))
        name, look_up, keys = options[0]
        table = tables.setdefault((name, look_up), {})
        for key in keys:
            table.setdefault(key, []).append(at)
    packed = tuple(
        (name, look_up, _pack(table), _span(table)) for (name, look_up), table in tables.items()
    )
    return RuleIndex(kept, tuple(always), packed)


def may_match(rule: Rule, arguments: Mapping[str, Json]) -> bool:
    """Tell whether a rule, by its own keys alone, may match these arguments."""
    for name, look_up, keys in _filings(rule):
        table: Table = dict.fromkeys(keys, 0)
        if name not in arguments or not look_up(arguments[name], table, _span(table)):
            return False
    return True


def _crowding(option: _Filing, crowd: Mapping[tuple[str, Lookup, Hashable], int]) -> int:
    name, look_up, keys = option
    return max(crowd[name, look_up, key] for key in keys)


def _pack(table: Mapping[Hashable, list[int]]) -> Table:
    # Most keys have one rule: no tuple for it, which takes as much memory as the entry.
    return {key: found[0] if len(found) == 1 else tuple(found) for key, found in table.items()}


def _span(table: Iterable[Hashable]) -> Span:
    texts = [key for key in table if isinstance(key, str)]
    starts = [len(text) for text in texts if text.endswith("/")]
    return min(starts, default=0), max(map(len, texts), default=0)


def _filings(rule: Rule) -> Iterator[_Filing]:
    """Name every way to file a rule: what some argument must have for it to match."""
    # What a rule restricts by is never narrower than what it grants by (`match_text`).
    for name, matcher in (rule.restricting or rule.matchers or {}).items():
        for look_up, keys in keys_of(matcher):
            if 0 < len(keys) <= MAX_KEYS:
                yield name, look_up, keys
