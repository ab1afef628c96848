"""The YAML subset: what it refuses, where it says so, and that text stays text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.errors import PolicyError
from safeconduct.policies.syntax import MAX_BYTES, MAX_DEPTH, parse_syntax, to_data

REFUSED = {
    "anchor": (b"a: &x 1\n", 1, "anchors"),
    "alias": (b"a: *x\n", 1, "aliases"),
    "self alias": (b"&a [*a]\n", 1, "anchors"),
    "tag": (b"a: !!python/object:os.system x\n", 1, "tags"),
    "local tag": (b"a: !x y\n", 1, "tags"),
    "merge": (b"a: 1\n<<: {b: 2}\n", 2, "merge"),
    "duplicate": (b"allow: 1\nb: 2\nallow: 3\n", 3, "twice"),
    "nested duplicate": (b"a: {b: 1, b: 2}\n", 1, "twice"),
    "quoted duplicate": (b'a: 1\n"a": 2\n', 2, "twice"),
    "second document": (b"a: 1\n---\nb: 2\n", 2, "second document"),
    "directive": (b"%YAML 1.1\n---\na: 1\n", 1, "directives"),
    "list as key": (b"[a]: 1\n", 1, "key"),
    "bad utf-8": (b"a: 1\nb: \xff\n", 2, "UTF-8"),
    "utf-16": ("a: 1\n".encode("utf-16"), 1, "UTF-8"),
    "bom": (b"\xef\xbb\xbfa: 1\n", 1, "byte order"),
    "control": (b"a: \x01\n", 0, "character"),
    "tab": (b"a:\n\t- b\n", 2, "YAML"),
    "open bracket": (b"a: [b\n", 2, "YAML"),
    "empty": (b"", 1, "empty"),
    "comment only": (b"# nothing\n", 1, "empty"),
    "deep": (b"[" * (MAX_DEPTH + 1), 1, "deep"),
    "very deep": (b"[" * 500_000, 1, "deep"),
    "large": (b"a" * (MAX_BYTES + 1), 0, "larger"),
    "long text": (b"a: " + b"b" * 5000, 1, "too long"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_a_place_and_a_fix(case: str) -> None:
    data, line, words = REFUSED[case]
    with pytest.raises(PolicyError, match=words) as caught:
        parse_syntax(data, name="p.yaml")
    assert caught.value.code == "policy.syntax"
    assert (caught.value.file, caught.value.line) == ("p.yaml", line)
    assert caught.value.hint


def test_every_scalar_stays_text() -> None:
    data = b"[no, off, 0o777, 1e3, 1.10, ~, null, 2026-01-01, 0x1F, 1_000, =, <<, '']"
    found = to_data(parse_syntax(data, name="p"))
    assert found == data.decode()[1:-1].replace("''", "").split(", ")


def test_dots_in_a_flow_list_are_a_word() -> None:
    assert to_data(parse_syntax(b"[pytest, ...]", name="p")) == ["pytest", "..."]


def outcome(data: bytes) -> str:
    """Return the hint of the refusal, or `parsed`."""
    try:
        to_data(parse_syntax(data, name="p"))
    except PolicyError as error:
        return error.hint
    return "parsed"


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_end_in_a_policy_error(data: bytes) -> None:
    assert outcome(data)


@given(st.text(alphabet="&*!%[]{}:,-?|>'\"#\n ab<.~", max_size=60))
def test_any_punctuation_parses_or_ends_in_a_policy_error(text: str) -> None:
    assert outcome(text.encode())
