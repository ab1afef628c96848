"""The published vectors: what another implementation checks itself against, we pass too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safeconduct.attestation import Opening, read_entries, read_opened, verify_trace
from safeconduct.attestation.entry import commit, parse_entry
from safeconduct.attestation.folder import Folder
from safeconduct.attestation.merkle import leaf_hash
from safeconduct.attestation.reader import stored_entries
from safeconduct.errors import Exit, TraceInvalid

VECTORS = Path(__file__).parents[1] / "vectors" / "trace"
SMALL = VECTORS / "small"
KEY = (VECTORS / "small.pub").read_text().strip()


def test_commitments_and_leaves() -> None:
    vectors = json.loads((VECTORS / "commitments.json").read_text())
    for case in vectors["cases"]:
        salt, data = bytes.fromhex(case["salt"]), bytes.fromhex(case["data"])
        assert commit(salt, data) == case["commitment"], case["name"]
    for case in vectors["leaves"]:
        assert leaf_hash(bytes.fromhex(case["entry"])).hex() == case["leaf"]


def test_the_small_trace_verifies() -> None:
    report = verify_trace(SMALL, [KEY], origin="example.org/vectors/small")
    assert (report.status, report.level) == (Exit.OK, 1)
    assert (report.size, report.sessions, report.calls) == (11, 1, 2)
    assert [entry.kind.value for _, entry in read_entries(SMALL)] == [
        "log.open",
        "policy.load",
        "session.open",
        *["call.intent", "call.decision", "call.outcome"] * 2,
        "session.close",
        "session.close",
    ]


def test_its_openings_open() -> None:
    opened = {index: found for index, _, found in read_opened(SMALL)}
    document, value = opened[3]["document"], opened[5]["value"]
    assert isinstance(document, Opening)
    assert isinstance(value, Opening)
    assert document.json()["arguments"] == {"path": "/ws/é.txt"}
    assert value.json() == "text\n"


def test_every_cut_or_lengthened_entry_is_refused() -> None:
    with Folder(SMALL) as folder:
        entries = [stored.data for stored in stored_entries(folder, 11)]
    for data in entries:
        assert parse_entry(data)
        for bad in (data[:-1], data + b" ", b" " + data, data.replace(b'"v":1', b'"v":2'), b""):
            with pytest.raises(TraceInvalid):
                parse_entry(bad)
