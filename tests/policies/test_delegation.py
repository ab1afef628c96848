"""What is handed on never allows more than what is held, expires, and can be taken back."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from safeconduct.call import (
    Bound,
    Decision,
    Document,
    Effect,
    Facts,
    Json,
    Limits,
    Per,
    Profile,
    Unit,
)
from safeconduct.errors import Denied, PolicyError
from safeconduct.policies import Judged, NarrowedPolicy, both, decide, parse_policy
from safeconduct.policies.delegation import MAX_DEPTH, Capability, Revocations, attenuate, beyond
from safeconduct.policies.lattice.profiles import profile_within

from .generate import WORKSPACE, Generator, parse, seeded

SEVERITY = {Effect.ALLOW: 0, Effect.ASK: 1, Effect.DENY: 2}
NOON = Facts(now_ms=12 * 3_600_000)
BUDGET = Bound(id="calls", unit=Unit.CALLS, most=5, per=Per.SESSION, reserve=1)


def policy(tools: str) -> Judged:
    profiles = "{base: {read: [$WS/**]}, dev: {like: base, write: [$WS/**]}}"
    text = f"version: 1\nprofiles: {profiles}\ntools: {{{tools}}}"
    return parse_policy(text.encode(), name="p", workspace=Path(WORKSPACE))


def capability(tools: str = "fs.read: {allow: any}, files.read: {allow: any}") -> Capability:
    return Capability(id="root", policy=policy(tools), revocations=Revocations())


def call(path: str = "/ws/a", tool: str = "fs.read") -> Document:
    return Document(tool=tool, arguments={"path": path}, workspace=WORKSPACE)


def judged(held: Capability, path: str = "/ws/a", tool: str = "fs.read") -> str:
    return held.decide(call(path, tool), NOON).code


def drawn(generator: Generator, parent: Capability, depth: int) -> Capability:
    """Hand on with random restrictions."""
    hide = ("/**/.env",) if generator.chance(0.5) else ()
    profile = Profile(
        name="bound",
        read=(generator.path(),),
        write=(generator.path(),),
        hide=hide,
        limits=Limits(wall_ms=generator.random.randint(1, 3000)),
    )
    tools = generator.random.sample(("fs.*", "files.read", "*.delete", "shell.run", "*.*"), 2)
    return attenuate(
        parent,
        id=f"c{depth}",
        tools=tools if generator.chance(0.4) else None,
        policy=parse(generator.spec()) if generator.chance(0.6) else None,
        profile=profile if generator.chance(0.5) else None,
        bounds=[BUDGET] if generator.chance(0.4) else [],
        expires_ms=generator.random.randint(1, 24) * 3_600_000 if generator.chance(0.3) else None,
    )


def assert_within(narrow: Decision, wide: Decision, document: Document) -> None:
    assert SEVERITY[narrow.effect] >= SEVERITY[wide.effect], document
    if narrow.effect is Effect.DENY:
        return
    assert narrow.profile is not None
    assert wide.profile is not None
    assert profile_within(narrow.profile, wide.profile), document
    kept = {(one.unit, one.per, one.most) for one in narrow.obligations}
    assert kept >= {(one.unit, one.per, one.most) for one in wide.obligations}, document


def test_attenuated_never_allows_more() -> None:
    granted = handed_on = 0
    for seed in range(400):
        generator = seeded(seed)
        held = Capability(id="c0", policy=parse(generator.spec()), revocations=Revocations())
        chain = [held]
        # Two drawn policies may take one argument for two things.
        with suppress(PolicyError):
            for depth in range(1, generator.random.randint(2, 4)):
                chain.append(drawn(generator, chain[-1], depth))
        handed_on += len(chain) - 1
        for _ in range(20):
            document = generator.document()
            facts = Facts(now_ms=generator.random.randint(1, 30) * 3_600_000, calls=1)
            decisions = [one.decide(document, facts) for one in chain]
            granted += decisions[-1].effect is not Effect.DENY
            assert decisions[0] == decide(held.policy, document, facts)
            for wide, narrow in pairwise(decisions):
                assert_within(narrow, wide, document)
    assert granted > 25
    assert handed_on > 300


def test_tools_narrow_at_every_step() -> None:
    first = attenuate(capability(), id="a", tools=["fs.*", "files.read"])
    second = attenuate(first, id="b", tools=["*.read"])
    third = attenuate(second, id="c", tools=["files.*"])
    assert [judged(one) for one in (first, second, third)] == [
        "policy.allow",
        "policy.allow",
        "capability.tool",
    ]
    assert judged(third, tool="files.read") == "policy.allow"


def test_a_redirection_needs_the_tool_that_opens_files() -> None:
    held = capability(
        "shell.run: {allow: {argv: [echo, ...]}, profile: dev},"
        " fs.write: {allow: {path: [$WS/**]}}, fs.read: {allow: {path: [$WS/**]}}"
    )
    programs = attenuate(held, id="a", tools=["shell.run"])
    readers = attenuate(held, id="b", tools=["shell.*", "fs.read"])
    for redirect, codes in {
        ">": ["policy.allow", "capability.tool", "capability.tool"],
        "<": ["policy.allow", "capability.tool", "policy.allow"],
    }.items():
        text = shell_text(["echo", "x"], redirect)
        assert [one.decide(text, NOON).code for one in (held, programs, readers)] == codes
    plain = shell_text(["echo", "x"], None)
    assert programs.decide(plain, NOON).code == "policy.allow"


def shell_text(argv: list[str], redirect: str | None) -> Document:
    """Return shell text in its canonical form."""
    words: list[Json] = [*argv]
    redirects: list[Json] = []
    if redirect is not None:
        redirects.append({"fd": int(redirect == ">"), "operator": redirect, "target": "/ws/a"})
    command: dict[str, Json] = {"join": "", "argv": words, "redirects": redirects}
    arguments: dict[str, Json] = {"command": "x", "commands": [command], "cwd": WORKSPACE}
    return Document(tool="shell.run", arguments=arguments, workspace=WORKSPACE)


def test_it_expires_and_a_missing_clock_is_a_refusal() -> None:
    short = attenuate(capability(), id="a", expires_ms=NOON.now_ms + 1)
    assert judged(short) == "policy.allow"
    assert short.decide(call(), replace(NOON, now_ms=NOON.now_ms + 1)).code == "capability.expired"
    assert short.decide(call(), Facts()).code == "capability.expired"
    # A later end does not lengthen it.
    assert attenuate(short, id="b", expires_ms=10**15).expires_ms == NOON.now_ms + 1


def test_revoking_takes_back_all_that_came_from_it() -> None:
    root = capability()
    child = attenuate(root, id="a")
    grandchild, sibling = attenuate(child, id="b"), attenuate(root, id="c")
    root.revocations.revoke(child)
    codes = [judged(one) for one in (root, child, grandchild, sibling)]
    assert codes == ["policy.allow", "capability.revoked", "capability.revoked", "policy.allow"]


def test_a_profile_bound_hides_paths_of_our_own_tools() -> None:
    root = capability("fs.read: {allow: any}, fs.write: {allow: any}, shell.run: {allow: any}")
    bound = Profile(name="bound", read=(WORKSPACE,), hide=("/**/.env",))
    child = attenuate(root, id="a", profile=bound)
    assert judged(root, "/ws/.env") == "policy.allow"
    assert judged(child, "/ws/.env") == "path.hidden"
    content = {"path": "/ws/a", "content": "/ws/.env"}
    written = Document(tool="fs.write", arguments=content, workspace=WORKSPACE)
    assert child.decide(written, NOON).code == "policy.allow"


@pytest.mark.parametrize("own", ["", "id: x, "])
def test_a_profile_bound_hides_whatever_ids_the_files_use(own: str) -> None:
    """The first rule of either file has one id; that of the narrower file does not grant."""
    narrow = f"""t: [
        {{{own}allow: {{p: any}}, when: "session.calls > 1000"}},
        {{allow: {{p: {{path: [$WS/**]}}}}}}]"""
    held = attenuate(
        capability("t: {allow: any}"),
        id="a",
        policy=policy(narrow),
        profile=Profile(name="bound", read=(WORKSPACE,), hide=("/**/.env",)),
    )
    facts = replace(NOON, calls=1)
    named = [
        Document(tool="t", arguments={"p": f"/ws/{x}"}, workspace=WORKSPACE) for x in ("a", ".env")
    ]
    assert [held.decide(one, facts).code for one in named] == ["policy.allow", "path.hidden"]


def test_budgets_are_counted_under_the_id_of_each_step() -> None:
    first = attenuate(capability(), id="a", bounds=[BUDGET])
    second = attenuate(first, id="b", bounds=[BUDGET])
    ids = [one.id for one in second.decide(call(), NOON).obligations]
    assert ids == ["a/calls", "b/calls"]


@pytest.mark.parametrize("name", ["", "root", "a b", "x" * 65])
def test_an_id_is_new(name: str) -> None:
    with pytest.raises(PolicyError) as caught:
        attenuate(capability(), id=name)
    assert caught.value.code == "capability.invalid"


@pytest.mark.parametrize("tool", ["", "fs.**", "fs read", "fs..read"])
def test_tools_are_names(tool: str) -> None:
    with pytest.raises(PolicyError, match="not the name of a tool"):
        attenuate(capability(), id="a", tools=[tool])


def test_it_is_not_handed_on_for_ever() -> None:
    held = capability()
    for depth in range(MAX_DEPTH - 1):
        held = attenuate(held, id=f"d{depth}")
    with pytest.raises(PolicyError, match="too often"):
        attenuate(held, id="last")


def test_profiles_of_two_engines_have_nothing_in_common() -> None:
    from safeconduct.call import Engine

    wasm, native = (Profile(name=engine, engine=engine) for engine in (Engine.WASM, Engine.NATIVE))
    first = attenuate(capability(), id="a", profile=native)
    with pytest.raises(Denied):
        attenuate(first, id="b", profile=wasm)


def test_what_is_asked_for_and_not_held_is_told() -> None:
    held = attenuate(capability(), id="a", policy=policy("fs.read: {allow: {path: [$WS/src/**]}}"))
    assert isinstance(held.policy, NarrowedPolicy)
    assert beyond(held, policy("fs.read: {allow: {path: [$WS/src/a]}}")) == ()
    (widening,) = beyond(held, policy("fs.read: {allow: {path: [$WS/docs/**]}}"))
    assert widening.certain
    assert widening.example is not None
    assert decide(both(held.policy, held.policy), widening.example).effect is Effect.DENY
