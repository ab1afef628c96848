"""`policy diff`: whatever random search finds to be wider is found, and examples are true."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from safeconduct.call import Decision, Document, Effect, Facts
from safeconduct.errors import PolicyError
from safeconduct.policies import Judged, both, decide, parse_policy
from safeconduct.policies.lattice.difference import Widening, difference
from safeconduct.policies.lattice.profiles import profile_widenings

from .generate import WORKSPACE, Generator, parse, seeded, write

SEVERITY = {Effect.ALLOW: 0, Effect.ASK: 1, Effect.DENY: 2}
# More in a run of its own: SAFECONDUCT_SEEDS=2000.
SEEDS = int(os.environ.get("SAFECONDUCT_SEEDS", "150"))
ROLES = (None, "coder", "reader")


def in_role(policy: Judged, role: str | None) -> Judged | None:
    try:
        return policy.for_role(role)
    except PolicyError:
        return None


def is_wider(old: Decision | None, new: Decision) -> str:
    """Say how one decision gives more than another; empty where it does not."""
    was = old.effect if old else Effect.DENY
    if SEVERITY[new.effect] < SEVERITY[was]:
        return f"{was} -> {new.effect}"
    if new.effect is Effect.DENY or old is None or not (old.profile and new.profile):
        return ""
    for bound in old.obligations:
        kept = [
            one
            for one in new.obligations
            if (one.unit, one.per, one.window_ms) == (bound.unit, bound.per, bound.window_ms)
        ]
        if not any(one.most <= bound.most for one in kept):
            return f"no bound {bound.id}"
    return next(profile_widenings(old.profile, new.profile), "")


def search(generator: Generator, old: Judged, new: Judged, tries: int) -> str:
    """Look for a call that the new policy judges more kindly, by chance alone."""
    for _ in range(tries):
        document = generator.document()
        draw = generator.random
        moment = draw.randint(1, 48) * 3_600_000
        for role in ROLES:
            facts = Facts(role=role, calls=draw.randint(0, 5), now_ms=moment)
            mine, theirs = in_role(old, role), in_role(new, role)
            if theirs is None:
                continue
            before = decide(mine, document, facts) if mine else None
            if how := is_wider(before, decide(theirs, document, facts)):
                return f"{how} for {document} in role {role}"
    return ""


def assert_true(widening: Widening, old: Judged, new: Judged) -> None:
    """Check an example with `decide` on both."""
    if widening.example is None:
        return
    facts = widening.facts or Facts()
    before, after = in_role(old, widening.role), in_role(new, widening.role)
    assert after is not None
    judged = decide(before, widening.example, facts) if before else None
    assert is_wider(judged, decide(after, widening.example, facts)), widening


@pytest.mark.parametrize("seed", range(0, SEEDS, 10))
def test_it_finds_what_random_search_finds(seed: int) -> None:
    for one in range(seed, seed + 10):
        generator = seeded(one)
        first = generator.spec()
        second = generator.mutate(first)
        if generator.chance(0.5):
            second = generator.mutate(second)
        old, new = parse(first), parse(second)
        assert difference(old, parse(first)) == (), f"seed {one}: not equal to itself"
        found = difference(old, new)
        for widening in found:
            assert_true(widening, old, new)
        chance = search(generator, old, new, 150)
        assert found or not chance, f"seed {one}: {chance}\n{write(first)}\n{write(second)}"


@pytest.mark.parametrize("seed", range(0, SEEDS // 3, 10))
def test_joining_a_policy_is_never_wider(seed: int) -> None:
    for one in range(seed, seed + 10):
        generator = seeded(10_000 + one)
        policy = parse(generator.spec())
        try:
            joined = both(policy, parse(generator.spec()))
        except PolicyError:
            continue
        # In a role that only the joined policy names, the first one judges as without a role.
        found = [x for x in difference(policy, joined) if in_role(policy, x.role) is not None]
        assert [x for x in found if x.certain] == [], f"seed {one}"


def policy(text: str) -> Judged:
    head = "profiles: {base: {read: [$WS/**]}, dev: {like: base, write: [$WS/**]}}\n"
    whole = text if "profiles:" in text else head + text
    return parse_policy(f"version: 1\n{whole}".encode(), name="p", workspace=Path(WORKSPACE))


def tools(text: str) -> Judged:
    return policy(f"tools: {{{text}}}")


# Each pair: the old rules and the new ones, which are no wider.
NARROWER = {
    "same": ("fs.read: {allow: {path: [$WS/**]}}", "fs.read: {allow: {path: ['$WS/**']}}"),
    "split in two": (
        "fs.read: {allow: {path: [$WS/src/**, $WS/a]}}",
        "fs.read: [{allow: {path: [$WS/a]}}, {allow: {path: [$WS/src/x/**]}}]",
    ),
    "joined": (
        "fs.read: [{allow: {path: [$WS/a]}}, {allow: {path: [$WS/src/**]}}]",
        "fs.read: {allow: {path: [$WS/a, $WS/src/*.py]}}",
    ),
    "not instead of a deny": (
        "fs.read: [{allow: {path: [$WS/**]}}, {deny: {path: ['**/.env']}}]",
        "fs.read: {allow: {path: {path: [$WS/**], not: ['**/.env']}}}",
    ),
    "a wider deny": (
        "fs.read: [{allow: {path: [$WS/**]}}, {deny: {path: ['$WS/a/.env']}}]",
        "fs.read: [{allow: {path: [$WS/**]}}, {deny: {path: ['**/.env']}}]",
    ),
    "two denies for one": (
        "fs.read: [{allow: {path: [$WS/**]}}, {deny: {path: [$WS/a, $WS/b]}}]",
        "fs.read: [{allow: {path: [$WS/**]}}, {deny: {path: [$WS/a]}}, {deny: {path: [$WS/b]}}]",
    ),
    "a deny that cannot matter": (
        "fs.read: [{allow: {path: [$WS/src/**]}}, {deny: {path: [$WS/docs/**]}}]",
        "fs.read: {allow: {path: [$WS/src/**]}}",
    ),
    "ask for allow": (
        "shell.run: {allow: {argv: [git, ...]}}",
        "shell.run: {ask: {argv: [git, {in: [log, diff]}]}}",
    ),
    "an ask takes a part": (
        "shell.run: {allow: {argv: [git, ...]}}",
        "shell.run: [{allow: {argv: [git, ...]}}, {ask: {argv: [git, push, ...]}}]",
    ),
    "in becomes two rules": (
        "shell.run: {allow: {argv: [git, {in: [log, diff]}, ...]}}",
        "shell.run: [{allow: {argv: [git, diff, ...]}}, {allow: {argv: [git, log]}}]",
    ),
    "two rules become in": (
        "shell.run: [{allow: {argv: [git, diff, ...]}}, {allow: {argv: [git, log]}}]",
        "shell.run: {allow: {argv: [git, {in: [log, diff]}]}}",
    ),
    "a smaller rate": (
        "fs.read: {allow: any, rate: 20/h}",
        "fs.read: {allow: any, rate: [10/h, 5/m]}",
    ),
    "a condition": ("fs.read: {allow: any}", "fs.read: {allow: any, when: session.calls < 5}"),
    "a wildcard gives way": (
        "'files.*': {allow: {path: {path: [$WS/**]}}}",
        "files.read: {allow: {path: {path: [$WS/src/**]}}}",
    ),
    "a narrower profile": (
        "shell.run: {allow: {argv: [ls]}, profile: dev}",
        "shell.run: {allow: {argv: [ls]}}",
    ),
    "what is not known yet": (
        "shell.run: [{allow: {argv: [ls, ...]}}, {ask: {argv: [ls], stdin: any}}]",
        "shell.run: [{allow: {argv: [ls, ...]}}, {deny: {argv: [ls]}}]",
    ),
    "a deny for an ask by input": (
        "shell.run: [{allow: {argv: [ls]}}, {ask: {argv: [ls], stdin: [a]}}]",
        "shell.run: [{allow: {argv: [ls], stdin: any}}, {deny: {argv: [ls], stdin: [a, b]}}]",
    ),
    "content that must be named": (
        "fs.write: {allow: {path: [$WS/**]}}",
        "fs.write: {allow: {path: [$WS/**], content: any}}",
    ),
    "whole numbers": (
        "x.y: [{allow: {n: {range: [1, 9]}}}, {ask: {n: {range: [3, 4]}}}]",
        "x.y: [{allow: {n: {range: [1, 9]}}}, {ask: {n: {range: [2, 5]}}}]",
    ),
    "addresses": (
        "mail.send: {allow: {to: {email: any, not: ['*@evil.test']}}}",
        "mail.send: {allow: {to: {email: ['*@a.test']}}}",
    ),
}


@pytest.mark.parametrize("name", NARROWER)
def test_what_is_no_wider_is_clean(name: str) -> None:
    old, new = map(tools, NARROWER[name])
    assert difference(old, new) == ()


WIDER = {
    "a path": (
        "fs.read: {allow: {path: [$WS/src/**]}}",
        "fs.read: {allow: {path: [$WS/**]}}",
        "diff.allows",
    ),
    "a lost deny": (
        "fs.read: [{allow: {path: [$WS/**]}}, {deny: {path: ['**/.env']}}]",
        "fs.read: {allow: {path: [$WS/**]}}",
        "diff.allows",
    ),
    "a deny that is too small": (
        "fs.read: [{allow: {path: [$WS/**]}}, {deny: {path: ['**/.env*']}}]",
        "fs.read: [{allow: {path: [$WS/**]}}, {deny: {path: ['**/.env']}}]",
        "diff.allows",
    ),
    "allow for ask": (
        "shell.run: {ask: {argv: [git, ...]}}",
        "shell.run: [{allow: {argv: [git, log]}}, {ask: {argv: [git, push, ...]}}]",
        "diff.unasked",
    ),
    "ask for nothing": (
        "fs.read: {allow: any}",
        "fs.read: {allow: any}, fs.write: {ask: any}",
        "diff.asks",
    ),
    "a profile": (
        "shell.run: {allow: {argv: [ls]}}",
        "shell.run: {allow: {argv: [ls]}, profile: dev}",
        "diff.profile",
    ),
    "a grant that narrowed the profile": (
        "shell.run: [{allow: {argv: [ls, ...]}, profile: dev}, {allow: {argv: [ls, a]}}]",
        "shell.run: [{allow: {argv: [ls, ...]}, profile: dev}]",
        "diff.profile",
    ),
    "a rate": (
        "fs.read: {allow: any, rate: 10/h}",
        "fs.read: {allow: any, rate: 20/h}",
        "diff.bounds",
    ),
    "no condition": (
        "fs.read: {allow: any, when: session.calls < 3}",
        "fs.read: {allow: any}",
        "diff.allows",
    ),
    "another condition": (
        "fs.read: {allow: any, when: session.calls < 3}",
        "fs.read: {allow: any, when: session.calls < 4}",
        "diff.allows",
    ),
    "another name": (
        "files.read: {allow: any}",
        "'files.*': {allow: any}",
        "diff.allows",
    ),
    "an argument": (
        "mail.send: {allow: {to: {email: any}}}",
        "mail.send: {allow: {to: {email: any}, rest: any}}",
        "diff.allows",
    ),
    "content that a redirection brings": (
        "shell.run: {allow: {argv: [ls]}, profile: dev},"
        " fs.write: {allow: {path: [$WS/**], content: any}}",
        "shell.run: {allow: {argv: [ls]}, profile: dev}, fs.write: {allow: {path: [$WS/**]}}",
        "diff.allows",
    ),
    "an ask by content is an ask of all": (
        "shell.run: {allow: {argv: [ls]}, profile: dev},"
        " fs.write: [{allow: {path: [$WS/**]}}, {ask: {path: [$WS/**], content: any}}]",
        "shell.run: {allow: {argv: [ls]}, profile: dev}, fs.write: {ask: {path: [$WS/**]}}",
        "diff.asks",
    ),
    "an ask by input is an ask of all": (
        "shell.run: [{allow: {argv: [ls, ...]}}, {ask: {argv: [ls, a], stdin: any}}]",
        "shell.run: [{allow: {argv: [ls, ...]}}, {ask: {argv: [ls, a]}}]",
        "diff.asks",
    ),
    "an ask by a condition on input is an ask of all": (
        "shell.run: [{allow: {argv: [ls]}},"
        ' {ask: {argv: [ls]}, when: \'default(call.stdin, "") != ""\'}]',
        "shell.run: [{allow: {argv: [ls]}}, {ask: {argv: [ls]}}]",
        "diff.asks",
    ),
    "one subdomain more": (
        "http.get: {allow: {url: ['https://*.a.test/**']}}",
        "http.get: {allow: {url: ['https://**.a.test/**']}}",
        "diff.allows",
    ),
}


@pytest.mark.parametrize("name", WIDER)
def test_what_is_wider_is_shown_with_an_example(name: str) -> None:
    old, new, code = WIDER[name]
    found = difference(tools(old), tools(new))
    shown = [one for one in found if one.code == code and one.certain]
    assert shown, found
    for one in found:
        assert_true(one, tools(old), tools(new))
        assert one.file == "p"
        assert one.line


def test_an_ask_counts_what_it_does_not_grant() -> None:
    whole, named = "{ask: {a: any, b: any}}", "{ask: {b: any}, rate: 20/h}"
    old, new = tools(f"t: [{whole}, {named}]"), tools(f"t: [{whole}]")
    assert "diff.bounds" in {one.code for one in difference(old, new)}
    assert difference(old, old) == ()


def test_one_rate_for_two_rules_is_not_two_rates() -> None:
    old = tools("fs.read: {allow: {path: [$WS/a, $WS/b]}, rate: 20/h}")
    new = tools(
        "fs.read: [{allow: {path: [$WS/a]}, rate: 20/h}, {allow: {path: [$WS/b]}, rate: 20/h}]"
    )
    (doubt,) = difference(old, new)
    assert (doubt.code, doubt.certain) == ("diff.bounds", False)
    assert difference(new, old) == ()


def test_an_argument_that_is_no_longer_a_path() -> None:
    old = tools("t: [{allow: {x: {path: [$WS/**]}}}, {allow: {x: any, y: any}}]")
    new = tools("t: {allow: {x: any, y: any}}")
    # Whatever it was, the other rule took it for nothing and granted it.
    assert difference(old, new) == ()
    assert difference(new, tools("t: {allow: {x: {path: [$WS/**]}, y: any}}")) == ()
    text = tools("t: {allow: {x: {in: [a]}}}")
    assert "diff.kind" in {one.code for one in difference(old, text)}


def test_a_rule_in_a_profile_that_hides_less() -> None:
    head = "profiles: {base: {read: [$WS/**], hide: ['**/.env']}, open: {read: [$WS/**]}}\n"
    one, more = "{allow: {path: [$WS/**]}}", "{allow: {path: [$WS/**]}, profile: open}"
    old = policy(f"{head}tools: {{fs.read: [{one}]}}")
    new = policy(f"{head}tools: {{fs.read: [{one}, {more}]}}")
    assert [found.code for found in difference(old, new)] == ["diff.profile"]
    assert difference(new, old) == ()


def test_two_programs_that_come_to_share_a_profile() -> None:
    old = tools("shell.run: [{allow: {argv: [ls]}, profile: dev}, {allow: {argv: [cat]}}]")
    new = tools("shell.run: [{allow: {argv: [ls]}}, {allow: {argv: [cat]}}]")
    (found,) = difference(old, new)
    assert (found.code, found.certain, found.old) == ("diff.joined", True, Effect.DENY)
    assert found.example is not None
    assert found.example.arguments["command"] == "ls; cat"


def test_what_a_machine_must_give() -> None:
    old = policy("require: {tier: full, cgroup: true}\ntools: {}")
    weaker = policy("require: {tier: landlock}\ntools: {}")
    assert {one.message for one in difference(old, weaker)} == {
        "it no longer requires tier full",
        "it no longer requires a cgroup",
    }
    assert difference(weaker, old) == ()


def test_roles_and_servers() -> None:
    old = policy("tools: {fs.read: {allow: any}}\nroles: {a: {fs.read: {allow: any}}}")
    new = policy(
        "tools: {fs.read: {allow: any}}\nservers: {s: {run: [x]}}\n"
        "roles: {a: {fs.list: {allow: any}}, b: {fs.read: {allow: any}}, c: {fs.list: {deny: any}}}"
    )
    found = {(one.code, one.role, one.certain) for one in difference(old, new)}
    assert found == {
        ("diff.server", None, True),
        ("diff.allows", "a", True),
        ("diff.allows", "b", True),
    }


def test_profiles_that_no_rule_uses_are_those_of_servers() -> None:
    rule = "tools: {shell.run: {allow: {argv: [ls]}, profile: dev}}"
    old = policy(f"profiles: {{dev: {{read: [$WS/**]}}, files: {{read: [$WS/**]}}}}\n{rule}")
    new = policy(
        "profiles: {dev: {read: [$WS/**]}, files: {write: [$WS/**]},"
        f" base: {{read: [/etc/**, $WS/**]}}}}\n{rule}"
    )
    found = {(one.code, one.message, one.certain) for one in difference(old, new)}
    assert found == {
        ("diff.default", "profile files, in which servers run, writes /ws", True),
        ("diff.default", "profile default, in which servers run, reads /etc", True),
    }
    assert difference(new, old) == ()


@pytest.mark.parametrize("tool", ["fs.read", "files.read"])
@pytest.mark.parametrize("effect", ["allow", "ask"])
def test_what_a_grant_hides_its_profile_does_not_bound(tool: str, effect: str) -> None:
    """A grant covers nothing that its own profile hides: another one's profile counts there."""
    text = f"""
profiles: {{near: {{read: [$WS/**], limits: {{wall: 1s}}}}, far: {{read: [$WS/**]}}}}
tools:
  {tool}:
    - {{allow: {{path: {{path: ["$WS/**"]}}}}, id: a, profile: near}}
    - {{{effect}: {{path: {{path: ["$WS/**"]}}}}, id: b, profile: far}}
"""
    old, new = policy(text), policy(text.replace("1s}", "1s}, hide: ['**/.env']"))
    env = Document(tool=tool, arguments={"path": "/ws/.env"}, workspace=WORKSPACE)
    assert is_wider(decide(old, env), decide(new, env))
    found = difference(old, new)
    assert {one.code for one in found} == {"diff.profile"}
    # What hid it already hides no more than it did.
    assert difference(new, new) == ()


