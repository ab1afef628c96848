"""Policy lattice: a rule that may be wider, and the rules it is held against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from safeconduct.policies.binding import Rule
from safeconduct.policies.match import Argv


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """A rule of the new policy that may be wider. ``focus`` is the old rule it may get around."""

    code: str
    rule: Rule
    focus: Rule | None = None


class Rules:
    """Some rules, those that say the same as another one first."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.all = tuple(rules)
        self._alike: dict[object, list[Rule]] = {}
        self._programs: dict[str | None, list[Rule]] = {}
        for rule in self.all:
            self._alike.setdefault(likeness(rule), []).append(rule)
            self._programs.setdefault(_program(rule), []).append(rule)

    def near(self, rule: Rule) -> Iterator[Rule]:
        """Yield all of them; whoever looks for a twin finds it at once."""
        return chain(self._alike.get(likeness(rule), ()), self.all)

    def of_program(self, rule: Rule) -> Iterable[Rule]:
        """Return those that may speak of the program that a rule names, if it names one."""
        program = _program(rule)
        if program is None:
            return self.all
        return chain(self._programs.get(program, ()), self._programs.get(None, ()))


def _program(rule: Rule) -> str | None:
    """Return the one program that a rule is about; None where it may be about several."""
    matcher = (rule.matchers or {}).get("argv")
    programs = matcher.programs if isinstance(matcher, Argv) else frozenset[str]()
    return next(iter(programs), None)


def likeness(rule: Rule) -> object:
    # A hint only: what is alike is compared all the same.
    matchers = rule.matchers or {}
    words = tuple((name, matchers[name].describe()) for name in sorted(matchers))
    return (words, rule.when.text if rule.when else None)
