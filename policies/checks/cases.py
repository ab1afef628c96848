"""Policy tests, step 1: the file `policy.test.yaml` beside a policy becomes Cases.

The same strict YAML as a policy. A list of cases, or `{files: […], tests: […]}`; `files` are what
the workspace holds while they run: `name`, `folder/`, or `{link: name, to: target}`.
Arguments are read as JSON would be: a bare number, true, false and null are what they say, every
other text and all that is quoted is text, and so is all that a tool of ours takes as text. `$WS` at
the start of a text is the workspace.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from safeconduct.call import Effect, Facts, Json
from safeconduct.errors import PolicyError
from safeconduct.policies.language import did_you_mean
from safeconduct.policies.signatures import BUILT_IN, Kind
from safeconduct.policies.syntax import (
    MAX_BYTES,
    Items,
    Node,
    Position,
    Scalar,
    Source,
    Table,
    parse_syntax,
)

SUFFIX: Final = ".test.yaml"
# LIMIT: cases of one file, and names in its workspace.
MAX_CASES: Final = 4096
MAX_FILES: Final = 4096
_JSON_WORD: Final = re.compile(r"true|false|null|-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?", re.ASCII)
_NOT_TEXT: Final = frozenset({Kind.INTEGERS, Kind.RESOURCES, Kind.JSON, Kind.NUMBER, Kind.SCALAR})
_CASE: Final = ("name", "role", "call", "expect", "rule", "code", "facts")
_FACTS: Final = ("caller", "origin", "calls", "denied", "time")
# One morning, so that a test that names no time has one all the same: Monday 2026-01-05, 10:00.
MORNING_MS: Final = 1_767_607_200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A symbolic link in the workspace of the tests."""

    name: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call and what must come of it. ``rule`` must be among those that decide."""

    name: str
    tool: str
    arguments: Mapping[str, Json]
    expect: Effect
    rule: str | None = None
    code: str | None = None
    role: str | None = None
    facts: Facts = field(default_factory=lambda: Facts(now_ms=MORNING_MS))
    position: Position = field(default=Position(0, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """A test file. ``files`` is None where it does not say what the workspace holds."""

    file: str
    cases: tuple[Case, ...]
    files: tuple[str | Link, ...] | None = None


def beside(policy: Path) -> Path:
    """Return where the tests of a policy file are: `policy.test.yaml` beside `policy.yaml`."""
    return policy.with_name(policy.stem + SUFFIX)


def read_cases(path: Path) -> Cases:
    """Read a test file; PolicyError ``test.*`` says what is wrong and where."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with os.fdopen(fd, "rb") as file:
            data = file.read(MAX_BYTES + 1) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError as error:
        raise PolicyError(
            f"cannot be read: {error.strerror}",
            file=str(path),
            code="test.unreadable",
            hint="write the policy's tests there: [{name: …, call: …, expect: allow}]",
        ) from error
    if data is None:
        hint = "tests are a plain file"
        raise PolicyError("not a regular file", file=str(path), code="test.unreadable", hint=hint)
    return parse_cases(data, name=str(path))


def parse_cases(data: bytes, *, name: str) -> Cases:
    """Parse the bytes of a test file; PolicyError says where it is wrong."""
    return _Reader(Source(name, parse_syntax(data, name=name))).read()


