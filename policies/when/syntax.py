"""Policy step 2d: the text of a `when` condition becomes its parts. One pass, no backtracking.

    condition  = negation, { "and", negation } | negation, { "or", negation }
    negation   = [ "not" ], comparison
    comparison = operand, [ sign, operand ]
    sign       = "==" | "!=" | "<" | "<=" | ">" | ">=" | "in" | "not", "in"
    operand    = literal | list | fact | "(", condition, ")" | "len", "(", condition, ")"
               | "default", "(", fact, ",", literal, ")"
    list       = "[", literal, { ",", literal }, "]"
    fact       = ( "call" | "session" | "time" ), { ".", name | "[", text, "]" }

`and` beside `or` needs parentheses: a condition means what everybody reads in it. What types are
known are checked here, so that a condition that can never be answered is an error of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NoReturn

from safeconduct.call import Json

from .nodes import Compare, Default, Fact, Joined, Length, Literal, Member, Node, Not, Type
from .tokens import Token, WhenSyntaxError, read_tokens, unquote

MAX_DEPTH: Final = 16
MAX_PATH: Final = 8

WEEKDAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_KNOWN: Final[Mapping[tuple[str, str], Type]] = MappingProxyType(
    {
        ("session", "role"): Type.TEXT,
        ("session", "caller"): Type.TEXT,
        ("session", "origin"): Type.TEXT,
        ("session", "calls"): Type.NUMBER,
        ("session", "denied"): Type.NUMBER,
        ("time", "hour"): Type.NUMBER,
        ("time", "weekday"): Type.TEXT,
    }
)
_VALUES: Final[Mapping[tuple[str, ...], frozenset[Json]]] = MappingProxyType(
    {("time", "hour"): frozenset(range(24)), ("time", "weekday"): frozenset(WEEKDAYS)}
)
_WORDS: Final[Mapping[str, Json]] = MappingProxyType({"true": True, "false": False, "null": None})
_ORDER: Final = frozenset({"<", "<=", ">", ">="})
_COMPARISONS: Final = _ORDER | {"==", "!=", "in", "not"}


def parse_when(text: str) -> tuple[Node, frozenset[str]]:
    """Parse a condition; return it with the arguments of the Call that it names.

    Raise WhenSyntaxError, a ValueError, which says where and what is wrong.
    """
    parser = _Parser(read_tokens(text))
    node = parser.condition(1)
    parser.expect_end()
    if node.type not in (Type.BOOLEAN, Type.UNKNOWN):
        raise WhenSyntaxError(f"a condition is true or false, not a {node.type}", 1)
    if not parser.facts:
        raise WhenSyntaxError("it names nothing of the call, the session or the time", 1)
    return node, frozenset(fact.path[1] for fact in parser.facts if fact.path[0] == "call")


class _Parser:
    """LL(1): each token is read once. LIMIT: recursion ends at MAX_DEPTH."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._at = 0
        self.facts: list[Fact] = []

    @property
    def _next(self) -> Token:
        return self._tokens[self._at]

    def _take(self) -> Token:
        token = self._tokens[self._at]
        if token.kind != "end":
            self._at += 1
        return token

    def _sees(self, word: str) -> bool:
        return self._next.kind in ("name", "sign") and self._next.text == word

    def _accept(self, word: str) -> bool:
        if not self._sees(word):
            return False
        self._take()
        return True

    def _expect(self, word: str) -> None:
        if not self._accept(word):
            self._fail(f"expected {word}")

    def _fail(self, message: str, token: Token | None = None) -> NoReturn:
        token = token or self._next
        found = f", found {token.text!r}" if token.text else ", found the end"
        raise WhenSyntaxError(message + found, token.position)

    def expect_end(self) -> None:
        """Refuse anything after the condition."""
        if self._next.kind != "end":
            self._fail("expected the end, and, or, or a comparison")

    def condition(self, depth: int) -> Node:
        """Read negations that are joined by one word."""
        if depth > MAX_DEPTH:
            self._fail(f"nested deeper than {MAX_DEPTH}")
        first = self._next
        operands = [self._negation(depth)]
        word = self._next.text if self._sees("and") or self._sees("or") else ""
        if not word:
            return operands[0]
        self._boolean(operands[0], first)
        while self._accept(word):
            first = self._next
            operands.append(self._negation(depth))
            self._boolean(operands[-1], first)
        if self._sees("and") or self._sees("or"):
            self._fail("and beside or needs parentheses")
        return Joined(tuple(operands), word == "and")

    def _negation(self, depth: int) -> Node:
        if not self._accept("not"):
            return self._comparison(depth)
        first = self._next
        operand = self._comparison(depth)
        self._boolean(operand, first)
        return Not(operand)

    def _comparison(self, depth: int) -> Node:
        left = self._operand(depth)
        sign = self._next
        if sign.kind not in ("sign", "name") or sign.text not in _COMPARISONS:
            return left
        self._take()
        negated = sign.text == "not"
        if negated:
            self._expect("in")
        right = self._operand(depth)
        if self._next.kind in ("sign", "name") and self._next.text in _COMPARISONS:
            self._fail("comparisons are not chained; join them with and")
        _check_values(left, right, sign)
        if negated or sign.text == "in":
            _check_member(left, right, sign)
            return Member(left, right, negated)
        _check_compare(left, right, sign)
        return Compare(sign.text, left, right)

    def _operand(self, depth: int) -> Node:
        token = self._next
        if token.kind in ("number", "text") or (token.kind == "name" and token.text in _WORDS):
            return self._literal()
        if token.kind == "name":
            return self._named(depth)
        if self._accept("("):
            inner = self.condition(depth + 1)
            self._expect(")")
            return inner
        if self._accept("["):
            return self._list(token)
        self._fail("expected a value")

    def _literal(self) -> Literal:
        token = self._take()
        if token.kind == "text":
            return Literal(unquote(token), Type.TEXT)
        if token.kind == "number":
            plain = "." not in token.text
            return Literal(int(token.text) if plain else float(token.text), Type.NUMBER)
        if token.kind != "name" or token.text not in _WORDS:
            self._fail("expected a text, a number, true, false or null", token)
        value = _WORDS[token.text]
        return Literal(value, Type.NULL if value is None else Type.BOOLEAN)

    def _list(self, opening: Token) -> Literal:
        values = [self._literal()]
        while self._accept(","):
            values.append(self._literal())
        self._expect("]")
        if any(value.type is Type.NULL for value in values):
            self._fail("null is compared with == or !=, not listed", opening)
        if len({value.type for value in values}) > 1:
            self._fail("the values of a list are of one type", opening)
        return Literal(tuple(value.value for value in values), Type.LIST)

    def _named(self, depth: int) -> Node:
        token = self._take()
        if token.text == "len":
            self._expect("(")
            operand = self.condition(depth + 1)
            self._expect(")")
            if operand.type in (Type.NUMBER, Type.BOOLEAN, Type.NULL):
                self._fail(f"a {operand.type} has no length", token)
            return Length(operand)
        if token.text == "default":
            return self._default(token)
        return self._fact(token)

    def _default(self, name: Token) -> Default:
        self._expect("(")
        fact = self._fact(self._take())
        self._expect(",")
        literal = self._literal()
        self._expect(")")
        if fact.type not in (Type.UNKNOWN, literal.type):
            self._fail(f"{'.'.join(fact.path)} is a {fact.type}, not a {literal.type}", name)
        return Default(fact, literal)

    def _fact(self, root: Token) -> Fact:
        if root.kind != "name" or root.text not in ("call", "session", "time"):
            self._fail("expected call., session. or time.", root)
        path = [root.text]
        while self._sees(".") or self._sees("["):
            bracket = self._take().text == "["
            step = self._take()
            if step.kind != ("text" if bracket else "name"):
                self._fail("expected a name", step)
            path.append(unquote(step) if bracket else step.text)
            if bracket:
                self._expect("]")
        if not 1 < len(path) <= MAX_PATH:
            self._fail(f"a fact has 1 to {MAX_PATH - 1} names after {root.text}", root)
        known = Type.UNKNOWN if root.text == "call" else _KNOWN.get((path[0], ".".join(path[1:])))
        if known is None:
            listed = ", ".join(".".join(name) for name in _KNOWN if name[0] == root.text)
            self._fail(f"there is no {'.'.join(path)}; there is {listed}", root)
        fact = Fact(tuple(path), known)
        self.facts.append(fact)
        return fact

    def _boolean(self, node: Node, token: Token) -> None:
        if node.type not in (Type.BOOLEAN, Type.UNKNOWN):
            self._fail(f"a {node.type} is neither true nor false", token)


