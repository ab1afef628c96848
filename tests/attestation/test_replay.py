"""Replay in policy mode: what another policy would have said, and what cannot be said."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from safeconduct.attestation import TraceWriter
from safeconduct.attestation.replay import replay_policy
from safeconduct.call import Effect, EntryKind, Json
from safeconduct.policies import Policy, parse_policy

from .kit import Bench, write_trace  # noqa: TID251 - the tests' own kit


def policy(allowed: str) -> Policy:
    text = f'version: 1\ntools:\n  fs.read: {{allow: {{path: ["{allowed}"]}}}}\n'
    return parse_policy(text.encode(), name="test.yaml", workspace=Path("/ws"))


@pytest.fixture
def trace(bench: Bench) -> Path:
    return write_trace(bench, calls=4, sessions=2)


def test_the_same_judgement_is_clean(trace: Path) -> None:
    report = replay_policy(trace, policy("$WS/**"))
    assert (report.calls, report.same, report.clean) == (4, 4, True)


def test_a_stricter_policy_lists_what_it_would_have_refused(trace: Path) -> None:
    report = replay_policy(trace, policy("$WS/docs/**"))
    assert (report.calls, report.same, len(report.changes)) == (4, 0, 4)
    change = report.changes[0]
    assert (change.tool, change.recorded, change.new) == ("fs.read", Effect.ALLOW, Effect.DENY)
    assert change.reason
    assert [one.index for one in report.changes] == sorted(one.index for one in report.changes)


def test_erased_and_false_openings_are_undecidable(trace: Path) -> None:
    first, second = sorted((trace / "openings").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes().replace(b"/ws/a", b"/ws/b"))
    report = replay_policy(trace, policy("$WS/**"))
    assert (report.same, report.changes) == (0, [])
    assert {one.code for one in report.undecidable} == {"opening.missing", "opening.false"}
    shutil.rmtree(trace / "openings")
    assert len(replay_policy(trace, policy("$WS/**")).undecidable) == 4


def decided(
    bench: Bench, body: dict[str, Json], document: Json = None, *, tool: str = "fs.read"
) -> Path:
    """Write a trace of one call whose decision says ``body`` too."""
    signer = bench.signer()
    with closing(signer), TraceWriter.open(bench.trace, signer=signer) as writer:
        session = writer.open_session("local", "sdk")
        document = document or {
            "tool": tool, "arguments": {"path": "/ws/a"}, "workspace": "/ws",
        }  # fmt: skip
        intent: dict[str, Json] = {
            "call": "c", "tool": tool, "caller": "helper", "origin": "sdk", "parent": None,
        }  # fmt: skip
        decision: dict[str, Json] = {
            "call": "c", "effect": "allow", "code": "policy.allow", "rules": [],
            "policy": "0" * 64, "enforcement": "object", **body,
        }  # fmt: skip
        writer.append(
            EntryKind.CALL_INTENT, intent, session=session, committed={"document": document}
        )
        writer.append(EntryKind.CALL_DECISION, decision, session=session)
        writer.close_session(session)
    return bench.trace


FACTS: dict[str, Json] = {"role": None, "calls": 1, "denied": 0, "now_ms": 1}


@pytest.mark.parametrize(
    "facts",
    [
        None,
        [],
        "text",
        {},
        {**FACTS, "calls": True},
        {**FACTS, "now_ms": "1"},
        {**FACTS, "role": 1},
        {**FACTS, "denied": None},
    ],
)
def test_facts_that_are_none_are_not_taken_for_others(bench: Bench, facts: Json) -> None:
    report = replay_policy(decided(bench, {"facts": facts}), policy("$WS/**"))
    assert [one.code for one in report.undecidable] == ["facts.invalid"]


@pytest.mark.parametrize("now_ms", [-(2**53) + 1, 0, 2**53 - 1])
def test_no_time_breaks_the_judgement(bench: Bench, now_ms: int) -> None:
    text = 'version: 1\ntools: {fs.read: {allow: {path: ["$WS/**"]}, when: "time.hour >= 0"}}\n'
    timed = parse_policy(text.encode(), name="test.yaml", workspace=Path("/ws"))
    report = replay_policy(decided(bench, {"facts": {**FACTS, "now_ms": now_ms}}), timed)
    assert (report.same, len(report.changes)) == ((1, 0) if now_ms > 0 else (0, 1))


def test_a_role_that_the_policy_does_not_have_is_undecidable(bench: Bench) -> None:
    trace = decided(bench, {"facts": {**FACTS, "role": "x"}})
    assert [one.code for one in replay_policy(trace, policy("$WS/**")).undecidable] == [
        "policy.unknown_role"
    ]


def test_what_a_capability_alone_refused_is_not_judged(bench: Bench) -> None:
    trace = decided(bench, {"effect": "deny", "code": "capability.expired", "facts": FACTS})
    report = replay_policy(trace, policy("$WS/**"))
    assert (report.calls, report.unjudged, report.clean) == (1, 1, True)


def foreign(matcher: str) -> Policy:
    text = f"version: 1\ntools: {{t: [{{allow: {{p: any}}}}, {{deny: {{p: {matcher}}}}}]}}\n"
    return parse_policy(text.encode(), name="test.yaml", workspace=Path("/ws"))


PATH, HOST = '{path: ["$WS/secrets/**"]}', "{host: [evil.example]}"


@pytest.mark.parametrize(
    ("matcher", "arguments", "unfit", "known"),
    [
        (PATH, {"p": "/ws/a/../secrets/k"}, None, False),
        (PATH, {"p": "secrets/k"}, None, False),
        (PATH, {"p": ["/ws/a", "/ws//secrets/k"]}, None, False),
        (PATH, {"P": "/ws/secrets/k"}, None, False),
        (PATH, {"p": "/ws/secrets/k"}, None, True),
        (PATH, {"p": "/ws/../x"}, ["path.dotdot", "the path holds .."], True),
        # It was no such thing for the other policy: for this one it may be.
        (PATH, {"p": "/ws/secrets/k"}, ["url.scheme", "no URL"], False),
        (HOST, {"p": "EVIL.example"}, None, False),
        (HOST, {"p": "evil.example"}, None, True),
        ("[x]", {"p": "../x"}, None, True),
    ],
)
def test_a_spelling_of_other_rules_is_undecidable(
    bench: Bench, matcher: str, arguments: Json, unfit: Json, known: bool
) -> None:
    """What another policy took for any text is judged by none that takes it for a path."""
    document: dict[str, Json] = {"tool": "t", "arguments": arguments, "workspace": "/ws"}
    if unfit is not None:
        document["unfit"] = {"p": unfit}
    trace = decided(bench, {"facts": FACTS}, document, tool="t")
    report = replay_policy(trace, foreign(matcher))
    assert [one.code for one in report.undecidable] == ([] if known else ["document.spelling"])


def test_the_policy_that_spelled_a_call_judges_it(bench: Bench) -> None:
    """A real path may look like none to us, for example after a link."""
    same = foreign(PATH)
    document: Json = {"tool": "t", "arguments": {"p": "/ws/a b/~|x "}, "workspace": "/ws"}
    trace = decided(bench, {"policy": same.version, "facts": FACTS}, document, tool="t")
    assert replay_policy(trace, same).clean
