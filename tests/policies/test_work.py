"""What one decision may cost: the product of what a policy lists and a call sends is bounded."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.call import Call, Decision, Effect, Json
from safeconduct.policies import canonicalize, decide, parse_policy
from safeconduct.policies.host_table import HostTable
from safeconduct.policies.hosts import HostPattern, compile_host
from safeconduct.policies.work import NO_BOUND, WORK, TooMuchWork, spend

# Far more than the bound takes here, and far less than the work without it.
SECONDS = 30.0
LABELS = st.sampled_from(["a", "b", "ab", "org", "localhost", "local"])
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
HOSTS = st.one_of(NAMES, st.sampled_from(["10.0.0.1", "[::1]"]))
PATTERNS = st.one_of(
    NAMES,
    NAMES.map("**.{}".format),
    NAMES.map("*.{}".format),
    st.sampled_from(["**", "*", "a.*.org", "**.*.org", "10.0.0.1"]),
)


def judged(workspace: Path, deny: str, value: Json) -> tuple[Decision, float]:
    text = f"version: 1\ntools: {{a.b: [{{allow: {{x: any}}}}, {{deny: {{x: {deny}}}}}]}}"
    policy = parse_policy(text.encode(), name="policy.yaml", workspace=workspace)
    call = Call(id="1", tool="a.b", arguments={"x": value}, session="s")
    with canonicalize(policy, call) as canonical:
        started = time.monotonic()
        return decide(policy, canonical.document), time.monotonic() - started


@pytest.mark.parametrize(
    ("deny", "value"),
    [
        ("{regex: '(?:.*a.{950}c)'}", ["ab" * 20_000] * 20),
        ("{path: ['**/%s?b']}" % ("?*/" * 60), ["/none/" + "a/" * 1500 + "a"] * 200),
        (
            "{{path: [{}]}}".format(", ".join(f"'**/bad{at}*/**'" for at in range(2000))),
            ["/n/a/b/c/d"] * 500,
        ),
        (
            "{{email: [{}]}}".format(", ".join(f"'*@bad{at}.example'" for at in range(2000))),
            ["a@b.example"] * 500,
        ),
    ],
)
def test_what_is_too_much_work_is_denied_early(workspace: Path, deny: str, value: Json) -> None:
    decision, seconds = judged(workspace, deny, value)
    assert (decision.effect, decision.code) == (Effect.DENY, "policy.too_much_work")
    assert seconds < SECONDS
    assert WORK.left == NO_BOUND
    # One of the values is no such work.
    assert isinstance(value, list)
    assert judged(workspace, deny, value[:1])[0].effect is Effect.ALLOW


@pytest.mark.parametrize(
    ("form", "pattern", "value"),
    [
        ("host", "**.bad{}.example", "h{}.good.example.org"),
        ("host", "h{}.bad.example", "h{}.good.example.org"),
        ("url", "https://**.bad{}.example/**", "https://h{}.good.example.org/"),
        ("url", "https://bad{}.example/a/*/b", "https://h{}.good.example.org/a/x/b"),
    ],
)
def test_a_list_of_hosts_is_held_against_a_long_block_list(
    workspace: Path, form: str, pattern: str, value: str
) -> None:
    listed = ", ".join(f"'{pattern.format(at)}'" for at in range(2000))
    deny = f"{{{form}: [{listed}]}}"
    values: list[Json] = [value.format(at) for at in range(1024)]
    decision, seconds = judged(workspace, deny, values)
    assert decision.effect is Effect.ALLOW
    assert seconds < SECONDS / 10
    blocked = pattern.format(1999).replace("**.", "x.").replace("/**", "/y").replace("*", "y")
    assert judged(workspace, deny, [*values[:-1], blocked])[0].code == "policy.deny"


@given(listed=st.lists(PATTERNS, max_size=6), host=HOSTS)
def test_a_table_leaves_out_no_pattern_that_covers(listed: list[str], host: str) -> None:
    patterns: list[HostPattern] = []
    for text in listed:
        try:
            patterns.append(compile_host(text))
        except ValueError:
            continue
    found = HostTable((one.labels, one) for one in patterns).find(host)
    assert [one for one in patterns if one.covers(host)] == [
        one for one in patterns if one in found and one.covers(host)
    ]


def test_each_thread_has_its_own_bound_and_none_outside_of_decisions() -> None:
    spend(1 << 60)
    left: list[float] = []
    WORK.left = 10_000
    try:
        thread = threading.Thread(target=lambda: left.append(WORK.left))
        thread.start()
        thread.join()
        spend(9_000)
        with pytest.raises(TooMuchWork):
            spend(9_000)
    finally:
        WORK.left = NO_BOUND
    assert left == [NO_BOUND]


def decided(workspace: Path, rules: str, value: Json) -> Decision:
    policy = parse_policy(
        f"version: 1\ntools: {{a.b: [{rules}]}}".encode(), name="p", workspace=workspace
    )
    call = Call(id="1", tool="a.b", arguments={"x": value}, session="s")
    with canonicalize(policy, call) as canonical:
        return decide(policy, canonical.document)


def test_a_grant_that_is_too_much_work_takes_nothing_from_another(workspace: Path) -> None:
    heavy, light = "{allow: {x: {regex: '(?:.*a.{300}b)'}}}", "{allow: {x: any}}"
    value: Json = ["ab" * 20_000] * 20
    assert decided(workspace, heavy, value).code == "policy.too_much_work"
    assert decided(workspace, f"{heavy}, {light}", value).effect is Effect.ALLOW
    assert decided(workspace, f"{light}, {heavy}", value).effect is Effect.ALLOW
    deny = "{deny: {x: {regex: 'ab'}}}"
    assert decided(workspace, f"{light}, {heavy}, {deny}", [*value, "ab"]).code == "policy.deny"
