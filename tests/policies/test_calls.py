"""Whole calls, as agents give them: the engine and the reference agree, and less is never more.

What an argument is follows from the rules, and most of these calls do not care: a number is a
text, a path leads nowhere, a name is written in capitals. SAFECONDUCT_POLICY_CALLS says how many
are judged (2,000).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest

from safeconduct.call import Call, Decision, Effect
from safeconduct.errors import Denied, PolicyError
from safeconduct.policies import Judged, both, canonicalize, decide, parse_policy
from safeconduct.policies.lattice.difference import difference

from . import random_policies as made
from .reference import Given, Plain, evaluate
from .test_properties import CALLS, RANK, beside, drawn, shuffled, without_a_grant
from .test_widening import changed

CALLS_PER_POLICY = 25
# Raw texts by the form that judges them, and what each is canonically.
SPELLINGS: Mapping[str, Mapping[str, str | None]] = {
    "path": {
        **{path: path for path in made.PATHS},
        "a": "/srv/space/a",
        "./src//a.py": "/srv/space/src/a.py",
        ".": "/srv/space",
        "src/new/x": "/srv/space/src/new/x",
        "in/a.py": "/srv/space/src/a.py",
        **dict.fromkeys(["src/../a", "~/a", "out/passwd", "", "-x", "file:///etc/passwd", "%61"]),
    },
    "url": {
        **{url: url for url in made.URLS},
        "HTTPS://X.Example/a": "https://x.example/a",
        "https://x.example": "https://x.example/",
        "https://x.example:443/a": "https://x.example/a",
        **dict.fromkeys(["https://u@x.example/", "https://x.example./", "x.example/a", "", "x y"]),
    },
    "host": {
        **{host: host for host in made.HOSTS},
        "X.Example": "x.example",
        **dict.fromkeys(["x.example.", "a b", "x.example:80", "", "https://x.example/"]),
    },
    "email": {
        **{mail: mail for mail in made.MAILS},
        "ann@CORP.example": "ann@corp.example",
        **dict.fromkeys(["Ann <ann@corp.example>", "ann", "", "a@b.example, c@d.example"]),
    },
}
NO_TEXTS: list[Any] = [7, True, None, 2.5, {"k": 1}, [["x"]]]
RAW: Mapping[str, list[Any]] = {
    "a": [*made.TEXTS, *NO_TEXTS],
    "n": [*made.NUMBERS, "5", "5 x", "x", *NO_TEXTS],
    "p": [*SPELLINGS["path"], *NO_TEXTS],
    "u": [*SPELLINGS["url"], *NO_TEXTS],
    "h": [*SPELLINGS["host"], *NO_TEXTS],
    "m": [*SPELLINGS["email"], *NO_TEXTS],
    "j": [*made.DATA, "5 x"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the workspace that the calls speak of; `/srv` stands for a folder below."""
    found = tmp_path_factory.mktemp("calls").resolve()
    space = found / "srv/space"
    (space / "src/x").mkdir(parents=True)
    for name in ("a", ".env", "src/a.py", "src/.env", "src/x/b.py"):
        (space / name).write_text("x")
    (space / "out").symlink_to("/etc")
    (space / "in").symlink_to("src")
    return found


