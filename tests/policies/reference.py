"""A plain evaluator of the policy language, written from its specification for the tests.

Slow and obvious on purpose: no index, no compiled form, nothing of the engine is imported. It
judges arguments (`Given`) by rules that are plain values (`Written`): canonical ones, or raw ones
with a table of what each is as a path, a URL, a host or an address.
"""

# Plain data is looked at by isinstance, after which pyright knows no element types.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false, reportUnnecessaryComparison=false

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TypeAlias
from urllib.parse import urlsplit

# Whatever a policy or a call holds: it is looked at, not typed.
Value: TypeAlias = Any
OURS = ("agent", "fs", "shell", "http", "python", "wasm")
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
STRICTER = ("allow", "ask", "deny")
LOCAL = ("localhost", "local", "internal", "arpa", "lan", "onion")
PORTS = {"http": 80, "https": 443}
MAX_LIST = 1024
# A value that is not what a matcher is about. No JSON value is this one.
NONE = object()


@dataclass(frozen=True)
class Matching:
    """One matcher: its form, what it lists, and what `not` takes out of it."""

    form: str
    listed: Value = None
    excluded: Value = None


@dataclass(frozen=True)
class Written:
    """One rule as its author wrote it. ``arguments`` is None for `any`."""

    id: str
    effect: str
    arguments: Mapping[str, Matching] | None = None
    rest: bool = False
    when: Value = None
    rate: int | None = None
    optional: Mapping[str, Matching] = field(default_factory=dict[str, Matching])


@dataclass(frozen=True)
class Plain:
    """A policy, or a role of one: the rules of each tool name, which may have stars."""

    tools: Mapping[str, Sequence[Written]]
    narrows: str | None = None
    roles: Mapping[str, Plain] = field(default_factory=dict[str, "Plain"])


@dataclass(frozen=True)
class Given:
    """One call in its canonical form, with the facts that a condition may name."""

    tool: str
    arguments: Mapping[str, Any]
    session: Mapping[str, Any]
    now_ms: int
    # By form, what a raw text is canonically; None where it is no such thing at all.
    spellings: Mapping[str, Mapping[str, str | None]] = field(
        default_factory=dict[str, Mapping[str, "str | None"]]
    )


class Doubt(Exception):
    """A condition that has no answer."""


def evaluate(policy: Plain, given: Given, workspace: str) -> tuple[str, set[str]]:
    """Return the effect, and the rules whose rates count unless it is a deny."""
    if len({name.casefold() for name in given.arguments}) < len(given.arguments):
        return "deny", set()
    parts, role = [policy], given.session.get("role")
    if role is not None:
        parts = [policy.roles[role]]
        while (wider := parts[-1].narrows) is not None:
            parts.append(policy.roles[wider])
    answers = [judge(part, given, workspace) for part in parts]
    effect = max((answer[0] for answer in answers), key=STRICTER.index)
    return effect, {rule for answer in answers for rule in answer[1]} if effect != "deny" else set()


def judge(part: Plain, given: Given, workspace: str) -> tuple[str, set[str]]:
    """Judge by one part: deny beats ask beats allow, and what is not granted is denied."""
    rules = list(speaking(part, given.tool))
    if any(restricts(rule, given) for rule in rules if rule.effect == "deny"):
        return "deny", set()
    granting = [rule for rule in rules if rule.effect != "deny" and grants(rule, given, workspace)]
    if not granting:
        return "deny", set()
    asking = [rule for rule in rules if rule.effect == "ask" and restricts(rule, given)]
    counting = {rule.id for rule in granting + asking if rule.rate is not None}
    return ("ask" if asking else "allow"), counting


def speaking(part: Plain, tool: str) -> list[Written]:
    """Return the rules of a name and of each wildcard that matches it."""
    found: list[Written] = []
    for name, rules in part.tools.items():
        if name == tool:
            found += rules
        elif "*" in name and fits_words(name.split("."), tool.split(".")):
            ours = tool.split(".")[0] in OURS
            found += [rule for rule in rules if rule.effect == "deny" or not ours]
    return found