def test_an_ask_loses_no_profile_of_an_allow() -> None:
    profiles = "profiles: {near: {read: [$WS/a]}, far: {read: [$WS/**]}}\n"
    allow = "{allow: {argv: [ls]}, profile: near, rate: 1/h}"
    asked = "{ask: {argv: [ls]}, profile: far}"
    old = policy(f"{profiles}tools: {{shell.run: [{allow}, {asked}]}}")
    new = policy(f"{profiles}tools: {{shell.run: [{asked}]}}")
    assert {one.code for one in difference(old, new)} >= {"diff.profile", "diff.bounds"}
    assert difference(old, old) == ()


def test_limits_and_hidden_files() -> None:
    rule = "tools: {fs.read: {allow: any}}"
    old = policy(f"profiles: {{base: {{read: [$WS/**], hide: ['**/.env*']}}}}\n{rule}")
    new = policy(
        f"profiles: {{base: {{read: [$WS/**], hide: ['**/.env'], limits: {{wall: 1m}}}}}}\n{rule}"
    )
    (one,) = difference(old, new)
    assert one.code == "diff.profile"
    assert one.certain
    assert "no longer hides" in one.message
    assert "limit wall 60000 instead of 30000" in one.message
    assert difference(new, old) == ()


def test_another_workspace_is_not_compared() -> None:
    one = tools("fs.read: {allow: any}")
    other = replace(one.parts[0], workspace="/other")
    assert [found.code for found in difference(one, other)] == ["diff.workspace"]


def test_a_large_policy_is_compared_in_time() -> None:
    rules = ", ".join(f"{{allow: {{argv: [p{n}, ...]}}, profile: dev}}" for n in range(400))
    paths = ", ".join(f"{{deny: {{path: ['$WS/p{n}/**']}}}}" for n in range(400))
    text = f"shell.run: [{rules}], fs.read: [{{allow: any}}, {paths}]"
    assert difference(tools(text), tools(text)) == ()
    found = difference(tools(text), tools(text.replace("'$WS/p7/**'", "'$WS/p7/a/**'")))
    assert [one.certain for one in found] == [True]
    shown = found[0].example
    assert isinstance(shown, Document)
    assert str(shown.arguments["path"]).startswith("/ws/p7")
