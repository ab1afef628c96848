"""The pitfall vectors: each spelling of a path, URL, argv, name or JSON has one verdict."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from safeconduct.call import Call
from safeconduct.errors import Denied, ProtocolError
from safeconduct.policies import canonicalize, decode_arguments, is_protected, parse_policy
from safeconduct.policies.globs import compile_glob
from safeconduct.policies.match import path_matcher
from safeconduct.policies.paths import split_path
from safeconduct.policies.urls import UrlRefused, canonical_url, compile_url, split_url

VECTORS = Path(__file__).parents[1] / "vectors" / "policy" / "pitfalls.json"
Case = dict[str, Any]
ALL: dict[str, Any] = json.loads(VECTORS.read_text())
WORKSPACE: str = ALL["workspace"]


def cases(kind: str) -> pytest.MarkDecorator:
    found: list[Case] = ALL[kind]
    return pytest.mark.parametrize("case", found, ids=[str(at) for at in range(len(found))])


def test_there_are_enough() -> None:
    kinds = [kind for kind in ALL if kind not in ("about", "workspace")]
    assert sum(len(ALL[kind]) for kind in kinds) >= 100


@cases("glob")
def test_globs(case: Case) -> None:
    glob = compile_glob(case["pattern"], workspace=WORKSPACE)
    assert glob.matches(case["path"][1:].split("/")) is case["matches"]
    # The short cuts for folders and literals say the same as the walk.
    assert path_matcher([glob]).matches(case["path"]) is case["matches"]


@cases("path")
def test_paths(case: Case) -> None:
    try:
        split_path(case["text"])
        found = "ok"
    except Denied as denied:
        found = denied.code
    assert found == case["result"]


@cases("url")
def test_urls(case: Case) -> None:
    try:
        found = canonical_url(case["text"])
        assert canonical_url(found) == found
        assert split_url(found) is not None
    except UrlRefused as refused:
        found = refused.code
    assert found == case["result"]


@cases("url_pattern")
def test_url_patterns(case: Case) -> None:
    url = split_url(canonical_url(case["url"]))
    assert url is not None
    assert compile_url(case["pattern"]).matches(url) is case["matches"]


@cases("argv")
def test_argv(case: Case) -> None:
    text = f"version: 1\ntools: {{shell.run: {{allow: {{argv: {case['pattern']}}}}}}}\n"
    policy = parse_policy(text.encode(), name="p", workspace=Path(WORKSPACE))
    (rule,) = policy.tools["shell.run"].allow
    assert rule.matchers is not None
    assert rule.matchers["argv"].matches(case["argv"]) is case["matches"]


@cases("tool")
def test_tool_names(case: Case) -> None:
    text = b'version: 1\ntools: {fs.read: {allow: {path: ["$WS/**"]}}}\n'
    # A workspace that exists nowhere: no case may get as far as the file system.
    policy = parse_policy(text, name="p", workspace=Path("/nonexistent/space"))
    call = Call(id="1", tool=case["name"], arguments={"path": "x"}, session="s")
    with pytest.raises(Denied) as caught:
        canonicalize(policy, call)
    known = caught.value.code != "call.unknown_tool"
    assert known is (case["result"] == "known")


@cases("json")
def test_json(case: Case) -> None:
    try:
        decode_arguments(case["text"].encode("utf-8"))
        found = "ok"
    except ProtocolError as error:
        found = error.code
    assert found == case["result"]


@cases("protected")
def test_protected(case: Case) -> None:
    path = case["path"].replace("$WS", WORKSPACE)
    assert is_protected(os.path.normpath(path)) is case["protected"]
