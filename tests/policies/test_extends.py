"""`extends`: a file and the wider one that it names, judged as both, read from one place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from safeconduct.call import Document, Effect, Json
from safeconduct.errors import PolicyError
from safeconduct.policies import (
    Judged,
    Resolution,
    TrustStore,
    check_file,
    compile_elsewhere,
    decide,
    load_policy,
    parse_policy,
    read_policy_file,
    resolve_policy,
)
from safeconduct.policies.files import MAX_EXTENDS

WIDE = """\
version: 1
profiles: {base: {read: ["$WS/**"], limits: {wall: 9s}}, dev: {like: base, write: ["$WS/**"]}}
servers: {files: {run: [files-server, "$WS"], profile: base}}
tools:
  t: [{allow: {a: any}}, {deny: {a: [secret]}}]
  shell.run: {allow: {argv: [make, ...]}, profile: dev, rate: 5/h}
"""
NARROW = """\
version: 1
extends: base.yaml
profiles: {dev: {like: dev, limits: {wall: 3s}}}
tools:
  t: {allow: any}
  u: {allow: any}
  shell.run: {allow: {argv: [make, test]}, profile: dev, rate: 2/h}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = Path(os.path.realpath(tmp_path)) / "policies"
    folder.mkdir()
    (folder / "base.yaml").write_text(WIDE)
    (folder / "own.yaml").write_text(NARROW)
    return folder


def judged(policy: Judged, tool: str, /, **arguments: Json) -> Effect:
    document = Document(tool=tool, arguments=arguments, workspace=policy.workspace)
    return decide(policy, document).effect


def test_both_must_agree(folder: Path, workspace: Path) -> None:
    policy = load_policy(folder / "own.yaml", workspace=workspace)
    assert [Path(part.file).name for part in policy.parts] == ["base.yaml", "own.yaml"]
    assert judged(policy, "t", a="x") is Effect.ALLOW
    assert judged(policy, "t", a="secret") is Effect.DENY
    assert judged(policy, "u") is Effect.DENY
    assert judged(policy, "shell.run", argv=["make", "all"], cwd=str(workspace)) is Effect.DENY
    assert policy.servers["files"].run == ("files-server", str(workspace))


def test_profiles_are_there_by_name_and_both_bound_a_call(folder: Path, workspace: Path) -> None:
    policy = load_policy(folder / "own.yaml", workspace=workspace)
    document = Document(
        tool="shell.run",
        arguments={"argv": ["make", "test"], "cwd": str(workspace)},
        workspace=str(workspace),
    )
    decision = decide(policy, document)
    assert decision.profile is not None
    assert (decision.profile.write, decision.profile.limits.wall_ms) == ((str(workspace),), 3000)
    # Both rules have the same id, and still are counted apart.
    ids = {bound.id: bound.most for bound in decision.obligations}
    assert ids == {
        "tools.shell.run[0]:rate/3600000ms": 5,
        "1/tools.shell.run[0]:rate/3600000ms": 2,
    }


def test_the_version_covers_all_files(folder: Path, workspace: Path) -> None:
    before = load_policy(folder / "own.yaml", workspace=workspace)
    file = read_policy_file(folder / "own.yaml")
    assert file.digest == before.version
    assert [path.name for path in file.paths] == ["own.yaml", "base.yaml"]
    (folder / "base.yaml").write_text(WIDE + "  v: {deny: any}\n")
    assert load_policy(folder / "own.yaml", workspace=workspace).version != before.version
    # What was read is compiled as it was, also for a workspace that is not here.
    there = compile_elsewhere(file, workspace=Path("/nonexistent/space"))
    assert (there.version, there.workspace) == (before.version, "/nonexistent/space")


def test_a_preset_can_be_the_wider_one(folder: Path, workspace: Path) -> None:
    path = folder / "own.yaml"
    path.write_text("version: 1\nextends: preset:read-only\ntools: {fs.read: {allow: any}}\n")
    policy = load_policy(path, workspace=workspace)
    assert judged(policy, "fs.read", path=str(workspace / "src")) is Effect.ALLOW
    assert judged(policy, "fs.read", path="/etc/passwd") is Effect.DENY
    assert [one.name for one in read_policy_file(path).paths] == ["own.yaml"]


def test_check_looks_at_all_files(folder: Path, workspace: Path) -> None:
    found = check_file(folder / "own.yaml", workspace=workspace)
    assert [(one.code, Path(one.file).name, one.line) for one in found] == [
        ("check.wide_profile", "base.yaml", 6),
        ("check.unreachable", "own.yaml", 6),
    ]


@pytest.mark.parametrize(
    ("extends", "words"),
    [
        ("../base.yaml", "leads out of the folder"),
        ("a/../../base.yaml", "leads out of the folder"),
        ("own.yaml", "cannot extend itself"),
        ("nothing.yaml", "no such policy file"),
        ("link.yaml", "cannot be opened"),
        ("linked/base.yaml", "cannot be opened"),
        ("preset:nothing", "no preset"),
        (".", "leads out of the folder"),
        ("folder", "not a regular file"),
        ("fifo", "not a regular file"),
        ("[base.yaml]", "extends"),
    ],
)
def test_what_may_be_named(folder: Path, workspace: Path, extends: str, words: str) -> None:
    (folder / "link.yaml").symlink_to("base.yaml")
    (folder / "linked").symlink_to(".")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "own.yaml").write_text(f"version: 1\nextends: {extends}\n")
    with pytest.raises(PolicyError, match=words) as caught:
        load_policy(folder / "own.yaml", workspace=workspace)
    assert caught.value.hint


