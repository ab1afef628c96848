"""Random small policies, matchers and calls over a tiny vocabulary, so that they meet often.

Everything comes from one `random.Random`, so a seed names a case. Policies are written as text,
as people write them. Documents are in canonical form: `decide` takes them without a file system.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safeconduct.call import Document, Json
from safeconduct.errors import PolicyError
from safeconduct.policies import Policy, parse_policy

WORKSPACE = "/ws"
NAMES = ("src", "docs", "a", "b", ".env", "ab")
WORDS = ("git", "push", "log", "-x", "ls", "3")
HOSTS = ("example.org", "api.example.org", "a.api.example.org", "evil.test", "10.0.0.1")
LOCALS = ("ann", "bob", "a")
TEXTS = ("red", "green", "true", "3", "a.b")


class Bare(str):
    """A word that is written without quotes: `any`, `...`."""

    __slots__ = ()


ANY = Bare("any")
REST = Bare("...")
Node = str | Sequence["Node"] | Mapping[str, "Node"]


def write(node: Node) -> str:
    """Write a node in YAML's flow style; every text but a Bare one is quoted."""
    if isinstance(node, Bare):
        return str(node)
    if isinstance(node, str):
        return '"' + node.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(node, Mapping):
        return "{" + ", ".join(f"{write(key)}: {write(node[key])}" for key in node) + "}"
    return "[" + ", ".join(map(write, node)) + "]"


