"""The JSON Schema of the v1 language, for editors and for `safeconduct policy schema`.

It describes the shape a YAML or JSON reader sees. Loading is stricter: patterns, profiles and
ids are checked against one another there.
"""

from __future__ import annotations

from typing import Final

from safeconduct.call import Durability, Json, WorkspaceMode
from safeconduct.syscalls import ADDABLE

from .match_json import Type
from .model_words import MAX_BOUNDS, MAX_PATTERNS, TOOL_NAME, WORD
from .signatures import BUILT_IN

_TEXT: Final[Json] = {"type": "string", "minLength": 1, "maxLength": 4096}
_SCALAR: Final[Json] = {"type": ["string", "number", "boolean"]}
_PATTERNS: Final[Json] = {
    "type": "array",
    "items": _TEXT,
    "minItems": 1,
    "maxItems": MAX_PATTERNS,
}
_WORDS: Final[Json] = {
    "type": "array",
    "items": _SCALAR,
    "minItems": 1,
    "maxItems": MAX_PATTERNS,
}
_PATTERNS_OR_ANY: Final[Json] = {"anyOf": [{"const": "any"}, _PATTERNS]}
_RANGE: Final[Json] = {"type": "array", "items": _SCALAR, "minItems": 2, "maxItems": 2}
_DURATION: Final[Json] = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"}
_SIZE: Final[Json] = {"type": "string", "pattern": "^[0-9]+(B|KiB|MiB|GiB)$"}
_COUNT: Final[Json] = {"type": ["integer", "string"], "pattern": "^[0-9]+[KMG]?$"}
_FLAG: Final[Json] = {"enum": [True, False, "true", "false"]}
_ABSOLUTE: Final[Json] = {"type": "string", "pattern": "^/", "maxLength": 4096}
_RATE: Final[Json] = {"type": "string", "pattern": "^[0-9]+[KMG]?/[smhd]$"}
_PERIOD: Final = "(/(call|session|day))?$"
# Beside which forms `not` may stand, and what it takes there.
_EXCLUDABLE: Final[dict[str, Json]] = {
    "path": _PATTERNS,
    "url": _PATTERNS,
    "host": _PATTERNS_OR_ANY,
    "email": _PATTERNS_OR_ANY,
    "in": _WORDS,
    "range": _RANGE,
    "regex": _TEXT,
}


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
                        "cgroup": _FLAG,
                    }
                ),
                "trace": _trace(),
                "workspace": _TEXT,
                "extends": _TEXT,
                "profiles": _named(WORD, {"$ref": "#/$defs/profile"}),
                "servers": _named(WORD, {"$ref": "#/$defs/server"}),
                "tools": _named(TOOL_NAME, {"$ref": "#/$defs/rules"}),
                "roles": _named(WORD, {"$ref": "#/$defs/role"}),
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
    return {
        "rules": {
            "anyOf": [
                {"$ref": "#/$defs/rule"},
                {"type": "array", "items": {"$ref": "#/$defs/rule"}, "minItems": 1},
            ]
        },
        "rule": _rule(),
        "role": {
            **_named(f"^(?!narrows$){TOOL_NAME[1:]}", {"$ref": "#/$defs/rules"}),
            "properties": {"narrows": {"type": "string", "pattern": WORD}},
        },
        "matcher": _matcher(),
        "shape": _shape(),
        "server": _closed({"run": _PATTERNS, "profile": {"type": "string"}}, required=["run"]),
        "profile": _profile(),
    }


