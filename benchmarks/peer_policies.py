"""The rules of bench_decision in the words of its peers: Rego and Cedar.

Each is written the way its engine answers fastest: equalities first, which OPA indexes; policies
scoped to one action, with literal conditions, for Cedar. What only we judge (that a call has no
other arguments, what a link leads to) is left out, so the peers have less to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from safeconduct.call import Document, Json

from .decision_policies import Form, Item, Test

REGO_PACKAGE = "bench"
_REGO_HEAD = f"""package {REGO_PACKAGE}

import rego.v1

default deny := false
default ask := false
default allow := false

verdict := "deny" if {{
\tdeny
}} else := "ask" if {{
\task
}} else := "allow" if {{
\tallow
}} else := "deny"

"""


def to_rego(rules: Sequence[Item], workspace: str) -> str:
    """Write the rules as one Rego module; `verdict` is what it answers."""
    return _REGO_HEAD + "\n".join(_rego_rule(rule, workspace) for rule in rules) + "\n"


def _rego_rule(rule: Item, workspace: str) -> str:
    lines = [f"input.tool == {json.dumps(rule.tool)}"]
    for test in rule.tests:
        lines += _rego_test(test, workspace)
    body = "".join(f"\t{line}\n" for line in lines)
    return f"{rule.effect} if {{\n{body}}}\n"


def _rego_test(test: Test, workspace: str) -> list[str]:
    name, first = f"input.arguments.{test.argument}", test.values[0]
    match test.form:
        case Form.WORDS:
            words = enumerate(test.values)
            return [f"{name}[{at}] == {json.dumps(word)}" for at, word in words]
        case Form.ONE_OF:
            if len(test.values) == 1:
                return [f"{name} == {json.dumps(first)}"]
            return [f"{name} in {{{', '.join(json.dumps(value) for value in test.values)}}}"]
        case Form.UNDER:
            return [f"startswith({name}, {json.dumps(f'{workspace}/{first}/')})"]
        case Form.NAMED:
            return [f"endswith({name}, {json.dumps('/' + first)})"]
        case Form.KIND:
            pattern = f"{workspace}/{first}/*{test.values[1]}"
            return [f'glob.match({json.dumps(pattern)}, ["/"], {name})']
        case Form.URL:
            return [f"startswith({name}, {json.dumps(first)})"]
        case Form.RANGE:
            return [f"{name} >= {first}", f"{name} <= {test.values[1]}"]


def rego_input(document: Document) -> dict[str, Json]:
    """Return what a Rego engine is asked about."""
    return {"tool": document.tool, "arguments": document.arguments}


def to_cedar(rules: Sequence[Item], workspace: str) -> str:
    """Write the rules as Cedar policies, in order, so that `policyN` is the Nth rule.

    Cedar knows no `ask`: those rules permit, and whoever asks looks at which policies decided.
    """
    return "\n".join(_cedar_rule(rule, workspace) for rule in rules)


def _cedar_rule(rule: Item, workspace: str) -> str:
    effect = "forbid" if rule.effect == "deny" else "permit"
    tests = " && ".join(text for test in rule.tests for text in _cedar_test(test, workspace))
    action = f"action == Action::{json.dumps(rule.tool)}"
    return f"{effect}(principal, {action}, resource) when {{ {tests} }};"


def _cedar_test(test: Test, workspace: str) -> list[str]:
    name, first = f"context.{test.argument}", test.values[0]
    has = f"context has {test.argument}"
    match test.form:
        case Form.WORDS:
            words = list(enumerate(test.values))
            return [f"context has word{words[-1][0]}"] + [
                f"context.word{at} == {json.dumps(word)}" for at, word in words
            ]
        case Form.ONE_OF:
            if len(test.values) == 1:
                return [has, f"{name} == {json.dumps(first)}"]
            return [
                has,
                f"[{', '.join(json.dumps(value) for value in test.values)}].contains({name})",
            ]
        case Form.UNDER:
            return [has, f"{name} like {json.dumps(f'{workspace}/{first}/*')}"]
        case Form.NAMED:
            return [has, f"{name} like {json.dumps('*/' + first)}"]
        case Form.KIND:
            # Cedar's `*` crosses `/`; close enough for a time.
            return [has, f"{name} like {json.dumps(f'{workspace}/{first}/*{test.values[1]}')}"]
        case Form.URL:
            return [has, f"{name} like {json.dumps(first + '*')}"]
        case Form.RANGE:
            return [has, f"{name} >= {first} && {name} <= {test.values[1]}"]


def cedar_request(document: Document) -> dict[str, object]:
    """Return what Cedar is asked about; it has no lists, so each word is an attribute."""
    context: dict[str, object] = {}
    for name, value in document.arguments.items():
        if name == "argv" and isinstance(value, Sequence):
            context |= {f"word{at}": word for at, word in enumerate(value)}
        elif not isinstance(value, Mapping):
            context[name] = value
    return {
        "principal": 'Agent::"agent"',
        "action": {"type": "Action", "id": document.tool},
        "resource": 'Workspace::"workspace"',
        "context": context,
    }
