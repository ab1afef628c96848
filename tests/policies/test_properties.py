"""The engine and the plain reference agree; order says nothing; less granted is never more allowed.

SAFECONDUCT_POLICY_CALLS says how many random calls are judged (2,000).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest

from safeconduct.call import Decision, Document, Effect
from safeconduct.errors import PolicyError
from safeconduct.policies import Policy, both, decide, parse_policy
from safeconduct.policies.codec import decode_policy, encode_policy

from . import random_policies as made
from .reference import Given, Plain, evaluate

CALLS = int(os.environ.get("SAFECONDUCT_POLICY_CALLS", "2000"))
CALLS_PER_POLICY = 25
RANK = {Effect.DENY: 0, Effect.ASK: 1, Effect.ALLOW: 2}


def load(plain: Plain) -> Policy:
    return parse_policy(made.write_policy(plain), name="p", workspace=Path(made.WORKSPACE))


def loads(plain: Plain) -> bool:
    """Tell whether the file is one. A rule that can never match is an error, and drawn again."""
    try:
        load(plain)
    except PolicyError as refused:
        # Nor is one whose `when` asks for what another rule calls a host, and its own does not.
        if "never match" not in refused.message and "read as it was given" not in refused.message:
            raise
        return False
    return True


def drawn(draw: Callable[[], Plain]) -> Plain:
    """Return the first of the drawn policies that loads."""
    return next(plain for plain in (draw() for _ in range(100)) if loads(plain))


def beside(plain: Plain, draw: Callable[[], Plain]) -> Plain:
    """Return the first of the drawn policies that can be joined with one."""
    for _ in range(100):
        other = drawn(draw)
        try:
            both(load(plain), load(other))
        except PolicyError as refused:
            if "read as it was given" not in refused.message:
                raise
            continue
        return other
    raise AssertionError("nothing that was drawn fits")


def judge(plain: Plain, given: list[Given]) -> list[Decision]:
    policy = load(plain)
    found: list[Decision] = []
    for one in given:
        facts = made.facts(one)
        document = Document(tool=one.tool, arguments=one.arguments, workspace=made.WORKSPACE)
        found.append(decide(policy.for_role(facts.role), document, facts))
    return found


def policies(seed: int, *, calls: int) -> Iterator[tuple[Random, Plain, list[Given]]]:
    """Return random policies with calls for each; the seed of one is in its name."""
    for at in range(max(1, calls // CALLS_PER_POLICY)):
        random = Random(f"{seed}-{at}")  # noqa: S311 - the same draws in every run
        plain = drawn(partial(made.policy, random))
        yield random, plain, [made.call(random, plain) for _ in range(CALLS_PER_POLICY)]


def test_the_engine_and_the_reference_agree() -> None:
    effects: Counter[str] = Counter()
    for _, plain, given in policies(1, calls=CALLS):
        text = made.write_policy(plain).decode()
        for one, decision in zip(given, judge(plain, given), strict=True):
            effect, counted = evaluate(plain, one, made.WORKSPACE)
            effects[effect] += 1
            assert (decision.effect.value, one, text) == (effect, one, text), decision
            if effect != "deny":
                found = {bound.id for bound in decision.obligations}
                assert all(any(name in bound for bound in found) for name in counted), (one, text)
                assert bool(found) is bool(counted), (one, text)
    # Each effect is common enough to mean something.
    assert min(effects[effect] for effect in ("allow", "ask", "deny")) >= CALLS // 25, effects


def test_the_order_of_rules_and_tools_never_matters() -> None:
    for random, plain, given in policies(2, calls=CALLS // 2):
        one, other = judge(plain, given), judge(shuffled(random, plain), given)
        assert [seen(x) for x in one] == [seen(x) for x in other], made.write_policy(plain)


def seen(decision: Decision) -> tuple[object, ...]:
    bounds = sorted((bound.id, bound.most) for bound in decision.obligations)
    return decision.effect, decision.code, decision.rules, decision.profile, bounds


def shuffled(random: Random, plain: Plain) -> Plain:
    tools = {
        name: random.sample(rules, len(rules))
        for name, rules in random.sample(list(plain.tools.items()), len(plain.tools))
    }
    roles = {name: shuffled(random, part) for name, part in plain.roles.items()}
    return replace(plain, tools=tools, roles=roles)


@pytest.mark.parametrize("change", ["without a grant", "with a deny"])
def test_less_is_never_more(change: str) -> None:
    changed = 0
    for random, plain, given in policies(3, calls=CALLS):
        narrower = (
            without_a_grant(random, plain) if "without" in change else with_a_deny(random, plain)
        )
        changed += narrower is not plain
        for one, before, after in zip(
            given, judge(plain, given), judge(narrower, given), strict=True
        ):
            assert RANK[after.effect] <= RANK[before.effect], (one, made.write_policy(narrower))
    assert changed >= CALLS // CALLS_PER_POLICY // 2


def without_a_grant(random: Random, plain: Plain) -> Plain:
    places = [
        (name, at)
        for name, rules in plain.tools.items()
        for at, rule in enumerate(rules)
        if rule.effect == "allow"
    ]
    if not places:
        return plain
    name, at = random.choice(places)
    fewer = [rule for index, rule in enumerate(plain.tools[name]) if index != at]
    tools = {key: rules for key, rules in plain.tools.items() if key != name}
    return replace(plain, tools=tools | ({name: fewer} if fewer else {}))


def with_a_deny(random: Random, plain: Plain) -> Plain:
    def draw() -> Plain:
        name = random.choice(list(plain.tools))
        deny = made.rule(random, "added", name, ["deny"])
        return replace(plain, tools={**plain.tools, name: [*plain.tools[name], deny]})

    return drawn(draw)


def test_two_policies_together_are_the_stricter_of_the_two() -> None:
    for random, plain, given in policies(4, calls=CALLS // 2):
        one = replace(plain, roles={})
        two = beside(one, lambda: replace(made.policy(random), roles={}))  # noqa: B023 used at once
        roleless = [
            replace(x, session={k: v for k, v in x.session.items() if k != "role"}) for x in given
        ]
        joined = both(load(one), load(two))
        mine, theirs = judge(one, roleless), judge(two, roleless)
        for given_one, a, b in zip(roleless, mine, theirs, strict=True):
            document = Document(
                tool=given_one.tool, arguments=given_one.arguments, workspace=made.WORKSPACE
            )
            found = decide(joined, document, made.facts(given_one))
            assert RANK[found.effect] == min(RANK[a.effect], RANK[b.effect])


def test_a_role_never_has_more_than_the_one_it_narrows() -> None:
    for _, plain, given in policies(5, calls=CALLS):
        for name, part in plain.roles.items():
            if part.narrows is None:
                continue
            as_small = [replace(x, session={**x.session, "role": name}) for x in given]
            as_wide = [replace(x, session={**x.session, "role": part.narrows}) for x in given]
            for small, wide in zip(judge(plain, as_small), judge(plain, as_wide), strict=True):
                # A condition on the role itself is the author's own word about it.
                if "session.role" not in made.write_policy(plain).decode():
                    assert RANK[small.effect] <= RANK[wide.effect]


def test_the_advice_of_a_denial_would_allow_the_call() -> None:
    advised = 0
    for _, plain, given in policies(6, calls=CALLS // 2):
        for one, decision in zip(given, judge(plain, given), strict=True):
            _, found, grant = decision.advice.partition("  ")
            if decision.code != "policy.no_rule" or not found or "role" in one.session:
                continue
            advised += 1
            text = f"version: 1\ntools:\n  {grant}\n".encode()
            policy = parse_policy(text, name="p", workspace=Path(made.WORKSPACE))
            document = Document(tool=one.tool, arguments=one.arguments, workspace=made.WORKSPACE)
            assert decide(policy, document).effect is Effect.ALLOW, (one, grant)
    assert advised > CALLS // 20


def test_a_kept_policy_decides_as_the_one_it_was() -> None:
    for _, plain, given in policies(8, calls=CALLS // 4):
        policy = load(plain)
        kept = decode_policy(encode_policy(policy))
        for one in given:
            facts = made.facts(one)
            document = Document(tool=one.tool, arguments=one.arguments, workspace=made.WORKSPACE)
            before, after = (
                decide(judged.for_role(facts.role), document, facts) for judged in (policy, kept)
            )
            assert before == after, (one, made.write_policy(plain))
