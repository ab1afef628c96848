"""Roles, tool names with wildcards, and what narrows: only what all parts agree to happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeconduct.call import Decision, Document, Effect, Facts, Json
from safeconduct.errors import PolicyError
from safeconduct.policies import Judged, Policy, both, decide, explain, parse_policy

WORKSPACE = Path("/srv/space")


def parse(text: str) -> Policy:
    return parse_policy(f"version: 1\n{text}".encode(), name="p", workspace=WORKSPACE)


def judged(policy: Judged, tool: str, /, facts: Facts | None = None, **arguments: Json) -> Decision:
    document = Document(tool=tool, arguments=arguments, workspace=str(WORKSPACE))
    return decide(policy, document, facts or Facts())


def effect(policy: Judged, tool: str, /, **arguments: Json) -> Effect:
    return judged(policy, tool, None, **arguments).effect


ROLES = """\
tools:
  t: {ask: any}
roles:
  reader:
    fs.read: {allow: {path: ["$WS/**"]}}
    notes.add: {allow: {text: any}, rate: 5/h}
  junior:
    narrows: reader
    fs.read: {allow: {path: ["$WS/docs/**"]}}
    notes.add: {ask: {text: any}, budget: {calls: 9/day}}
    t: {allow: any}
"""


class TestRoles:
    """A session has one role or none."""

    def test_each_role_has_its_own_rules(self) -> None:
        policy = parse(ROLES)
        reader = policy.for_role("reader")
        assert effect(policy, "t") is Effect.ASK
        assert effect(reader, "t") is Effect.DENY
        assert effect(reader, "fs.read", path=f"{WORKSPACE}/x") is Effect.ALLOW
        assert effect(policy, "fs.read", path=f"{WORKSPACE}/x") is Effect.DENY
        assert reader.version == policy.version
        assert policy.for_role(None) is policy

    def test_a_role_that_narrows_is_judged_with_the_other(self) -> None:
        junior = parse(ROLES).for_role("junior")
        assert [part.role for part in junior.parts] == ["reader", "junior"]
        assert effect(junior, "fs.read", path=f"{WORKSPACE}/docs/x") is Effect.ALLOW
        assert effect(junior, "fs.read", path=f"{WORKSPACE}/x") is Effect.DENY
        # The wider role has no t at all.
        assert effect(junior, "t") is Effect.DENY
        note = judged(junior, "notes.add", text="x")
        assert note.effect is Effect.ASK
        assert {bound.id for bound in note.obligations} == {
            "roles.reader.notes.add[0]:rate/3600000ms",
            "1/roles.junior.notes.add[0]:calls/day",
        }
        assert junior.version == parse(ROLES).version

    def test_a_role_cannot_be_left_for_another(self) -> None:
        junior = parse(ROLES).for_role("junior")
        with pytest.raises(PolicyError):
            junior.for_role("reader")
        assert junior.for_role(None) is junior

    def test_an_unknown_role_is_refused(self) -> None:
        with pytest.raises(PolicyError, match="no role 'reeder'") as caught:
            parse(ROLES).for_role("reeder")
        assert caught.value.code == "policy.unknown_role"
        assert "reader" in caught.value.hint
        with pytest.raises(PolicyError, match="no role"):
            parse("tools: {t: {allow: any}}").for_role("reader")

    def test_only_roles_grant_nothing_to_a_session_without_one(self) -> None:
        policy = parse("roles: {a: {t: {allow: any}}}")
        assert effect(policy, "t") is Effect.DENY
        assert effect(policy.for_role("a"), "t") is Effect.ALLOW

    def test_a_narrowing_policy_without_roles_holds_for_every_role(self) -> None:
        mine = parse("roles: {a: {t: {allow: any}, u: {allow: any}}}")
        theirs = parse("tools: {t: {allow: any}}")
        pair = both(mine, theirs).for_role("a")
        assert effect(pair, "t") is Effect.ALLOW
        assert effect(pair, "u") is Effect.DENY
        other = both(mine, parse("roles: {b: {t: {allow: any}}}"))
        with pytest.raises(PolicyError, match="no role 'a'"):
            other.for_role("a")

    def test_a_condition_sees_the_role(self) -> None:
        policy = parse("roles: {a: {t: {allow: any, when: \"session.role == 'a'\"}}}").for_role("a")
        assert judged(policy, "t", Facts(role="a")).effect is Effect.ALLOW
        assert judged(policy, "t", Facts()).effect is Effect.DENY

    @pytest.mark.parametrize(
        ("roles", "words"),
        [
            ("{a: {narrows: b}}", "no role 'b'"),
            ("{a: {narrows: a}}", "never ends"),
            ("{a: {narrows: b}, b: {narrows: a}}", "never ends"),
            ("{a: {t: {allow: any, id: x}}, b: {t: {allow: any, id: x}}}", "is taken"),
            ("{a: {narrows: [b]}}", "narrows"),
            ("{a: {t: {alow: any}}}", "unknown key 'alow' in a rule"),
            ("{a: {t: {allow: {x: {pth: [y]}}}}}", "unknown key 'pth' in a matcher"),
            ("{a: {fs.raed: {allow: any}}}", "no tool 'fs.raed'"),
            ("{a: [t]}", "map from tool to rules"),
            ("{a: {t: {allow: {x: {path: ['/a']}}}, 't*': {allow: {x: [b]}}}}", "'x' is a"),
        ],
    )
    def test_wrong_roles_are_refused_in_their_place(self, roles: str, words: str) -> None:
        with pytest.raises(PolicyError, match=words) as caught:
            parse(f"roles: {roles}")
        assert (caught.value.line, bool(caught.value.hint)) == (2, True)

    def test_a_tool_may_have_any_name_but_narrows(self) -> None:
        policy = parse("roles: {a: {tools: {allow: any}, roles: {deny: any}}}").for_role("a")
        assert effect(policy, "tools") is Effect.ALLOW
        with pytest.raises(PolicyError) as caught:
            parse("roles:\n  a:\n    tools:\n      - {allow: any}\n      - {alow: any}\n")
        assert caught.value.line == 6


class TestWildcards:
    """Names with `*`, which never crosses a dot."""

    @pytest.mark.parametrize(
        ("pattern", "tool", "covers"),
        [
            ("files.*", "files.read", True),
            ("files.*", "files", False),
            ("files.*", "files.a.b", False),
            ("files.*", "file.read", False),
            ("*.delete_*", "db.delete_row", True),
            ("*.delete_*", "db.delete_", True),
            ("*.delete_*", "db.undelete_row", False),
            ("*", "files", True),
            ("*", "files.read", False),
            ("*.*", "a.b", True),
            ("a*b*c.x", "a1b2b3c.x", True),
            ("a*b*c.x", "a1b2b3.x", False),
            ("*.read", "fs.read", False),
            ("*.Task", "claude.Task", False),
            ("c*.*", "codex.spawn_agent", False),
            ("claude.*", "claude.Task", True),
        ],
    )
    def test_what_a_grant_covers(self, pattern: str, tool: str, covers: bool) -> None:
        policy = parse(f"tools: {{'{pattern}': {{allow: any}}}}")
        assert (effect(policy, tool) is Effect.ALLOW) is covers
        assert policy.signature(tool) is not None or not covers

    def test_exact_rules_and_all_wildcards_count(self) -> None:
        policy = parse(
            "tools:\n"
            "  files.*: {allow: any}\n"
            "  '*.delete': {ask: any}\n"
            "  files.format: {deny: any}\n"
        )
        assert effect(policy, "files.read") is Effect.ALLOW
        assert effect(policy, "files.delete") is Effect.ASK
        assert effect(policy, "files.format") is Effect.DENY
        assert effect(policy, "mail.delete") is Effect.ASK
        assert judged(policy, "files.format").rules == ("tools.files.format[0]",)

    @pytest.mark.parametrize("pattern", ["fs.*", "*.write", "*.*", "f*.w*"])
    def test_a_deny_covers_our_own_tools(self, pattern: str) -> None:
        text = (
            f"tools: {{fs.write: {{allow: {{path: ['$WS/**']}}}}, '{pattern}': "
            f"{{deny: {{path: {{path: ['$WS/k/**']}}}}}}}}"
        )
        policy = parse(text)
        path = f"{WORKSPACE}/a"
        assert effect(policy, "fs.write", path=path, content="x") is Effect.ALLOW
        assert effect(policy, "fs.write", path=f"{WORKSPACE}/k/a", content="x") is Effect.DENY

    def test_a_bare_list_under_our_own_prefix_means_paths(self) -> None:
        policy = parse("tools: {fs.read: {allow: any}, fs.*: {deny: {path: ['$WS/k/**']}}}")
        assert effect(policy, "fs.read", path=f"{WORKSPACE}/k/a") is Effect.DENY

    @pytest.mark.parametrize(
        ("tools", "words"),
        [
            ("fs.*: {allow: any}", "never grants"),
            ("fs.*: {ask: {path: ['$WS/**']}}", "never grants"),
            ("fs.x*: {deny: any}", "no tool of ours"),
            ("fs.*: {deny: {file: [x]}}", "no argument 'file'"),
            ("'a**': {allow: any}", "never crosses a dot"),
            ("'*.*': {deny: {path: ['$WS/k/**']}}", "bare list"),
            ("'*.read': {deny: {path: ['$WS/k/**']}}", "bare list"),
            ("'a b*': {deny: any}", "cannot be a name"),
            ("'a.*': {allow: {x: {path: ['/a']}}}, a.b: {allow: {x: [c]}}", "'x' is a"),
            ("'a.*': {allow: {x: {path: ['/a']}}}, '*.b': {allow: {x: [c]}}", "'x' is a"),
        ],
    )
    def test_what_cannot_mean_anything_is_refused(self, tools: str, words: str) -> None:
        with pytest.raises(PolicyError, match=words) as caught:
            parse(f"tools: {{{tools}}}")
        assert (caught.value.line, bool(caught.value.hint)) == (2, True)

    def test_patterns_that_share_no_name_may_differ(self) -> None:
        policy = parse("tools: {'a.*': {allow: {x: {path: ['/a']}}}, b.c: {allow: {x: [d]}}}")
        assert effect(policy, "b.c", x="d") is Effect.ALLOW

    def test_names_that_an_agent_makes_up_are_forgotten_again(self) -> None:
        policy = parse("tools: {'a.*': {allow: any}}")
        for number in range(5000):
            assert policy.signature(f"a.x{number}") is not None
        assert effect(policy, "a.x1") is Effect.ALLOW

    def test_a_long_pattern_is_answered_at_once(self) -> None:
        policy = parse(f"tools: {{'{'a*' * 60}b.c': {{allow: any}}}}")
        assert effect(policy, f"{'a' * 120}.c") is Effect.DENY

    def test_there_are_only_so_many(self) -> None:
        few = ", ".join(f"'a{number}*': {{allow: any}}" for number in range(80))
        parse(f"tools: {{{few}}}")
        with pytest.raises(PolicyError, match="tool names with"):
            parse(f"tools: {{{few}}}\nroles: {{r: {{{few}}}}}")

    def test_explain_shows_the_rules_of_wildcards(self) -> None:
        policy = parse("tools: {files.*: {allow: any}, files.x: {deny: {a: [b]}}}")
        document = Document(tool="files.x", arguments={"a": "c"}, workspace=str(WORKSPACE))
        explanation = explain(policy, document)
        assert [item.rule for item in explanation.considered] == [
            "tools.files.x[0]",
            "tools.files.*[0]",
        ]


class TestServers:
    """Who names a command that the operator's `safeconduct mcp NAME` runs."""

    def test_what_narrows_names_none(self) -> None:
        mine = parse("servers: {files: {run: [mine]}}")
        theirs = parse("servers: {files: {run: [theirs]}, more: {run: [theirs]}}")
        assert {name: found.run for name, found in both(mine, theirs).servers.items()} == {
            "files": ("mine",)
        }
        assert both(mine, theirs, servers=theirs.servers).servers == theirs.servers

    def test_a_role_has_the_servers_of_its_policy(self) -> None:
        policy = parse("servers: {s: {run: [x]}}\nroles: {a: {t: {allow: any}}, b: {narrows: a}}")
        assert set(policy.for_role("b").servers) == set(policy.for_role("a").servers) == {"s"}
