"""Loading: every file that means something else than it says is refused, with its place."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path

import pytest

from safeconduct.call import Engine, Limits, Tier
from safeconduct.errors import PolicyError
from safeconduct.policies import (
    PRESETS,
    check_policy,
    load_policy,
    parse_policy,
    policy_schema,
    read_preset,
)

TEN_LINES = b"""\
version: 1                         # what is not granted is denied; that cannot be changed
tools:
  fs.read:  {allow: {path: ["$WS/**"]}}
  fs.write: {allow: {path: ["$WS/src/**", "$WS/tests/**"]}}
  shell.run:
    - {allow: {argv: [pytest, ...]}}
    - {ask: {argv: [git, commit, ...]}}
  http.get: {allow: {url: ["https://api.github.com/repos/**"]}}
"""
HEAD = "version: 1\n"

NOT_ENFORCED = [
    "credentials: {}",
    "labels: {secret: {from: [{fs.read: {path: ['$WS/data/**']}}], track: session}}",
    "flows: [{deny: secret, into: [http.get, mail.send.to]}]",
    "events: {tested: {on: {shell.run: {argv: [pytest, ...]}}, exit: 0}}",
    "order: [{require: tested, after: edited, before: pushed}]",
    "rego: policy.rego",
    "rate: 5/h",
    "budget: {calls: 5}",
    "require: {witness: 2}",
    "profiles: {p: {net: ['* https://x/**']}}",
    "profiles: {p: {net: all}}",
    "profiles: {p: {credentials: [x]}}",
    "profiles: {p: {limits: {calls: 50}}}",
    "servers: {s: {url: 'https://mail.example/mcp'}}",
    "servers: {s: {run: [x], install: npm}}",
    "tools: {t: {allow: any, remember: never}}",
    "tools: {t: {allow: {a: {shell: x}}}}",
    "tools: {t: {allow: {a: {text: {max: 4B, min: 1B}}}}}",
    "tools: {shell.run: {allow: {argv: [a, {host: [x]}]}}}",
    "roles: {r: {t: {allow: any, redact: [x]}}}",
]


@pytest.mark.parametrize("text", NOT_ENFORCED)
def test_what_is_not_enforced_is_refused_by_name(text: str, workspace: Path) -> None:
    with pytest.raises(PolicyError, match="this version does not enforce it") as caught:
        parse_policy((HEAD + text).encode(), name="p", workspace=workspace)
    assert caught.value.code == "policy.not_enforced"
    assert caught.value.line == 2
    assert caught.value.column > 0


# text after `version: 1`, the line of the error, words in it
WRONG = {
    "unknown key": ("tool: {}", 2, "unknown key 'tool'"),
    "unknown rule key": ("tools:\n  t: {alow: any}", 3, "unknown key 'alow'"),
    "unknown profile key": ("profiles: {p: {reads: []}}", 2, "unknown key 'reads'"),
    "unknown matcher": ("tools: {t: {allow: {a: {pth: [x]}}}}", 2, "unknown key 'pth'"),
    "server of ours": ("servers: {fs: {run: [x]}}", 2, "tools under it are ours"),
    "server without command": ("servers: {s: {run: []}}", 2, "at least 1"),
    "server with nothing": ("servers: {s: {profile: p}}", 2, "'run' is missing"),
    "server in no profile": ("servers: {s: {run: [x], profile: p}}", 2, "no profile 'p'"),
    "server in wasm": (
        "profiles: {p: {engine: wasm}}\nservers: {s: {run: [x], profile: p}}",
        3,
        "engine: wasm",
    ),
    "unknown server key": ("servers: {s: {command: [x]}}", 2, "unknown key 'command' in a server"),
    "bad tool name": ('tools: {"a b": {allow: any}}', 2, "cannot be a name"),
    "unknown tool of ours": ("tools: {fs.raed: {allow: any}}", 2, "no tool 'fs.raed'"),
    "unknown argument": ("tools: {fs.read: {allow: {file: any}}}", 2, "no argument 'file'"),
    "two effects": ("tools: {t: {allow: any, deny: any}}", 2, "one effect"),
    "no effect": ("tools: {t: {id: x}}", 2, "one effect"),
    "no rule": ("tools: {t: []}", 2, "at least 1"),
    "empty list": ("tools: {fs.read: {allow: {path: []}}}", 2, "never matches"),
    "empty argv": ("tools: {shell.run: {allow: {argv: []}}}", 2, "never matches"),
    "empty range": ("tools: {t: {allow: {a: {range: [5, 1]}}}}", 2, "empty"),
    "range of words": ("tools: {t: {allow: {a: {range: [a, b]}}}}", 2, "whole numbers"),
    "missing required": ("tools: {fs.read: {allow: {}}}", 2, "never match"),
    "write without path": ("tools: {fs.write: {allow: {content: any}}}", 2, "never match"),
    "no such profile": ("tools: {t: {allow: any, profile: dev}}", 2, "no profile 'dev'"),
    "profile on deny": ("profiles: {d: {}}\ntools: {t: {deny: any, profile: d}}", 3, "deny has"),
    "like nothing": ("profiles: {p: {like: q}}", 2, "no profile 'q'"),
    "like itself": ("profiles: {p: {like: p}}", 2, "never ends"),
    "like circle": ("profiles: {p: {like: q}, q: {like: p}}", 2, "never ends"),
    "read glob": ('profiles: {p: {read: ["$WS/*.py"]}}', 2, "mounts folders"),
    "read relative": ("profiles: {p: {read: [src]}}", 2, "must begin"),
    "read home": ('profiles: {p: {read: ["~/x"]}}', 2, "begins with ~"),
    "fuel on native": ("profiles: {p: {limits: {fuel: 5G}}}", 2, "fuel"),
    "unit": ("profiles: {p: {limits: {memory: 512MB}}}", 2, "a size such as"),
    "no unit": ("profiles: {p: {limits: {wall: 30}}}", 2, "a duration such as"),
    "zero wall": ("profiles: {p: {limits: {wall: 0s}}}", 2, "greater than"),
    "engine": ("profiles: {p: {engine: docker}}", 2, "engine"),
    "tier": ("require: {tier: none}", 2, "tier"),
    "flag": ("require: {cgroup: yes}", 2, "true or false"),
    "workspace": ("workspace: ../x", 2, "absolute"),
    "other workspace": ("workspace: /elsewhere", 2, "no other"),
    "two kinds": (
        "tools:\n  t:\n  - {allow: {a: {path: ['/x/**']}}}\n  - {deny: {a: {in: [y]}}}",
        5,
        "'a' is a",
    ),
    "kind misfit": ("tools: {fs.read: {allow: {path: {in: [x]}}}}", 2, "cannot judge"),
    "dots first": ("tools: {shell.run: {allow: {argv: [..., a]}}}", 2, "only come last"),
    "matcher in a plain list": ("tools: {t: {allow: {a: [{in: [x]}]}}}", 2, "expected a text"),
    "deny by spelling": (
        "tools: {shell.run: {deny: {argv: [cat, {path: ['$WS/s/**']}]}}}",
        2,
        "walked around",
    ),
    "spelling with cwd": (
        "tools: {shell.run: {allow: {argv: [cat, {path: ['$WS/s/**']}], cwd: any}}}",
        2,
        "cwd must stay",
    ),
    "same id": (
        "tools:\n  t:\n  - {allow: any, id: x}\n  - {deny: any, id: x}",
        5,
        "is taken",
    ),
    "deny of nothing": ("tools: {t: {deny: {}}}", 2, "names nothing"),
    "deny of the rest": ("tools: {t: {deny: {rest: any}}}", 2, "names nothing"),
    "rest not any": ("tools: {t: {allow: {a: any, rest: [x]}}}", 2, "rest can only"),
    "scalar rule": ("tools: {t: allow}", 2, "tools.t"),
    "scalar arguments": ("tools: {t: {allow: all}}", 2, "expected any"),
    "text matcher": ("tools: {t: {allow: {a: b}}}", 2, "expected a list"),
    "two matchers": ("tools: {t: {allow: {a: {in: [x], text: {max: 1B}}}}}", 2, "exactly one"),
    "class glob": ("tools: {fs.read: {allow: {path: ['/srv/[a-z]']}}}", 2, "only *"),
    "brace glob": ("tools: {fs.read: {allow: {path: ['/{a,b}']}}}", 2, "only *"),
    "dotdot glob": ("tools: {fs.read: {allow: {path: ['/**/../x']}}}", 2, r"'\.\.'"),
    "glued stars": ("tools: {fs.read: {allow: {path: ['/srv/**.py']}}}", 2, "stand alone"),
    "url without path": ("tools: {http.get: {allow: {url: ['https://x.org']}}}", 2, "no path"),
    "url scheme": ("tools: {http.get: {allow: {url: ['ftp://x.org/**']}}}", 2, "https://"),
    "url glob host": ("tools: {http.get: {allow: {url: ['https://a*.org/']}}}", 2, "whole label"),
    "url userinfo": ("tools: {http.get: {allow: {url: ['https://a@b.org/']}}}", 2, "user name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_with_place_and_fix(case: str, workspace: Path) -> None:
    text, line, words = WRONG[case]
    words = words.replace("*", r"\*") if "only *" in words else words
    with pytest.raises(PolicyError, match=words) as caught:
        parse_policy((HEAD + text).encode(), name="p.yaml", workspace=workspace)
    assert (caught.value.file, caught.value.line) == ("p.yaml", line)
    assert caught.value.column > 0
    assert caught.value.hint


def test_a_misspelt_key_gets_a_suggestion(workspace: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy(b"version: 1\nprofile: {}\n", name="p", workspace=workspace)
    assert "did you mean 'profiles'" in caught.value.hint
    assert caught.value.code == "policy.unknown_key"


@pytest.mark.parametrize("text", [b"tools: {}\n", b"version: 2\n", b"version: 1.10\n", b"[a]\n"])
def test_the_version_is_one(text: bytes, workspace: Path) -> None:
    with pytest.raises(PolicyError):
        parse_policy(text, name="p", workspace=workspace)


def test_the_ten_line_policy_loads(workspace: Path) -> None:
    policy = parse_policy(TEN_LINES, name="p", workspace=workspace)
    assert policy.version.startswith("sha256:")
    assert policy.workspace == str(workspace)
    assert policy.require_tier is None
    assert check_policy(policy) == ()


def test_profiles_are_compiled(workspace: Path) -> None:
    text = """\
