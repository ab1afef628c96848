"""Step 2 of the path of one Call: the one spelling of a value, and of the Calls of foreign tools.

What an argument of a tool that is not ours is follows from the rules. So a value that is no such
thing refuses nothing here, or a rule more would decide about Calls that it does not name: it
stays as it is, and `Document.unfit` says so to every rule that judges it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from safeconduct.call import Document, Json
from safeconduct.errors import Denied

from .hosts import canonical_email, canonical_host
from .paths import PathResolver, plain_path, show
from .signatures import AMBIGUOUS, MAX_LIST, SPELLED, Kind, Signature
from .urls import UrlRefused, canonical_url

MAX_ARGV: Final = 1024
# The kernel's own bound on one argument string (MAX_ARG_STRLEN).
MAX_ARGV_BYTES: Final = 128 << 10
# Setting this member of an object in JavaScript gives it another prototype, whose members it has.
_PROTOTYPE: Final = "__proto__"


def open_document(
    workspace: str, tool: str, signature: Signature, given: dict[str, Json]
) -> Document:
    """Make the Document of a tool that is not ours, which says of each value whether it fits."""
    unfit = _alike(given, signature)
    values = given
    resolver: PathResolver | None = None
    try:
        for name, argument in signature.arguments.items():
            kind = argument.kind
            if name not in given or (kind not in SPELLED and kind is not Kind.ARGV):
                continue
            if kind is Kind.TOOL_PATH:
                resolver = resolver or PathResolver(workspace)
            try:
                of_tool = resolver.of_tool if resolver and kind is Kind.TOOL_PATH else None
                values[name] = _spelling(kind, name, given[name], of_tool)
            except Denied as refused:
                unfit[name] = (refused.code, refused.message)
            except OSError:
                unfit[name] = ("path.refused", "the kernel refuses to resolve a path")
    finally:
        if resolver is not None:
            resolver.close()
    arguments = {name: values[name] for name in sorted(values)} if len(values) > 1 else values
    return Document(tool=tool, arguments=arguments, workspace=workspace, unfit=unfit or None)


def unspelled(document: Document, signature: Signature) -> str | None:
    """Name an argument that a Call under this signature would surely or perhaps hold otherwise.

    For what was recorded under other rules, so in their spelling. Only the text is looked at: no
    one can tell what a path led to then.
    """
    if signature.closed:
        return None
    unfit, arguments = document.unfit or {}, document.arguments
    try:
        alike = _alike(arguments, signature)
    except Denied:
        return next(iter(arguments))
    for name, argument in signature.arguments.items():
        if name not in arguments:
            same = (name in alike) is (name in unfit)
        else:
            same = _stands(argument.kind, name, arguments[name], fit=name not in unfit)
        if not same:
            return name
    return None


def _stands(kind: Kind, name: str, value: Json, *, fit: bool) -> bool:
    """Tell whether a value has the spelling of a kind, or has none where it does not fit."""
    if kind not in SPELLED and kind is not Kind.ARGV:
        return fit
    try:
        spelled = _spelling(kind, name, value, plain_path if kind is Kind.TOOL_PATH else None)
    except Denied:
        return not fit
    return fit and spelled == value


def _spelling(kind: Kind, name: str, value: Json, of_tool: Callable[[str], str] | None) -> Json:
    """Bring a value, or every value of a list, to the one spelling that its kind has."""
    if kind is Kind.ARGV:
        return take_argv(name, value)
    listed = value if isinstance(value, list) else [value]
    if len(listed) > MAX_LIST:
        raise bad_argument(name, f"a list of at most {MAX_LIST} values")
    if of_tool is not None:
        found: list[Json] = [of_tool(take_text_value(name, item)) for item in listed]
    else:
        found = [_SPELLINGS[kind](name, item) for item in listed]
    return found if isinstance(value, list) else found[0]


def _alike(given: Mapping[str, Json], signature: Signature) -> dict[str, tuple[str, str]]:
    """Say which names that rules judge another one may be taken for, as it differs only in case.

    Go's encoding/json takes `Path` for `path` (https://pkg.go.dev/encoding/json#Unmarshal), so a
    server would use what no rule has looked at. Two such names in one Call are refused.
    """
    if _PROTOTYPE in given:
        # Object.assign makes its members those of the arguments (ECMA-262 section 20.1.2.1).
        message = f"a tool may take members of {_PROTOTYPE} for arguments"
        raise Denied(message, code=AMBIGUOUS)
    names: dict[str, str] = {}
    for name in given:
        if names.setdefault(name.casefold(), name) != name:
            message = f"a tool may take {show(name)} for an argument of another name"
            raise Denied(message, code=AMBIGUOUS)
    return {
        name: (AMBIGUOUS, f"a tool may take {show(other)} for the argument {name}")
        for name in signature.arguments
        if (other := names.get(name.casefold(), name)) != name
    }


def spell_url(name: str, value: Json) -> str:
    """Return the one spelling of a URL; Denied where it has none."""
    return _spelled(name, value, canonical_url)


def _host(name: str, value: Json) -> str:
    return _spelled(name, value, canonical_host)


def _email(name: str, value: Json) -> str:
    return _spelled(name, value, canonical_email)


def _spelled(name: str, value: Json, spell: Callable[[str], str]) -> str:
    try:
        return spell(take_text_value(name, value))
    except UrlRefused as error:
        raise Denied(f"{name}: {error}", code=error.code) from error


def take_text_value(name: str, value: Json) -> str:
    """Return a value that is a text; Denied for any other."""
    if not isinstance(value, str):
        raise bad_argument(name, "a text")
    return value


def take_argv(name: str, value: Json) -> list[Json]:
    """Return a list of words that a program can be run with; Denied for any other value."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_ARGV:
        raise bad_argument(name, f"a list of 1 to {MAX_ARGV} texts")
    for word in value:
        if not isinstance(word, str) or "\0" in word:
            raise bad_argument(name, "a list of texts without NUL")
        if _is_long(word):
            raise bad_argument(name, f"a list of texts of less than {MAX_ARGV_BYTES} bytes")
    if value[0] == "":
        raise bad_argument(name, "a list that begins with a program")
    return value


def _is_long(word: str) -> bool:
    # A character has at most four bytes, so most words need not be encoded.
    return len(word) * 4 >= MAX_ARGV_BYTES and len(word.encode()) >= MAX_ARGV_BYTES


def bad_argument(name: str, expected: str) -> Denied:
    """Say what an argument must be."""
    return Denied(f"{show(name)} must be {expected}", code="call.bad_argument")


# The spellings of what tools that are not ours take.
_SPELLINGS: Final[Mapping[Kind, Callable[[str, Json], Json]]] = MappingProxyType(
    {Kind.TOOL_URL: spell_url, Kind.HOST: _host, Kind.EMAIL: _email}
)
