"""One folder under two names, by bind mounts: keys and traces are refused under either.

Each case runs in a mount namespace of its own, where the mount is really made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from safeconduct.mounts import Mounts

WORLD = """
import ctypes, json, os, sys
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)

def check(result):
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def bind(source, target):
    Path(target).mkdir(mode=0o700, exist_ok=True)
    check(libc.mount(os.fsencode(source), os.fsencode(target), None, 0x1000, None))  # MS_BIND

try:
    check(libc.unshare(0x20000))  # CLONE_NEWNS
    check(libc.mount(b"none", b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
except OSError as error:
    print(error)
    sys.exit(77)

from safeconduct.attestation import write_key
from safeconduct.attestation.signing.key import load_key, require_outside
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.call import Profile
from safeconduct.errors import Error
from safeconduct.runtime.foundation import refuse_inside
from safeconduct.runtime.places import Places
from safeconduct.runtime.sandbox.shield import Shields

def told(work):
    try:
        work()
    except Error as error:
        return error.code
    return "accepted"

base = Path(sys.argv[2])
places = Places.of({"HOME": str(base), "XDG_STATE_HOME": str(base / "local")})
ws, state, trace = base / "w s\\\\n", places.state, base / "trace"
for folder in (ws / "sub", state.parent):
    folder.mkdir(parents=True)
ws.joinpath("sub").chmod(0o700)
state.mkdir(mode=0o700)
exec(sys.argv[1])
key = state / "log.key"
write_key(key, "example.org/a")
shields = Shields(str(ws), (), [str(state), str(trace)])
profile = Profile(name="p", read=(str(ws),))

def raise_shield():
    with shields.raised(profile, lambda path: False):
        pass

print(json.dumps({
    "seen": (ws / seen / "log.key").read_text()[:11],
    "key": told(lambda: load_key(key, forbidden=[ws])),
    "state": told(lambda: require_outside(state, [ws])),
    "vault": told(lambda: Vault.open(state / "vault.key", forbidden=[ws])),
    "workspace": told(lambda: refuse_inside(str(ws), trace, places)),
    "grant": told(raise_shield),
    "call": shields.refuses(str(ws / seen / "log.key")),
    "elsewhere": shields.refuses(str(ws / "free")),
    "frozen": Shields(str(ws), (), [], frozen=[str(key)]).freezes(str(ws / seen / "log.key")),
    "apart": told(lambda: load_key(key, forbidden=[base / "other"])),
}))
"""

REFUSED = {
    "seen": "PRIVATE+KEY",
    "key": "key.permissions",
    "state": "key.permissions",
    "vault": "key.permissions",
    "workspace": "trace.inside_workspace",
    "grant": "sandbox.absent_granted",
    "call": True,
    "elsewhere": False,
    "frozen": True,
    "apart": "accepted",
}


def in_namespace(code: str, base: Path) -> dict[str, object]:
    if os.geteuid() != 0:
        pytest.skip("needs root, for mounts")
    done = subprocess.run(
        [sys.executable, "-c", WORLD, code, str(base)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )
    if done.returncode == 77:
        pytest.skip(f"needs a mount namespace: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize(
    "code",
    [
        "seen = 'sub'; bind(ws / 'sub', state)",
        "seen = 'in'; bind(state, ws / 'in')",
        "seen = 'in/safeconduct'; bind(state.parent, ws / 'in')",
        "seen = 'deep'; bind(state, base / 'first'); bind(base / 'first', ws / 'deep')",
    ],
    ids=["state is a folder of the workspace", "state shown there", "its parent", "twice"],
)
def test_a_bind_mount_between_state_and_workspace_is_refused(code: str, tmp_path: Path) -> None:
    assert in_namespace(code, tmp_path) == REFUSED


def test_a_trace_that_is_to_be_made_in_a_bound_folder_is_refused(tmp_path: Path) -> None:
    code = "seen = '../local/safeconduct'; bind(ws / 'sub', trace); trace /= 'new/one'"
    found = in_namespace(code, tmp_path)
    assert (found["workspace"], found["grant"]) == (
        "trace.inside_workspace",
        "sandbox.absent_granted",
    )


@pytest.mark.parametrize("procfs", [True, False])
def test_where_the_kernel_does_not_tell_it_is_refused(procfs: bool, tmp_path: Path) -> None:
    code = f"""
jail = base / 'jail'
jail.mkdir()
if {procfs}: bind('/proc', jail / 'proc')
os.chroot(jail)
from safeconduct.mounts import Mounts
print(json.dumps({{'code': told(lambda: Mounts().names_below('/', '/x'))}}))
sys.exit()
"""
    assert in_namespace(code, tmp_path) == {"code": "mounts.unknown"}


def test_without_mounts_only_names_below_a_folder_lead_into_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    mounts = Mounts()
    inner, outer = str(tmp_path / "a" / "b"), str(tmp_path / "a")
    assert mounts.names_below(outer, inner) == [inner]
    assert mounts.names_below(inner, outer) == [inner]
    assert mounts.names_below("/", f"{inner}/missing/one") == [f"{inner}/missing/one"]
    assert mounts.names_below(f"{inner}c", inner) == []
