"""One value, one spelling: the encoder equals RFC 8785 there, the decoder takes no other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.attestation.encoding import (
    MAX_DEPTH,
    MAX_ENTRY_BYTES,
    MAX_INTEGER,
    decode,
    encode,
    encode_committed,
)
from safeconduct.call import Json
from safeconduct.errors import TraceInvalid

VECTORS = Path(__file__).parents[1] / "vectors" / "trace" / "encoding.json"
_SHORT = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 34: '\\"', 92: "\\\\"}


def reference(value: Json) -> str:
    """Spell a value as RFC 8785 §3.2 says, written without looking at the encoder."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        marks = (ord(mark) for mark in value)
        spelled = (
            _SHORT.get(mark) or (f"\\u{mark:04x}" if mark < 32 else chr(mark)) for mark in marks
        )
        return f'"{"".join(spelled)}"'
    if isinstance(value, Mapping):
        items = sorted(value.items(), key=lambda item: item[0].encode("utf-16-be"))
        return "{" + ",".join(f"{reference(key)}:{reference(item)}" for key, item in items) + "}"
    return "[" + ",".join(reference(item) for item in value) + "]"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
KEYS = st.text(st.characters(max_codepoint=127), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-MAX_INTEGER, MAX_INTEGER) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4)
)


@given(VALUES)
def test_encodes_as_rfc_8785_and_back(value: Json) -> None:
    data = encode(value)
    assert data == reference(value).encode()
    assert decode(data) == value


@given(VALUES, st.data())
def test_a_changed_byte_is_another_value_or_refused(value: Json, choice: st.DataObject) -> None:
    data = bytearray(encode(value))
    at = choice.draw(st.integers(0, len(data) - 1))
    data[at] ^= 1 << choice.draw(st.integers(0, 7))
    try:
        other = decode(bytes(data))
    except TraceInvalid:
        return
    assert encode(other) == bytes(data)
    assert (type(other), other) != (type(value), value) or repr(other) != repr(value)


@given(st.binary(max_size=200))
def test_garbage_is_refused_with_an_offset(data: bytes) -> None:
    try:
        value = decode(data)
    except TraceInvalid as error:
        good = error.code == "trace.encoding" and -1 <= error.offset <= len(data)
    else:
        good = encode(value) == data
    assert good


@pytest.mark.parametrize("case", json.loads(VECTORS.read_text())["good"], ids=lambda c: c["name"])
def test_good_vectors(case: dict[str, Any]) -> None:
    data = bytes.fromhex(case["hex"])
    assert encode(case["value"]) == data
    assert decode(data) == case["value"]


@pytest.mark.parametrize("case", json.loads(VECTORS.read_text())["bad"], ids=lambda c: c["name"])
def test_bad_vectors(case: dict[str, Any]) -> None:
    with pytest.raises(TraceInvalid) as caught:
        decode(bytes.fromhex(case["hex"]))
    assert caught.value.code == "trace.encoding"


def test_bounds() -> None:
    deep: Json = 0
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert decode(encode(deep)) == deep
    for too_much in (
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b"[" * 30_000 + b"]" * 30_000,
        b'"' + b"a" * MAX_ENTRY_BYTES + b'"',
        b"9" * 60_000,
    ):
        with pytest.raises(TraceInvalid):
            decode(too_much)


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        float("nan"),
        MAX_INTEGER + 1,
        {"é": 1},
        {1: 2},
        b"x",
        "\ud800",
        {"a": {"b": [1.0]}},
        {1},
    ],
    ids=repr,
)
def test_encoder_refuses_what_is_outside(value: Any) -> None:  # noqa: ANN401 - no Json on purpose
    with pytest.raises(TraceInvalid):
        encode(value)


def test_committed_values_may_hold_fractions_but_no_nan() -> None:
    assert json.loads(encode_committed({"ключ": [0.5, 2**60, None]})) == {
        "ключ": [0.5, 2**60, None]
    }
    for value in (float("nan"), [float("inf")], "\udfff"):
        with pytest.raises(TraceInvalid):
            encode_committed(value)
