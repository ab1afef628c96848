"""Whatever an agent or a file says, only typed errors of ours come out, and no decision fails.

SAFECONDUCT_FUZZ multiplies how much is tried.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeconduct.call import Call
from safeconduct.errors import Denied, PolicyError, ProtocolError
from safeconduct.policies import canonicalize, decide, decode_arguments, explain, parse_policy

# Whatever JSON holds: the checks below look at it, not its type.
Value: TypeAlias = Any
MORE = int(os.environ.get("SAFECONDUCT_FUZZ", "1"))
fuzz = settings(
    max_examples=150 * MORE,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

POLICY = b"""version: 1
tools:
  fs.read: [{allow: {path: ["$WS/src/**", "/etc/*"]}}, {deny: {path: ["**/.env"]}}]
  fs.write: {allow: {path: ["$WS/**"]}}
  fs.list: {allow: any}
  shell.run: [{allow: {argv: [ls, ...]}}, {ask: {argv: [git, {in: [a, b]}, any]}}]
  http.get: {allow: {url: ["https://**/**", "http://*.x.example/a/*"]}}
  wasm.run: {allow: any}
  python.run: {allow: any}
  t:
    - {allow: {a: [x, "1"], b: {range: [1, 9]}, rest: any}}
    - {deny: {c: {path: ["$WS/**"]}, d: {url: ["https://**/**"]}}}
    - {ask: {e: {text: {max: 9B}}}}