def fits_words(pattern: list[str], words: list[str]) -> bool:
    return len(pattern) == len(words) and all(map(fits, pattern, words))


def fits(pattern: str, name: str) -> bool:
    """Tell whether one name fits `*` (any part) and `?` (one character)."""
    spelled = "".join(
        ".*" if sign == "*" else "." if sign == "?" else re.escape(sign) for sign in pattern
    )
    return bool(name or not pattern) and re.fullmatch(spelled, name, re.DOTALL) is not None


def grants(rule: Written, given: Given, workspace: str) -> bool:
    """Tell whether a rule covers the whole call: every argument, and its condition surely."""
    if rule.when is not None and answer(rule.when, as_read(rule, given)) is not True:
        return False
    if rule.arguments is None:
        return True
    for name, matching in rule.arguments.items():
        if name not in given.arguments or not covers(matching, given.arguments[name], given):
            return False
    unnamed = {name: value for name, value in given.arguments.items() if name not in rule.arguments}
    for name, matching in rule.optional.items():
        if name in unnamed and not covers(matching, unnamed.pop(name), given):
            return False
    if given.tool == "shell.run":
        unnamed.pop("stdin", None)
        if unnamed.get("cwd") == workspace:
            del unnamed["cwd"]
    if given.tool == "fs.write":
        unnamed.pop("content", None)
    return rule.rest or not unnamed


def restricts(rule: Written, given: Given) -> bool:
    """Tell whether what a rule names may be meant, whatever else the call carries."""
    if rule.when is not None and answer(rule.when, as_read(rule, given)) is False:
        return False
    return all(
        touches(matching, given.arguments[name], given)
        if name in given.arguments
        else name.casefold() in {other.casefold() for other in given.arguments}
        for name, matching in (rule.arguments or {}).items()
    )


def covers(matching: Matching, value: Value, given: Given) -> bool:
    """A list is granted when it is not empty and every element is."""
    if isinstance(value, list) and matching.form not in ("any", "argv", "json"):
        few = 0 < len(value) <= MAX_LIST
        return few and all(covers_one(matching, item, given) for item in value)
    return covers_one(matching, value, given)


def covers_one(matching: Matching, value: Value, given: Given) -> bool:
    seen = as_kind(matching.form, value, given)
    return seen is not NONE and matches(matching, seen, sure=True)


def touches(matching: Matching, value: Value, given: Given) -> bool:
    """One element of a list is enough to restrict, and so is one that cannot be judged."""
    if isinstance(value, list) and matching.form not in ("any", "argv", "json"):
        return len(value) > MAX_LIST or any(touches_one(matching, item, given) for item in value)
    return touches_one(matching, value, given)


def touches_one(matching: Matching, value: Value, given: Given) -> bool:
    seen = as_kind(matching.form, value, given)
    return seen is NONE or matches(matching, seen, sure=False)


def as_kind(form: str, value: Value, given: Given) -> Value:
    """Return a value as what a matcher is about; NONE where it is no such thing."""
    if form in ("any", "json"):
        return value
    if form == "argv":
        return value if isinstance(value, list) else NONE
    if form == "in":
        return NONE if isinstance(value, list | dict) else value
    if form == "range":
        return value if isinstance(value, int | float) and not isinstance(value, bool) else NONE
    if not isinstance(value, str):
        return NONE
    spelled_so = given.spellings.get(form, {}).get(value, value)
    return NONE if spelled_so is None else spelled_so


