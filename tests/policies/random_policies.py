"""Random policies as the reference evaluator reads them and as a person writes them, and calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, TypeAlias, cast

from safeconduct.call import Facts

from .reference import Given, Matching, Plain, Written

# Whatever JSON holds: the checks below look at it, not its type.
Value: TypeAlias = Any
WORKSPACE = "/srv/space"
CLOCK_MS = 1_767_607_200_000  # Monday 2026-01-05, 10:00 UTC
THIRD = [
    "t",
    "files.read",
    "files.write",
    "files.delete_all",
    "mail.send",
    "mail.delete_one",
    "a.b.c",
]
WILD = ["*", "*.*", "files.*", "*.delete_*", "mail.s*", "*.*.c", "f*.r*d"]
# Wildcards that cover tools of ours, which only a deny does; those of one tool take its arguments.
DENY_WILD = {"fs.r*": "fs.read", "shell.*": "shell.run", "*.run": "", "http.g*": "http.get"}
ROLES = ["reader", "writer", "small", "smaller"]

PATHS = [
    "/srv/space",
    "/srv/space/a",
    "/srv/space/src/a.py",
    "/srv/space/src/x/b.py",
    "/srv/space-x/a",
    "/etc/passwd",
    "/srv/space/.env",
    "/srv/space/src/.env",
    "/",
    "/srv/space/src/caf\u00e9",
]
PATH_PATTERNS = [
    "/srv/space/**",
    "/srv/space/src/**",
    "/srv/space/src/*.py",
    "**/.env",
    "/**",
    "/etc/*",
    "/srv/space/**/*.py",
    "/srv/*/a",
    "/srv/space/?",
    "/srv/space/src/a.py",
    "/srv/*/**/b.py",
]
URLS = [
    "https://x.example/",
    "https://x.example/a",
    "https://x.example/a/b?q=1",
    "http://x.example/a",
    "https://api.x.example/a",
    "https://a.api.x.example/",
    "https://x.example:8443/a",
    "https://10.0.0.1/",
    "https://localhost/a",
    "https://evil.test/x.example/a",
    "https://x.example/a/",
    "https://host/",
]
URL_PATTERNS = [
    "https://x.example/**",
    "https://*.x.example/**",
    "https://**.x.example/a",
    "https://**/**",
    "https://x.example/a/b?q=1",
    "http://x.example/*",
    "https://x.example:8443/**",
    "https://10.0.0.1/**",
    "https://localhost/a",
    "https://x.example/",
    "https://*.example/*",
]
HOSTS = [
    "x.example",
    "api.x.example",
    "a.api.x.example",
    "10.0.0.1",
    "localhost",
    "evil.test",
    "[::1]",
]
HOST_PATTERNS = [
    "x.example",
    "*.x.example",
    "**.x.example",
    "**",
    "10.0.0.1",
    "*.example",
    "*.*.example",
]
MAILS = [
    "ann@corp.example",
    "bob@corp.example",
    "ann@sub.corp.example",
    "eve@evil.test",
    "a.b@corp.example",
]
MAIL_PATTERNS = [
    "*@corp.example",
    "ann@corp.example",
    "*@*.corp.example",
    "*@**.example",
    "a*@corp.example",
]
TEXTS = ["x", "y", "xy", "yes", "x1", "", "1", "true", "caf\u00e9", "xx"]
EXPRESSIONS = ["x|y", "[a-z]+", "x[0-9]*", "(xy?)+", "[^x]*", "y|", "x.?"]
SHAPES: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 0, "maximum": 5},
    {"type": "string", "enum": ["x", "y"]},
    {"type": "boolean"},
    {"type": "array", "items": {"type": "string"}},
    {"type": "array", "items": {"type": "integer", "minimum": 2}},
    {"type": "object", "properties": {"k": {"type": "integer"}}},
    {
        "type": "object",
        "properties": {"k": {"type": "string", "enum": ["x"]}, "l": {"type": "integer"}},
        "required": ["k"],
    },
]
DATA: list[Any] = [
    1,
    7,
    -1,
    2.0,
    "x",
    "z",
    True,
    ["x"],
    [1, 2],
    [2, 3],
    [],
    {"k": 1},
    {"k": "x"},
    {"k": "x", "l": 2},
    {"k": "x", "m": 1},
    {},
    {"l": 1},
    [["x"]],
    None,
    {"k": ["x"]},
]
NUMBERS: list[Any] = [0, 1, 3, 5, 9, 10, 2.0, 2.5, -1]
WORDS = ["ls", "git", "-l", "log", "commit", "5", "x", ""]


class Word(str):
    """A word that is written without quotes: any, and the ... of an argv."""

    __slots__ = ()


ANY, REST = Word("any"), Word("...")


def write(value: Value) -> str:
    """Write a value in the flow style of YAML."""
    if isinstance(value, dict):
        table = cast("dict[str, Value]", value)
        return (
            "{"
            + ", ".join(f"{json.dumps(key)}: {write(item)}" for key, item in table.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(write, cast("list[Value]", value))) + "]"
    return str(value) if isinstance(value, Word) else json.dumps(str(value), ensure_ascii=False)


def some(random: Random, pool: Sequence[Any], most: int = 3) -> list[Any]:
    return random.sample(pool, random.randint(1, min(most, len(pool))))


def listing(form: str, pool: Sequence[str]) -> Callable[[Random], Matching]:
    def make(random: Random) -> Matching:
        excluded = some(random, pool, 2) if random.random() < 0.3 else None
        free = form in ("host", "email") and random.random() < 0.2
        return Matching(form, "any" if free else some(random, pool), excluded)

    return make


def literal(pool: Sequence[Any]) -> Callable[[Random], Matching]:
    return lambda random: Matching("in", [str(item) for item in some(random, pool)])


def argv(random: Random) -> Matching:
    elements: list[Any] = [random.choice(["ls", "git"])]
    for _ in range(random.randrange(3)):
        elements.append(
            random.choice(
                [
                    *["log", "-l", "commit"],
                    Matching("any"),
                    Matching("in", some(random, ["log", "commit", "-l"])),
                    Matching("range", (1, 7)),
                    Matching("text", 2),
                ]
            )
        )
    return Matching("argv", [*elements, "..."] if random.random() < 0.5 else elements)


def numbers(random: Random) -> Matching:
    low = random.randint(-1, 5)
    return Matching("range", (low, low + random.randint(0, 6)))


# What an argument may be matched by, and what it may hold. No argument is of two kinds.
ARGUMENTS: Mapping[str, tuple[list[Callable[[Random], Matching]], Sequence[Any]]] = {
    "a": (
        [
            literal(TEXTS),
            lambda r: Matching("text", r.randint(0, 3)),
            listing("regex", EXPRESSIONS),
        ],
        TEXTS,
    ),
    "n": ([literal([0, 1, 3, 5, "1.0", "2.50", "1e1", "-0"]), numbers], NUMBERS),
    "p": ([listing("path", PATH_PATTERNS)], PATHS),
    "u": ([listing("url", URL_PATTERNS)], URLS),
    "h": ([listing("host", HOST_PATTERNS)], HOSTS),
    "m": ([listing("email", MAIL_PATTERNS)], MAILS),
    "j": ([lambda r: Matching("json", r.choice(SHAPES))], DATA),
}
OURS: Mapping[str, Mapping[str, tuple[list[Callable[[Random], Matching]], Sequence[Any]]]] = {
    "fs.read": {"path": ARGUMENTS["p"]},
    "http.get": {"url": ARGUMENTS["u"]},
    "shell.run": {
        "argv": ([argv], []),
        "cwd": ([listing("path", PATH_PATTERNS)], ["/srv/space", "/srv/space", "/srv/space/src"]),
    },
}


def matching(random: Random, makers: Sequence[Callable[[Random], Matching]]) -> Matching:
    return Matching("any") if random.random() < 0.2 else random.choice(list(makers))(random)


def condition(random: Random, names: Sequence[str], depth: int = 2) -> Value:
    """Return a condition that is well typed where types are known."""
    if depth and random.random() < 0.5:
        sign = random.choice(["and", "or", "not"])
        count = 1 if sign == "not" else 2
        return (sign, *(condition(random, names, depth - 1) for _ in range(count)))
    texts = [name for name in names if name in ("call.a", "call.h")]
    text = ("fact", random.choice([*texts, "session.caller", "session.role", "time.weekday"]))
    counts = [name for name in names if name == "call.n"]
    number = (
        "fact",
        random.choice([*counts, "session.calls", "session.denied", "time.hour"]),
    )
    words = {"time.weekday": ["mon", "sun"], "session.role": [*ROLES, "none"]}
    pool = words.get(text[1], ["x", "y", "ann", "x.example"])
    choice = random.randrange(4)
    if choice == 0:
        return (random.choice(["==", "!="]), text, ("literal", random.choice(pool)))
    if choice == 1:
        return ("in", text, ("literal", some(random, pool)))
    if choice == 2 and names:
        of = ("len", ("fact", random.choice(["call.a", "call.j"])))
        return (random.choice(["==", "<", ">"]), of, ("literal", random.randint(0, 3)))
    return (random.choice(["<", "<=", ">", ">=", "=="]), number, ("literal", random.randint(0, 9)))


def write_condition(said: Value) -> str:
    sign, *operands = said
    if sign == "literal":
        return json.dumps(operands[0])
    if sign == "fact":
        return str(operands[0])
    inner = [write_condition(operand) for operand in operands]
    if sign in ("not", "len"):
        return f"{sign} ({inner[0]})"
    return (
        f"({inner[0]}) {sign} ({inner[1]})"
        if sign in ("and", "or")
        else f"{inner[0]} {sign} {inner[1]}"
    )


def rule(random: Random, name: str, tool: str, effects: Sequence[str]) -> Written:
    effect = random.choice(effects)
    arguments: dict[str, Matching] | None = None
    makers = OURS.get(DENY_WILD.get(tool, tool))
    if random.random() < 0.85 and tool != "*.run":
        arguments = {}
        for key in some(random, list(makers or ARGUMENTS), 2):
            arguments[key] = matching(random, (makers or ARGUMENTS)[key][0])
        if makers and effect != "deny":  # what every call has must be named
            first = next(iter(makers))
            arguments.setdefault(first, matching(random, makers[first][0]))
    # A condition may only name arguments that the tool has.
    named = [] if tool in OURS or tool in DENY_WILD else ["call.a", "call.h", "call.n", "call.j"]
    rest = arguments is not None and effect != "deny" and random.random() < 0.4
    optional: dict[str, Matching] = {}
    if arguments and effect != "deny" and not makers and not rest and random.random() < 0.3:
        for key in some(random, [key for key in ARGUMENTS if key not in arguments], 2):
            optional[key] = matching(random, ARGUMENTS[key][0])
    return Written(
        id=name,
        optional=optional,
        effect=effect,
        arguments=arguments,
        rest=rest,
        when=condition(random, named) if random.random() < 0.25 else None,
        rate=random.randint(1, 9) if effect != "deny" and random.random() < 0.3 else None,
    )


def rules(random: Random, prefix: str) -> dict[str, list[Written]]:
    """Return the rules of one part of a policy."""
    tools: dict[str, list[Written]] = {}
    for name in some(random, [*THIRD, *WILD, *OURS, *DENY_WILD], 7):
        effects = ["deny"] if name in DENY_WILD else ["allow", "allow", "allow", "ask", "deny"]
        tools[name] = [
            rule(random, f"{prefix}{name.replace('*', 'X')}.{at}", name, effects)
            for at in range(random.randint(1, 4))
        ]
    return tools


def policy(random: Random) -> Plain:
    """Return a policy; some have roles, and some roles narrow others."""
    roles: dict[str, Plain] = {}
    if random.random() < 0.4:
        for name in some(random, ROLES[:2], 2):
            roles[name] = Plain(rules(random, f"{name}."))
        roles["small"] = Plain(rules(random, "small."), narrows=random.choice(list(roles)))
        roles["smaller"] = Plain(rules(random, "smaller."), narrows="small")
    return Plain(rules(random, ""), roles=roles)


def write_policy(plain: Plain) -> bytes:
    """Write the file."""
    tree: dict[str, Any] = {"version": Word("1"), "tools": write_tools(plain)}
    if plain.roles:
        tree["roles"] = {
            name: write_tools(part) | ({"narrows": part.narrows} if part.narrows else {})
            for name, part in plain.roles.items()
        }
    return (write(tree) + "\n").encode()


def write_tools(plain: Plain) -> dict[str, Any]:
    return {name: [write_rule(one) for one in listed] for name, listed in plain.tools.items()}


def write_rule(one: Written) -> dict[str, Any]:
    arguments: Value = ANY
    if one.arguments is not None:
        arguments = {name: write_matching(found) for name, found in one.arguments.items()}
        if one.rest:
            arguments["rest"] = ANY
    found: dict[str, Any] = {one.effect: arguments, "id": one.id}
    if one.optional:
        found["optional"] = {name: write_matching(item) for name, item in one.optional.items()}
    if one.when is not None:
        found["when"] = write_condition(one.when)
    if one.rate is not None:
        found["rate"] = f"{one.rate}/h"
    return found


def write_matching(found: Matching) -> Value:
    listed = found.listed
    if found.form == "any":
        return ANY
    if found.form == "argv":
        elements = [
            REST if x == "..." else write_matching(x) if isinstance(x, Matching) else x
            for x in listed
        ]
        return {"argv": elements}
    if found.form == "text":
        return {"text": {"max": f"{listed}B"}}
    if found.form == "range":
        return {"range": list(listed)}
    if found.form == "regex":
        # One expression each: several are joined here, as the language has one.
        listed = "|".join(f"(?:{pattern})" for pattern in listed)
    written: dict[str, Any] = {found.form: ANY if listed == "any" else listed}
    if found.excluded is not None:
        written["not"] = found.excluded
    return written


def value_of(random: Random, pool: Sequence[Any]) -> Value:
    if random.random() < 0.25:
        return [random.choice(pool) for _ in range(random.choice([0, 1, 2, 2, 3]))]
    return random.choice(pool)


def call(random: Random, plain: Plain) -> Given:
    """Return a call in canonical form; most have the arguments that some rule names."""
    session: dict[str, Any] = {"caller": random.choice(["ann", "bob"]), "origin": "sdk"}
    session |= {"calls": random.randrange(10), "denied": random.randrange(3)}
    part = plain
    if plain.roles and random.random() < 0.7:
        session["role"] = random.choice(list(plain.roles))
        part = plain.roles[session["role"]]
    names = [name for name in part.tools if "*" not in name]
    tool = (
        random.choice(names) if names and random.random() < 0.8 else random.choice([*THIRD, *OURS])
    )
    if tool in OURS:
        arguments = arguments_of_ours(random, tool)
    else:
        rules = part.tools.get(tool) or [one for listed in part.tools.values() for one in listed]
        near = random.choice(rules)
        keys = [key for key in (*(near.arguments or ()), *near.optional) if key in ARGUMENTS]
        keys += some(random, list(ARGUMENTS), 2) if random.random() < 0.3 else []
        arguments = {key: value_of(random, ARGUMENTS[key][1]) for key in keys}
        if random.random() < 0.1:
            arguments["extra"] = random.choice([None, 1, "x"])
    now_ms = CLOCK_MS + random.randrange(14 * 24) * 3_600_000
    return Given(tool, arguments, session, now_ms)


def arguments_of_ours(random: Random, tool: str) -> dict[str, Any]:
    """Return what the signature of one of our tools admits."""
    if tool != "shell.run":
        return {key: random.choice(pool) for key, (_, pool) in OURS[tool].items()}
    words = [random.choice(["ls", "git"]), *random.choices(WORDS, k=random.randint(0, 3))]
    cwd = random.choice(OURS[tool]["cwd"][1])
    content = {"stdin": "x"} if random.random() < 0.2 else {}
    return {"argv": words, "cwd": cwd, **content}


def facts(given: Given) -> Facts:
    """Return the facts as the runtime hands them over."""
    return Facts(now_ms=given.now_ms, **given.session)
