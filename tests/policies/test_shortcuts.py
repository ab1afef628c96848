"""What is answered in a short way is answered as it would be in the long one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safeconduct.call import Call, Json
from safeconduct.errors import Denied
from safeconduct.policies import canonicalize, parse_policy
from safeconduct.policies.arguments import copy_json
from safeconduct.policies.globs import Glob, hidden_by
from safeconduct.policies.match import Argv
from safeconduct.policies.match_url import UrlMatcher
from safeconduct.policies.urls import (
    UrlRefused,
    canonical_url,
    compile_url,
    respell_url,
    split_url,
)

_NAMES = st.sampled_from(["a", ".env", "x.env", "k.pem", ".pem", "pem", "a.pem.b", "a\n.pem"])
_HIDE = st.sampled_from(
    [
        "/**/.env",
        "**/.env",
        "**/*.pem",
        "**/*.p?m",
        "**/*",
        "**/a/.env",
        "/a/**",
        "**/*e*v",
        "**/**",
    ]
)


@given(st.lists(_HIDE, max_size=4).map(tuple), st.lists(_NAMES, max_size=4))
def test_what_is_hidden(patterns: tuple[str, ...], names: list[str]) -> None:
    path = "/" + "/".join(names)
    globs = [Glob(one, (*one.removeprefix("/").split("/"), "**")) for one in patterns]
    assert hidden_by(patterns, path) == any(glob.matches(path[1:].split("/")) for glob in globs)


_TAILS = st.lists(st.sampled_from(["a", "b", "", "v1"]), max_size=3).map("/".join)
_URLS = st.builds(
    "{}://{}{}/{}{}".format,
    st.sampled_from(["https", "http"]),
    st.sampled_from(["a.org", "b.a.org", "b", "[2001:db8::1]"]),
    st.sampled_from(["", ":8443", ":443", ":80"]),
    _TAILS,
    st.sampled_from(["", "?a/b", "#a", "?#"]),
)
_PATTERNS = st.builds(
    "{}://{}{}/{}".format,
    st.sampled_from(["https", "http"]),
    st.sampled_from(["a.org", "*.a.org", "**.a.org", "b.*.org", "b", "[2001:db8::1]"]),
    st.sampled_from(["", ":8443", ":443"]),
    st.sampled_from(["**", "a/**", "v1/a/**", "a/*/**", "a", "", "a/**/b", "a/**?a/b"]),
)


@settings(max_examples=500)
@example(["https://b.*.org/**"], "https://b/a")
@given(st.lists(_PATTERNS, min_size=1, max_size=3), _URLS)
def test_urls(written: list[str], text: str) -> None:
    patterns = tuple(compile_url(one) for one in written)
    url = split_url(text)
    expected = url is not None and any(pattern.matches(url) for pattern in patterns)
    assert UrlMatcher(patterns).matches(text) == expected


class _Slow(dict[str, Json]):
    """Not exactly a dict, so it is copied in the long way."""


_PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 54), 1 << 54),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["\ud800", "a" * 400_000]),
)
_JSON = st.one_of(_PLAIN, st.lists(_PLAIN, max_size=3), st.lists(st.lists(_PLAIN, max_size=2)))


@given(st.dictionaries(st.text(max_size=3), _JSON, max_size=4))
def test_copies_of_arguments(value: dict[str, Json]) -> None:
    def told(argument: dict[str, Json]) -> object:
        try:
            return copy_json(argument)
        except Denied as denied:
            return denied.code

    assert told(value) == told(_Slow(value))


def test_a_copy_is_bounded_and_shares_nothing() -> None:
    words: list[Json] = ["a"]
    given_arguments: dict[str, Json] = {"argv": words}
    copied = copy_json(given_arguments)
    words.append("b")
    assert copied == {"argv": ["a"]}
    for large in (["a"] * 10_000, ["a" * 10_500] * 100, list("a" * 9_999)):
        with pytest.raises(Denied) as caught:
            copy_json({"argv": large})
        assert caught.value.code == "call.too_large"


@pytest.mark.parametrize("moved", ["link", "parent link", "renamed", "file"])
def test_a_workspace_that_moved_is_refused(tmp_path: Path, moved: str) -> None:
    folder = Path(os.path.realpath(tmp_path)) / "above" / "work"
    folder.mkdir(parents=True)
    (folder / "file.txt").write_text("x")
    text = b'version: 1\ntools: {fs.read: {allow: {path: ["/**"]}}}\n'
    policy = parse_policy(text, name="p", workspace=folder)
    call = Call(id="1", tool="fs.read", arguments={"path": "file.txt"}, session="s")
    canonicalize(policy, call).close()
    before = len(os.listdir("/proc/self/fd"))
    if moved == "parent link":
        folder.parent.rename(tmp_path / "elsewhere")
        folder.parent.symlink_to(tmp_path / "elsewhere")
    else:
        folder.rename(tmp_path / "elsewhere")
        if moved == "link":
            folder.symlink_to(tmp_path / "elsewhere")
        elif moved == "file":
            folder.write_text("")
    expected = {"renamed": "path.not_found", "file": "path.not_folder"}.get(moved, "path.workspace")
    with pytest.raises(Denied) as caught:
        canonicalize(policy, call)
    assert caught.value.code == expected
    assert len(os.listdir("/proc/self/fd")) == before


_PIECES = st.lists(
    st.sampled_from(
        [*"aB1./-_?=&~@;+é#\n", "..", "xn--", "%2e", ":80", "org", "0x7f", "127.0.0.1", "localhost"]
    ),
    max_size=8,
).map("".join)
_TEXTS = st.builds(
    "{}{}".format, st.sampled_from(["https://a.org", "http://", "https://"]), _PIECES
)


@settings(max_examples=1000)
@given(_TEXTS)
def test_a_url_that_is_its_own_spelling(text: str) -> None:
    def told(spell: Callable[[str], str]) -> str:
        try:
            return spell(text)
        except UrlRefused as refused:
            return refused.code

    assert told(canonical_url) == told(respell_url)


_WORDS = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3)
_VALUE = st.one_of(st.lists(st.sampled_from(["a", "b", "ab", 1, None]), max_size=4), st.just("a"))


@given(_WORDS, st.booleans(), _VALUE)
def test_literal_words(words: list[str], rest: bool, value: Json) -> None:
    literal = tuple(words)
    shown = tuple([*words])
    same, other = Argv(literal, rest, literal), Argv(literal, rest, shown)
    assert same.shown is same.elements
    assert other.shown is not other.elements
    assert same.matches(value) == other.matches(value)
    assert same.matches(tuple(value) if isinstance(value, list) else value) == same.matches(value)
