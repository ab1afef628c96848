"""Which policy counts, and whose word it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from safeconduct.call import Call, Decision, Effect, Json
from safeconduct.errors import PolicyError
from safeconduct.policies import (
    Judged,
    NarrowedPolicy,
    Origin,
    Resolution,
    TrustStore,
    canonicalize,
    decide,
    discover_policy,
    read_policy_file,
    resolve_policy,
)

READS = b'version: 1\ntools: {fs.read: {allow: {path: ["$WS/src/**"]}}}\n'
WRITE: dict[str, Json] = {"path": "/tmp/new", "content": ""}
WIDE = b"version: 1\ntools: {fs.read: {allow: any}, fs.write: {allow: any}}\n"


def judge_with(policy: Judged, tool: str, arguments: dict[str, Json]) -> Decision:
    call = Call(id="1", tool=tool, arguments=arguments, session="s")
    with canonicalize(policy, call) as canonical:
        return decide(policy, canonical.document)


class Home:
    """A home with nothing in it, and the project beside it."""

    def __init__(self, root: Path, workspace: Path) -> None:
        self.root, self.workspace = root, workspace
        self.environment = {"HOME": str(root / "home")}
        self.own = root / "home/.config/safeconduct/policy.yaml"
        self.project = workspace / ".safeconduct/policy.yaml"
        self.system = root / "etc/policy.yaml"
        self.trust = TrustStore.of(self.environment)

    def write(self, path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o644)
        return path

    def resolve(self, explicit: Path | None = None) -> Resolution:
        return resolve_policy(
            explicit=explicit,
            start=self.workspace / "src",
            environment=self.environment,
            system=self.system,
        )


@pytest.fixture
def home(tmp_path: Path, workspace: Path) -> Home:
    return Home(tmp_path, workspace)


def test_the_order(home: Home) -> None:
    def origin(explicit: Path | None = None) -> Origin:
        start = home.workspace / "src"
        return discover_policy(
            explicit=explicit, start=start, environment=home.environment, system=home.system
        ).origin

    with pytest.raises(PolicyError) as caught:
        origin()
    assert caught.value.code == "policy.not_found"
    home.write(home.system, READS)
    assert origin() is Origin.SYSTEM
    home.write(home.own, READS)
    assert origin() is Origin.USER
    home.write(home.project, READS)
    assert origin() is Origin.PROJECT
    home.environment["SAFECONDUCT_POLICY"] = "/x"
    assert origin() is Origin.ENVIRONMENT
    assert origin(Path("/y")) is Origin.EXPLICIT


def test_nothing_above_the_repository_is_looked_at(home: Home) -> None:
    home.write(home.workspace.parent / ".safeconduct/policy.yaml", WIDE)
    with pytest.raises(PolicyError, match="there is no policy"):
        home.resolve()


def test_an_untrusted_project_policy_alone_is_refused(home: Home) -> None:
    home.write(home.project, READS)
    with pytest.raises(PolicyError) as caught:
        home.resolve()
    assert caught.value.code == "policy.untrusted"
    assert "safeconduct trust" in caught.value.hint


def test_an_untrusted_project_policy_never_widens(home: Home) -> None:
    home.write(home.own, READS)
    home.write(home.project, WIDE)
    found = home.resolve()
    assert isinstance(found.policy, NarrowedPolicy)
    assert not found.trusted
    arguments: dict[str, Json] = {"path": "src/main.py"}
    assert judge_with(found.policy, "fs.read", arguments).effect is Effect.ALLOW
    assert judge_with(found.policy, "fs.read", {"path": "/etc/passwd"}).effect is Effect.DENY
    written = judge_with(found.policy, "fs.write", {"path": "new", "content": ""})
    assert written.code == "policy.no_rule"
    home.write(home.project, b"version: 1\ntools: {fs.read: {deny: any}}\n")
    narrowed = home.resolve().policy
    assert judge_with(narrowed, "fs.read", arguments).effect is Effect.DENY


@pytest.mark.parametrize("text", [b"version: 1\nworkspace: /\n", b"version: 1\nworkspace: /etc\n"])
def test_an_untrusted_project_policy_never_moves_the_workspace(home: Home, text: bytes) -> None:
    home.write(home.own, READS)
    home.write(home.project, text)
    with pytest.raises(PolicyError):
        home.resolve()


def test_trust_holds_for_the_very_bytes(home: Home) -> None:
    home.write(home.project, WIDE)
    policy = resolve_policy(
        explicit=home.project, start=home.workspace, environment=home.environment
    ).policy
    home.trust.pin(home.project, policy.version)
    found = home.resolve()
    assert found.trusted
    assert found.policy.version == policy.version
    assert judge_with(found.policy, "fs.write", {"path": "n", "content": ""}).effect is Effect.ALLOW
    home.write(home.project, WIDE + b"# changed\n")
    with pytest.raises(PolicyError) as caught:
        home.resolve()
    assert caught.value.code == "policy.untrusted"
    home.write(home.project, WIDE)
    assert home.trust.unpin(home.project)
    assert not home.trust.unpin(home.project)
    with pytest.raises(PolicyError):
        home.resolve()


@pytest.mark.parametrize("linked", [".safeconduct", ".safeconduct/policy.yaml"])
def test_trust_is_not_borrowed_through_a_link(home: Home, tmp_path: Path, linked: str) -> None:
    theirs = home.write(tmp_path / "a/.safeconduct/policy.yaml", WIDE)
    home.trust.pin(theirs, read_policy_file(theirs).digest)
    link = home.workspace / linked
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "a" / linked)
    # Both without and with an own policy that it could narrow.
    for _ in range(2):
        with pytest.raises(PolicyError) as caught:
            home.resolve()
        assert caught.value.code == "policy.link"
        assert caught.value.hint
        home.write(home.own, READS)
    assert home.resolve(home.project).found.origin is Origin.EXPLICIT


def test_all_files_in_force_are_named_as_they_were_named(home: Home) -> None:
    home.write(home.system, READS)
    assert home.resolve().files == (home.system,)
    real = home.write(home.own.with_name("real.yaml"), READS)
    home.own.symlink_to(real)
    assert home.resolve().files == (home.own,)
    home.write(home.project, WIDE)
    assert home.resolve().files == (home.project, home.own)
    assert home.resolve(real).files == (real,)
    home.trust.pin(home.project, read_policy_file(home.project).digest)
    assert home.resolve().files == (home.project,)


def test_a_policy_that_others_can_change_is_refused(home: Home) -> None:
    home.write(home.own, READS).chmod(0o664)
    with pytest.raises(PolicyError) as caught:
        home.resolve()
    assert caught.value.code == "policy.mode"
    home.own.chmod(0o666)
    with pytest.raises(PolicyError):
        home.resolve(home.own)
    home.own.chmod(0o664)
    assert home.resolve(home.own).found.origin is Origin.EXPLICIT


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_policy_of_another_user_is_refused(home: Home) -> None:
    os.chown(home.write(home.own, READS), 12345, 12345)
    with pytest.raises(PolicyError) as caught:
        home.resolve()
    assert caught.value.code == "policy.owner"


class TestStore:
    """The trust store believes only what its user alone could have written."""

    digest = "sha256:" + "0" * 64

    def test_it_is_private_and_plain(self, home: Home) -> None:
        home.trust.pin(home.project, self.digest)
        assert home.trust.path.stat().st_mode & 0o777 == 0o600
        assert json.loads(home.trust.path.read_text())["trusted"] == {
            str(home.project): self.digest
        }
        assert home.trust.is_trusted(home.project, self.digest)
        assert not home.trust.is_trusted(home.project, "sha256:" + "1" * 64)
        assert not home.trust.is_trusted(home.own, self.digest)
        assert os.listdir(home.trust.path.parent) == ["trust.json"]

    def test_a_store_open_to_others_is_refused(self, home: Home) -> None:
        home.trust.pin(home.project, self.digest)
        home.trust.path.chmod(0o644)
        with pytest.raises(PolicyError) as caught:
            home.trust.is_trusted(home.project, self.digest)
        assert caught.value.code == "trust.store"

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            '{"version": 2, "trusted": {}}',
            '{"version": 1, "trusted": []}',
            '{"version": 1, "trusted": {"/x": "sha256:1"}}',
            '{"version": 1, "trusted": {"/x": 1}}',
            '{"version": 1, "trusted": {}, "more": 1}',
            "[" * 100_000,
        ],
    )
    def test_a_damaged_store_is_refused(self, home: Home, text: str) -> None:
        home.trust.pin(home.project, self.digest)
        home.trust.path.write_text(text)
        with pytest.raises(PolicyError) as caught:
            home.trust.is_trusted(home.project, self.digest)
        assert caught.value.code == "trust.store"

    def test_links_and_fifos_are_refused(self, home: Home) -> None:
        home.trust.path.parent.mkdir(parents=True)
        home.trust.path.symlink_to("/dev/null")
        with pytest.raises(PolicyError):
            home.trust.is_trusted(home.project, self.digest)
        home.trust.path.unlink()
        os.mkfifo(home.trust.path)
        with pytest.raises(PolicyError):
            home.trust.is_trusted(home.project, self.digest)

    def test_only_digests_are_pinned(self, home: Home) -> None:
        with pytest.raises(ValueError, match="digest"):
            home.trust.pin(home.project, "sha256:x")


def managed_policy(home: Home, data: bytes) -> Path:
    """Lay down a managed policy; only root can make one that is believed."""
    path = home.write(home.system.parent / "managed.yaml", data)
    if os.geteuid() != 0:
        pytest.skip("only root lays down a managed policy")
    return path


def test_a_managed_policy_stands_above_every_other(home: Home) -> None:
    mine = home.write(home.root / "mine.yaml", WIDE)
    home.write(home.own, WIDE)
    assert judge_with(home.resolve(mine).policy, "fs.write", WRITE).effect is Effect.ALLOW
    path = managed_policy(home, b"version: 1\ntools: {fs.read: {allow: any}}\n")
    real = str(home.workspace / "src/main.py")
    for explicit in (mine, None):
        found = home.resolve(explicit)
        assert judge_with(found.policy, "fs.write", WRITE).effect is Effect.DENY
        assert judge_with(found.policy, "fs.read", {"path": real}).effect is Effect.ALLOW
        assert path in found.files
        assert found.why.endswith(f"within {path}")


def test_a_managed_policy_bounds_a_trusted_project_too(home: Home) -> None:
    managed_policy(home, READS)
    home.write(home.project, WIDE)
    home.trust.pin(home.project, read_policy_file(home.project).digest)
    assert judge_with(home.resolve().policy, "fs.write", WRITE).effect is Effect.DENY


@pytest.mark.parametrize("spoil", ["owner", "mode", "broken"])
def test_a_managed_policy_that_is_not_roots_own_refuses_everything(home: Home, spoil: str) -> None:
    mine = home.write(home.root / "mine.yaml", WIDE)
    path = managed_policy(home, READS if spoil != "broken" else b"version: 2\n")
    if spoil == "owner":
        os.chown(path, 65534, 65534)
    elif spoil == "mode":
        path.chmod(0o664)
    with pytest.raises(PolicyError) as error:
        home.resolve(mine)
    assert error.value.file == str(path)


def test_an_ordinary_user_lays_down_no_managed_policy(home: Home) -> None:
    mine = home.write(home.root / "mine.yaml", WIDE)
    path = home.write(home.system.parent / "managed.yaml", READS)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    with pytest.raises(PolicyError, match="belong to root"):
        home.resolve(mine)


def test_a_managed_policy_that_cannot_be_looked_at_is_not_absent(home: Home) -> None:
    """Such as one in a folder that only root may enter; a link to itself fails for root too."""
    mine = home.write(home.root / "mine.yaml", WIDE)
    folder = home.system.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(folder.name)
    with pytest.raises(PolicyError) as error:
        home.resolve(mine)
    assert error.value.code == "policy.unreadable"
    assert error.value.file == str(folder / "managed.yaml")


def test_a_relative_name_in_the_variable_counts_from_the_start(home: Home) -> None:
    home.write(home.workspace / "src" / "named.yaml", READS)
    home.environment["SAFECONDUCT_POLICY"] = "named.yaml"
    assert home.resolve().files == (home.workspace / "src" / "named.yaml",)
