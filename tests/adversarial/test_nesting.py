"""Safeconduct where something is around it already: what is left is used and said, never less.

Everything around is real: bubblewrap, a user namespace that allows no further one, a seccomp filter
like a container runtime's, root without its capabilities, and a sandbox of ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import safeconduct
from safeconduct.errors import Exit
from safeconduct.runtime.sandbox.scratch import remove_tree

ROOT = os.geteuid() == 0
SECONDS = 120
# An ordinary user: as root we become one that owns nothing.
USER = 4242 if ROOT else os.geteuid()
POLICY = """\
version: 1
workspace: {workspace}
profiles:
  base: {{read: ["$WS/**", {shown}], write: ["$WS/**"],
         limits: {{wall: 60s, pids: 128, memory: 1GiB}}}}
tools: {{shell.run: {{allow: any}}}}
"""
# Makes what is around and then becomes the command: MODE… -- COMMAND.
SURROUND = r"""
import ctypes, errno, os, sys
cut = sys.argv.index("--")
modes, command = sys.argv[1:cut], sys.argv[cut + 1:]
if "no-user-namespaces" in modes:
    uid, gid = os.geteuid(), os.getegid()
    assert ctypes.CDLL(None).unshare(0x10000000) == 0
    open("/proc/self/setgroups", "w").write("deny")
    open("/proc/self/uid_map", "w").write(f"{uid} {uid} 1")
    open("/proc/self/gid_map", "w").write(f"{gid} {gid} 1")
    open("/proc/sys/user/max_user_namespaces", "w").write("0")
if "container-filter" in modes or "no-landlock" in modes:
    import pyseccomp as s
    program = s.SyscallFilter(defaction=s.ALLOW)
    # What the default profiles of container runtimes refuse without CAP_SYS_ADMIN.
    names = "unshare setns mount umount2 pivot_root open_tree move_mount fsopen fsconfig fsmount \
mount_setattr bpf perf_event_open keyctl add_key request_key userfaultfd kcmp"
    if "no-landlock" in modes:
        names += " landlock_create_ruleset landlock_add_rule landlock_restrict_self"
    for name in names.split():
        program.add_rule(s.ERRNO(errno.EPERM), name)
    for bit in (0x80, *(1 << n for n in (17, 25, 26, 27, 28, 29, 30))):
        program.add_rule(s.ERRNO(errno.EPERM), "clone", s.Arg(0, s.MASKED_EQ, bit, bit))
    program.add_rule(s.ERRNO(errno.ENOSYS), "clone3")
    program.load()
os.execv(command[0], command)
"""
# Reads what no profile grants and signals what is not its own.
ATTACK = """
import os, sys
for path in sys.argv[1:]:
    try: print("ESCAPED" if open(path).read() else "")
    except OSError as error: print(error.strerror)
