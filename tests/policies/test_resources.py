"""What a Call says it needs: the grammar of `limits`, one spelling, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeconduct.call import Call, Effect, Json, Limits
from safeconduct.errors import Denied
from safeconduct.policies import canonicalize, decide, parse_policy

POLICY = b"version: 1\ntools:\n  shell.run: {allow: {argv: [make, ...]}}\n"
EVERY = """version: 1
profiles:
  base:
    limits: {wall: 30s, cpu: 20s, memory: 512MiB, pids: 64, files: 1024, disk: 256MiB, inodes: 64K,
             depth: 100, file: 8MiB, output: 1MiB, idle: 60s}
"""


def resources(tmp_path: Path, value: Json) -> Json:
    policy = parse_policy(POLICY, name="policy.yaml", workspace=tmp_path)
    arguments: dict[str, Json] = {"argv": ["make"], "resources": value}
    call = Call(id="1", tool="shell.run", arguments=arguments, session="s")
    with canonicalize(policy, call) as canonical:
        assert decide(policy, canonical.document).effect is Effect.ALLOW
        return canonical.document.arguments["resources"]


def test_needs_have_one_spelling(tmp_path: Path) -> None:
    written: Json = {"wall": "5m", "memory": "1GiB", "pids": 8, "inodes": "2K", "idle": "1s"}
    canonical = resources(tmp_path, written)
    assert canonical == {
        "idle": "1000ms",
        "inodes": "2000",
        "memory": "1073741824B",
        "pids": "8",
        "wall": "300000ms",
    }
    assert resources(tmp_path, canonical) == canonical
    assert resources(tmp_path, {}) == {}


@pytest.mark.parametrize(
    "value",
    [
        "5m",
        [],
        None,
        {"wall": 5},
        {"wall": "5 minutes"},
        {"wall": "0s"},
        {"wall": True},
        {"memory": "1GB"},
        {"memory": -1},
        {"pids": 0},
        {"pids": 1.5},
        {"pids": ["8"]},
        {"fuel": "5G"},
        {"walls": "5m"},
        {"wall": "5m", "\x1b[2J": "1"},
    ],
    ids=repr,
)
def test_what_no_policy_could_say_is_denied(tmp_path: Path, value: Json) -> None:
    with pytest.raises(Denied) as caught:
        resources(tmp_path, value)
    assert caught.value.code == "call.bad_argument"
    assert caught.value.message.isprintable()


def test_every_limit_has_a_word(tmp_path: Path) -> None:
    policy = parse_policy(EVERY.encode(), name="policy.yaml", workspace=tmp_path)
    assert policy.profiles["base"].limits == Limits(
        wall_ms=30_000, cpu_ms=20_000, memory_bytes=512 << 20, pids=64, files=1024,
        disk_bytes=256 << 20, inodes=64_000, depth=100, file_bytes=8 << 20,
        output_bytes=1 << 20, idle_ms=60_000,
    )  # fmt: skip