def test_what_lies_elsewhere_must_be_ours_alone(
    folder: Path, workspace: Path, tmp_path: Path
) -> None:
    elsewhere = Path(os.path.realpath(tmp_path)) / "elsewhere.yaml"
    elsewhere.write_text(WIDE)
    (folder / "own.yaml").write_text(f"version: 1\nextends: {elsewhere}\ntools: {{}}\n")
    elsewhere.chmod(0o644)
    assert len(load_policy(folder / "own.yaml", workspace=workspace).parts) == 2
    elsewhere.chmod(0o664)
    with pytest.raises(PolicyError, match="others can change"):
        load_policy(folder / "own.yaml", workspace=workspace)


def test_chains_have_an_end(folder: Path, workspace: Path) -> None:
    for number in range(MAX_EXTENDS + 1):
        text = f"version: 1\nextends: p{number + 1}.yaml\ntools: {{t: {{allow: any}}}}\n"
        (folder / f"p{number}.yaml").write_text(text)
    (folder / f"p{MAX_EXTENDS + 1}.yaml").write_text("version: 1\ntools: {t: {allow: any}}\n")
    with pytest.raises(PolicyError, match="never ends"):
        load_policy(folder / "p0.yaml", workspace=workspace)
    policy = load_policy(folder / "p1.yaml", workspace=workspace)
    assert (len(policy.parts), judged(policy, "t")) == (MAX_EXTENDS + 1, Effect.ALLOW)
    (folder / f"p{MAX_EXTENDS}.yaml").write_text("version: 1\nextends: p3.yaml\n")
    with pytest.raises(PolicyError, match="extend itself"):
        load_policy(folder / "p1.yaml", workspace=workspace)


def test_a_key_that_hides_is_refused(folder: Path, workspace: Path) -> None:
    (folder / "own.yaml").write_text('version: 1\n"\\x65xtends": base.yaml\n')
    with pytest.raises(PolicyError) as caught:
        load_policy(folder / "own.yaml", workspace=workspace)
    assert (caught.value.code, caught.value.line) == ("policy.extends", 2)


def test_a_text_that_is_no_file_extends_nothing(workspace: Path) -> None:
    data = b"version: 1\nextends: preset:read-only\n"
    with pytest.raises(PolicyError, match="has not been read"):
        parse_policy(data, name="p", workspace=workspace)


def test_one_server_is_one_command(folder: Path, workspace: Path) -> None:
    (folder / "own.yaml").write_text(
        "version: 1\nextends: base.yaml\nservers: {files: {run: [other-server]}}\n"
    )
    with pytest.raises(PolicyError, match="another one"):
        load_policy(folder / "own.yaml", workspace=workspace)


class TestWhichCounts:
    """What is extended is found, trusted and shielded with the file that names it."""

    @pytest.fixture
    def environment(self, tmp_path: Path) -> dict[str, str]:
        return {"HOME": str(tmp_path / "home")}

    def write(self, path: Path, text: str, mode: int = 0o644) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def resolve(self, workspace: Path, environment: dict[str, str], system: Path) -> Resolution:
        return resolve_policy(start=workspace, environment=environment, system=system)

    def test_trust_holds_for_all_files(
        self, workspace: Path, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        base = self.write(workspace / ".safeconduct/base.yaml", WIDE)
        own = self.write(workspace / ".safeconduct/policy.yaml", NARROW)
        store = TrustStore.of(environment)
        store.pin(own, read_policy_file(own).digest)
        found = self.resolve(workspace, environment, tmp_path / "none.yaml")
        assert (found.trusted, set(found.files)) == (True, {own, base})
        self.write(base, WIDE.replace("secret", "nothing"))
        with pytest.raises(PolicyError) as caught:
            self.resolve(workspace, environment, tmp_path / "none.yaml")
        assert caught.value.code == "policy.untrusted"

    def test_an_untrusted_project_only_narrows(
        self, workspace: Path, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        text = "version: 1\ntools: {t: {allow: {a: [x]}}}\nservers: {files: {run: [mine]}}\n"
        self.write(tmp_path / "home/.config/safeconduct/policy.yaml", text)
        self.write(workspace / ".safeconduct/base.yaml", WIDE)
        self.write(workspace / ".safeconduct/policy.yaml", NARROW)
        policy = self.resolve(workspace, environment, tmp_path / "none.yaml").policy
        assert len(policy.parts) == 3
        assert judged(policy, "t", a="x") is Effect.ALLOW
        assert judged(policy, "t", a="y") is Effect.DENY
        assert policy.servers["files"].run == ("mine",)

    def test_what_ones_own_policy_extends_must_be_ones_own(
        self, workspace: Path, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        folder = tmp_path / "home/.config/safeconduct"
        self.write(folder / "policy.yaml", NARROW)
        self.write(folder / "base.yaml", WIDE, 0o664)
        with pytest.raises(PolicyError) as caught:
            self.resolve(workspace, environment, tmp_path / "none.yaml")
        assert (caught.value.code, Path(caught.value.file or "").name) == (
            "policy.mode",
            "base.yaml",
        )

    def test_the_machines_policy_stands_above_and_names_servers(
        self, workspace: Path, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        self.write(tmp_path / "home/.config/safeconduct/policy.yaml", WIDE)
        text = "version: 1\ntools: {t: {allow: any}}\nservers: {mail: {run: [mail]}}\n"
        self.write(tmp_path / "etc/managed.yaml", text)
        if os.geteuid() != 0:
            pytest.skip("only root can give the machine a policy")
        policy = self.resolve(workspace, environment, tmp_path / "etc/policy.yaml").policy
        assert judged(policy, "t", a="x") is Effect.ALLOW
        assert judged(policy, "shell.run", argv=["make"], cwd=str(workspace)) is Effect.DENY
        assert set(policy.servers) == {"files", "mail"}