try: os.kill(os.getppid(), 0) if os.getppid() > 1 else None
except OSError as error: print(error.strerror)
print("ran")
"""


@dataclass(frozen=True)
class Host:
    """An ordinary user's machine: an interpreter that has the package, a workspace, a secret."""

    root: Path
    python: Path
    code: Path

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    @property
    def secret(self) -> Path:
        return self.root / "secret"

    @property
    def policy(self) -> Path:
        return self.root / "policy.yaml"

    def spawn(
        self, argv: Sequence[str | Path], *, root: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run something as the ordinary user, or as root."""
        given: dict[str, Any] = {}
        if ROOT and not root:
            given = {"user": USER, "group": USER, "extra_groups": []}
        return subprocess.run(
            list(argv), capture_output=True, text=True, timeout=SECONDS, cwd=self.workspace,
            env={"HOME": str(self.root / "home"), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
            check=False, **given,
        )  # fmt: skip

    def command(self, *words: str | Path) -> list[str]:
        return [str(self.python), "-m", "safeconduct", *(str(word) for word in words)]

    def around(self, *modes: str) -> list[str]:
        return [str(self.python), "-c", SURROUND, *modes, "--"]


@pytest.fixture(scope="session")
def python() -> Iterator[Path]:
    """An interpreter with this package that every user may run."""
    folder = Path(tempfile.mkdtemp(prefix="installed-", dir="/var/tmp"))
    folder.chmod(0o755)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [Path(os.path.realpath(sys.executable)), Path("/usr/bin") / version]
    packages = [Path(safeconduct.__file__).parents[1]]
    packages += installed()
    usable = [path for path in candidates if _for_everybody(path)]
    if not usable or not all(_for_everybody(path) for path in packages):
        shutil.rmtree(folder)
        pytest.skip("needs an interpreter and packages that other users may read")
    subprocess.run([usable[0], "-m", "venv", "--without-pip", folder], check=True, timeout=SECONDS)
    paths = "".join(f"{path}\n" for path in packages)
    (folder / "lib" / version / "site-packages" / "packages.pth").write_text(paths)
    yield folder / "bin" / "python"
    shutil.rmtree(folder)


def installed() -> list[Path]:
    """Return the folders of packages that this interpreter has."""
    return [Path(path) for path in sys.path if path.endswith("site-packages")]


def _for_everybody(path: Path) -> bool:
    return path.exists() and all(one.stat().st_mode & 0o005 for one in (path, *path.parents))


@pytest.fixture
def host(python: Path) -> Iterator[Host]:
    root = Path(os.path.realpath(tempfile.mkdtemp(prefix="host-", dir="/var/tmp")))
    root.chmod(0o755)
    code = Path(safeconduct.__file__).parents[2]
    made = Host(root, python, code)
    for folder in (made.workspace, root / "home"):
        folder.mkdir(mode=0o755)
        if ROOT:
            os.chown(folder, USER, USER)
    made.secret.write_text("SECRET")
    shown = ", ".join(f'"{path}/**"' for path in (python.parents[1], code, *installed()))
    made.policy.write_text(POLICY.format(workspace=made.workspace, shown=shown))
    yield made
    remove_tree(str(root))


def bwrap(*options: str) -> list[str]:
    return ["bwrap", *options, "--"]


WHOLE = ("--dev-bind", "/", "/")
MASKED = ("--proc", "/proc", "--ro-bind", "/dev/null", "/proc/kmsg")
# What is around, the tier that remains (None: nothing may run), the row of `doctor` that names
# the cause, and a word of it.
SURROUNDINGS: dict[str, tuple[list[str], str | None, str, str]] = {
    "nothing": ([], "full", "tier full", ""),
    "bubblewrap": (bwrap(*WHOLE), "full", "tier full", ""),
    "bubblewrap-user-namespace": (bwrap("--unshare-user", *WHOLE), "full", "tier full", ""),
    "bubblewrap-everything": (
        bwrap("--unshare-all", *WHOLE, "--proc", "/proc"), "full", "tier full", "",
    ),
    "bubblewrap-masked-proc": (
        bwrap("--unshare-all", *WHOLE, *MASKED), "landlock", "tier full", "/proc is masked",
    ),
    "bubblewrap-no-user-namespaces": (
        bwrap("--unshare-user", "--disable-userns", *WHOLE), "landlock", "user namespaces",
        "used up",
    ),
    "no-user-namespaces": (["no-user-namespaces"], "landlock", "user namespaces", "= 0"),
    "container-filter": (["container-filter"], "landlock", "user namespaces", "seccomp filter"),
    "container": (
        ["no-user-namespaces", "container-filter"], "landlock", "tier full", "seccomp filter",
    ),
    "container-without-landlock": (
        ["container-filter", "no-landlock"], None, "landlock", "seccomp filter",
    ),
}  # fmt: skip


@pytest.fixture(params=SURROUNDINGS, ids=str)
def surrounded(
    request: pytest.FixtureRequest, host: Host
) -> tuple[list[str], str | None, str, str]:
    """What is around, skipped by name where this machine cannot make it."""
    argv, tier, row, word = SURROUNDINGS[request.param]
    if argv and argv[0] != "bwrap":
        argv = host.around(*argv)
    if argv and host.spawn([*argv, "/bin/true"]).returncode != 0:
        pytest.skip(f"this machine cannot make the surroundings {request.param}")
    plain = json.loads(host.spawn(host.command("doctor", "--json")).stdout)
    if plain["tier"] != "full" and tier == "full":
        pytest.skip("needs tier full for an ordinary user")
    if tier == "landlock" and not _row(plain, "tier landlock")["available"]:
        pytest.skip("needs tier landlock for an ordinary user")
    return argv, tier, row, word


def _row(report: Any, name: str) -> Any:  # noqa: ANN401 - a parse boundary
    return next(layer for layer in report["layers"] if layer["name"] == name)


def test_what_is_left_is_used_and_said(
    host: Host, surrounded: tuple[list[str], str | None, str, str]
) -> None:
    argv, tier, row, word = surrounded
    doctor = host.spawn([*argv, *host.command("doctor", "--json")])
    report = json.loads(doctor.stdout)
    assert report["tier"] == tier
    assert doctor.returncode == (Exit.OK if tier else Exit.FAILURE)
    assert word in _row(report, row)["note"], _row(report, row)
    assert all(layer["available"] or layer["get"] for layer in report["layers"])
    if tier != "full":
        assert report["next"]

    attack = ["/usr/bin/python3", "-c", ATTACK, str(host.secret)]
    assert "ESCAPED" in host.spawn([*argv, *attack]).stdout
    outcome = host.workspace / "outcome"
    ran = host.spawn(
        [*argv, *host.command("exec", "-p", host.policy, "--outcome", outcome, "--"), *attack]
    )
    told = json.loads(outcome.read_text())
    assert "ESCAPED" not in ran.stdout
    if tier is None:
        assert (ran.returncode, told["error"]["code"]) == (Exit.FAILURE, "sandbox.unavailable")
        assert ran.stdout == ""
    else:
        assert (ran.returncode, "ran" in ran.stdout) == (Exit.OK, True), ran.stderr
        assert told["confinement"]["tier"] == tier


LESS = [name for name, (_, tier, _, _) in SURROUNDINGS.items() if tier != "full"]


@pytest.mark.parametrize("surrounded", LESS, indirect=True)
def test_a_policy_that_needs_more_refuses(
    host: Host, surrounded: tuple[list[str], str | None, str, str]
) -> None:
    argv = surrounded[0]
    host.policy.write_text(host.policy.read_text() + "require: {tier: full}\n")
    ran = host.spawn([*argv, *host.command("exec", "-p", host.policy, "--", "echo", "ran")])
    assert (ran.returncode, ran.stdout) == (Exit.FAILURE, "")
    assert "[sandbox.unavailable]" in ran.stderr
    assert "safeconduct doctor" in ran.stderr


AS_ROOT = {
    "root-of-a-user-namespace": ["unshare", "--user", "--map-root-user", "--mount", "--"],
    "root-without-capabilities": bwrap("--unshare-user", "--uid", "0", "--gid", "0", *WHOLE),
}


@pytest.mark.parametrize("around", AS_ROOT.values(), ids=AS_ROOT.keys())
def test_root_of_a_namespace_is_confined_or_refused(host: Host, around: list[str]) -> None:
    if host.spawn([*around, "/bin/true"]).returncode != 0:
        pytest.skip("this machine cannot make the surroundings")
    _confined_or_refused(host, around, root=False)


@pytest.mark.skipif(not ROOT, reason="needs root to take capabilities from")
@pytest.mark.parametrize("taken", ["-sys_admin", "-all"])
def test_root_without_capabilities_is_confined_or_refused(host: Host, taken: str) -> None:
    around = ["setpriv", "--inh-caps", taken, "--bounding-set", taken, "--"]
    os.chown(host.workspace, 0, 0)
    os.chown(host.root / "home", 0, 0)
    report = _confined_or_refused(host, around, root=True)
    assert "root without CAP_SYS_ADMIN" in _row(report, "surroundings")["note"]
    assert report["tier"] != "full"


def _confined_or_refused(host: Host, around: Sequence[str], *, root: bool) -> Any:  # noqa: ANN401
    """Check that a call runs in the tier that `doctor` names, or is refused with a code."""
    report = json.loads(host.spawn([*around, *host.command("doctor", "--json")], root=root).stdout)
    attack = ["/usr/bin/python3", "-c", ATTACK, str(host.secret)]
    assert "ESCAPED" in host.spawn([*around, *attack], root=root).stdout
    outcome = host.workspace / "outcome"
    argv = host.command("exec", "-p", host.policy, "--outcome", outcome, "--")
    ran = host.spawn([*around, *argv, *attack], root=root)
    told = json.loads(outcome.read_text())
    assert "ESCAPED" not in ran.stdout
    if report["tier"] is None:
        assert (ran.returncode, told["error"]["code"]) == (Exit.FAILURE, "sandbox.unavailable")
    else:
        assert (ran.returncode, "ran" in ran.stdout) == (Exit.OK, True), ran.stderr
        assert told["confinement"]["tier"] == report["tier"]
    return report


@pytest.fixture(params=["full", "landlock"])
def inside(request: pytest.FixtureRequest, host: Host) -> list[str]:
    """A sandbox of ours that shows the package, so that safeconduct runs in it."""
    tier = str(request.param)
    report = json.loads(host.spawn(host.command("doctor", "--json")).stdout)
    if not _row(report, f"tier {tier}")["available"]:
        pytest.skip(f"needs tier {tier} for an ordinary user")
    return host.command("exec", "-p", host.policy, "--tier", tier, "--")


def test_inside_itself_what_is_left_is_said(host: Host, inside: list[str]) -> None:
    doctor = host.spawn([*inside, *host.command("doctor", "--json")])
    report = json.loads(doctor.stdout)
    assert "a safeconduct sandbox" in _row(report, "surroundings")["note"]
    for name in ("user namespaces", "seccomp", "tier full", "tier landlock"):
        assert "safeconduct sandbox around" in _row(report, name)["note"]
    # Without a seccomp filter of its own a call inside would be less confined than it says.
    assert (doctor.returncode, report["tier"]) == (Exit.FAILURE, None)
    (host.workspace / "inner.yaml").write_text("version: 1\ntools: {shell.run: {allow: any}}\n")
    state = ["/usr/bin/env", f"XDG_STATE_HOME={host.workspace.parent}/none"]
    inner = host.command("exec", "-p", "inner.yaml", "-w", "/usr", "--", "echo", "ran")
    for environment in ([], state):
        ran = host.spawn([*inside, *environment, *inner])
        assert (ran.returncode, ran.stdout) == (Exit.FAILURE, "")
        assert "Traceback" not in ran.stderr
    # In tier landlock the mounts are out of sight as well, and that is looked at first.
    said = host.spawn([*inside, *inner]).stderr
    assert "[sandbox.unavailable]" in said or "[mounts.unknown]" in said


def test_verbs_for_people_refuse_inside(host: Host, inside: list[str]) -> None:
    call = host.workspace / "call.json"
    call.write_text('{"tool": "shell.run", "arguments": {"argv": ["true"]}}')
    for words in (
        ("trust",), ("init",), ("setup",), ("setup", "--apply"), ("policy", "explain", str(call)),
        ("keys", "new", "x.key", "--name", "example.org/x"),
    ):  # fmt: skip
        refused = host.spawn([*inside, *host.command(*words)])
        assert (refused.returncode, "[sandbox.inside]" in refused.stderr) == (Exit.DENIED, True)
        # The variable is the program's to change; in tier full a file says it as well.
        if "full" in inside:
            cleared = ["/usr/bin/env", "-i", "LANG=C.UTF-8", *host.command(*words)]
            assert host.spawn([*inside, *cleared]).returncode == Exit.DENIED


def test_a_launcher_or_state_folder_that_is_missing_is_named(host: Host) -> None:
    hide = bwrap(*WHOLE, "--tmpfs", str(Path(safeconduct.__file__).parents[2] / "runtime" / "bin"))
    if host.spawn([*hide, "/bin/true"]).returncode != 0:
        pytest.skip("this machine cannot make the surroundings")
    argv = host.command("exec", "-p", host.policy, "--", "true")
    ran = host.spawn([*hide, *argv])
    assert (ran.returncode, "launcher" in ran.stderr) == (Exit.FAILURE, True)
    assert "make setup" in ran.stderr
    report = json.loads(host.spawn([*hide, *host.command("doctor", "--json")]).stdout)
    assert (report["tier"], _row(report, "launcher")["available"]) == (None, False)
    assert "missing" in report["next"]
    closed = bwrap(*WHOLE, "--ro-bind", str(host.root / "home"), str(host.root / "home"))
    ran = host.spawn([*closed, *argv])
    assert (ran.returncode, "Traceback" in ran.stderr) == (Exit.FAILURE, False)
    assert str(host.root / "home") in ran.stderr
    report = json.loads(host.spawn([*closed, *host.command("doctor", "--json")]).stdout)
    assert "XDG_STATE_HOME" in _row(report, "state folder")["get"]
