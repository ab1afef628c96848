"""The signer under a user id of its own: installed for real, in a copy of this machine's folders.

``setup``'s step runs as root in a mount namespace where ``/etc``, ``/usr/lib``, ``/var/lib`` and
``/run`` are overlays on a tmpfs, with the real useradd(8), visudo(8) and sudo(8). The client is
an ordinary user who has nothing but the rule.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safeconduct.attestation.signing.signer_user import main as serve_user
from safeconduct.runtime.cli.setup_signer import interpreter, signer_step
from safeconduct.runtime.cli.setup_steps import State

MACHINE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)

def check(result):
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def mount(kind, target, data=""):
    check(libc.mount(kind.encode(), target.encode(), kind.encode(), 0, data.encode()))

try:
    check(libc.unshare(0x20000))  # CLONE_NEWNS
    check(libc.mount(b"none", b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
    mount("tmpfs", "/run")
    os.chmod("/run", 0o755)
    for name in ("/etc", "/usr/lib", "/var/lib"):
        upper, work = "/run/overlay/upper" + name, "/run/overlay/work" + name
        os.makedirs(upper), os.makedirs(work)
        mount("overlay", name, f"lowerdir={name},upperdir={upper},workdir={work}")
except OSError as error:
    print(error)
    sys.exit(77)
os.chdir("/")
exec(sys.argv[1])
"""

TOOLS = """
import json, os, pwd, subprocess, sys
from pathlib import Path
from safeconduct.runtime.cli.setup_apply import perform, take_back
from safeconduct.runtime.cli.setup_signer import interpreter, signer_step

ROOT, CODE = Path("/"), Path("/usr/lib/safeconduct-signer")
KEYS = Path("/var/lib/safeconduct-signer")

def act(change):
    return change(signer_step(ROOT), ROOT, real=True)

def as_user(code, uid=65534, check=True):
    # -S: nothing but the standard library, and the copy that everybody may read.
    lib = f"import sys; sys.path.insert(0, {str(CODE / 'lib')!r})\\n"
    done = subprocess.run([interpreter(), "-IS", "-c", lib + CLIENT + code], capture_output=True,
        text=True, timeout=60, user=uid, group=65534, extra_groups=[], env={})
    if check and done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout) if check else done

def answer(value):
    print(json.dumps(value))

CLIENT = '''
import json, os
from pathlib import Path
from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.merkle import leaf_hash
from safeconduct.attestation.note import Note
from safeconduct.attestation.signing.signer import SignerClient
from safeconduct.errors import TraceInvalid
SUDO = ["/usr/bin/sudo", "-n", "-u", "safeconduct-signer", "--", "/usr/lib/safeconduct-signer/run"]
def start(): return SignerClient.start_command(SUDO, isolation="user")
def head(leaf): return Checkpoint(origin="example.org/log", size=1, root=leaf_hash(leaf))
'''
"""


