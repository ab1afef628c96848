"""Ranges that are checked apart and joined say what reading entry by entry says, on any log."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from safeconduct.attestation import (
    Report,
    generate_key,
    verify_trace,
)
from safeconduct.attestation.entry import SHAPES
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.verify import ranges, verification, worker
from safeconduct.attestation.verify.exact import ExactReader
from safeconduct.attestation.verify.summary import Summary
from safeconduct.call import EntryKind
from safeconduct.errors import Exit

from .forge import (  # noqa: TID251 - the tests' own kit
    Fields,
    call,
    chain,
    entry,
    forge,
    opening,
    spell,
)

KEY = generate_key("example.org/alice")
ORIGIN = "example.org/alice/log"
CALLS = 420
Chance = random.Random


def honest(chance: Chance) -> list[Fields]:
    """Return a log of overlapping sessions whose calls overlap too, across several bundles."""
    entries = [opening(ORIGIN)]
    open_steps: dict[str, list[Fields]] = {}
    started = 0
    while started < CALLS or open_steps:
        if len(open_steps) < 4 and started < CALLS:
            name = f"s{started:05d}"
            steps = [entry("session.open", name, {"caller": "local", "origin": "sdk"})]
            for _ in range(chance.choice([1, 3, 90])):
                steps += overlap(chance, name, started)
                started += 2
            steps.append(entry("session.close", name, {"status": "closed"}))
            open_steps[name] = steps
        name = chance.choice(list(open_steps))
        entries.append(open_steps[name].pop(0))
        if not open_steps[name]:
            del open_steps[name]
    return [*entries, entry("session.close", "run-1", {"status": "closed"})]


def overlap(chance: Chance, session: str, number: int) -> list[Fields]:
    """Return two calls of one session, the second begun before the first has its outcome."""
    first, second = call(session, f"c{number}"), call(session, f"c{number + 1}")
    if chance.random() < 0.5:
        return [*first, *second]
    return [first[0], second[0], first[1], second[1], second[2], first[2]]


# Each takes entries that are not chained yet and changes one at a place.
def body_of(entries: list[Fields], at: int) -> Fields:
    return cast("Fields", entries[at]["body"])


def other_call(entries: list[Fields], at: int, chance: Chance) -> None:
    body_of(entries, at)["call"] = f"c{chance.randrange(CALLS)}"


def other_kind(entries: list[Fields], at: int, chance: Chance) -> None:
    kinds = ["call.intent", "call.outcome", "session.open", "session.close", "approval", "none"]
    entries[at]["kind"] = chance.choice(kinds)


def other_time(entries: list[Fields], at: int, chance: Chance) -> None:
    entries[at]["time"] = chance.choice([0, 1_795_280_000_000, 1_800_000_000_000])


def other_session(entries: list[Fields], at: int, chance: Chance) -> None:
    entries[at]["session"] = chance.choice(["run-1", "S!", "fresh", "s" * 65])


def lost_field(entries: list[Fields], at: int, chance: Chance) -> None:
    body = body_of(entries, at)
    del body[chance.choice(list(body))]


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


ODD: list[object] = [
    1.5,
    -0.0,
    2**53,
    2**53 - 1,
    -(2**53),
    True,
    None,
    "",
    "x" * 201,
    "x" * 200,
    "a\nb",
    "a\\b",
    "a\x7fb",
    "é",
    "\u2028",
    [],
    {},
    {"é": 1},
    {"a": {"b\n": 1}},
    {"commitment": "ab" * 32},
    {"commitment": "AB" * 32},
    {"commitment": "ab" * 32, "more": 1},
    nested(4),
    nested(6),
    nested(31),
    nested(32),
    nested(40),
]


def odd_value(entries: list[Fields], at: int, chance: Chance) -> None:
    body = body_of(entries, at)
    body[chance.choice([*body, "new"])] = chance.choice(ODD)


def odd_header(entries: list[Fields], at: int, chance: Chance) -> None:
    values: list[object] = [-1, 2, 2**53, 1.0, None, "x"]
    entries[at][chance.choice(["v", "time", "mono_ns", "more"])] = chance.choice(values)


def twice(entries: list[Fields], at: int, chance: Chance) -> None:
    entries.insert(at, dict(entries[at]))


def lost(entries: list[Fields], at: int, chance: Chance) -> None:
    del entries[at]


def moved(entries: list[Fields], at: int, chance: Chance) -> None:
    entries.insert(chance.randrange(len(entries)), entries.pop(at))


def reopened(entries: list[Fields], at: int, chance: Chance) -> None:
    """A session id that is used again after its session was closed: allowed, if it starts anew."""
    name = str(entries[at]["session"])
    body: Fields = {"caller": "local", "origin": "sdk"}
    closed: Fields = {"status": "closed"}
    entries += [entry("session.open", name, body), entry("session.close", name, closed)]


CHANGES: list[Callable[[list[Fields], int, Chance], None]] = [
    other_call,
    other_kind,
    other_session,
    other_time,
    lost_field,
    odd_value,
    odd_value,
    odd_header,
    twice,
    lost,
    moved,
    reopened,
]


# And these change how entries are spelled, after they were chained.
def spaced(spelled: list[bytes], at: int, chance: Chance) -> None:
    spelled[at] = spelled[at].replace(b",", b", ", 1)


def broken_line(spelled: list[bytes], at: int, chance: Chance) -> None:
    spelled[at] = spelled[at].replace(b'"kind"', b'\n"kind"', 1)


def merged(spelled: list[bytes], at: int, chance: Chance) -> None:
    """Two entries in the place of one: as lines they are two, and so would the count be."""
    at = min(at, len(spelled) - 2)
    spelled[at : at + 2] = [spelled[at] + b"\n" + spelled[at + 1], b""]


def doubled_key(spelled: list[bytes], at: int, chance: Chance) -> None:
    spelled[at] = spelled[at].replace(b'"v":1', b'"v":1,"v":1')


def cut(spelled: list[bytes], at: int, chance: Chance) -> None:
    spelled[at] = spelled[at][: chance.randrange(len(spelled[at]))]


def other_previous(spelled: list[bytes], at: int, chance: Chance) -> None:
    place = spelled[at].find(b'"prev":"')
    if place > 0:
        spelled[at] = spelled[at][: place + 8] + b"f" * 64 + spelled[at][place + 72 :]


def other_number(spelled: list[bytes], at: int, chance: Chance) -> None:
    spelled[at] = spelled[at].replace(b'"sseq":', b'"sseq":1')


SPELLINGS = [spaced, broken_line, merged, doubled_key, cut, other_previous, other_number]


def both(trace: Path, patch: pytest.MonkeyPatch) -> tuple[Report, Report]:
    """Verify in ranges of one bundle, and entry by entry."""
    with patch.context() as small:
        small.setattr(verification, "RANGE_BUNDLES", 1)
        fast = verify_trace(trace, [KEY.verifier.line], jobs=1)

    def doubt(folder: Folder, bundles: range, size: int, *, structure: bool = True) -> Summary:
        return Summary(fault=bundles.start)

    with patch.context() as slow:
        slow.setattr(worker, "check_range", doubt)
        return fast, verify_trace(trace, [KEY.verifier.line], jobs=1)


def test_an_honest_log_passes_without_a_second_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = honest(Chance(1))
    forge(tmp_path, chain(entries), KEY, ORIGIN)
    fast, slow = both(tmp_path, monkeypatch)
    assert fast == slow
    assert (fast.status, fast.size) == (Exit.OK, len(entries))
    assert len(entries) > 1024
    looks: list[range] = []
    monkeypatch.setattr(verification, "RANGE_BUNDLES", 1)

    def look(reader: ExactReader, bundles: range) -> Summary:
        looks.append(bundles)
        return Summary()

    monkeypatch.setattr(ExactReader, "read", look)
    assert verify_trace(tmp_path, [KEY.verifier.line], jobs=1).status == Exit.OK
    assert not looks


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_is_told_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    chance = Chance(change.__name__)
    whole = honest(chance)
    told = 0
    for _ in range(10):
        entries: list[Fields] = [
            {**one, "body": dict(cast("Fields", one["body"]))} for one in whole
        ]
        change(entries, chance.randrange(1, len(entries)), chance)
        forge(tmp_path, chain(entries), KEY, ORIGIN)
        fast, slow = both(tmp_path, monkeypatch)
        assert fast == slow
        told += fast.status != Exit.OK
    assert told or change in (reopened, other_time)


@pytest.mark.parametrize("change", SPELLINGS, ids=lambda change: change.__name__)
def test_what_is_spelled_otherwise_is_told_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    chance = Chance(change.__name__)
    whole = chain(honest(chance))
    for _ in range(6):
        spelled = list(whole)
        change(spelled, chance.randrange(1, len(spelled)), chance)
        forge(tmp_path, spelled, KEY, ORIGIN)
        fast, slow = both(tmp_path, monkeypatch)
        assert fast == slow
        assert fast.status != Exit.OK


def test_workers_say_what_one_process_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = Chance(5)
    spelled = chain(honest(chance))
    monkeypatch.setattr(verification, "_WORKER_BUNDLES", 1)
    monkeypatch.setattr(verification, "RANGE_BUNDLES", 1)
    for bad in (None, 700):
        if bad is not None:
            spaced(spelled, bad, chance)
        forge(tmp_path, spelled, KEY, ORIGIN)
        alone = verify_trace(tmp_path, [KEY.verifier.line], jobs=1)
        several = verify_trace(tmp_path, [KEY.verifier.line], jobs=3)
        assert several == alone
        assert [one.index for one in alone.findings] == ([] if bad is None else [bad])


def test_lost_workers_are_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forge(tmp_path, chain(honest(Chance(6))), KEY, ORIGIN)
    monkeypatch.setattr(verification, "_WORKER_BUNDLES", 1)
    monkeypatch.setattr(verification, "RANGE_BUNDLES", 1)
    alone = verify_trace(tmp_path, [KEY.verifier.line], jobs=1)
    # One that ends before it has answered, and one that cannot be started at all.
    for program in ("/bin/true", "/nonexistent"):
        monkeypatch.setattr(worker.sys, "executable", program)
        assert verify_trace(tmp_path, [KEY.verifier.line], jobs=2) == alone


def test_progress_is_told_in_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spelled = chain(honest(Chance(7)))
    forge(tmp_path, spelled, KEY, ORIGIN)
    monkeypatch.setattr(verification, "RANGE_BUNDLES", 1)
    told: list[tuple[int, int]] = []
    verify_trace(
        tmp_path,
        [KEY.verifier.line],
        jobs=1,
        on_progress=lambda done, of: told.append((done, of)),
    )
    assert told[0] == (256, len(spelled))
    assert told[-1] == (len(spelled), len(spelled))


def test_the_report_of_an_edit_names_entry_and_byte(tmp_path: Path) -> None:
    spelled = chain(honest(Chance(8)))
    forge(tmp_path, spelled, KEY, ORIGIN)
    bundle = tmp_path / "tile/entries/001"
    whole = bytearray(bundle.read_bytes())
    place = whole.index(b'"tool":"fs.read"')
    whole[place + 8 : place + 15] = b"fs.rode"
    bundle.write_bytes(whole)
    report = verify_trace(tmp_path, [KEY.verifier.line])
    first = report.findings[0]
    assert (report.status, first.code, first.path) == (
        Exit.TAMPERED,
        "entry.hash",
        "tile/entries/001",
    )
    assert 256 <= first.index < 512
    assert first.offset < place


def test_spelled_entries_are_what_the_encoder_writes() -> None:
    """The forge spells as the writer does, so that a change is what breaks, not the forge."""
    assert spell({"b": 1, "a": ["x"]}) == b'{"a":["x"],"b":1}'


def test_the_fast_way_knows_every_rule_of_the_kinds_it_reads() -> None:
    """Whoever adds a rule to one of these bodies must add it to ranges.py as well."""
    intent, decision = SHAPES[EntryKind.CALL_INTENT], SHAPES[EntryKind.CALL_DECISION]
    outcome = SHAPES[EntryKind.CALL_OUTCOME]
    assert set(intent) == {"call", "tool", "caller", "origin", "document"}
    names = {"call", "code", "policy"}
    assert set(decision) == {*names, "effect", "enforcement", "rules"}
    assert set(outcome) == {"call", "status"}
    words = ["allow", "ask", "deny", "object", "sandbox", "advisory", "ok", "failed", "limit"]
    words += ["denied", "error", "unknown", "other"]
    assert {word for word in words if decision["effect"](word)} == ranges.EFFECTS
    assert {word for word in words if decision["enforcement"](word)} == ranges.ENFORCEMENTS
    assert {word for word in words if outcome["status"](word)} == ranges.STATUSES