def _check_compare(left: Node, right: Node, sign: Token) -> None:
    types = {left.type, right.type} - {Type.UNKNOWN}
    if sign.text in _ORDER:
        if types - {Type.NUMBER}:
            message = f"only numbers have an order, not a {min(types - {Type.NUMBER})}"
            raise WhenSyntaxError(message, sign.position)
        return
    if types & {Type.LIST}:
        raise WhenSyntaxError("a list is not compared; use in or len", sign.position)
    if len(types) > 1:
        one, other = sorted(types)
        raise WhenSyntaxError(f"a {one} is never compared with a {other}", sign.position)


def _check_member(item: Node, container: Node, sign: Token) -> None:
    if container.type not in (Type.LIST, Type.UNKNOWN):
        raise WhenSyntaxError(f"in looks into a list, not a {container.type}", sign.position)
    if item.type is Type.LIST:
        raise WhenSyntaxError("a list is not an element", sign.position)
    if isinstance(container, Literal) and isinstance(container.value, tuple):
        inner = Literal(container.value[0], _literal_type(container.value[0]))
        if Type.UNKNOWN is not item.type is not inner.type:
            message = f"a {item.type} is never compared with a {inner.type}"
            raise WhenSyntaxError(message, sign.position)


def _literal_type(value: Json) -> Type:
    if isinstance(value, str):
        return Type.TEXT
    if value is None:
        return Type.NULL
    return Type.BOOLEAN if isinstance(value, bool) else Type.NUMBER


def _check_values(left: Node, right: Node, sign: Token) -> None:
    """Refuse a text or number that a fact never is: `time.weekday == "Monday"`."""
    for node, other in ((left, right), (right, left)):
        fact = node.fact if isinstance(node, Default) else node
        possible = _VALUES.get(fact.path) if isinstance(fact, Fact) else None
        if possible is None or not isinstance(other, Literal) or sign.text in _ORDER:
            continue
        listed = other.value if isinstance(other.value, tuple) else (other.value,)
        for value in listed:
            if value not in possible:
                message = f"it is never {value!r}; it is one of {sorted(map(str, possible))}"
                raise WhenSyntaxError(message, sign.position)