def on_machine(code: str) -> Any:  # noqa: ANN401 - a parse boundary
    """Run code as root where the signer may be installed, and return its answer."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not Path("/usr/bin/sudo").exists() or shutil.which("visudo", path="/usr/sbin") is None:
        pytest.skip("needs sudo(8)")
    if interpreter() is None:
        pytest.skip("needs an interpreter of this version that only root can change")
    done = subprocess.run(
        [sys.executable, "-c", MACHINE, TOOLS + code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )
    if done.returncode == 77:
        pytest.skip(f"needs a mount namespace with overlays: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
    assert not Path("/usr/lib/safeconduct-signer/run").exists()
    return json.loads(done.stdout)


SCENARIO = """
before = str(signer_step(ROOT).state)
first, after, second = act(perform), str(signer_step(ROOT).state), act(perform)
signed = as_user('''
client = start()
line = client.sign(head(b"a"), old_size=0, proof=[])
note = Note.parse(f"{head(b'a').text()}\\\\n{line}".encode())
named = client.key.of_log("example.org/log")
try:
    client.sign(head(b"b"), old_size=1, proof=[])
    forked = "signed"
except TraceInvalid as error:
    forked = error.code
def tried(work):
    try:
        work()
    except OSError as error:
        return type(error).__name__
    return "done"
def uids(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {int(uid) for line in lines if line.startswith("Uid:") for uid in line.split()[1:]}
def below(pid):
    # sudo stays in front of what it starts, or becomes it.
    started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return below(int(started[0])) if started else pid
signer = below(client.pid)
home = Path("/var/lib/safeconduct-signer")
print(json.dumps({
    "verifies": named.verifies(note.signatures[0], note.text), "forked": forked,
    "line": client.key.line, "isolation": client.isolation,
    "read": tried(lambda: os.listdir(home)), "open": tried(lambda: open(home / "65534/log.key")),
    "code": tried(lambda: open("/usr/lib/safeconduct-signer/run", "a")),
    "uids": list(uids(signer)), "memory": tried(lambda: open(f"/proc/{signer}/mem", "rb")),
    "kill": tried(lambda: os.kill(signer, 9)),
}))
client.close()
''')
key = KEYS / "65534/log.key"
status, owner = os.stat(key), pwd.getpwnam("safeconduct-signer").pw_uid
again = as_user('client = start(); print(json.dumps(client.key.line)); client.close()')
other = as_user('client = start(); print(json.dumps(client.key.line)); client.close()', uid=1)
lied = as_user('''
os.environ["SUDO_UID"] = "1"
client = start()
print(json.dumps(client.key.line))
''')
options = as_user('''
import subprocess
print(json.dumps(subprocess.run(SUDO + ["x"], capture_output=True).returncode))
''')
ROTATES = '''
client = SignerClient.start_command([*SUDO, "rotate"], isolation="user")
body = client.rotate("example.org/log")
print(json.dumps(body["old"] == client.key.line != body["new"]))
client.close()
'''
refused = as_user('''
client = start()
try:
    client.rotate("example.org/log")
except TraceInvalid as error:
    print(json.dumps(error.code))
client.close()
''')
without = as_user(ROTATES, check=False)
# What stands in for an operator's own right to run programs through sudo.
right = Path("/etc/sudoers.d/operator")
right.write_text("#65534 ALL=(safeconduct-signer) NOPASSWD: /usr/lib/safeconduct-signer/run\\n")
right.chmod(0o440)
operator = as_user(ROTATES)
right.unlink()
direct = as_user('''
try:
    SignerClient.start_command([SUDO[-1]])
except TraceInvalid as error:
    print(json.dumps(error.code))
''')
undone = act(take_back)
answer({"states": [before, after, str(signer_step(ROOT).state)], "first": first, "second": second,
        "signed": signed, "mode": oct(status.st_mode), "owner": status.st_uid == owner != 0,
        "again": again, "other": other, "lied": lied, "options": options, "direct": direct,
        "rotation": [refused, without.returncode != 0, operator],
        "uid": owner, "undone": undone, "kept": key.exists(), "code": CODE.exists()})
"""


def test_an_ordinary_user_signs_with_a_key_that_only_the_signer_reads() -> None:
    found = on_machine(SCENARIO)
    signed = found["signed"]
    assert found["states"] == ["needed", "done", "needed"]
    assert len(found["first"]) == 3
    assert found["second"] == []
    assert signed["verifies"]
    assert signed["forked"] == "signer.refused"
    assert signed["isolation"] == "user"
    assert signed["uids"] == [found["uid"]]
    for name in ("read", "open", "code", "memory", "kill"):
        assert signed[name] == "PermissionError", name
    assert (found["mode"], found["owner"]) == ("0o100600", True)
    # Its memory outlives the process, and each user has a key: sudo says who calls.
    assert found["again"] == found["lied"] == signed["line"] != found["other"]
    assert found["options"] != 0
    assert found["direct"] == "signer.user"
    # Every program of the user may ask it to sign; only an operator's sudo rights end the key.
    assert found["rotation"][0] == "signer.refused"
    assert found["rotation"][1]
    assert found["rotation"][2]
    assert found["kept"]
    assert not found["code"]


def test_where_there_is_no_sudo_the_step_is_impossible(tmp_path: Path) -> None:
    step = signer_step(tmp_path)
    assert step.state is State.IMPOSSIBLE
    assert "sudo" in step.why


@pytest.mark.parametrize("caller", ["", "0", "-1", "1.5", "\u0661", "99999999999", "../x"])
def test_without_sudo_it_serves_nobody(tmp_path: Path, caller: str) -> None:
    import socket

    from safeconduct.attestation.signing.signer_request import receive

    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        os.dup2(theirs.fileno(), 0)
        os._exit(serve_user({"SUDO_UID": caller} if caller else {}, home=tmp_path))
    theirs.close()
    with ours:
        answer = receive(ours)
    os.waitpid(child, 0)
    assert answer is not None
    assert answer.startswith(b"-signer.user") or (os.geteuid() != 0 and caller == "0")
    assert list(tmp_path.iterdir()) == []
