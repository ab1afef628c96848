"""Policy matching: the shape of a structured value. A small, total subset of JSON Schema.

A shape names one type. Objects are closed: a property that is not named does not match, unless
the shape says `rest: any`. Every word of a shape arrives as text and is parsed by its field.
Duplicate keys cannot occur: `decode_arguments` refuses them before anything is judged.

A shape that restricts (ask, deny) matches whatever may be meant (shapes.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

from safeconduct.call import Json

from .match import parse_integer
from .shapes import Form, Type, describe_form
from .signatures import Kind
from .syntax import Data

__all__ = ["Form", "Shape", "ShapeError", "Type", "compile_shape"]

# LIMIT: a policy file nests 16 deep (syntax.MAX_DEPTH); a shape begins 6 levels down.
MAX_SHAPE_DEPTH: Final = 8
MAX_SHAPE_NODES: Final = 1024
MAX_SHAPE_WORDS: Final = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """`json`: the value has the shape, judged as one value even where it is a list."""

    form: Form
    restricts: bool = False
    whole: bool = True
    kind: Kind = Kind.JSON

    def matches(self, value: Json) -> bool:
        return self.form.holds(value, restricts=self.restricts)

    @property
    def words(self) -> tuple[str, ...]:
        return ()

    def describe(self) -> str:
        return f"a value of the shape {describe_form(self.form)}"


class ShapeError(ValueError):
    """A shape that is not one. ``path`` leads to the wrong part of it."""

    def __init__(self, message: str, path: tuple[str | int, ...]) -> None:
        super().__init__(message)
        self.path = path


def compile_shape(data: Data, *, restricts: bool = False) -> Shape:
    """Compile a shape as it stands in a policy; raise ShapeError, a ValueError."""
    return Shape(_Reader().read(data, ()), restricts)


_Path: TypeAlias = tuple[str | int, ...]
_OF: Final[Mapping[Type, frozenset[str]]] = MappingProxyType(
    {
        Type.OBJECT: frozenset({"properties", "required", "rest"}),
        Type.ARRAY: frozenset({"items", "maxItems"}),
        Type.STRING: frozenset({"enum", "maxLength"}),
        Type.INTEGER: frozenset({"enum", "minimum", "maximum"}),
        Type.NUMBER: frozenset({"enum", "minimum", "maximum"}),
        Type.BOOLEAN: frozenset({"enum"}),
        Type.NULL: frozenset[str](),
        Type.ANY: frozenset[str](),
    }
)


class _Reader:
    """Read one shape, counting its nodes."""

    def __init__(self) -> None:
        self._nodes = 0

    def read(self, data: Data, path: _Path) -> Form:
        self._nodes += 1
        if self._nodes > MAX_SHAPE_NODES:
            raise ShapeError(f"a shape has more than {MAX_SHAPE_NODES} parts", path)
        if len([step for step in path if step != "properties"]) > MAX_SHAPE_DEPTH:
            raise ShapeError(f"a shape nests deeper than {MAX_SHAPE_DEPTH}", path)
        if data == "any":
            return Form(type=Type.ANY)
        if not isinstance(data, dict):
            raise ShapeError("a shape is a map that begins with type, or any", path)
        kind = self._type(data.get("type"), path)
        for key in data.keys() - {"type"}:
            if key not in _OF[kind]:
                fitting = ", ".join(sorted(_OF[kind])) or "nothing else"
                raise ShapeError(
                    f"{key} does not fit type {kind}; it takes {fitting}", (*path, key)
                )
        return self._form(kind, data, path)

    def _type(self, written: Data | None, path: _Path) -> Type:
        names = {kind.value for kind in Type} - {Type.ANY.value}
        if not isinstance(written, str) or written not in names:
            raise ShapeError(f"type must be one of {', '.join(sorted(names))}", (*path, "type"))
        return Type(written)

    def _form(self, kind: Type, data: Mapping[str, Data], path: _Path) -> Form:
        open_ = self._rest(data, path)
        properties = self._properties(data.get("properties", {}), (*path, "properties"))
        required = frozenset(self._words(data, "required", path))
        unknown = required - properties.keys()
        if unknown and not open_:
            message = f"requires {sorted(unknown)[0]!r}, which properties does not name"
            raise ShapeError(message, (*path, "required"))
        minimum, maximum = (
            self._integer(data, "minimum", path),
            self._integer(data, "maximum", path),
        )
        if minimum is not None and maximum is not None and minimum > maximum:
            raise ShapeError("minimum is above maximum, so nothing matches", (*path, "minimum"))
        return Form(
            type=kind,
            properties=properties,
            required=required,
            open=open_,
            items=self.read(data["items"], (*path, "items")) if "items" in data else None,
            enum=self._enum(kind, data, path),
            minimum=minimum,
            maximum=maximum,
            max_length=self._count(data, "maxLength", path),
            max_items=self._count(data, "maxItems", path),
        )

    def _rest(self, data: Mapping[str, Data], path: _Path) -> bool:
        if "rest" not in data:
            return False
        if data["rest"] != "any":
            raise ShapeError("rest takes only any", (*path, "rest"))
        return True

    def _properties(self, data: Data, path: _Path) -> Mapping[str, Form]:
        if not isinstance(data, dict):
            raise ShapeError("properties is a map from name to shape", path)
        return MappingProxyType({name: self.read(x, (*path, name)) for name, x in data.items()})

    def _words(self, data: Mapping[str, Data], key: str, path: _Path) -> list[str]:
        if key not in data:
            return []
        listed = data[key]
        if not isinstance(listed, list) or not 0 < len(listed) <= MAX_SHAPE_WORDS:
            raise ShapeError(f"{key} is a list of words, not empty", (*path, key))
        words: list[str] = []
        for at, word in enumerate(listed):
            if not isinstance(word, str):
                raise ShapeError(f"{key} is a list of words", (*path, key, at))
            words.append(word)
        return words

    def _enum(self, kind: Type, data: Mapping[str, Data], path: _Path) -> frozenset[str] | None:
        words = self._words(data, "enum", path)
        for at, word in enumerate(words):
            if kind in (Type.INTEGER, Type.NUMBER):
                number = parse_integer(word)
                if number is None:
                    raise ShapeError(f"{word!r} is not a whole number", (*path, "enum", at))
                # `-0` is written as scalar_text writes the number.
                words[at] = str(number)
            if kind is Type.BOOLEAN and word not in ("true", "false"):
                raise ShapeError(f"{word!r} is not true or false", (*path, "enum", at))
        return frozenset(words) if words else None

    def _integer(self, data: Mapping[str, Data], key: str, path: _Path) -> int | None:
        if key not in data:
            return None
        written = data[key]
        number = parse_integer(written) if isinstance(written, str) else None
        if number is None:
            raise ShapeError(f"{key} is a whole number", (*path, key))
        return number

    def _count(self, data: Mapping[str, Data], key: str, path: _Path) -> int | None:
        number = self._integer(data, key, path)
        if number is not None and number < 0:
            raise ShapeError(f"{key} is not negative", (*path, key))
        return number