class _Reader:
    """Read one test file."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def read(self) -> Cases:
        root = self._source.root
        files: tuple[str | Link, ...] | None = None
        if isinstance(root, Table):
            entries = self._entries(root, ("files", "tests"))
            if "files" in entries:
                files = tuple(self._file(one) for one in self._items(entries["files"], MAX_FILES))
            root = self._needed(entries, "tests", root)
        cases = tuple(self._case(one) for one in self._items(root, MAX_CASES))
        names: set[str] = set()
        for case in cases:
            if case.name in names:
                raise self._error(case.position, "two cases have this name", "name each once")
            names.add(case.name)
        return Cases(file=self._source.name, cases=cases, files=files)

    def _error(self, position: Position, message: str, hint: str) -> PolicyError:
        return self._source.error(position, message, hint=hint, code="test.invalid")

    def _entries(self, node: Node, keys: tuple[str, ...]) -> dict[str, Node]:
        if not isinstance(node, Table):
            raise self._error(node.position, "expected a map", f"its keys are {', '.join(keys)}")
        for key, (scalar, _) in node.entries.items():
            if key not in keys:
                hint = did_you_mean(key, keys)
                raise self._error(scalar.position, f"unknown key {key!r}", hint)
        return {key: value for key, (_, value) in node.entries.items()}

    def _needed(self, entries: Mapping[str, Node], key: str, node: Node) -> Node:
        if key not in entries:
            raise self._error(node.position, f"the key {key!r} is missing", "add it")
        return entries[key]

    def _items(self, node: Node, most: int) -> tuple[Node, ...]:
        if not isinstance(node, Items) or len(node.items) > most:
            message = f"expected a list of at most {most}"
            raise self._error(node.position, message, "write for example [a, b]")
        return node.items

    def _text(self, node: Node) -> str:
        if not isinstance(node, Scalar):
            raise self._error(node.position, "expected a text", "write one word, or quote it")
        return node.text

    def _file(self, node: Node) -> str | Link:
        if isinstance(node, Scalar):
            return self._inside(node.text, node.position)
        entries = self._entries(node, ("link", "to"))
        name = self._needed(entries, "link", node)
        target = self._text(self._needed(entries, "to", node))
        return Link(name=self._inside(self._text(name), name.position), target=target)

    def _inside(self, name: str, position: Position) -> str:
        parts = name.removesuffix("/").split("/")
        if not {"", ".", ".."}.isdisjoint(parts) or "\0" in name:
            hint = "write for example src/main.py, or docs/ for a folder"
            raise self._error(position, f"{name!r} is not a name in the workspace", hint)
        return name

    def _case(self, node: Node) -> Case:
        entries = self._entries(node, _CASE)
        call_node = self._needed(entries, "call", node)
        call = self._entries(call_node, ("tool", "arguments"))
        tool = self._text(self._needed(call, "tool", call_node))
        arguments = self._arguments(tool, call["arguments"]) if "arguments" in call else {}
        expected = self._needed(entries, "expect", node)
        effect = self._text(expected)
        if effect not in {one.value for one in Effect}:
            hint = "write allow, ask or deny"
            raise self._error(expected.position, f"{effect!r} is no effect", hint)
        texts = {
            key: self._text(entries[key]) for key in ("role", "rule", "code") if key in entries
        }
        return Case(
            name=self._text(self._needed(entries, "name", node)),
            tool=tool,
            arguments=arguments,
            expect=Effect(effect),
            rule=texts.get("rule"),
            code=texts.get("code"),
            role=texts.get("role"),
            facts=self._facts(entries.get("facts"), texts.get("role")),
            position=node.position,
        )

    def _facts(self, node: Node | None, role: str | None) -> Facts:
        if node is None:
            return Facts(role=role, now_ms=MORNING_MS)
        entries = self._entries(node, _FACTS)
        texts = {key: self._text(value) for key, value in entries.items()}
        try:
            counts = [int(texts.get(key, "0")) for key in ("calls", "denied")]
            now_ms = _milliseconds(texts["time"]) if "time" in texts else MORNING_MS
        except (ValueError, OverflowError) as error:
            hint = "write calls: 3, or time: 2026-01-05T10:00:00Z"
            raise self._error(node.position, f"these facts are none: {error}", hint) from error
        return Facts(
            role=role,
            caller=texts.get("caller", "local"),
            origin=texts.get("origin", "sdk"),
            calls=counts[0],
            denied=counts[1],
            now_ms=now_ms,
        )

    def _arguments(self, tool: str, node: Node) -> dict[str, Json]:
        if not isinstance(node, Table):
            hint = "write arguments: {path: a}"
            raise self._error(node.position, "the arguments are a map", hint)
        signature = BUILT_IN.get(tool)
        known = {**signature.as_text.arguments} if signature and signature.as_text else {}
        known |= signature.arguments if signature else {}
        found: dict[str, Json] = {}
        for name, (_, value) in node.entries.items():
            argument = known.get(name)
            # `-3` is a number, but in an argv it can only be a word.
            only_text = argument is not None and argument.kind not in _NOT_TEXT
            found[name] = self._value(value, only_text=only_text)
        return found

    def _value(self, node: Node, *, only_text: bool) -> Json:
        # INVARIANT: parse_syntax bounds the depth, so this may recurse.
        if isinstance(node, Table):
            entries = node.entries.items()
            return {key: self._value(value, only_text=only_text) for key, (_, value) in entries}
        if isinstance(node, Items):
            return [self._value(item, only_text=only_text) for item in node.items]
        if not only_text and not node.quoted and _JSON_WORD.fullmatch(node.text):
            value: Json = json.loads(node.text)
            return value
        return node.text


def _milliseconds(text: str) -> int:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    found = int(moment.timestamp() * 1000)
    if found <= 0:
        raise ValueError("the time is before 1970")
    return found