"""
PIECES = st.sampled_from(
    [
        *"/\\.:@#?%[]*~$`&;|<>(){}'\" \t\n\r\x00\x1b-=,!^_",
        "..",
        "//",
        "%2e",
        "%00",
        "%252f",
        "src",
        "main.py",
        "proc/self",
        "\u202e",
        "�",
        "。",
        "http://",
        "https://",
        "x.example",
        "127.0.0.1",
        "[::1]",
        "xn--",
        "\uff0f",
        "$(",
        "&&",
        "<<EOF",
        "ls",
        "git",
        "a",
        "é",
        "é",
        "0x7f",
        "1" * 30,
        "file:",
        "\x7f",
        "\x85",
        "\u2028",
    ]
)
texts = st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=40)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)
)
tools = st.sampled_from(
    ["fs.read", "fs.write", "fs.list", "shell.run", "http.get", "wasm.run", "python.run", "t"]
)
names = st.sampled_from(
    [
        "path",
        "content",
        "argv",
        "command",
        "cwd",
        "stdin",
        "resources",
        "url",
        "module",
        "function",
        "arguments",
        "code",
        "a",
        "b",
        "c",
        "d",
        "e",
    ]
)


def try_call(workspace: Path, tool: Value, arguments: dict[str, Any]) -> None:
    policy = parse_policy(POLICY, name="p", workspace=workspace)
    call = Call(id="1", tool=tool, arguments=arguments, session="s")
    try:
        canonical = canonicalize(policy, call)
    except Denied:
        return
    with canonical:
        decision = decide(policy, canonical.document)
        assert decision.code != "policy.error", decision.advice
        explained = explain(policy, canonical.document)
        assert explained.decision.effect is decision.effect
        # What is recorded must be writable as UTF-8 and JSON.
        json.dumps(explained.to_json()).encode()


@fuzz
@given(tools, st.dictionaries(names, values, max_size=4))
def test_arguments(workspace: Path, tool: str, arguments: dict[str, Any]) -> None:
    try_call(workspace, tool, arguments)


@fuzz
@given(tools, st.sampled_from(["path", "url", "command", "module", "c", "d", "e"]), texts)
def test_one_text(workspace: Path, tool: str, name: str, text: str) -> None:
    more = {"fs.write": {"content": "x"}, "wasm.run": {"function": "f"}}.get(tool, {})
    try_call(workspace, tool, {**more, name: text})


@fuzz
@given(st.sampled_from(["fs.read", "fs.write", "c"]), texts)
def test_paths(workspace: Path, where: str, text: str) -> None:
    for path in (text, f"src/{text}", f"{workspace}/{text}", f"/{text}"):
        if where == "c":
            try_call(workspace, "t", {"c": path})
        else:
            try_call(workspace, where, {"path": path} | {"content": ""} if "w" in where else {})


@fuzz
@given(texts)
def test_urls(workspace: Path, text: str) -> None:
    for url in (text, f"https://{text}", f"https://a.x.example/{text}", f"http://{text}/a"):
        try_call(workspace, "http.get", {"url": url})
        try_call(workspace, "t", {"d": url})


@fuzz
@given(texts)
def test_commands(workspace: Path, text: str) -> None:
    for command in (text, f"ls {text}", f"ls '{text}'", f'ls "{text}"', f"ls > {text}"):
        try_call(workspace, "shell.run", {"command": command})


@fuzz
@given(values)
def test_names(workspace: Path, name: Value) -> None:
    try_call(workspace, name, {})


@fuzz
@given(values, st.integers(0, 200), texts)
def test_json(value: Value, at: int, put: str) -> None:
    text = json.dumps(value)
    for data in (text, f'{{"a":{text}}}', text[:at] + put + text[at:], put):
        try:
            decoded = decode_arguments(data.encode("utf-8", "surrogatepass"))
        except ProtocolError:
            continue
        assert decoded == json.loads(data)


SNIPPETS = st.sampled_from(
    [
        "version: 1\n",
        "tools:",
        "roles:",
        "profiles:",
        "servers:",
        "  t:",
        "  - ",
        "{",
        "}",
        "[",
        "]",
        "allow:",
        "deny:",
        "ask:",
        "any",
        "path:",
        "url:",
        "argv:",
        "in:",
        "range:",
        "text:",
        "host:",
        "regex:",
        "email:",
        "json:",
        "not:",
        "when:",
        "rate:",
        "budget:",
        "like:",
        "extends:",
        "...",
        ", ",
        ": ",
        "\n",
        "\n  ",
        "\n    ",
        '"',
        "'",
        '"$WS/**"',
        '"/a/*"',
        "20/h",
        "max: 4KiB",
        "&a ",
        "*a",
        "!t ",
        "<<: ",
        "? ",
        "| ",
        "> ",
        "# ",
        "%TAG",
        "---\n",
        "fs.read",
        "files.*",
        "type: object",
        '"call.a == 1"',
        "https://x.example/**",
        "\t",
        "\x00",
        "\ufeff",
        "1",
        "true",
        "null",
        "~",
        "a",
    ]
)


@fuzz
@given(st.lists(SNIPPETS, max_size=30).map("".join))
def test_policy_files(text: str) -> None:
    load_or_refuse(text.encode("utf-8", "surrogatepass"))
    load_or_refuse(f"version: 1\ntools: {{t: {{{text}}}}}\n".encode())
    load_or_refuse(f"version: 1\ntools: {{t: {{allow: {{a: {text}}}}}}}\n".encode())


yaml_values: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(["any", "x", "1", "", "$WS/**", "/a", "https://x.example/**", "[a-z]+", "20/h"])
    | texts.filter(lambda text: "\ud800" not in text),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "allow",
                    "deny",
                    "ask",
                    "path",
                    "url",
                    "argv",
                    "in",
                    "range",
                    "text",
                    "max",
                    "host",
                    "email",
                    "regex",
                    "json",
                    "not",
                    "when",
                    "rate",
                    "budget",
                    "id",
                    "profile",
                    "a",
                    "rest",
                    "type",
                    "properties",
                    "items",
                    "enum",
                    "like",
                    "read",
                    "write",
                    "hide",
                    "net",
                    "limits",
                    "wall",
                    "engine",
                    "syscalls",
                    "narrows",
                    "run",
                    "calls",
                    "bytes",
                    "tokens",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@fuzz
@given(
    st.sampled_from(["tools", "roles", "profiles", "servers", "require", "extends", "workspace"]),
    yaml_values,
)
def test_policy_trees(key: str, value: Value) -> None:
    for tree in (value, {"t": value}, {"t": {"allow": {"a": value}}}, {"r": {"t": value}}):
        load_or_refuse(f"version: 1\n{key}: {json.dumps(tree)}\n".encode())


def load_or_refuse(data: bytes) -> None:
    error: PolicyError | None = None
    try:
        parse_policy(data, name="p", workspace=Path("/srv/space"))
    except PolicyError as refused:
        error = refused
    if error is not None:
        assert error.code.startswith("policy.")
        assert (error.file, bool(error.hint)) == ("p", True)


def test_the_policy_of_these_tests_loads(workspace: Path) -> None:
    assert parse_policy(POLICY, name="p", workspace=workspace).tools
    with pytest.raises(Denied):
        canonicalize(
            parse_policy(POLICY, name="p", workspace=workspace),
            Call(id="1", tool="none", arguments={}, session="s"),
        )
