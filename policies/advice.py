"""What the operator is told about a denial: the smallest rule that would allow the Call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from safeconduct.call import Document, Json

from .match import scalar_text
from .model_words import ANY_CALL, ARGUMENT_NAME, MAX_LITERAL, REST
from .signatures import Kind, Signature

_NAME: Final = re.compile(ARGUMENT_NAME)
# What patterns read as wildcards, or refuse; `?` is any one character.
_SPECIAL: Final = str.maketrans(dict.fromkeys("*[]{}\\", "?"))
# The same of a name in a URL, encoded or not.
_NO_NAME: Final = re.compile(r"[*\[\]{}\\]|%(?:2a|3f|5b|5d|7b|7d)", re.IGNORECASE)
# The form that names an argument of a tool that is not ours; ours take a bare list.
_FORM: Final[Mapping[Kind, str]] = MappingProxyType(
    {
        Kind.TOOL_PATH: "path",
        Kind.TOOL_URL: "url",
        Kind.HOST: "host",
        Kind.EMAIL: "email",
        Kind.ARGV: "argv",
    }
)


def smallest_grant(document: Document, signature: Signature | None) -> str:
    """Write the rule that would allow this Call and as little else as the language can say."""
    found = signature or Signature(closed=False)
    named: dict[str, object] = {}
    for name, value in document.arguments.items():
        if found.may_be_unnamed(name, value, document.workspace):
            continue
        if name in (REST, ANY_CALL) or not _NAME.fullmatch(name):
            # No rule can name it, so it is one of the rest.
            named[REST] = "any"
            continue
        if document.unfit is not None and name in document.unfit:
            # No form takes it, so nothing less lets it pass.
            named[name] = "any"
            continue
        argument = found.arguments.get(name)
        kind = argument.kind if argument else Kind.SCALAR
        words = _words(kind, value, document.workspace)
        form = None if found.closed else _FORM.get(kind)
        named[name] = "any" if words is None else {form: words} if form else words
    # YAML reads JSON, so whatever an agent put into an argument stays inside its quotes.
    return f"{document.tool}: {json.dumps({'allow': named})}"


def _words(kind: Kind, value: Json, workspace: str) -> list[str] | None:
    """Return the words that match a value and little else; None where only `any` does."""
    if kind is Kind.JSON:
        return None
    listed = value if isinstance(value, list | tuple) else [value]
    spell = _SPELL.get(kind, _literal)
    words = [word for item in listed if (word := spell(item, workspace)) is not None]
    return words if words and len(words) == len(listed) else None


def _literal(value: Json, workspace: str) -> str | None:
    text = scalar_text(value)
    return None if text is None or len(text) > MAX_LITERAL else text


def _path(value: Json, workspace: str) -> str | None:
    if not isinstance(value, str):
        return None
    if value == "/":
        return "/**"  # no pattern means the root alone
    inside = value.startswith(workspace + "/")
    return ("$WS" + value[len(workspace) :] if inside else value).translate(_SPECIAL)


def _url(value: Json, workspace: str) -> str | None:
    """Write a canonical URL as a pattern; a `?` would begin its query, so `*` stands for a name."""
    if not isinstance(value, str):
        return None
    scheme, _, rest = value.partition("://")
    authority, _, tail = rest.partition("/")
    path, question, query = tail.partition("?")
    names = ["*" if _NO_NAME.search(name) else name for name in path.split("/")]
    if "" in names[:-1]:
        names = [*names[: names.index("")], "**"]
    return f"{scheme}://{authority}/{'/'.join(names)}{question}{query}"


_SPELL: Final[Mapping[Kind, Callable[[Json, str], str | None]]] = MappingProxyType(
    {
        Kind.PATH: _path,
        Kind.NEW_PATH: _path,
        Kind.TOOL_PATH: _path,
        Kind.URL: _url,
        Kind.TOOL_URL: _url,
    }
)