def as_read(rule: Written, given: Given) -> Given:
    """Return the call as the condition of a rule sees it: what the rule takes each value for."""
    read = dict(given.arguments)
    for name, matching in {**(rule.arguments or {}), **rule.optional}.items():
        if name not in read or matching.form not in given.spellings:
            continue
        value = read[name]
        listed = value if isinstance(value, list) else [value]
        seen = [as_kind(matching.form, item, given) for item in listed]
        if NONE in seen or len(listed) > MAX_LIST:
            # It is no such thing: whoever asks for it gets no answer.
            del read[name]
        else:
            read[name] = seen if isinstance(value, list) else seen[0]
    return replace(given, arguments=read)


def matches(matching: Matching, value: Value, *, sure: bool) -> bool:
    """Judge one value. What is after `not` is taken out."""
    form, listed = matching.form, matching.listed
    if matching.excluded is not None and matches(
        replace(matching, listed=matching.excluded, excluded=None), value, sure=not sure
    ):
        return False
    if form == "any":
        return True
    if form == "in":
        return spelled(value) in (listed if sure else {*listed, *map(as_number, listed)})
    if form == "range":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        within = number and listed[0] <= value <= listed[1]
        return within and (not sure or value == int(value))
    if form == "json":
        return shaped(listed, value, sure=sure)
    if form == "argv":
        return worded(listed, value, sure=sure)
    if not isinstance(value, str):
        return False
    if form == "text":
        return len(value.encode()) <= listed
    return any(LISTED[form](pattern, value) for pattern in listed) if listed != "any" else True


def as_number(text: str) -> str | None:
    """Spell what is a number in JSON as the number of a call is: `1.0` is `1`."""
    plain = re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", text, re.ASCII)
    whole = re.fullmatch(r"0|-?[1-9][0-9]*", text, re.ASCII)
    return spelled(float(text)) if plain and not whole else None


def spelled(value: Value) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value == int(value):
        value = int(value)
    if value is None:
        return "null"
    return None if isinstance(value, list | dict) else str(value)


def path_fits(pattern: str, value: str) -> bool:
    return value.startswith("/") and walk(
        pattern.removeprefix("/").split("/"), value[1:].split("/")
    )


