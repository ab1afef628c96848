"""The given escape probes, confined in each tier: what still says ESCAPED is listed with a reason.

The probes are programs by others; they run inside the sandbox with one writable workspace. Some of
their fixtures need root, so as an ordinary user fewer of them can succeed even unconfined.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Box

from safeconduct.call import Tier

PROBES = Path(__file__).resolve().parents[2].parent / "shared" / "corpora" / "probes"
RUNNER = PROBES / "run_probes.py"
FIXTURE = Path("/tmp/probe-fixture")  # where the runner puts what the probes look for
# LIMIT: seconds for all probes in one tier; on a quiet machine they take half of one each.
SECONDS = 600

EVERYWHERE = {
    "c08_vsyscall_jit": "granted: memory that is written and then executed; node and java need it",
    "k21_wx_mmap": "granted: memory that is written and then executed; node and java need it",
    "r12_ignore_term": "granted: SIGTERM may be ignored; SIGKILL comes at the wall limit",
    "r13_setsid_orphan": "granted: a session of its own lives as long as the call, not longer",
}
# Nothing to see where no such socket lies on the host.
PERHAPS = {"n24_docker_sock"}
REMAINING = {
    Tier.FULL: EVERYWHERE
    | {
        "c06_ldso_exec": "granted: the profile lets programs in the workspace be executed",
        "fs38_exec_from_ws": "granted: the profile lets programs in the workspace be executed",
    },
    # In this tier the root of a workspace with protected names takes no new ones, so what makes
    # files there fails; a profile that writes to a subfolder is granted the same as above.
    Tier.LANDLOCK: EVERYWHERE
    | {"n24_docker_sock": "open: stat(2) sees that the name exists; no socket can be made to it"},
}

DRIVER = """
import os, sys
from safeconduct.call import Limits, Profile, Tier
from safeconduct.policies import PROTECTED
from safeconduct.runtime.sandbox import cgroup
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.shield import Shields

workspace, tier = os.path.realpath(sys.argv[1]), Tier(sys.argv[2])
launcher, cgroups = Launcher(), cgroup.discover()
shields = Shields(workspace, PROTECTED)
limits = Limits(wall_ms=20_000, memory_bytes=512 << 20, pids=64)
profile = Profile(name="probe", read=(workspace,), write=(workspace,), limits=limits)
box = NativeSandbox(launcher, tier=tier, cgroups=cgroups)
program = Program(argv=sys.argv[3:], cwd=workspace, environment={"PROBE_WS": workspace})
with shields.raised(profile, lambda path: False) as shield:
    outcome = box.run("probe", program, profile, workspace=workspace, shield=shield)
os.write(1, outcome.stdout)
os.write(2, outcome.stderr)
shields.close()
launcher.close()
if cgroups:
    cgroups.close()
"""


def test_only_what_is_listed_escapes(box: Box, tmp_path: Path) -> None:
    if not RUNNER.exists():
        pytest.skip("needs the probe corpus beside the repository")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc to build the probes")
    if FIXTURE.exists() and os.geteuid() not in (0, FIXTURE.stat().st_uid):
        pytest.skip("the probes' fixture folder is left over from another user")
    driver, table = tmp_path / "driver.py", tmp_path / "table.json"
    driver.write_text(DRIVER)
    mode = f"ours={sys.executable} {driver} {{ws}} {box.tier} {{argv}}"
    done = subprocess.run(
        [sys.executable, str(RUNNER), mode, "--json", str(table)],
        capture_output=True, text=True, timeout=SECONDS, env={**os.environ, "ONLY": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    verdicts = {name: row["ours"] for name, row in json.loads(table.read_text()).items()}
    assert len(verdicts) >= 60
    escaped = {name for name, verdict in verdicts.items() if verdict == "ESCAPED"}
    assert escaped <= REMAINING[box.tier].keys()
    if os.geteuid() == 0:  # the list is exact; an ordinary user's fixtures are fewer
        assert REMAINING[box.tier].keys() - PERHAPS <= escaped
    assert "CONTAINED" in verdicts.values()
    assert "TIMEOUT" not in verdicts.values()