def _rule() -> dict[str, Json]:
    arguments: Json = {
        "anyOf": [
            {"const": "any"},
            {"type": "object", "additionalProperties": {"$ref": "#/$defs/matcher"}},
        ]
    }
    effects: dict[str, Json] = {name: arguments for name in ("allow", "ask", "deny")}
    amounts: dict[str, Json] = {
        "calls": f"^[0-9]+[KMG]?{_PERIOD}",
        "bytes": f"^[0-9]+(B|KiB|MiB|GiB){_PERIOD}",
        "money": f"^[0-9]+(\\.[0-9]{{1,6}})?{_PERIOD}",
        "tokens": f"^[0-9]+[KMG]?{_PERIOD}",
    }
    options: dict[str, Json] = {
        "optional": {"type": "object", "additionalProperties": {"$ref": "#/$defs/matcher"}},
        "profile": {"type": "string"},
        "id": {"type": "string"},
        "when": _TEXT,
        "irreversible": {"enum": [True, "true"]},
        "rate": _one_or_more(_RATE),
        "budget": _closed(
            {
                unit: _one_or_more({"type": ["string", "number"], "pattern": pattern})
                for unit, pattern in amounts.items()
            }
        ),
    }
    return _closed({**effects, **options}, oneOf=[{"required": [name]} for name in effects])


def _one_or_more(value: Json) -> Json:
    several: Json = {"type": "array", "items": value, "minItems": 1, "maxItems": MAX_BOUNDS}
    return {"anyOf": [value, several]}


def _matcher() -> dict[str, Json]:
    text = _closed({"max": _SIZE}, required=["max"])
    element = _one_key(
        {"in": _WORDS, "path": _PATTERNS, "range": _RANGE, "text": text, "regex": _TEXT}
    )
    argv: Json = {"type": "array", "items": {"anyOf": [_SCALAR, element]}, "minItems": 1}
    forms: dict[str, Json] = {
        **_EXCLUDABLE,
        "argv": argv,
        "text": text,
        "json": {"$ref": "#/$defs/shape"},
    }
    without: list[Json] = [
        _closed({form: taken, "not": _excluded(taken)}, required=[form, "not"])
        for form, taken in _EXCLUDABLE.items()
    ]
    return {"anyOf": [{"const": "any"}, argv, _one_key(forms), *without]}


def _excluded(taken: Json) -> Json:
    if taken is _TEXT:
        return _one_or_more(_TEXT)
    return _PATTERNS if taken is _PATTERNS_OR_ANY else taken


def _shape() -> dict[str, Json]:
    number: Json = {"type": "integer"}
    shape: Json = {"$ref": "#/$defs/shape"}
    return {
        "anyOf": [
            {"const": "any"},
            _closed(
                {
                    "type": {"enum": [kind.value for kind in Type if kind is not Type.ANY]},
                    "properties": {"type": "object", "additionalProperties": shape},
                    "required": _WORDS,
                    "rest": {"const": "any"},
                    "items": shape,
                    "enum": _WORDS,
                    **dict.fromkeys(("minimum", "maximum", "maxLength", "maxItems"), number),
                },
                required=["type"],
            ),
        ]
    }


def _trace() -> dict[str, Json]:
    witness = _closed({"policy": _ABSOLUTE, "require": _FLAG}, required=["policy"])
    tool: Json = {"type": "string", "pattern": TOOL_NAME, "maxLength": 128}
    return _closed(
        {
            "durability": {"enum": [str(durability) for durability in Durability]},
            "batch": _DURATION,
            "irreversible": {
                "type": "array",
                "items": tool,
                "minItems": 1,
                "maxItems": MAX_PATTERNS,
            },
            "quota": _SIZE,
            "retain": {"type": "string", "pattern": "^[1-9][0-9]*d$"},
            "witness": witness,
        }
    )


def _profile() -> dict[str, Json]:
    limits: dict[str, Json] = {name: _DURATION for name in ("wall", "cpu", "idle")}
    limits |= {name: _SIZE for name in ("memory", "disk", "file", "output")}
    limits |= {name: _COUNT for name in ("pids", "files", "inodes", "depth", "fuel")}
    patterns: dict[str, Json] = {
        name: {"type": "array", "items": {"type": "string"}} for name in ("read", "write", "hide")
    }
    return _closed(
        {
            "like": {"type": "string"},
            "engine": {"enum": ["native", "wasm"]},
            "workspace": {"enum": [str(mode) for mode in WorkspaceMode]},
            **patterns,
            "imports": {"type": "array", "items": {"type": "string"}},
            "syscalls": {"type": "array", "items": {"enum": sorted(ADDABLE)}},
            "net": {"const": "none"},
            "limits": _closed(limits),
        }
    )
