"""Paths in the calls of other programs: what they read otherwise than the kernel is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeconduct.call import Effect
from safeconduct.errors import Denied
from safeconduct.policies.agents.names import Host, map_tool
from safeconduct.policies.agents.patch import MAX_PATCH_PATHS, patch_paths

from .conftest import Judge

PATCH = "*** Begin Patch\n*** Update File: a.py\n@@\n-x\n+y\n*** End Patch\n"


@pytest.mark.parametrize(
    "path",
    [
        *("", " ", "~", "~/x", "~root/x", " /ws/a", "/ws/a ", "/ws/a\n", "\t/ws/a", "/ws/\0a"),
        *("..", "../a", "/ws/../etc/passwd", "a/..", "/ws/cafe\N{COMBINING ACUTE ACCENT}"),
    ],
)
def test_paths_that_programs_read_otherwise(path: str) -> None:
    for name in ("Read", "Write", "Grep", "LS"):
        extra = {"Write": {"content": ""}, "Grep": {"pattern": "x"}}.get(name, {})
        key = "file_path" if name in ("Read", "Write") else "path"
        with pytest.raises(Denied) as refusal:
            map_tool(Host.CLAUDE, name, {key: path, **extra}, cwd="/ws")
        assert refusal.value.code == "call.bad_argument"


def test_a_relative_path_needs_a_folder() -> None:
    for cwd in (None, "", "ws", "~/ws", "/ws/.."):
        with pytest.raises(Denied):
            map_tool(Host.CLAUDE, "Glob", {"pattern": "*", "path": "src"}, cwd=cwd)
    with pytest.raises(Denied):
        map_tool(Host.CLAUDE, "Bash", {"command": "ls"}, cwd="relative")
    assert map_tool(Host.CLAUDE, "Bash", {"command": "ls"}) == ("shell.run", {"command": "ls"})


@pytest.mark.parametrize(
    "pattern",
    [
        *("..", "../*", "a/../../b", "/etc/*", "~/x", "{/etc,a}/*", "{a,b/..}/x", "{..,a}/x"),
        *(".{.,b}/x", "{.,a}{.,b}/x", "{,a}../x", "{,a}.{,b}./x", "[.][.]/x", "[.]./x", ".[.]/x"),
        *("{" * 1_000_000, "{a,{b,/etc}}", "a" * 5000),
        *("@(..|a)/x", "a/@(.).", "(..)/x", "\\.\\./x", "a/{x,/etc}", "a\\/../b"),
    ],
)
def test_a_glob_stays_beneath_its_folder(pattern: str) -> None:
    with pytest.raises(Denied):
        map_tool(Host.CLAUDE, "Glob", {"pattern": pattern}, cwd="/ws")


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "*",
            "**/*.py",
            "src/**/*.{ts,tsx}",
            "{src,lib}/**",
            ".github/**",
            ".eslintrc.js",
            "...x",
        ),
        *("app/[slug]/page.tsx", "*.{test.ts,spec.ts}", "v1.2.3/x", "a..b/x", "[a-z]*.md"),
    ],
)
def test_usual_globs_pass(pattern: str) -> None:
    assert map_tool(Host.CLAUDE, "Glob", {"pattern": pattern})[1] == {"pattern": pattern}


@pytest.mark.parametrize(
    ("patch", "paths"),
    [
        ("*** Begin Patch\n*** Add File: a/b\n+x\n*** End Patch", ["a/b"]),
        ("*** Begin Patch\n*** Delete File: a b\n*** End Patch\r\n", ["a b"]),
        ("*** Update File: a\n*** Move to: b\n@@\n x", ["a", "b"]),
        ("*** Update File: a\r\n@@\r\n x\r\n*** End of File", ["a"]),
        # Indented: a header for the lenient parser, context for the strict one.
        ("*** Add File: a\n+x\n *** Delete File: b", ["a", "b"]),
        ("<<'EOF'\n*** Begin Patch\n*** Add File: a\n+x\n*** End Patch\nEOF", ["a"]),
        ("*** Add File: a\n+*** Delete File: b\n ***\n-*** x", ["a"]),
        ("*** Add File: a\n*** Add File: a", ["a"]),
        ("*** Add File: ../a", ["../a"]),
    ],
)
def test_every_file_of_a_patch_is_named(patch: str, paths: list[str]) -> None:
    assert list(patch_paths(patch)) == paths


@pytest.mark.parametrize(
    "patch",
    [
        *("", "x", "*** Begin Patch\n*** End Patch", "*** Add File:", "*** Add File: "),
        *("*** Add File:  a", "*** Move to: a ", "***Add File: a", "*** add file: a"),
        *("*** Rename File: a", "*** Environment ID: x\n*** Add File: a", "*** Add File:\ta"),
        *("*** Add File: a\x0b", "*** Add File: a\x85", "*** Add File: \N{NO-BREAK SPACE}a"),
        "\n".join(f"*** Add File: {at}" for at in range(MAX_PATCH_PATHS + 1)),
    ],
)
def test_no_patch(patch: str) -> None:
    with pytest.raises(ValueError, match="patch"):
        patch_paths(patch)


def test_a_patch_does_not_leave_by_a_path() -> None:
    for path in ("../a", "~/a", "a/../../b"):
        with pytest.raises(Denied):
            map_tool(Host.CODEX, "apply_patch", {"input": f"*** Add File: {path}"}, cwd="/ws")
    for arguments in ({}, {"input": PATCH, "command": PATCH}, {"input": "x"}):
        with pytest.raises(Denied):
            map_tool(Host.CODEX, "apply_patch", dict(arguments), cwd="/ws")


def test_a_patch_is_judged_by_every_file_it_touches(judge: Judge, workspace: Path) -> None:
    rules = '  codex.apply_patch: {allow: {paths: {path: ["$WS/src/**"]}, input: any}}\n'
    header = "*** Begin Patch\n*** Update File: src/main.py\n@@\n x\n"
    for more, effect in (
        ("", Effect.ALLOW),
        ("*** Add File: src/new.py\n+x\n", Effect.ALLOW),
        ("*** Add File: new.py\n+x\n", Effect.DENY),
        (" *** Delete File: .git/hooks\n", Effect.DENY),
    ):
        arguments = {"input": header + more}
        tool, judged = map_tool(Host.CODEX, "apply_patch", arguments, cwd=str(workspace))
        assert judge(rules, tool, **judged).effect is effect
