"""Policy step 1: what an argument of another program's tool may be, as that program reads it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from safeconduct.call import Json
from safeconduct.errors import Denied

from .tables import Takes

# LIMIT: characters of a pattern for the names of files.
_MAX_GLOB: Final = 4096
_GROUPS: Final = frozenset("{[(")
# Shells that read a command as it is judged.
SHELLS: Final = frozenset(
    f"{folder}{shell}" for folder in ("", "/bin/", "/usr/bin/") for shell in ("sh", "bash")
)


def bad(what: str, expected: str) -> Denied:
    """Make the refusal of an argument that is not what it must be."""
    return Denied(f"{what} must be {expected}", code="call.bad_argument")


def _escalates(what: str) -> Denied:
    message = f"{what} asks for more than the usual rights"
    hint = "grant what is needed in the policy; a call does not take rights by itself"
    return Denied(message, code="call.escalation", hint=hint)


def _text(what: str, value: Json, cwd: str | None) -> str:
    if not isinstance(value, str):
        raise bad(what, "a text")
    return value


def _texts(what: str, value: Json, cwd: str | None) -> list[Json]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise bad(what, "a list of texts")
    return value


def _number(what: str, value: Json, cwd: str | None) -> Json:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad(what, "a number")
    return value


def _boolean(what: str, value: Json, cwd: str | None) -> Json:
    if not isinstance(value, bool):
        raise bad(what, "true or false")
    return value


def absolute(what: str, value: Json, cwd: str | None) -> str:
    """Make a path absolute, refusing what a program reads as another path than the kernel does.

    Programs trim paths, expand `~`, bring them to Unicode's form C and take away `NAME/..`
    without looking whether NAME is a link before they open them.
    """
    path = _text(what, value, None)
    if not path or path != path.strip() or path.startswith("~") or "\0" in path:
        raise bad(what, "a plain path")
    if ".." in path.split("/"):
        raise bad(what, "a path without ..")
    if not unicodedata.is_normalized("NFC", path):
        raise bad(what, "a path in Unicode's form C")
    if path.startswith("/"):
        return path
    if cwd is None:
        raise bad(what, "an absolute path")
    folder = absolute("the current folder", cwd, None)
    return f"{folder.rstrip('/')}/{path}"


def _glob(what: str, value: Json, cwd: str | None) -> str:
    """Refuse a pattern that may lead out of its folder, as `..` or as an absolute path.

    Braces, classes and groups can spell `..` in parts (`.{.,x}`, `{,a}..`), unless a wildcard
    comes first: that stands for a name that is there, which is never `..`.
    """
    pattern = _text(what, value, None)
    if len(pattern) > _MAX_GLOB:
        raise bad(what, f"a pattern of at most {_MAX_GLOB} characters")
    if pattern.startswith(("/", "~")) or "\\" in pattern or _has_grouped_slash(pattern):
        raise bad(what, "a pattern beneath its folder")
    for component in pattern.split("/"):
        spells = not _GROUPS.isdisjoint(component) and component[0] not in "*?"
        if component == ".." or (spells and component.count(".") > 1):
            raise bad(what, "a pattern beneath its folder")
    return pattern


def _has_grouped_slash(pattern: str) -> bool:
    """Tell whether a slash stands in braces, a class or a group: it would make new components."""
    depth = 0
    for character in pattern:
        if character in _GROUPS:
            depth += 1
        elif character in "}])" and depth:
            depth -= 1
        elif character == "/" and depth:
            return True
    return False


def _false(what: str, value: Json, cwd: str | None) -> Json:
    if value is not False:
        raise _escalates(what)
    return value


def _usual(what: str, value: Json, cwd: str | None) -> Json:
    if value != "use_default":
        raise _escalates(what)
    return value


def _nothing(what: str, value: Json, cwd: str | None) -> Json:
    raise _escalates(what)


def _shell(what: str, value: Json, cwd: str | None) -> Json:
    if not isinstance(value, str) or value not in SHELLS:
        raise bad(what, "sh or bash, which read the command as it is judged")
    return value


def _json(what: str, value: Json, cwd: str | None) -> Json:
    return value


CHECKS: Final[Mapping[Takes, Callable[[str, Json, str | None], Json]]] = MappingProxyType(
    {
        Takes.TEXT: _text,
        Takes.TEXTS: _texts,
        Takes.NUMBER: _number,
        Takes.BOOLEAN: _boolean,
        Takes.PATH: absolute,
        Takes.FOLDER: absolute,
        Takes.GLOB: _glob,
        Takes.JSON: _json,
        Takes.FALSE: _false,
        Takes.USUAL: _usual,
        Takes.SHELL: _shell,
        Takes.NOTHING: _nothing,
    }
)
