"""Policy step 1: bytes of a policy file become a tree of text with positions.

A strict subset of YAML 1.1 read from the event stream: no anchors, aliases, tags, merges,
directives, duplicate keys or second documents. Every scalar stays text, so `no`, `1e3` and
`0o777` mean what they look like; the field that takes a scalar parses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import yaml

from safeconduct.errors import PolicyError

# LIMIT: a file of 5,000 rules takes about 600 KiB and 100,000 nodes.
MAX_BYTES = 1 << 20
MAX_NODES = 200_000
# LIMIT: no list or map of the language holds more, and each entry may be wrong in its own way.
MAX_ENTRIES = 8192
# LIMIT: the deepest form of the language is 8 levels.
MAX_DEPTH = 16
MAX_SCALAR_CHARACTERS = 4096
# What ends a line, so a comment, for YAML 1.1 but not for YAML 1.2 and most editors (YAML 1.2.2
# section 5.4), and what shows a line in another order (UAX 9): a rule could look like a comment.
_DECEPTIVE = re.compile("\r(?!\n)|[\x85\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_DIRECTIVE = re.compile("(?:\\A|\n)%")


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the file; both count from 1, columns in characters."""

    line: int
    column: int


# A tuple, not a dataclass: a file has one for each word, and this takes a third of the time.
class Scalar(NamedTuple):
    """A text. ``quoted`` tells a literal `"any"` from the word `any`."""

    text: str
    quoted: bool
    position: Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """A list."""

    items: tuple[Node, ...]
    position: Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A map; keys are unique."""

    entries: dict[str, tuple[Scalar, Node]]
    position: Position


Node: TypeAlias = Scalar | Items | Table
Data: TypeAlias = "str | list[Data] | dict[str, Data]"


class _Open:
    """A list or map whose end has not been read."""

    __slots__ = ("entries", "is_table", "items", "key", "position")

    def __init__(self, position: Position, is_table: bool) -> None:
        self.position = position
        self.is_table = is_table
        self.items: list[Node] = []
        self.entries: dict[str, tuple[Scalar, Node]] = {}
        self.key: Scalar | None = None


def parse_syntax(data: bytes, *, name: str) -> Node:
    """Parse the bytes of a policy file; PolicyError says where and what to write instead."""
    text = _decode(data, name)
    _refuse_deceptive(text, name)
    _refuse_directive(text, name)
    builder = _Builder(name)
    try:
        for event in _events(text):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        raise PolicyError(
            f"not valid YAML: {error.problem or 'syntax error'}",
            file=name,
            line=line,
            column=column,
            code="policy.syntax",
            hint="check the indentation, the brackets and the quotes on this line",
        ) from error
    except yaml.YAMLError as error:
        raise PolicyError(
            "not valid YAML: a character that YAML does not allow",
            file=name,
            code="policy.syntax",
            hint="remove control characters from the file",
        ) from error
    return builder.finish()


def to_data(node: Node) -> Data:
    """Drop the positions. INVARIANT: depth is bounded by MAX_DEPTH, so this may recurse."""
    if isinstance(node, Scalar):
        return node.text
    if isinstance(node, Items):
        return [to_data(item) for item in node.items]
    return {key: to_data(value) for key, (_, value) in node.entries.items()}


def _decode(data: bytes, name: str) -> str:
    def refuse(message: str, hint: str, line: int = 0, column: int = 0) -> PolicyError:
        return PolicyError(
            message, file=name, line=line, column=column, code="policy.syntax", hint=hint
        )

    if len(data) > MAX_BYTES:
        raise refuse(f"the file is larger than {MAX_BYTES} bytes", "split it or use wider patterns")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise refuse(
            "the file is not UTF-8", "save it as UTF-8", before.count(b"\n") + 1, column
        ) from error
    if text.startswith("\ufeff"):
        raise refuse("the file begins with a byte order mark", "save it as UTF-8 without BOM", 1, 1)
    return text


def _refuse_deceptive(text: str, name: str) -> None:
    """Refuse a file that says one thing to who reads it and another to the parser."""
    if text.isascii() and "\r" not in text:
        return  # as nearly all are
    found = _DECEPTIVE.search(text)
    if found is None:
        return
    raise PolicyError(
        f"the character U+{ord(found[0]):04X} makes lines look like others than they are",
        file=name,
        line=text.count("\n", 0, found.start()) + 1,
        column=found.start() - text.rfind("\n", 0, found.start()),
        code="policy.syntax",
        hint="end lines with a line feed; in double quotes, write it by its number, as \\u2028",
    )


def _refuse_directive(text: str, name: str) -> None:
    """Refuse a line that begins with %. The parser would hold each `%TAG` against all before it."""
    found = _DIRECTIVE.search(text)
    if found is not None:
        line = text.count("\n", 0, found.end()) + 1
        message, hint = "directives are not allowed", "remove the % line"
        raise PolicyError(message, file=name, line=line, column=1, code="policy.syntax", hint=hint)


def _events(text: str) -> Iterator[yaml.Event]:
    # The C parser is 10 times faster; both yield the same events for what the subset admits.
    loader: type[yaml.CLoader | yaml.Loader]
    loader = yaml.CLoader if yaml.__with_libyaml__ else yaml.Loader
    # Only events are read: nothing is constructed, so no tag can name a Python type.
    return iter(yaml.parse(text, Loader=loader))


def _place(event: yaml.Event) -> Position:
    mark = event.start_mark
    return Position(mark.line + 1, mark.column + 1) if mark else Position(0, 0)


class _Builder:
    """Build the tree from events without recursion."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stack: list[_Open] = []
        self._root: Node | None = None
        self._nodes = 0
        self._documents = 0
        self._words: dict[str, str] = {}

    def finish(self) -> Node:
        if self._root is None:
            raise self._error(Position(1, 1), "the file is empty", "start it with: version: 1")
        return self._root

    def take(self, event: yaml.Event) -> None:
        # The most frequent ones first.
        if isinstance(event, yaml.ScalarEvent):
            self._add_scalar(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._close()
        elif isinstance(event, yaml.CollectionStartEvent):
            self._open(event)
        elif isinstance(event, yaml.DocumentStartEvent):
            self._start_document(event, _place(event))
        elif isinstance(event, yaml.AliasEvent):
            raise self._error(_place(event), "aliases are not allowed", "write the value out")

    def _open(self, event: yaml.CollectionStartEvent) -> None:
        position = self._admit(event)
        if len(self._stack) >= MAX_DEPTH:
            raise self._error(position, "nested too deep", f"use at most {MAX_DEPTH} levels")
        self._stack.append(_Open(position, isinstance(event, yaml.MappingStartEvent)))

    def _error(self, position: Position, message: str, hint: str) -> PolicyError:
        return PolicyError(
            message,
            file=self._name,
            line=position.line,
            column=position.column,
            code="policy.syntax",
            hint=hint,
        )

    def _start_document(self, event: yaml.DocumentStartEvent, position: Position) -> None:
        self._documents += 1
        if self._documents > 1:
            raise self._error(position, "a second document", "keep one document per file")
        if event.version or event.tags:
            raise self._error(position, "directives are not allowed", "remove the % line")

    def _admit(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> Position:
        """Count a node that carries nothing but its value, and say where it stands."""
        mark = event.start_mark
        position = Position(mark.line + 1, mark.column + 1) if mark else Position(0, 0)
        if event.anchor is not None:
            raise self._error(position, "anchors are not allowed", "write the value out")
        if event.tag is not None:
            raise self._error(position, "tags are not allowed", "remove the ! word")
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._error(position, f"more than {MAX_NODES} values", "use wider patterns")
        return position

    def _add_scalar(self, event: yaml.ScalarEvent) -> None:
        position = self._admit(event)
        text = event.value
        if len(text) > MAX_SCALAR_CHARACTERS:
            hint = f"use at most {MAX_SCALAR_CHARACTERS} characters"
            raise self._error(position, "a text is too long", hint)
        # The same few words come thousands of times: one object each.
        text = self._words.setdefault(text, text)
        scalar = Scalar(text, bool(event.style), position)
        top = self._stack[-1] if self._stack else None
        if top is None or not top.is_table or top.key is not None:
            self._attach(scalar)
            return
        if text == "<<" and not scalar.quoted:
            raise self._error(position, "merge keys are not allowed", "write the keys out")
        if text in top.entries:
            first = top.entries[text][0].position.line
            message = f"the key {text!r} is there twice (first on line {first})"
            raise self._error(position, message, "keep one of the two")
        top.key = scalar

    def _attach(self, node: Node) -> None:
        if not self._stack:
            self._root = node
            return
        top = self._stack[-1]
        if len(top.items) >= MAX_ENTRIES or len(top.entries) >= MAX_ENTRIES:
            hint = "use wider patterns"
            raise self._error(node.position, f"more than {MAX_ENTRIES} values in one place", hint)
        if not top.is_table:
            top.items.append(node)
        elif top.key is None:
            raise self._error(node.position, "a key must be a text", "use a plain word as key")
        else:
            top.entries[top.key.text] = (top.key, node)
            top.key = None

    def _close(self) -> None:
        done = self._stack.pop()
        if done.is_table:
            self._attach(Table(entries=done.entries, position=done.position))
        else:
            self._attach(Items(items=tuple(done.items), position=done.position))


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed file that can say where a part of it stands."""

    name: str
    root: Node

    def node(self, loc: tuple[int | str, ...]) -> Node:
        """Return the deepest node on the way to ``loc``; steps that lead nowhere are skipped."""
        node = self.root
        for step in loc:
            if isinstance(node, Table) and isinstance(step, str) and step in node.entries:
                node = node.entries[step][1]
            elif isinstance(node, Items) and isinstance(step, int) and step < len(node.items):
                node = node.items[step]
        return node

    def key(self, loc: tuple[int | str, ...]) -> Position:
        """Return where the key at the end of ``loc`` stands, else where its value does."""
        parent = self.node(loc[:-1])
        last = loc[-1] if loc else None
        if isinstance(parent, Table) and isinstance(last, str) and last in parent.entries:
            return parent.entries[last][0].position
        return self.node(loc).position

    def error(
        self, position: Position, message: str, *, hint: str, code: str = "policy.invalid"
    ) -> PolicyError:
        """Make the error that points at ``position``."""
        return PolicyError(
            message,
            file=self.name,
            line=position.line,
            column=position.column,
            code=code,
            hint=hint,
        )
