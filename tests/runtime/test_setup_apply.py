"""``safeconduct setup --apply`` on this very machine, of which it changes nothing.

It runs as root at ``/`` in a mount namespace of its own, where ``/etc``, ``/usr/bin`` and
``/usr/local/sbin`` are overlays on a tmpfs, and in a user namespace of its own, where
``user.max_user_namespaces`` is a setting of that namespace and sysctl(8) the real one. What this
machine has not (systemd, AppArmor) is put there as files and as programs that note how they were
called. sudo(8) is taken away: test_setup_signer.py has the step that needs it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SYSCTL = "/etc/sysctl.d/99-zz-safeconduct.conf"
APPARMOR = "/etc/apparmor.d/safeconduct-launcher"
DROP_IN = "/etc/systemd/system/user@.service.d/50-safeconduct.conf"
LOG, LOADED = "/run/commands", "/sys/kernel/security/apparmor/profiles"

# Stands for the programs that this machine may not have; a file /run/broken-NAME makes one fail.
STAND_IN = f"""\
#!/bin/sh
name="${{0##*/}}"
echo "$name $*" >> {LOG}
test ! -e "/run/broken-$name" || {{ echo "broken on purpose" >&2; exit 3; }}
case "$name $1" in
  "apparmor_parser -r") test -f "$2" && echo 'safeconduct-launcher (unconfined)' > {LOADED};;
  "apparmor_parser -R") test -f "$2" && : > {LOADED};;
esac
"""

MACHINE = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)

def check(result):
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def mount(kind, target, flags=0, data=""):
    check(libc.mount(kind.encode(), target.encode(), kind.encode(), flags, data.encode()))

def write(path, text, mode=0o644):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file: file.write(text)
    os.chmod(path, mode)

try:
    check(libc.unshare(0x20000))  # CLONE_NEWNS
    check(libc.mount(b"none", b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
    mount("tmpfs", "/run")
    for name in ("/etc", "/usr/local/sbin", "/usr/bin"):
        upper, work = "/run/overlay/upper" + name, "/run/overlay/work" + name
        os.makedirs(upper), os.makedirs(work)
        mount("overlay", name, 0, f"lowerdir={{name}},upperdir={{upper}},workdir={{work}}")
    for name in ("/proc/sys/kernel", "/sys/fs/cgroup", "/sys/kernel/security"):
        mount("tmpfs", name)
    ours, theirs = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        check(libc.unshare(0x10000000))  # CLONE_NEWUSER
        os.write(ours[1], b"x")
        os.read(theirs[0], 1)
        os.setgid(0), os.setuid(0)
    else:
        os.read(ours[0], 1)
        for kind in ("gid", "uid"):  # all of them, as themselves: as in the first one
            with open(f"/proc/{{child}}/{{kind}}_map", "w") as file: file.write("0 0 4294967295")
        os.write(theirs[1], b"x")
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
except OSError as error:
    print(error)
    sys.exit(77)
with open("/proc/sys/user/max_user_namespaces", "w") as file: file.write("0")
write("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1")
write({LOADED!r}, "")
os.makedirs("/run/systemd/system")
write("/sys/fs/cgroup/cgroup.controllers", "cpu memory pids")
manager = "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/cgroup.controllers"
write(manager, "cpu")
for name in ("apparmor_parser", "systemctl"):
    write("/usr/local/sbin/" + name, {STAND_IN!r}, 0o755)
if os.path.lexists("/usr/bin/sudo"):
    os.unlink("/usr/bin/sudo")
os.chdir("/")
exec(sys.argv[1])
"""

# What the code of each test begins with.
TOOLS = f"""
import json, os, subprocess, sys
FILES = [{SYSCTL!r}, {APPARMOR!r}, {DROP_IN!r}]

def setup(*options):
    done = subprocess.run([sys.executable, "-m", "safeconduct", "setup", *options],
                          capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr

def apply(*options):
    code, out, err = setup("--json", *options)
    return json.loads(out)["changed"] if code == 0 else err

def look():
    return {{name: [open(name).read(), oct(os.stat(name).st_mode), os.stat(name).st_uid,
                   os.stat(name).st_mtime_ns] for name in FILES if os.path.lexists(name)}}

def tree():
    return sorted(os.path.join(folder, name) for top in ("/etc", "/usr/local/sbin")
                  for folder, _, names in os.walk(top) for name in names)

def states():
    return {{step["name"]: step["state"] for step in json.loads(setup("--json")[1])["steps"]}}

def namespaces():
    return open("/proc/sys/user/max_user_namespaces").read().strip()

def commands():
    try:
        return open({LOG!r}).read().splitlines()
    except FileNotFoundError:
        return []

def answer(value):
    print(json.dumps(value))
"""


@dataclass(frozen=True)
class Facts:
    """What of the real machine must stay as it is."""

    namespaces: str
    files: tuple[str, ...]

    @classmethod
    def now(cls) -> Facts:
        names = sorted(
            f"{path} {path.lstat().st_mtime_ns}"
            for folder in ("/etc/sysctl.d", "/etc/apparmor.d", "/etc/systemd", "/usr/local/sbin")
            for path in (Path(folder), *Path(folder).rglob("*"))
            if os.path.lexists(path)
        )
        text = Path("/proc/sys/user/max_user_namespaces").read_text()
        return cls(namespaces=text, files=tuple(names))


