"""The JSON Schema of the v1 language, for editors and for `safeconduct policy schema`.

It describes the shape a YAML or JSON reader sees. Loading is stricter: patterns, profiles and
ids are checked against one another there.
"""

from __future__ import annotations

from typing import Final

from safeconduct.call import Json
from safeconduct.syscalls import ADDABLE

from .model import MAX_PATTERNS, TOOL_NAME, WORD
from .signatures import BUILT_IN

_SCALAR: Final[Json] = {"type": ["string", "number", "boolean"]}
_PATTERNS: Final[Json] = {
    "type": "array",
    "items": {"type": "string", "minLength": 1, "maxLength": 4096},
    "minItems": 1,
    "maxItems": MAX_PATTERNS,
}
_WORDS: Final[Json] = {
    "type": "array",
    "items": _SCALAR,
    "minItems": 1,
    "maxItems": MAX_PATTERNS,
}
_RANGE: Final[Json] = {"type": "array", "items": _SCALAR, "minItems": 2, "maxItems": 2}
_DURATION: Final[Json] = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"}
_SIZE: Final[Json] = {"type": "string", "pattern": "^[0-9]+(B|KiB|MiB|GiB)$"}
_COUNT: Final[Json] = {"type": ["integer", "string"], "pattern": "^[0-9]+[KMG]?$"}


def _one_key(forms: dict[str, Json]) -> dict[str, Json]:
    return {
        "type": "object",
        "properties": forms,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }


def _closed(properties: dict[str, Json], **more: Json) -> dict[str, Json]:
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **more,
    }


def policy_schema() -> dict[str, Json]:
    """Return the JSON Schema (draft 2020-12) of a policy file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Safeconduct policy, version 1",
        "description": "What is not granted is denied.",
        **_closed(
            {
                "version": {"enum": [1, "1"]},
                "require": _closed(
                    {
                        "tier": {"enum": ["full", "landlock"]},
                        "cgroup": {"enum": [True, False, "true", "false"]},
                    }
                ),
                "workspace": {"type": "string", "minLength": 1, "maxLength": 4096},
                "profiles": _named(WORD, {"$ref": "#/$defs/profile"}),
                "tools": _named(TOOL_NAME, {"$ref": "#/$defs/rules"}),
            },
            required=["version"],
        ),
        "$defs": _definitions(),
    }


def _named(pattern: str, value: Json) -> dict[str, Json]:
    known: list[Json] = [*sorted(BUILT_IN)]
    named: dict[str, Json] = {
        "type": "object",
        "patternProperties": {pattern: value},
        "additionalProperties": False,
    }
    if pattern == TOOL_NAME:
        named["examples"] = known
    return named


def _definitions() -> dict[str, Json]:
    text = _closed({"max": _SIZE}, required=["max"])
    element = _one_key({"in": _WORDS, "path": _PATTERNS, "range": _RANGE, "text": text})
    argv: Json = {"type": "array", "items": {"anyOf": [_SCALAR, element]}, "minItems": 1}
    forms: dict[str, Json] = {
        "path": _PATTERNS,
        "url": _PATTERNS,
        "argv": argv,
        "in": _WORDS,
        "range": _RANGE,
        "text": text,
    }
    matcher: Json = {"anyOf": [{"const": "any"}, argv, _one_key(forms)]}
    arguments: Json = {
        "anyOf": [{"const": "any"}, {"type": "object", "additionalProperties": matcher}]
    }
    effects: dict[str, Json] = {name: arguments for name in ("allow", "ask", "deny")}
    rule = _closed(
        {**effects, "profile": {"type": "string"}, "id": {"type": "string"}},
        oneOf=[{"required": [name]} for name in effects],
    )
    limits: dict[str, Json] = {name: _DURATION for name in ("wall", "cpu", "idle")}
    limits |= {name: _SIZE for name in ("memory", "disk", "file", "output")}
    limits |= {name: _COUNT for name in ("pids", "files", "inodes", "depth", "fuel")}
    patterns: dict[str, Json] = {
        name: {"type": "array", "items": {"type": "string"}} for name in ("read", "write", "hide")
    }
    return {
        "rules": {"anyOf": [rule, {"type": "array", "items": rule, "minItems": 1}]},
        "profile": _closed(
            {
                "like": {"type": "string"},
                "engine": {"enum": ["native", "wasm"]},
                "workspace": {"enum": ["direct", "overlay"]},
                **patterns,
                "imports": {"type": "array", "items": {"type": "string"}},
                "syscalls": {"type": "array", "items": {"enum": sorted(ADDABLE)}},
                "net": {"const": "none"},
                "limits": _closed(limits),
            }
        ),
    }
