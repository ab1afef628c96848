"""`diff` finds a widening wherever random calls do: what the lattice misses, a call would show."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from random import Random

from safeconduct.policies.lattice.difference import difference

from . import random_policies as made
from .reference import Plain
from .test_properties import CALLS, RANK, drawn, judge, load, policies


def changed(random: Random, plain: Plain) -> Plain:
    """Return the policy with a rule more, a rule less, or another rule in the place of one."""
    name = random.choice(list(plain.tools))
    rules, chance = list(plain.tools[name]), random.random()
    effects = ["deny"] if name in made.DENY_WILD else ["allow", "ask"]
    if chance < 0.4:
        rules.append(made.rule(random, "added", name, effects))
    elif chance < 0.7 and len(rules) > 1:
        rules.pop(random.randrange(len(rules)))
    else:
        at = random.randrange(len(rules))
        rules[at] = made.rule(random, "changed", name, [*effects, "deny"])
    return replace(plain, tools={**plain.tools, name: rules})


def test_no_widening_is_missed() -> None:
    widened = 0
    for random, old, given in policies(7, calls=CALLS):
        new = drawn(partial(changed, random, old))
        calls = [*given, *(made.call(random, new) for _ in range(50))]
        more = [
            one
            for one, before, after in zip(calls, judge(old, calls), judge(new, calls), strict=True)
            if RANK[after.effect] > RANK[before.effect]
        ]
        if more:
            widened += 1
            assert difference(load(old), load(new)), (more[0], made.write_policy(new))
    assert widened >= CALLS // 400
