"""What a machine cannot give is said as that, with what helps, and not as a sandbox that broke.

Each case is made real in a process of its own: a file system, a limit, a listener, a closed folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import Box

from safeconduct.call import Tier
from safeconduct.errors import SandboxFailed, ToolFailed
from safeconduct.runtime.sandbox import shortfall
from safeconduct.runtime.sandbox.shield import Shield

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
RUN = """
import sys
from safeconduct.call import Profile, Tier
from safeconduct.errors import SandboxUnavailable
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.shield import Shield

folder, explain = sys.argv[1], "explain" in sys.argv[2:]
launcher = Launcher()
sandbox = NativeSandbox(launcher, tier=Tier.FULL, cgroups=None)
profile = Profile(name="one", read=(folder,), write=(folder,))
for late in (False, True) if not explain else (False,):
    try:
        print(sandbox.run("call", Program(argv=["true"], cwd=folder), profile, workspace=folder,
                          shield=Shield(), explain=explain, late=late).exit_code)
    except SandboxUnavailable as error:
        print(error.code, error.missing, bool(error.hint))
sandbox.close()
launcher.close()
"""
# A filter that lets everything through and has a listener, seccomp_unotify(2).
LISTEN = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
lines = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
program = struct.pack("HxxxxxxQ", 1, ctypes.addressof(lines))
number = {"x86_64": 317}.get(os.uname().machine, 277)
assert libc.syscall(number, 1, 8, program) >= 0, ctypes.get_errno()
"""


@pytest.fixture
def folder() -> Iterator[str]:
    made = tempfile.mkdtemp(prefix="workspace-")
    Path(made).chmod(0o777)
    yield made
    shutil.rmtree(made)


def told(argv: list[str]) -> list[str]:
    """Run a program and return the lines it printed."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@needs_root
def test_a_file_system_without_id_mapped_mounts(folder: str) -> None:
    python = [sys.executable, "-c", RUN, folder]
    assert told(python) == ["0", "0"]
    script = f'mount -t ramfs none {folder} && chmod 777 {folder} && exec "$@"'
    found = told(["unshare", "--mount", "sh", "-c", script, "sh", *python])
    assert found == ["sandbox.unavailable id-mapped-mount True"] * 2


def test_a_limit_of_user_namespaces(folder: str) -> None:
    python = [sys.executable, "-c", RUN, folder]
    own = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*own, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs user namespaces")
    script = 'echo {} >/proc/sys/user/max_user_namespaces && exec "$@"'
    # Root of a namespace that maps one id confines itself as an ordinary user does.
    assert told([*own, "sh", "-c", script.format(1000), "sh", *python]) == ["0", "0"]
    found = told([*own, "sh", "-c", script.format(0), "sh", *python])
    assert found == ["sandbox.unavailable user-namespaces True"] * 2


def test_somebody_who_listens_already(folder: str, box: Box) -> None:
    if box.tier is not Tier.FULL:
        pytest.skip("the same in both tiers")
    assert told([sys.executable, "-c", RUN, folder, "explain"]) == ["0"]
    assert told([sys.executable, "-c", LISTEN + RUN, folder]) == ["0", "0"]
    found = told([sys.executable, "-c", LISTEN + RUN, folder, "explain"])
    assert found == ["sandbox.unavailable seccomp-listener True"]


@needs_root
def test_a_program_below_a_private_folder(box: Box) -> None:
    private = box.workspace / "home"
    private.mkdir(mode=0o700)
    program = str(shutil.copy("/bin/true", private))
    if box.tier is Tier.FULL:  # an id-mapped mount shows it as the program's own
        assert box.run(program).ok
        return
    with pytest.raises(ToolFailed) as caught:
        box.run(program)
    assert "home folder" in caught.value.hint
    assert shortfall.closed_above(program) == str(private)
    private.chmod(0o711)
    assert box.run(program).ok
    assert shortfall.closed_above(program) == ""
    assert shortfall.closed_above(__file__) in ("", *map(str, Path(__file__).parents))


def test_what_broke_stays_what_it_was() -> None:
    error = SandboxFailed("It broke.", step="mount", errno=22)
    assert shortfall.typed(error) is error


def test_too_many_hidden_files_are_said_to_be_that(box: Box) -> None:
    if box.tier is not Tier.FULL:
        pytest.skip("is about masks")
    hidden = tuple(str(box.workspace / f"secret-{number}") for number in range(5000))
    for path in hidden:
        Path(path).touch()
    with pytest.raises(SandboxFailed) as caught:
        box.run("true", shield=Shield(hidden=hidden))
    assert caught.value.code == "sandbox.too_many_paths"
    assert caught.value.hint
