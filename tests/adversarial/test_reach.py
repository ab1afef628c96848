"""What no tool may reach, whatever the policy grants: keys, traces, policies in force, the hidden.

Each attack moves a folder above the thing, grants it sideways, or comes back in a later call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from safeconduct import Denied, Outcome, Runtime, SandboxFailed, Tier

START = Callable[..., Runtime]


@pytest.fixture(params=list(Tier))
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A home folder that holds the workspace, the state folder and the policies."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(0o755)
    (tmp_path / "ws" / "conf").mkdir(parents=True)
    (tmp_path / "ws" / "conf" / "secret.key").write_text("SECRET-TEXT")
    (tmp_path / "tier").write_text(str(request.param))
    return tmp_path


@pytest.fixture
def start(home: Path) -> Generator[START]:
    """Start a Runtime on a profile; the policy lies where ``policy`` says."""
    with ExitStack() as stack:

        def go(profile: str, *, policy: Path | None = None, tools: str = "") -> Runtime:
            path = policy or home / "policy.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                f"version: 1\nprofiles:\n  base: {{{profile}}}\ntools:\n"
                "  shell.run: {allow: {argv: [sh, -c, any]}}\n"
                '  fs.read: {allow: {path: ["/**"]}}\n'
                '  fs.write: {allow: {path: ["/**"]}}\n' + tools
            )
            environment = {"HOME": str(home), "XDG_STATE_HOME": str(home / "local" / "state")}
            runtime = Runtime.from_policy(
                path,
                workspace=home / "ws",
                trace=home.parent / f"trace-{os.urandom(4).hex()}",
                environment=environment,
            )
            tier = Tier((home / "tier").read_text())
            if tier is Tier.LANDLOCK and os.geteuid() == 0:
                runtime.close()
                pytest.skip("tier landlock started by root: the program has no right to write here")
            if runtime.machine.tiers[tier]:
                runtime.close()
                pytest.skip(f"tier {tier}: {runtime.machine.tiers[tier]}")
            if runtime.confinement.tier is not tier:
                runtime.close()
                runtime = Runtime.from_policy(
                    path, workspace=home / "ws", tier=tier, environment=environment
                )
            return stack.enter_context(runtime)

        yield go


def sh(runtime: Runtime, text: str) -> Outcome:
    return runtime.call("shell.run", argv=["sh", "-c", text])


def test_the_key_is_not_reached_by_moving_what_holds_it(home: Path, start: START) -> None:
    runtime = start(f'write: ["{home}/**"]')
    key = home / "local/state/safeconduct/keys/log.key"
    assert key.read_text().startswith("PRIVATE+KEY")  # the attack would have something to find
    first = sh(runtime, f"mv {home}/local {home}/x; cat {home}/x/state/safeconduct/keys/log.key")
    second = sh(runtime, f"cat {home}/x/state/safeconduct/keys/log.key {key}")
    assert b"PRIVATE" not in first.stdout + second.stdout
    assert key.exists()
    with pytest.raises(Denied):
        runtime.call("fs.read", path=str(key))


def test_a_grant_below_the_state_folder_refuses_the_call(home: Path, start: START) -> None:
    start('read: ["$WS/**"]').close()  # makes the folders
    runtime = start(f'read: ["{home}/local/state/safeconduct/keys/**"]')
    with pytest.raises(SandboxFailed) as refused:
        sh(runtime, "true")
    assert refused.value.code == "sandbox.absent_granted"


@pytest.mark.parametrize("place", ["ws/policy.yaml", "elsewhere/deep/policy.yaml"])
def test_the_policy_in_force_is_not_changed(home: Path, start: START, place: str) -> None:
    policy = home / place
    runtime = start(f'write: ["{home}/**"]', policy=policy)
    before = policy.read_bytes()
    with pytest.raises(Denied) as refused:
        runtime.call("fs.write", path=str(policy), content="version: 1\n")
    assert refused.value.code == "path.protected"
    top = home / Path(place).parts[0]
    sh(runtime, f"echo 'version: 1' > {policy}; rm -f {policy}; mv {top} {home}/y")
    assert policy.read_bytes() == before


def test_a_policy_behind_a_link_is_not_run_under(home: Path, start: START) -> None:
    real = home / "real.yaml"
    start('write: ["$WS/**"]', policy=real).close()
    (home / "ws" / "link.yaml").symlink_to(real)
    environment = {"HOME": str(home), "XDG_STATE_HOME": str(home / "local" / "state")}
    with (
        Runtime.from_policy(
            home / "ws" / "link.yaml", workspace=home / "ws", environment=environment
        ) as runtime,
        pytest.raises(SandboxFailed) as refused,
    ):
        sh(runtime, "true")
    assert refused.value.code == "sandbox.protected_link"


def test_what_is_hidden_is_not_shown_by_moving_it_first(home: Path, start: START) -> None:
    runtime = start('write: ["$WS/**"], hide: ["$WS/conf/secret.key"]')
    sh(runtime, "mv conf conf2")
    outcome = sh(runtime, "cat conf2/secret.key conf/secret.key")
    assert b"SECRET-TEXT" not in outcome.stdout
    assert (home / "ws/conf/secret.key").exists()


def test_what_is_hidden_is_not_shown_by_a_path_too_long_to_search(home: Path, start: START) -> None:
    (home / "ws" / "conf" / ".env").write_text("SECRET-TEXT")
    deep = home / "ws"
    fd = os.open(deep, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=fd)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.rename(home / "ws" / "conf", "conf", dst_dir_fd=fd)
    os.close(fd)
    runtime = start('read: ["$WS/**"], hide: ["**/.env*"]')
    dive = "for i in $(seq 30); do cd ddd*; done; cat conf/.env"
    with pytest.raises(SandboxFailed):
        sh(runtime, dive)


def test_a_read_only_folder_does_not_keep_a_protected_file(home: Path, start: START) -> None:
    runtime = start('write: ["$WS/**"]')
    with suppress(SandboxFailed):  # tier landlock lets nobody make it in the first place
        sh(runtime, "echo evil > .mcp.json; chmod 555 .")
    assert not (home / "ws/.mcp.json").exists()
    if runtime.confinement.tier is Tier.FULL:
        assert [one.name for one in (home / "ws").glob(".mcp.json.refused-*")] != []


def test_a_home_with_the_trace_inside_still_runs(home: Path, start: START) -> None:
    start('read: ["$WS/**"]').close()
    environment = {"HOME": str(home), "XDG_STATE_HOME": str(home / "local" / "state")}
    policy = home / "wide.yaml"
    policy.write_text(
        f'version: 1\nprofiles:\n  base: {{read: ["{home}/**"]}}\n'
        "tools:\n  shell.run: {allow: {argv: [sh, -c, any]}}\n"
    )
    with Runtime.from_policy(policy, workspace=home / "ws", environment=environment) as runtime:
        assert sh(runtime, "ls").ok
        assert b"PRIVATE" not in sh(runtime, f"find {home} -name log.key | xargs cat").stdout