def walk(pattern: list[str], names: list[str]) -> bool:
    """`**` is any number of folders, none included."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(walk(pattern[1:], names[at:]) for at in range(len(names) + 1))
    return bool(names) and fits(pattern[0], names[0]) and walk(pattern[1:], names[1:])


def url_fits(pattern: str, value: str) -> bool:
    wanted, url = urlsplit(pattern), urlsplit(value)
    host, _, port = wanted.netloc.partition(":")
    return (
        wanted.scheme == url.scheme
        and int(port or PORTS[wanted.scheme]) == (url.port or PORTS[url.scheme])
        and ("?" not in pattern or ("?" in value and wanted.query == url.query))
        and host_fits(host, url.netloc.partition(":")[0])
        and walk(wanted.path[1:].split("/"), url.path[1:].split("/"))
    )


def host_fits(pattern: str, host: str) -> bool:
    """`*` is one label and `**` one or more; neither covers addresses and local names."""
    if "*" not in pattern:
        return pattern == host
    labels, names = pattern.split("."), host.split(".")
    local = names[-1] in LOCAL and (names[-1] == "localhost" or "*" in labels[-1])
    if len(names) == 1 or names[-1].isdigit() or host.startswith("[") or local:
        return False
    if labels[0] == "**":
        tail = labels[1:]
        return len(names) > len(tail) and fits_words(tail, names[len(names) - len(tail) :])
    return fits_words(labels, names)


def email_fits(pattern: str, address: str) -> bool:
    (local, _, domain), (name, _, host) = pattern.partition("@"), address.partition("@")
    return fits(local, name) and host_fits(domain, host)


def regex_fits(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text, re.ASCII) is not None


LISTED = {
    "path": path_fits,
    "url": url_fits,
    "host": host_fits,
    "email": email_fits,
    "regex": regex_fits,
}


def worded(elements: list[Any], words: Value, *, sure: bool) -> bool:
    """`...` at the end is the rest; a text is itself, a matcher is asked."""
    if not isinstance(words, list):
        return False
    rest = bool(elements) and elements[-1] == "..."
    wanted = elements[:-1] if rest else elements
    if len(words) < len(wanted) or (len(words) > len(wanted) and not rest):
        return False
    return all(
        word == element if isinstance(element, str) else word_fits(element, word, sure=sure)
        for element, word in zip(wanted, words, strict=False)
    )


def word_fits(element: Matching, word: str, *, sure: bool) -> bool:
    """A word is a text; where a number is asked for, it is the one spelling, or has a digit."""
    if element.form != "range":
        return matches(element, word, sure=True)
    if re.fullmatch("0|-?[1-9][0-9]*", word) is None:
        return not sure and any(sign.isnumeric() for sign in word)
    return matches(element, int(word), sure=True)


TYPES: Mapping[str, Any] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: type(value) is int or (type(value) is float and value == int(value)),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
}


def shaped(shape: Mapping[str, Any], value: Value, *, sure: bool) -> bool:
    """Objects are closed where it must be sure, open where it may be meant; so are lists."""
    if not TYPES[shape["type"]](value):
        return False
    if "enum" in shape and spelled(value) not in shape["enum"]:
        return False
    if "minimum" in shape and value < shape["minimum"]:
        return False
    if "maximum" in shape and value > shape["maximum"]:
        return False
    if isinstance(value, list):
        found = [shaped(shape["items"], item, sure=sure) for item in value]
        return all(found) if sure or not found else any(found)
    if isinstance(value, dict):
        named = shape["properties"]
        if not sure:
            # A name may be read in any case.
            named = {str(name).casefold(): form for name, form in named.items()}
        names = {name: name if sure else str(name).casefold() for name in value}
        alike: dict[str, list[bool]] = {}
        for name, read in names.items():
            if read in named:
                alike.setdefault(read, []).append(shaped(named[read], value[name], sure=sure))
        required = [name if sure else str(name).casefold() for name in shape.get("required", [])]
        return (
            all(name in names.values() for name in required)
            and (not sure or all(name in named for name in value))
            and all(any(found) for found in alike.values())
        )
    return True


def answer(condition: Value, given: Given) -> bool | None:
    """Return what a condition says, or None where it has no answer."""
    try:
        said = ask(condition, given)
    except Doubt:
        return None
    return said if isinstance(said, bool) else None


def ask(condition: Value, given: Given) -> Value:
    """Evaluate ("and", a, b), ("not", a), ("==", a, b), ("fact", name), ("literal", value) …"""
    sign, *operands = condition
    if sign == "literal":
        return operands[0]
    if sign == "fact":
        return fact(operands[0], given)
    values = [ask(operand, given) for operand in operands]
    if sign in ("and", "or", "not"):
        if not all(isinstance(value, bool) for value in values):
            raise Doubt
        return not values[0] if sign == "not" else (all if sign == "and" else any)(values)
    if sign == "len":
        if not isinstance(values[0], str | list | dict):
            raise Doubt
        return len(values[0])
    if sign == "in":
        return any([compare("==", values[0], item) for item in values[1]])
    return compare(sign, values[0], values[1])


def compare(sign: str, one: Value, other: Value) -> bool:
    if kind(one) != kind(other) or (
        sign not in ("==", "!=") and kind(one) not in ("str", "number")
    ):
        raise Doubt
    signs = {"==": one == other, "!=": one != other}
    if sign in signs:
        return signs[sign]
    return {"<": one < other, "<=": one <= other, ">": one > other, ">=": one >= other}[sign]


def kind(value: Value) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return type(value).__name__


def fact(name: str, given: Given) -> Value:
    at = datetime.fromtimestamp(given.now_ms / 1000, UTC)
    where, _, key = name.partition(".")
    known = {
        "call": given.arguments,
        "session": given.session,
        "time": {"hour": at.hour, "weekday": WEEKDAYS[at.weekday()]},
    }[where]
    if key not in known:
        raise Doubt
    return known[key]
