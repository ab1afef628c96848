"""What came of a call must fit what was decided about it, in the fast way and in the exact one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import cast

import pytest

from safeconduct.attestation import Report, verify_trace
from safeconduct.attestation.verify.vouching import Brought
from safeconduct.errors import Exit

from .evidence_kit import check  # noqa: TID251 - the tests' own kit
from .forge import Fields, call, chain, entry, forge, opening  # noqa: TID251 - the tests' own kit
from .test_bundle import honest_bundle_of  # noqa: TID251 - the tests' own kit
from .test_verify_ranges import KEY, ORIGIN, both  # noqa: TID251 - the tests' own kit

CLOSED: Fields = {"status": "closed"}
YES: Fields = {"answer": "yes", "by": "operator"}


def told(name: str, decisions: list[Fields], outcome: Fields, *answers: Fields) -> list[Fields]:
    """Return the entries of one call: what was decided, what a person said, what came of it."""
    intent, decision, end = call("s", name)
    steps = [intent]
    for changed in decisions:
        steps.append({**decision, "body": {**cast("Fields", decision["body"]), **changed}})
    steps += [entry("approval", "s", {"call": name, **one}) for one in answers]
    return [*steps, {**end, "body": {"call": name, **outcome}}]


def verified(trace: Path, steps: list[Fields]) -> Report:
    entries = [opening(ORIGIN), entry("session.open", "s", {"caller": "local", "origin": "sdk"})]
    entries += [*steps, entry("session.close", "s", CLOSED)]
    forge(trace, chain([*entries, entry("session.close", "run-1", CLOSED)]), KEY, ORIGIN)
    return verify_trace(trace, [KEY.verifier.line], jobs=1)


DENY: Fields = {"effect": "deny"}
ASK: Fields = {"effect": "ask"}
ALLOW: Fields = {"effect": "allow"}
SEEN: Fields = {"observed": True}
OK: Fields = {"status": "ok"}
USED: Fields = {"status": "failed", "usage": {"wall_ms": 1}}
UNTRUE: dict[str, tuple[str, list[Fields]]] = {
    "denied and ok": ("call.denied", told("c", [DENY], OK)),
    "denied and failed": ("call.denied", told("c", [DENY], USED)),
    "denied, a yes, and ok": ("call.denied", told("c", [DENY], OK, YES)),
    "denied, allowed, and ok": ("call.denied", told("c", [DENY, ALLOW], OK)),
    "denied, asked, a yes, and ok": ("call.denied", told("c", [DENY, ASK], OK, YES)),
    "not observed": ("call.denied", told("c", [{**DENY, "observed": False}], OK)),
    "asked and ok": ("call.unasked", told("c", [ASK], OK)),
    "asked, a no, and ok": ("call.unasked", told("c", [ASK], OK, {**YES, "answer": "no"})),
}
TRUE: dict[str, list[Fields]] = {
    "denied": told("c", [DENY], {"status": "denied"}),
    "denied and broken off": told("c", [DENY], {"status": "error"}),
    "denied and lost": told("c", [DENY], {"status": "unknown"}),
    "only observed": told("c", [{**DENY, **SEEN}], OK),
    "asked and only observed": told("c", [{**ASK, **SEEN}], USED),
    "asked and a yes": told("c", [ASK], OK, YES),
    "asked, nobody, and a yes": told("c", [ASK], OK, {**YES, "answer": "none"}, YES),
    "asked and a no": told("c", [ASK], {"status": "denied"}, {**YES, "answer": "no"}),
    "no decision": told("c", [], OK),
}


@pytest.mark.parametrize("what", UNTRUE)
def test_a_call_that_ran_although_it_may_not_is_named(tmp_path: Path, what: str) -> None:
    code, steps = UNTRUE[what]
    report = verified(tmp_path, steps)
    assert [(one.code, one.index) for one in report.findings] == [(code, 1 + len(steps))]
    assert (report.status, report.level) == (Exit.TAMPERED, 0)
    assert "'c' ran" in report.findings[0].message


@pytest.mark.parametrize("what", TRUE)
def test_what_a_recorder_rightly_says_passes(tmp_path: Path, what: str) -> None:
    report = verified(tmp_path, TRUE[what])
    assert (report.status, report.findings) == (Exit.OK, ())


def test_a_bundle_of_such_a_session_is_not_believed(tmp_path: Path) -> None:
    brought = Brought(keys=(KEY.verifier,))
    for what, (code, steps) in UNTRUE.items():
        verified(tmp_path, steps)
        found = check(honest_bundle_of(tmp_path, "s", lambda _: True), brought)
        assert (found.status, found.findings[0].code) == (Exit.TAMPERED, code), what
    for what, steps in TRUE.items():
        verified(tmp_path, steps)
        found = check(honest_bundle_of(tmp_path, "s", lambda _: True), brought)
        assert found.status is Exit.OK, what


def test_it_is_told_alike_wherever_the_ranges_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decision, answer and outcome may stand in three ranges, or in one."""
    chance = random.Random(11)  # noqa: S311 - a fixed choice
    stories = [*TRUE.values(), *(steps for _, steps in UNTRUE.values())]
    found: set[str] = set()
    for round_ in range(24):
        honest = list(TRUE.values()) if round_ % 4 == 0 else stories
        waiting: list[list[Fields]] = []
        for number in range(60):
            name = {"call": f"c{number}"}
            chosen = chance.choice(honest)
            waiting.append(
                [{**one, "body": {**cast("Fields", one["body"]), **name}} for one in chosen]
            )
        steps: list[Fields] = []
        while waiting:
            steps.append(chance.choice(waiting).pop(0))
            if chance.random() < 0.5:
                steps += call("s", f"between-{len(steps)}")
            waiting = [one for one in waiting if one]
        verified(tmp_path, steps)
        fast, slow = both(tmp_path, monkeypatch)
        assert fast == slow
        found.update(one.code for one in fast.findings)
        assert (fast.status == Exit.OK) == (round_ % 4 == 0 or not fast.findings)
    assert found == {"call.denied", "call.unasked"}