@dataclass(slots=True)
class Generator:
    """Draw policies and calls. ``tools`` says which arguments each tool has, by their form."""

    random: random.Random
    tools: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: TOOLS)
    # Tool names of rules beside those of ``tools``.
    wildcards: Sequence[str] = ("files.*", "*.delete")

    def some(self, draw: Callable[[], Node], most: int = 2) -> list[Node]:
        """Draw one to ``most`` times."""
        return [draw() for _ in range(self.random.randint(1, most))]

    def chance(self, of: float) -> bool:
        """Tell whether something with this probability happens."""
        return self.random.random() < of

    # Patterns and matchers, as they are written.

    def path_pattern(self) -> str:
        """Write a path pattern."""
        start = self.random.choice(("$WS", "$WS", "$WS", "", "**"))
        parts = [
            self.random.choice((*NAMES, "*", "a*", "?", "*b"))
            for _ in range(self.random.randint(0, 2))
        ]
        if self.chance(0.6) or not (parts or start == "$WS"):
            parts.append("**" if start != "**" or parts else "a")
        return "/".join([start, *parts])

    def host_pattern(self) -> str:
        """Write a host pattern."""
        return self.random.choice((*HOSTS, "*.example.org", "**.example.org", "*.*", "**"))

    def url_pattern(self) -> str:
        """Write a URL pattern."""
        scheme = self.random.choice(("https", "https", "http"))
        port = self.random.choice(("", "", "", ":8080"))
        tail = self.random.choice(("**", "a/**", "a", "*", "a/*", "", "a?q=1"))
        return f"{scheme}://{self.host_pattern()}{port}/{tail}"

    def email_pattern(self) -> str:
        """Write a pattern of mail addresses."""
        host = self.random.choice([*(h for h in HOSTS if "0" not in h), "**.example.org", "**"])
        return f"{self.random.choice((*LOCALS, '*', 'a*'))}@{host}"

    def element(self) -> Node:
        """Write one element of an argv."""
        kind = self.random.randint(0, 9)
        if kind < 5:
            return self.random.choice(WORDS)
        if kind < 7:
            return ANY
        if kind == 7:
            return {"range": self.range()}
        if kind == 8:
            return {"path": self.some(self.path_pattern)}
        return {"in": self.some(lambda: self.random.choice(WORDS))}

    def argv(self, *, spelling: bool) -> list[Node]:
        """Write an argv. ``spelling``: it may judge how a path is spelled, which no deny may."""
        elements = self.some(self.element, 3)
        if not spelling:
            elements = [
                x if not (isinstance(x, Mapping) and "path" in x) else ANY for x in elements
            ]
        return [*elements, REST] if self.chance(0.5) else elements

    def range(self) -> list[Node]:
        """Write the ends of a range."""
        low, high = sorted((self.random.randint(-2, 5), self.random.randint(-2, 5)))
        return [str(low), str(high)]

    def regex(self) -> str:
        """Write a regular expression."""
        return self.random.choice(("red|green", "[a-z]+", "a.b", ".*", "[0-9]+"))

    def shape(self, depth: int = 2) -> Node:
        """Write a shape of JSON."""
        kind = self.random.choice(("string", "integer", "object", "array", "any", "number"))
        if kind == "any" or (depth == 0 and kind in ("object", "array")):
            return ANY
        found: dict[str, Node] = {"type": kind}
        if kind in ("integer", "number") and self.chance(0.5):
            low, high = self.range()
            found |= {"minimum": low, "maximum": high}
        elif kind == "string" and self.chance(0.5):
            found["maxLength"] = str(self.random.randint(1, 4))
        elif kind == "string" and self.chance(0.3):
            found["enum"] = self.some(lambda: self.random.choice(TEXTS))
        elif kind == "array":
            found |= {"items": self.shape(depth - 1), "maxItems": str(self.random.randint(0, 3))}
        elif kind == "object":
            names = self.random.sample(("p", "q"), self.random.randint(0, 2))
            found["properties"] = {name: self.shape(depth - 1) for name in names}
            if names and self.chance(0.5):
                found["required"] = names[:1]
            if self.chance(0.4):
                found["rest"] = ANY
        return found

    def matcher(self, form: str, *, deny: bool = False) -> Node:
        """Write a matcher of one form; sometimes `any`, sometimes with `not` beside it."""
        if form != "argv" and self.chance(0.15):
            return ANY
        patterns = {
            "path": self.path_pattern,
            "url": self.url_pattern,
            "email": self.email_pattern,
            "host": self.host_pattern,
        }
        if form in patterns:
            found: dict[str, Node] = {form: self.some(patterns[form])}
            if form in ("email", "host") and self.chance(0.3):
                found[form] = ANY
            if self.chance(0.25):
                found["not"] = self.some(patterns[form])
            return found
        if form == "text":
            form = self.random.choice(("in", "regex", "text"))
        simple: dict[str, Callable[[], Node]] = {
            "argv": lambda: self.argv(spelling=not deny),
            "range": self.range,
            "regex": self.regex,
            "in": lambda: self.some(lambda: self.random.choice(TEXTS)),
            "text": lambda: {"max": f"{self.random.randint(1, 5)}B"},
            "json": self.shape,
        }
        return {form: simple[form]()}

    # Rules and policies.

    def rule(self, tool: str) -> dict[str, Node]:
        """Write a rule of a tool or of a wildcard."""
        effect = self.random.choice(("allow", "allow", "ask", "deny"))
        forms = self.tools.get(tool, {"path": "path"})
        return {
            effect: self._arguments(tool, forms, deny=effect == "deny"),
            **self._options(effect),
        }

    def _arguments(self, tool: str, forms: Mapping[str, str], *, deny: bool) -> Node:
        if self.chance(0.08):
            return ANY
        needed = [name for name in forms if name in REQUIRED.get(tool, ())]
        chosen = [name for name in forms if name in needed or self.chance(0.7)]
        if not chosen:
            chosen = [self.random.choice([*forms])]
        if deny and len(chosen) > 1 and self.chance(0.5):
            chosen = [self.random.choice(chosen)]
        found = {name: self.matcher(forms[name], deny=deny) for name in chosen}
        judges_spelling = "argv" in found and '"path"' in write(found["argv"])
        if judges_spelling:
            found.pop("cwd", None)
        if not judges_spelling and self.chance(0.1 if tool in REQUIRED else 0.2):
            found["rest"] = ANY
        return found

    def _options(self, effect: str) -> dict[str, Node]:
        options: dict[str, Node] = {}
        if effect != "deny" and self.chance(0.5):
            options["profile"] = self.random.choice(("narrow", "wide"))
        if self.chance(0.12):
            options["when"] = self.random.choice(WHENS)
        if effect != "deny" and self.chance(0.12):
            options["rate"] = f"{self.random.randint(1, 3)}/h"
        return options

    def rules(self) -> dict[str, Node]:
        """Write the rules of some tools."""
        named = [*self.tools, *self.wildcards]
        chosen = self.random.sample(named, self.random.randint(1, min(4, len(named))))
        return {
            tool: [self.rule(tool) for _ in range(self.random.randint(1, 4))] for tool in chosen
        }

    def profiles(self) -> dict[str, Node]:
        """Write two profiles, of which one is usually wider."""
        wall = f"{self.random.randint(1, 3)}s"
        wide: dict[str, Node] = {"read": ["$WS/**"], "write": ["$WS/**"], "limits": {"wall": wall}}
        narrow: dict[str, Node] = {"read": [self.random.choice(("$WS/**", "$WS/src/**"))]}
        if self.chance(0.3):
            narrow["hide"] = ["**/.env"]
        return {"narrow": narrow, "wide": wide}

    def roles(self) -> dict[str, Node]:
        """Write one or two roles, of which the second may narrow the first."""
        found: dict[str, Node] = {"coder": self.rules()}
        if self.chance(0.5):
            narrows: dict[str, Node] = {"narrows": "coder"} if self.chance(0.5) else {}
            found["reader"] = {**narrows, **self.rules()}
        return found

    def valid(self, draw: Callable[[], dict[str, Node]]) -> dict[str, Node]:
        """Draw until it loads: what can never match is refused, and draws are blind to that."""
        for _ in range(200):
            found = draw()
            try:
                parse(found)
            except PolicyError:
                continue
            return found
        raise AssertionError("nothing that was drawn loads")

    def spec(self) -> dict[str, Node]:
        """Write a policy that loads as a tree; `mutate` and `write` take it further."""
        return self.valid(self._spec)

    def _spec(self) -> dict[str, Node]:
        found: dict[str, Node] = {"version": "1", "profiles": self.profiles()}
        if self.chance(0.9):
            found["tools"] = self.rules()
        if self.chance(0.2) or "tools" not in found:
            found["roles"] = self.roles()
        return found

    def mutate(self, spec: Mapping[str, Node]) -> dict[str, Node]:
        """Return the policy with one change, as an edit would make it; it loads too."""
        return self.valid(lambda: self._mutate(spec))

    def _mutate(self, spec: Mapping[str, Node]) -> dict[str, Node]:
        found = dict(spec)
        roles, tools = found.get("roles"), found.get("tools")
        if isinstance(roles, Mapping) and (self.chance(0.4) or not tools):
            return {**found, "roles": self._mutate_role(roles)}
        if not isinstance(tools, Mapping) or self.chance(0.1):
            return {**found, "profiles": self.profiles()}
        return {**found, "tools": self._mutate_tools(tools)}

    def _mutate_role(self, roles: Mapping[str, Node]) -> Node:
        if self.chance(0.3):
            return self.roles()
        name = self.random.choice([*roles])
        role = roles[name]
        tools = (
            {k: v for k, v in role.items() if k != "narrows"} if isinstance(role, Mapping) else {}
        )
        narrows = {"narrows": "coder"} if name == "reader" and self.chance(0.5) else {}
        return {**roles, name: {**narrows, **self._mutate_tools(tools)}}

    def _mutate_tools(self, tools: Mapping[str, Node]) -> dict[str, Node]:
        changed: dict[str, Node] = dict(tools)
        tool = self.random.choice([*changed])
        listed = changed[tool]
        rules = list(listed) if isinstance(listed, Sequence) and not isinstance(listed, str) else []
        at = self.random.randrange(len(rules))
        kind = self.random.randint(0, 3)
        if kind == 0:
            rules.insert(at, self.rule(tool))
        elif kind == 1 and len(rules) > 1:
            del rules[at]
        else:
            rules[at] = self.rule(tool)
        return {**changed, tool: rules}

    # Calls.

    def path(self) -> str:
        """Draw a canonical path."""
        depth = self.random.randint(0, 3)
        start = self.random.choice((WORKSPACE, WORKSPACE, WORKSPACE, ""))
        return "/".join([start, *self.random.choices(NAMES, k=depth)]) or "/"

    def value(self, form: str) -> Json:
        """Draw a canonical value of one form."""
        choose = self.random.choice
        draw: dict[str, Callable[[], Json]] = {
            "path": self.path,
            "url": lambda: (
                f"{choose(('https', 'http'))}://{choose(HOSTS)}{choose(('', ':8080'))}/"
                + choose(("", "a", "a/b", "b", "a?q=1"))
            ),
            "email": lambda: f"{choose(LOCALS)}@{choose([h for h in HOSTS if '0' not in h])}",
            "host": lambda: choose(HOSTS),
            "argv": lambda: [
                choose((*WORDS, "src/a", "/ws/docs")) for _ in range(self.random.randint(1, 4))
            ],
            "range": lambda: self.random.randint(-3, 6),
            "text": lambda: choose((*TEXTS, "x", "a\nb")),
            "json": self.json,
        }
        return draw[form]()

    def json(self, depth: int = 2) -> Json:
        """Draw a JSON value."""
        kind = self.random.randint(0, 5 if depth else 3)
        if kind == 4:
            return [self.json(depth - 1) for _ in range(self.random.randint(0, 3))]
        if kind == 5:
            names = self.random.sample(("p", "q", "r"), self.random.randint(0, 3))
            return {name: self.json(depth - 1) for name in names}
        return self.random.choice((*TEXTS, 0, 3, 2.5, 4.0, True, None))

    def shell_text(self) -> Document:
        """Draw shell text in its canonical form: some programs, some of them with redirections."""
        commands: list[Json] = []
        for at in range(self.random.randint(1, 3)):
            argv = self.value("argv")
            redirects: list[Json] = []
            if self.chance(0.3):
                operator = self.random.choice(("<", ">", ">>"))
                redirects.append({"fd": 0, "operator": operator, "target": self.path()})
            join = self.random.choice((";", "&&", "|")) if at else ""
            commands.append({"join": join, "argv": argv, "redirects": redirects})
        arguments: dict[str, Json] = {"command": "as below", "commands": commands, "cwd": WORKSPACE}
        return Document(tool="shell.run", arguments=arguments, workspace=WORKSPACE)

    def document(self, tool: str | None = None) -> Document:
        """Draw a call of a tool in its canonical form: sorted, defaults filled."""
        tool = tool or self.random.choice([*self.tools, "other.delete", "files.other"])
        if tool == "shell.run" and self.chance(0.4):
            return self.shell_text()
        forms = self.tools.get(tool, {"path": "path", "force": "text"})
        required = REQUIRED.get(tool, ())
        values: dict[str, Json] = {
            name: self._value_of(tool, form)
            for name, form in forms.items()
            if name in required or self.chance(0.8)
        }
        if tool not in REQUIRED and self.chance(0.15):
            values["extra"] = "x"
        for name, default in DEFAULTS.get(tool, {}).items():
            values.setdefault(name, default)
        return Document(
            tool=tool, arguments={x: values[x] for x in sorted(values)}, workspace=WORKSPACE
        )

    def _value_of(self, tool: str, form: str) -> Json:
        if tool not in REQUIRED and form not in ("argv", "json") and self.chance(0.15):
            return [self.value(form) for _ in range(self.random.randint(0, 2))]
        return self.value(form)


