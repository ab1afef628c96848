"""The pitfall corpus: each spelling of a path, URL, command, name, text or file has one verdict."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from safeconduct.errors import Denied, PolicyError, ProtocolError
from safeconduct.policies import decode_arguments, is_protected
from safeconduct.policies.globs import compile_glob
from safeconduct.policies.match import path_matcher
from safeconduct.policies.paths import split_path
from safeconduct.policies.urls import UrlRefused, canonical_url, compile_url, split_url

from .corpus import FEATURES, NO_FILES, Case, cases, has, judge, load, plant, read

WORKSPACE = str(NO_FILES)
KINDS = {
    "argv": {"pattern", "argv", "matches"},
    "call": {"policy", "tool", "arguments", "verdict"},
    "glob": {"pattern", "path", "matches"},
    "glob_refused": {"pattern"},
    "json": {"result"},
    "path": {"text", "result"},
    "policy": {"result"},
    "protected": {"path", "protected"},
    "tool": {"name", "result"},
    "url": {"text", "result"},
    "url_pattern": {"pattern", "url", "matches"},
    "url_refused": {"pattern"},
}
OPTIONAL = {"id", "kind", "why", "needs", "code", "role", "facts", "text", "hex"}


def each(*kinds: str) -> pytest.MarkDecorator:
    found = cases(*kinds)
    return pytest.mark.parametrize("case", found, ids=[case.id for case in found])


@pytest.fixture(autouse=True)
def skip_what_is_not_there(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    case = callspec.params.get("case") if callspec else None
    for feature in case.needs if isinstance(case, Case) else ():
        if not has(feature):
            pytest.skip(f"this version does not have {feature}")


def test_the_corpus_is_whole() -> None:
    everything = cases()
    assert len(everything) >= 300
    assert max(Counter(case.id for case in everything).values()) == 1
    for case in everything:
        keys = set(case.fields)
        assert KINDS[case.kind] <= keys <= KINDS[case.kind] | OPTIONAL, case.id
        assert set(case.needs) <= {*FEATURES, "command"}, case.id
    sizes = Counter(case.file for case in everything)
    assert min(sizes.values()) >= 20, sizes


@each("glob")
def test_globs(case: Case) -> None:
    glob = compile_glob(case["pattern"], workspace=WORKSPACE)
    assert glob.matches(case["path"][1:].split("/")) is case["matches"]
    # The short cuts for folders and literals say the same as the walk.
    assert path_matcher([glob]).matches(case["path"]) is case["matches"]


@each("glob_refused")
def test_globs_that_mean_nothing(case: Case) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        compile_glob(case["pattern"], workspace=WORKSPACE)


@each("path")
def test_paths(case: Case) -> None:
    try:
        split_path(case["text"])
        found = "ok"
    except Denied as denied:
        found = denied.code
    assert found == case["result"]


@each("url")
def test_urls(case: Case) -> None:
    try:
        found = canonical_url(case["text"])
        assert canonical_url(found) == found
        assert split_url(found) is not None
    except UrlRefused as refused:
        found = refused.code
    assert found == case["result"]


@each("url_pattern")
def test_url_patterns(case: Case) -> None:
    url = split_url(canonical_url(case["url"]))
    assert url is not None
    assert compile_url(case["pattern"]).matches(url) is case["matches"]


@each("url_refused")
def test_url_patterns_that_mean_nothing(case: Case) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        compile_url(case["pattern"])


@each("argv")
def test_argv(case: Case) -> None:
    text = f"version: 1\ntools: {{shell.run: {{allow: {{argv: {case['pattern']}}}}}}}\n"
    (policy,) = load(text.encode(), NO_FILES).parts
    (rule,) = policy.tools["shell.run"].allow
    assert rule.matchers is not None
    assert rule.matchers["argv"].matches(case["argv"]) is case["matches"]


@each("tool")
def test_tool_names(case: Case) -> None:
    text = 'version: 1\ntools: {fs.read: {allow: {path: ["$WS/**"]}}}\n'
    call = {"policy": text, "tool": case["name"], "arguments": {"path": "x"}}
    # A workspace that exists nowhere: no case may get as far as the file system.
    _, code = judge(Case(case.file, call), Path("/nonexistent/space"))
    assert (code != "call.unknown_tool") is (case["result"] == "known")


@each("json")
def test_json(case: Case) -> None:
    try:
        decode_arguments(_bytes(case))
        found = "ok"
    except ProtocolError as error:
        found = error.code
    assert found == case["result"]


@each("protected")
def test_protected(case: Case) -> None:
    path = case["path"].replace("$WS", WORKSPACE)
    assert is_protected(os.path.normpath(path)) is case["protected"]


@each("policy")
def test_policy_files(case: Case) -> None:
    error: PolicyError | None = None
    try:
        load(_bytes(case), NO_FILES)
    except PolicyError as refused:
        error = refused
    if case["result"] == "ok":
        assert error is None
        return
    assert error is not None
    assert error.hint
    assert error.file
    assert case["result"] in ("refused", error.code)


def _bytes(case: Case) -> bytes:
    if "hex" in case.fields:
        return bytes.fromhex(case["hex"])
    text: str = case["text"]
    return text.encode()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plant the tree of each file once: judging changes nothing."""
    found: dict[str, Path] = {}
    for name in sorted({case.file for case in cases("call")}):
        folder = Path(os.path.realpath(tmp_path_factory.mktemp(name))) / "work"
        folder.mkdir()
        plant(folder, read(name).get("tree", []))
        found[name] = folder
    return found


@each("call")
def test_calls(case: Case, planted: dict[str, Path]) -> None:
    effect, code = judge(case, planted[case.file])
    assert effect == case["verdict"], code
    assert code == case.fields.get("code", code)