@pytest.fixture(params=["bounds as they are", "bounds that are met"])
def met(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Bound the work of a decision so that many of these calls meet it, or as always."""
    if tight := request.param == "bounds that are met":
        monkeypatch.setattr("safeconduct.policies.work.FREE_STEPS", 0)
        monkeypatch.setattr("safeconduct.policies.decision.MAX_STEPS", 9_000)
        for module in ("decision", "sorting"):
            monkeypatch.setattr(f"safeconduct.policies.{module}.MAX_GRANT_STEPS", 3_000)
    return tight


def moved(value: Any, root: Path) -> Any:  # noqa: ANN401 - whatever a call holds
    """Say of every path below `/srv` where it is on this machine."""
    if isinstance(value, str):
        return value.replace("/srv/", f"{root}/srv/") if value.startswith("/srv/") else value
    if isinstance(value, list):
        return [moved(item, root) for item in cast("list[Any]", value)]
    return value


def load(plain: Plain, root: Path) -> Judged:
    text = made.write_policy(plain).replace(b'"/srv/', f'"{root}/srv/'.encode())
    return parse_policy(text, name="p", workspace=root / "srv/space")


def judge(policy: Judged, given: list[Given], root: Path) -> list[tuple[Effect, Decision | None]]:
    found: list[tuple[Effect, Decision | None]] = []
    for one in given:
        facts = made.facts(one)
        arguments = {name: moved(value, root) for name, value in one.arguments.items()}
        call = Call(id="1", tool=one.tool, arguments=arguments, session="s")
        judged = policy.for_role(facts.role)
        try:
            with canonicalize(judged, call) as canonical:
                decision = decide(judged, canonical.document, facts)
        except Denied:
            found.append((Effect.DENY, None))
            continue
        assert decision.code != "policy.error", (decision.advice, one)
        found.append((decision.effect, decision))
    return found


def raw(random: Random, plain: Plain) -> Given:
    """Draw a call of a tool that is not ours with values that fit its rules, or do not."""
    drawn_call = made.call(random, plain)
    while drawn_call.tool in made.OURS:
        drawn_call = made.call(random, plain)
    arguments: dict[str, Any] = {}
    for name in drawn_call.arguments:
        pool = RAW.get(name, ["x"])
        value = random.choice(pool)
        if random.random() < 0.2:
            value = [random.choice(pool) for _ in range(random.choice([0, 1, 2, 3]))]
        if random.random() < 0.01:
            value = [pool[0]] * 1025
        chance = random.random()
        arguments[name.upper() if chance < 0.08 else name] = value
        if chance > 0.98:
            arguments[name.upper()] = value
    return replace(drawn_call, arguments=arguments, spellings=SPELLINGS)


def policies(seed: int, calls: int) -> list[tuple[Random, Plain, list[Given]]]:
    found: list[tuple[Random, Plain, list[Given]]] = []
    for at in range(max(1, calls // CALLS_PER_POLICY)):
        random = Random(f"calls-{seed}-{at}")  # noqa: S311 - the same draws in every run
        plain = drawn(partial(made.policy, random))
        found.append((random, plain, [raw(random, plain) for _ in range(CALLS_PER_POLICY)]))
    return found


def test_the_engine_and_the_reference_agree_about_whole_calls(root: Path) -> None:
    effects: Counter[str] = Counter()
    for _, plain, given in policies(1, CALLS):
        for one, (effect, decision) in zip(
            given, judge(load(plain, root), given, root), strict=True
        ):
            expected, _ = evaluate(plain, one, made.WORKSPACE)
            effects[expected] += 1
            assert (effect.value, one) == (expected, one), (made.write_policy(plain), decision)
    assert min(effects[effect] for effect in ("allow", "ask", "deny")) >= CALLS // 100, effects


def test_the_order_never_matters_to_whole_calls(root: Path, met: bool) -> None:
    unjudged = 0
    for random, plain, given in policies(2, CALLS // 2):
        one = judge(load(plain, root), given, root)
        other = judge(load(shuffled(random, plain), root), given, root)
        assert [x for x, _ in one] == [x for x, _ in other], made.write_policy(plain)
        unjudged += sum(is_too_much(decision) for _, decision in one)
    assert (unjudged >= CALLS // 200) is met


def is_too_much(decision: Decision | None) -> bool:
    return decision is not None and decision.code == "policy.too_much_work"


def part_of(random: Random, plain: Plain) -> str | None:
    return random.choice([None, *plain.roles])


def in_part(plain: Plain, name: str | None, change: Callable[[Plain], Plain]) -> Plain:
    """Change the rules without a role, or those of one role."""
    if name is None:
        return change(plain)
    return replace(plain, roles={**plain.roles, name: change(plain.roles[name])})


def with_a_deny(random: Random, plain: Plain) -> Plain:
    name = random.choice(list(plain.tools)) if plain.tools else "t"
    deny = made.rule(random, "added", name, ["deny"])
    return replace(plain, tools={**plain.tools, name: [*plain.tools.get(name, []), deny]})


@pytest.mark.parametrize("change", [without_a_grant, with_a_deny])
def test_less_is_never_more_of_whole_calls(
    root: Path, change: Callable[[Random, Plain], Plain], met: bool
) -> None:
    fewer = unjudged = 0
    for random, plain, given in policies(3, CALLS):
        where = part_of(random, plain)
        narrower = drawn(lambda: in_part(plain, where, partial(change, random)))  # noqa: B023
        before = judge(load(plain, root), given, root)
        after = judge(load(narrower, root), given, root)
        for one, (was, _), (now, decision) in zip(given, before, after, strict=True):
            text = made.write_policy(plain), made.write_policy(narrower)
            assert RANK[now] <= RANK[was], (one, text, decision)
            fewer += RANK[now] < RANK[was]
            unjudged += is_too_much(decision)
    assert fewer >= CALLS // 200
    assert (unjudged >= CALLS // 200) is met


@pytest.mark.parametrize("change", [without_a_grant, with_a_deny])
def test_less_is_never_more_of_joined_policies(
    root: Path, change: Callable[[Random, Plain], Plain]
) -> None:
    for random, plain, given in policies(4, CALLS // 2):
        one = replace(plain, roles={})
        two = beside(one, lambda: replace(made.policy(random), roles={}))  # noqa: B023
        calls = [
            replace(x, session={k: v for k, v in x.session.items() if k != "role"}) for x in given
        ]
        before = judge(both(load(one, root), load(two, root)), calls, root)
        first = random.random() < 0.5
        narrower = drawn(lambda: change(random, one if first else two))  # noqa: B023
        parts = (narrower, two) if first else (one, narrower)
        try:
            joined = both(*(load(part, root) for part in parts))
        except PolicyError:
            # A file that cannot be loaded allows nothing.
            continue
        after = judge(joined, calls, root)
        for call, (was, _), (now, decision) in zip(calls, before, after, strict=True):
            assert RANK[now] <= RANK[was], (call, made.write_policy(one), decision)


def test_no_widening_of_whole_calls_is_missed(root: Path) -> None:
    widened = 0
    for random, old, given in policies(7, CALLS):
        new = drawn(partial(changed, random, old))
        calls = [*given, *(raw(random, new) for _ in range(50))]
        one, two = load(old, root), load(new, root)
        before, after = judge(one, calls, root), judge(two, calls, root)
        more = [
            (call, was, now)
            for call, (was, _), (now, _) in zip(calls, before, after, strict=True)
            if RANK[now] > RANK[was]
        ]
        if more:
            widened += 1
            assert difference(one, two), (more[0], made.write_policy(old), made.write_policy(new))
    assert widened >= CALLS // 400