WHENS = ("session.calls < 3", "time.hour >= 8", 'session.caller == "local"')
TOOLS: Mapping[str, Mapping[str, str]] = {
    "fs.read": {"path": "path"},
    "fs.write": {"path": "path", "content": "text"},
    "shell.run": {"argv": "argv", "cwd": "path", "stdin": "text"},
    "http.get": {"url": "url"},
    "files.read": {"path": "path", "mode": "text"},
    "files.delete": {"path": "path", "count": "range"},
    "mail.send": {"to": "email", "subject": "text", "data": "json"},
    "net.dial": {"host": "host", "url": "url"},
}
# What every call of a tool of ours has. Those that are not listed here have no signature.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "fs.read": ("path",),
    "fs.write": ("path", "content"),
    "shell.run": ("argv",),
    "http.get": ("url",),
}
DEFAULTS: Mapping[str, Mapping[str, Json]] = {"shell.run": {"cwd": WORKSPACE}}


def seeded(seed: int) -> Generator:
    """Return the generator that a seed names."""
    return Generator(random.Random(seed))  # noqa: S311 - tests, not keys


def parse(spec: Mapping[str, Node]) -> Policy:
    """Compile a drawn policy for the workspace of the drawn documents."""
    return parse_policy(write(spec).encode(), name="drawn.yaml", workspace=Path(WORKSPACE))
