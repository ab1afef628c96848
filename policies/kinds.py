"""Policy step 3: what the arguments of a tool that is not ours are, as its rules imply.

The kind says which spelling of a value is handed to the tool and recorded. It decides nothing:
every matcher judges a value as what the matcher itself is about, and a `when` asks for a value
that has other spellings only where its own rule says what it is. So a rule less, or one more,
never changes what another rule says of a Call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from .match import AnyValue
from .signatures import SPELLED, Argument, Kind, Signature, merge_kinds

if TYPE_CHECKING:
    from .binding import Rule

# What is a path or a URL for us is one that the tool itself opens.
_TOOL_KIND: Final[Mapping[Kind, Kind]] = MappingProxyType(
    {Kind.PATH: Kind.TOOL_PATH, Kind.URL: Kind.TOOL_URL}
)
_TOOL_FORM: Final[Mapping[Kind, str]] = MappingProxyType(
    {Kind.TOOL_PATH: "path", Kind.TOOL_URL: "url"}
)


def implied_by(tool: str, rules: Sequence[Rule]) -> Signature:
    """Return the signature of a tool that is not ours: what the matchers of its rules imply.

    Raise KindConflict where one argument would have to be two things.
    """
    kinds: dict[str, tuple[Kind, Rule]] = {}
    # Also what may be anything is known by its name: no other spelling of it passes for another.
    named: dict[str, Kind] = {}
    readers: dict[str, Rule] = {}
    for rule in rules:
        for name in rule.reads:
            named[name] = Kind.JSON
            readers.setdefault(name, rule)
        for name, matcher in (rule.matchers or {}).items():
            if isinstance(matcher, AnyValue):
                named[name] = Kind.JSON
                continue
            kind = _TOOL_KIND.get(matcher.kind, matcher.kind)
            known, first = kinds.get(name, (kind, rule))
            merged = merge_kinds(known, kind)
            if merged is None:
                raise KindConflict(tool, name, rule, kind, first, known)
            kinds[name] = (merged, first)
    for name, reader in readers.items():
        if name in kinds and kinds[name][0] in SPELLED:
            kind, first = kinds[name]
            raise KindConflict(tool, name, reader, None, first, kind)
    named |= {name: kind for name, (kind, _) in kinds.items()}
    return Signature(
        arguments={name: Argument(kind=kind, required=False) for name, kind in named.items()},
        closed=False,
    )


class KindConflict(ValueError):
    """Two rules take one argument of a tool for two things.

    ``kind`` is None where a `when` asks for an argument that its own rule takes for nothing.
    """

    def __init__(
        self, tool: str, name: str, rule: Rule, kind: Kind | None, first: Rule, known: Kind
    ) -> None:
        here = "is read as it was given in when" if kind is None else f"is a {kind}"
        super().__init__(f"{tool}: {name!r} {here} here and a {known} at {first.where}")
        self.rule = rule
        self.hint = "use the same matcher for the argument in all rules that the tool meets"
        if kind is None:
            form = _TOOL_FORM.get(known, str(known))
            self.hint = f"name {name} with a matcher of the form {form} in this rule too"
