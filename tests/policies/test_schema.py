"""The JSON Schema takes what loads, knows every key of the language, and no other."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.test_docs import POLICIES

from safeconduct.errors import PolicyError
from safeconduct.policies import PRESETS, parse_policy, policy_schema, read_preset
from safeconduct.policies.model import (
    BudgetSpec,
    LimitsSpec,
    PolicySpec,
    ProfileSpec,
    RequireSpec,
    RuleSpec,
    ServerSpec,
)
from safeconduct.policies.model_matchers import ElementSpec, MatcherSpec
from safeconduct.policies.model_trace import TraceSpec, WitnessSpec
from safeconduct.policies.model_words import Model

WORKSPACE = Path("/srv/space")
SCHEMA: dict[str, Any] = json.loads(json.dumps(policy_schema()))
DEFINED = SCHEMA["$defs"]

# Of each: whether the loader takes it. The schema must take what the loader does.
TOOLS = [
    ("t: {allow: any, when: 'call.a == 1', rate: 5/h, budget: {calls: 5}}", True),
    (
        "t: {allow: any, rate: [5/h, 1/s], budget: {money: [1/call, 2.50/day], bytes: 4KiB}}",
        True,
    ),
    ("t: {allow: {a: {url: ['https://**/**'], not: ['https://**.corp.example/**']}}}", True),
    ("t: {allow: {a: {email: any, not: ['*@corp.example']}, b: {host: [a.example]}}}", True),
    ("t: {allow: {a: {regex: a+, not: aa}, b: {range: [1, 9], not: [2, 3]}}}", True),
    ("t: {allow: {a: {json: {type: object, properties: {b: any}, rest: any}}}}", True),
    ("t: {allow: {a: {json: {type: array, items: {type: string, maxLength: 5}}}}}", True),
    ("t: {allow: {a: {argv: [a, {regex: b}, {in: [c]}, any, ...]}}}", True),
    ("'files.*': {ask: any}", True),
    ("t: {allow: {a: any}, optional: {b: {range: [1, 2]}}}", True),
    ("t: {allow: {a: any}, optional: [b]}", False),
    ("t: {allow: {a: {argv: [a], not: [b]}}}", False),
    ("t: {allow: {a: {not: [b]}}}", False),
    ("t: {allow: {a: {json: {type: text}}}}", False),
    ("t: {allow: {a: {json: {}}}}", False),
    ("t: {allow: any, rate: 5/y}", False),
    ("t: {allow: any, budget: {calls: 5/week}}", False),
    ("t: {allow: any, budget: {hours: 5}}", False),
    ("t: {ask: any, irreversible: true}", True),
    ("t: {ask: any, irreversible: false}", False),
    ("t: {allow: any, remember: never}", False),
    ("'a b': {allow: any}", False),
]


def errors_of(document: object) -> list[str]:
    jsonschema = import_module("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(document)
    return [str(error.message) for error in found]


@pytest.mark.parametrize(("tools", "loads"), TOOLS)
def test_it_agrees_with_the_loader(tools: str, loads: bool) -> None:
    text = f"version: 1\ntools: {{{tools}}}\nroles: {{r: {{{tools.replace('id: x', '')}}}}}\n"
    document = yaml.safe_load(text)
    assert (errors_of(document) == []) is loads
    if loads:
        parse_policy(text.encode(), name="p", workspace=WORKSPACE)
    else:
        with pytest.raises(PolicyError):
            parse_policy(text.encode(), name="p", workspace=WORKSPACE)


@pytest.mark.parametrize("text", [*POLICIES, *(read_preset(name).decode() for name in PRESETS)])
def test_it_takes_every_policy_that_we_show(text: str) -> None:
    assert errors_of(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    "rest",
    [
        "labels: {}",
        "trace: {keep: 1}",
        "trace: {retain: 0d}",
        "trace: {irreversible: []}",
        "trace: {witness: {policy: here}}",
        "flows: []",
        "servers: {s: {url: x}}",
        "servers: {s: {profile: p}}",
        "profiles: {p: {net: all}}",
        "roles: {r: {narrows: [a]}}",
        "roles: {r: {narrows: {allow: any}}}",
        "extends: [a]",
    ],
)
def test_it_refuses_what_does_not_load(rest: str) -> None:
    assert errors_of(yaml.safe_load(f"version: 1\n{rest}\n"))


@pytest.mark.parametrize(
    ("model", "properties", "more"),
    [
        (PolicySpec, SCHEMA["properties"], frozenset[str]()),
        (RequireSpec, SCHEMA["properties"]["require"]["properties"], frozenset[str]()),
        (ProfileSpec, DEFINED["profile"]["properties"], frozenset[str]()),
        (LimitsSpec, DEFINED["profile"]["properties"]["limits"]["properties"], frozenset[str]()),
        (ServerSpec, DEFINED["server"]["properties"], frozenset[str]()),
        (TraceSpec, SCHEMA["properties"]["trace"]["properties"], frozenset[str]()),
        (
            WitnessSpec,
            SCHEMA["properties"]["trace"]["properties"]["witness"]["properties"],
            frozenset[str](),
        ),
        (RuleSpec, DEFINED["rule"]["properties"], frozenset[str]()),
        (BudgetSpec, DEFINED["rule"]["properties"]["budget"]["properties"], frozenset[str]()),
        (
            MatcherSpec,
            DEFINED["matcher"]["anyOf"][2]["properties"],
            frozenset({"any", "items", "not"}),
        ),
        (
            ElementSpec,
            DEFINED["matcher"]["anyOf"][1]["items"]["anyOf"][1]["properties"],
            frozenset({"literal"}),
        ),
    ],
)
def test_it_knows_every_key(
    model: type[Model], properties: dict[str, Any], more: frozenset[str]
) -> None:
    keys = {info.alias or name for name, info in model.model_fields.items()}
    assert set(properties) == keys - more