version: 1
require: {tier: full, cgroup: true}
profiles:
  base: {read: ["$WS/**", /etc/hosts], hide: ["**/.env*"], limits: {wall: 30s, memory: 1GiB}}
  dev: {like: base, write: ["$WS/out/**"], hide: ["$WS/k"], limits: {wall: 500ms, files: 2K}}
  py: {engine: wasm, limits: {fuel: 5G}}
"""
    policy = parse_policy(text.encode(), name="p", workspace=workspace)
    assert policy.require_tier is Tier.FULL
    assert policy.require_cgroup
    dev = policy.profiles["dev"]
    assert dev.read == (str(workspace), "/etc/hosts")
    assert dev.write == (f"{workspace}/out",)
    assert dev.hide == ("/**/.env*", f"{workspace}/k")
    assert dev.limits == Limits(wall_ms=500, memory_bytes=1 << 30, files=2000)
    assert policy.profiles["py"].engine is Engine.WASM
    assert policy.profiles["py"].limits.fuel == 5 * 10**9


def test_servers_are_compiled(workspace: Path) -> None:
    text = """\
version: 1
profiles: {docs: {read: ["$WS/**"]}}
servers:
  files: {run: [npx, "server@1", $WS, "$WS/docs", x$WS], profile: docs}
  mail: {run: [mail-server]}