def on_machine(code: str) -> Any:  # noqa: ANN401 - a parse boundary
    """Run code where setup may change everything, and return its answer."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if shutil.which("sysctl", path="/usr/sbin:/sbin") is None:
        pytest.skip("needs sysctl(8)")
    before = Facts.now()
    done = subprocess.run(
        [sys.executable, "-c", MACHINE, TOOLS + code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={name: text for name, text in os.environ.items() if name != "SAFECONDUCT_SANDBOX"},
    )
    if done.returncode == 77:
        pytest.skip(f"needs mount and user namespaces with overlays: {done.stdout.strip()}")
    assert Facts.now() == before
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_is_shown_done_kept_and_taken_back() -> None:
    found = on_machine("""
start = tree()
shown = setup()
untouched = tree() == start and namespaces() == "0" and not commands()
first, after, mid = apply("--apply"), look(), states()
value, done = namespaces(), commands()
second, same = apply("--apply"), look() == after and commands() == done
undone = apply("--undo")
answer({
    "shown": shown[1], "untouched": untouched, "first": first, "after": after, "states": mid,
    "value": value, "done": done, "second": second, "same": same, "undone": undone,
    "commands": commands()[len(done):], "left": tree() == start, "end": namespaces(),
    "again": apply("--undo"),
})
""")
    assert found["untouched"]
    assert found["first"] == [
        f"wrote {SYSCTL}", f"ran sysctl -p {SYSCTL}",
        f"wrote {APPARMOR}", f"ran apparmor_parser -r {APPARMOR}",
        f"wrote {DROP_IN}", "ran systemctl daemon-reload",
    ]  # fmt: skip
    assert found["value"] == "15000"
    assert found["done"] == [f"apparmor_parser -r {APPARMOR}", "systemctl daemon-reload"]
    assert found["states"] == {
        "user namespaces": "done", "AppArmor profile": "done", "cgroup delegation": "done",
        "signer user": "impossible",
    }  # fmt: skip
    for name, (text, mode, owner, _) in found["after"].items():
        assert (mode, owner) == ("0o100644", 0), name
        # What was shown beforehand is what was written.
        for line in text.splitlines():
            assert f"    {line}".rstrip() in found["shown"], name
    assert "user.max_user_namespaces = 15000\n" in found["after"][SYSCTL][0]
    assert "  userns,\n" in found["after"][APPARMOR][0]
    assert "\nDelegate=cpu cpuset io memory pids\n" in found["after"][DROP_IN][0]
    assert (found["second"], found["same"]) == ([], True)
    assert found["undone"] == [
        f"removed {SYSCTL}", "ran sysctl -w user.max_user_namespaces=0",
        f"ran apparmor_parser -R {APPARMOR}", f"removed {APPARMOR}",
        f"removed {DROP_IN}", "ran systemctl daemon-reload",
    ]  # fmt: skip
    assert (found["end"], found["left"], found["again"]) == ("0", True, [])


def test_a_command_that_fails_leaves_its_step_undone_and_tells_what_was_done() -> None:
    found = on_machine("""
open("/run/broken-apparmor_parser", "w").close()
code, _, told = setup("--apply")
files, mid = look(), states()
os.unlink("/run/broken-apparmor_parser")
answer({"code": code, "told": told, "files": list(files), "states": mid, "rest": apply("--apply")})
""")
    assert found["code"] == 125
    assert "[setup.command]" in found["told"]
    assert "broken on purpose" in found["told"]
    assert f"done before that: wrote {SYSCTL}" in found["told"]
    assert found["files"] == [SYSCTL]
    assert (found["states"]["user namespaces"], found["states"]["AppArmor profile"]) == (
        "done", "needed",
    )  # fmt: skip
    assert [line.split()[0] for line in found["rest"]] == ["wrote", "ran"] * 2


def test_a_profile_that_is_written_but_not_loaded_is_loaded() -> None:
    found = on_machine(f"""
apply("--apply")
open({LOADED!r}, "w").close()  # as after a stop of AppArmor
mid, again = states()["AppArmor profile"], apply("--apply")
open({LOADED!r}, "w").close()
open("/run/broken-apparmor_parser", "w").close()  # it does fail for what is not loaded
answer({{"state": mid, "again": again, "undone": apply("--undo"), "left": list(look())}})
""")
    assert found["state"] == "needed"
    assert found["again"][1] == f"ran apparmor_parser -r {APPARMOR}"
    assert f"removed {APPARMOR}" in found["undone"]
    assert found["left"] == []


def test_what_is_not_there_is_said() -> None:
    found = on_machine("""
os.unlink("/usr/local/sbin/apparmor_parser")
code, _, told = setup("--apply")
answer({"code": code, "told": told, "files": list(look())})
""")
    if "no such program" not in found["told"]:
        pytest.skip("this machine has apparmor_parser")
    assert (found["code"], found["files"]) == (125, [SYSCTL])