"""
    servers = parse_policy(text.encode(), name="p", workspace=workspace).servers
    assert servers["files"].run == ("npx", "server@1", f"{workspace}", f"{workspace}/docs", "x$WS")
    assert (servers["files"].profile, servers["mail"].profile) == ("docs", None)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_clean(name: str, workspace: Path) -> None:
    assert check_policy(parse_policy(read_preset(name), name=name, workspace=workspace)) == ()


def test_the_schema_accepts_what_loads() -> None:
    jsonschema = import_module("jsonschema")
    schema = policy_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    syntax = import_module("safeconduct.policies.syntax")
    for data in (TEN_LINES, *(read_preset(name) for name in PRESETS)):
        document = syntax.to_data(syntax.parse_syntax(data, name="p"))
        jsonschema.Draft202012Validator(schema).validate(document)
    assert not jsonschema.Draft202012Validator(schema).is_valid({"version": 1, "labels": {}})
    json.dumps(schema)


class TestFiles:
    """What may be a policy file."""

    def test_a_fifo_is_refused_at_once(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "p.yaml")
        with pytest.raises(PolicyError, match="regular file"):
            load_policy(tmp_path / "p.yaml")

    @pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/proc", "/"])
    def test_devices_and_folders_are_refused(self, path: str) -> None:
        with pytest.raises(PolicyError, match="regular file"):
            load_policy(Path(path))

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(PolicyError) as caught:
            load_policy(tmp_path / "p.yaml")
        assert caught.value.code == "policy.not_found"

    def test_a_large_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "p.yaml").write_bytes(b"#" * (1 << 20) + b"\nversion: 1\n")
        with pytest.raises(PolicyError, match="larger"):
            load_policy(tmp_path / "p.yaml")

    def test_the_workspace_is_where_the_folder_lies(self, workspace: Path) -> None:
        folder = workspace / ".safeconduct"
        folder.mkdir()
        (folder / "policy.yaml").write_bytes(b"version: 1\n")
        assert load_policy(folder / "policy.yaml").workspace == str(workspace)
        other = workspace / "src"
        assert load_policy(folder / "policy.yaml", workspace=other).workspace == str(other)

    def test_a_workspace_that_is_a_pattern_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "*").mkdir()
        with pytest.raises(PolicyError) as caught:
            parse_policy(b"version: 1\n", name="p", workspace=tmp_path / "*")
        assert caught.value.code == "policy.workspace"

    def test_root_is_no_workspace(self) -> None:
        with pytest.raises(PolicyError):
            parse_policy(b"version: 1\n", name="p", workspace=Path("/"))
