"""``safeconduct doctor``: its shape, the trials against the real kernel, and each cause by name."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safeconduct.call import Tier
from safeconduct.errors import Exit, SandboxUnavailable
from safeconduct.runtime.sandbox import causes, delegation, executable
from safeconduct.runtime.sandbox.facts import Facts, Surroundings, Trial, collect
from safeconduct.runtime.sandbox.machine import OWN_ID_COUNT, OWN_ID_FIRST, Machine, maps_own_ids

NAMES = {
    "kernel", "python", "surroundings", "launcher", "user namespaces", "mount namespaces",
    "pid namespaces", "net namespaces", "ipc namespaces", "uts namespaces", "cgroup namespaces",
    "time namespaces", "tmpfs", "fresh /proc", "overlayfs", "separate user ids", "id-mapped mounts",
    "landlock", "seccomp", "cgroups", "tier full", "tier landlock", "wasm engine", "signer",
    "state folder", "temporary folder",
}  # fmt: skip
INVALID = Trial(step="unshare", errno=errno.EINVAL)
# A machine on which everything works, for an ordinary user.
GOOD = Facts(
    root=False,
    capabilities=frozenset(),
    trials={
        **dict.fromkeys(
            ("user", "root", "tmpfs", "proc", "overlay", "landlock", "seccomp"), Trial()
        ),
        **dict.fromkeys(("mount", "pid", "net", "ipc", "uts", "cgroup", "time"), Trial()),
        "unfiltered unshare": INVALID,
        "unfiltered clone": Trial(step="clone", errno=errno.EINVAL),
    },
    landlock_abi=7,
)


def failing(facts: Facts, step: str, number: int, *names: str) -> Facts:
    bad = Trial(step=step, errno=number)
    return replace(facts, trials={**facts.trials, **dict.fromkeys(names, bad)})


@pytest.fixture
def doctor(tmp_path: Path) -> Any:  # noqa: ANN401 - a parse boundary
    return _doctor(tmp_path)


def _doctor(state: Path) -> Any:  # noqa: ANN401 - a parse boundary
    done = subprocess.run(
        [sys.executable, "-m", "safeconduct", "doctor", "--json"],
        capture_output=True, timeout=60, check=False, cwd=state,
        env={**os.environ, "XDG_STATE_HOME": str(state)},
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert done.returncode == (Exit.OK if report["tier"] else Exit.FAILURE)
    assert report["summary"] in done.stderr.decode().splitlines()[0]
    return report


def test_the_shape_is_stable(doctor: Any) -> None:  # noqa: ANN401
    assert list(doctor) == ["version", "tier", "summary", "next", "layers"]
    assert doctor["version"] == 1
    assert {layer["name"] for layer in doctor["layers"]} == NAMES
    for layer in doctor["layers"]:
        assert list(layer) == ["name", "available", "used", "note", "get"]
        assert layer["available"] or (layer["get"] and not layer["used"]), layer
        assert layer["note"]


def test_what_is_used_is_what_a_run_says(doctor: Any, machine: Machine) -> None:  # noqa: ANN401
    layers = {layer["name"]: layer for layer in doctor["layers"]}
    for tier in Tier:
        assert layers[f"tier {tier}"]["available"] == (not machine.tiers[tier])
    used = [str(tier) for tier in Tier if layers[f"tier {tier}"]["used"]]
    assert used == ([doctor["tier"]] if doctor["tier"] else [])
    full = doctor["tier"] == "full"
    for kind in ("user", "mount", "pid", "net", "ipc", "uts", "cgroup"):
        assert layers[f"{kind} namespaces"]["used"] == full
    assert layers["cgroups"]["available"] == (machine.cgroups is not None)


def test_the_trials_agree_with_the_kernel() -> None:
    facts = collect()
    assert facts.trials, "the trials did not run"
    assert not facts.filtered or facts.around.seccomp_filter
    for kind in ("mount", "pid", "net", "ipc", "uts"):
        argv = ["unshare", f"--{kind}", *([] if os.geteuid() == 0 else ["--map-root-user"])]
        done = subprocess.run([*argv, "true"], capture_output=True, check=False)
        assert facts.trial(kind).ok == (done.returncode == 0), kind
    leftover = subprocess.run(["mount"], capture_output=True, text=True, check=True).stdout
    assert "lowerdir=lower" not in leftover


def test_a_trial_that_cannot_run_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    facts = collect()
    assert not facts.trial("user").ok
    assert not facts.filtered
    for cause in (causes.user_namespaces(facts), causes.landlock(facts), causes.seccomp(facts)):
        assert cause is not None
        assert cause.get


def test_where_all_works_there_is_no_cause() -> None:
    found = [causes.user_namespaces(GOOD), causes.landlock(GOOD), causes.seccomp(GOOD)]
    found += [causes.namespace(GOOD, kind) for kind in ("mount", "pid", "time")]
    found += [causes.mounts(GOOD, name) for name in ("tmpfs", "proc", "overlay")]
    assert found == [None] * len(found)


REFUSED = failing(GOOD, "unshare", errno.EPERM, "user", "mount")
KNOB = "kernel.apparmor_restrict_unprivileged_userns"
USER_NAMESPACES = {
    "max_user_namespaces": (
        replace(failing(GOOD, "unshare", errno.ENOSPC, "user"),
                knobs={"user.max_user_namespaces": "0"}),
        "user.max_user_namespaces = 0", "safeconduct setup",
    ),
    "used up": (failing(GOOD, "unshare", errno.ENOSPC, "user"), "used up", "sysctl -w"),
    "too deep": (failing(GOOD, "unshare", errno.EUSERS, "user"), "32", "outside"),
    "unprivileged_userns_clone": (
        replace(REFUSED, knobs={"kernel.unprivileged_userns_clone": "0"}),
        "kernel.unprivileged_userns_clone = 0", "safeconduct setup",
    ),
    "unprivileged_userns_clone, which the kernel asks before anything": (
        replace(failing(REFUSED, "unshare", errno.EPERM, "unfiltered unshare"),
                knobs={"kernel.unprivileged_userns_clone": "0"}),
        "kernel.unprivileged_userns_clone = 0", "safeconduct setup",
    ),
    "apparmor, Ubuntu": (
        replace(failing(GOOD, "use capability", errno.EPERM, "user"), knobs={KNOB: "1"}),
        f"{KNOB} = 1", "safeconduct setup",
    ),
    "apparmor, no profile of its own": (
        replace(failing(GOOD, "unshare", errno.EACCES, "user"), knobs={KNOB: "1"}),
        f"{KNOB} = 1", "safeconduct setup",
    ),
    "apparmor, a container's": (
        replace(REFUSED, around=Surroundings(apparmor="docker-default (enforce)")),
        "docker-default", "apparmor=unconfined",
    ),
    "selinux": (
        replace(failing(GOOD, "unshare", errno.EACCES, "user"),
                security_modules=("landlock", "selinux")),
        "SELinux", "ausearch",
    ),
    "a container's filter": (
        replace(failing(REFUSED, "unshare", errno.EPERM, "unfiltered unshare"),
                around=Surroundings(seccomp_filter=True, container="docker"),
                knobs={KNOB: "1", "user.max_user_namespaces": "0"}),
        "seccomp filter of the docker", "seccomp=",
    ),
    "a sandbox of ours": (
        replace(failing(REFUSED, "unshare", errno.ENOSYS, "user", "unfiltered unshare"),
                around=Surroundings(ours=True)),
        "safeconduct sandbox", "outside",
    ),
    "not in this kernel": (
        failing(GOOD, "unshare", errno.EINVAL, "user"), "built without", "CONFIG_USER_NS",
    ),
    "unknown": (REFUSED, "unshare: EPERM", "outside"),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "note", "get"), USER_NAMESPACES.values(), ids=USER_NAMESPACES)
def test_each_refusal_of_user_namespaces_has_its_name(facts: Facts, note: str, get: str) -> None:
    cause = causes.user_namespaces(facts)
    assert cause is not None
    assert note in cause.note
    assert get in cause.get


def test_root_of_a_container_is_told_what_it_lacks() -> None:
    facts = replace(REFUSED, root=True, around=Surroundings(container="podman"))
    user = causes.user_namespaces(facts)
    assert user is not None
    assert "root without CAP_SYS_ADMIN (podman)" in causes.without_admin(facts, user).note
    unmapped = causes.user_namespaces(replace(failing(facts, "map ids", errno.EPERM, "user")))
    assert unmapped is not None
    assert "CAP_SETFCAP" in unmapped.get


def test_a_masked_proc_is_named_with_what_masks_it() -> None:
    facts = failing(GOOD, "mount proc", errno.EPERM, "proc")
    cause = causes.mounts(replace(facts, around=Surroundings(proc_masked=("/proc/kcore",))), "proc")
    assert cause is not None
    assert "/proc/kcore" in cause.note
    assert "systempaths=unconfined" in cause.get


@pytest.mark.parametrize(
    ("answer", "note", "get"),
    [
        (-errno.ENOSYS, "not in this kernel", "CONFIG_SECURITY_LANDLOCK"),
        (-errno.EOPNOTSUPP, "not switched on (lsm=yama,apparmor)", "lsm=landlock,yama,apparmor"),
    ],
)
def test_landlock_missing_and_switched_off_differ(answer: int, note: str, get: str) -> None:
    facts = failing(GOOD, "create ruleset", -answer, "landlock")
    cause = causes.landlock(
        replace(facts, landlock_abi=answer, security_modules=("yama", "apparmor"))
    )
    assert cause is not None
    assert "Landlock" in cause.note  # a tier's row shows it without the name of the layer
    assert note in cause.note
    assert get in cause.get


def test_each_landlock_abi_says_what_it_lacks() -> None:
    assert causes.landlock_lacks(7) == ""
    assert "scopes of signals" in causes.landlock_lacks(5)
    assert "scopes of signals" not in causes.landlock_lacks(6)
    assert causes.landlock_lacks(1).count("ABI") == 6


V1 = "30 25 0:26 / /sys/fs/cgroup/{0} {1} - cgroup cgroup rw,{0}\n"
V2 = "30 25 0:26 / /sys/fs/cgroup {0} - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("mounts", "uid", "files", "note", "get"),
    [
        ("", 1000, {}, "no cgroup file system", "mount -t cgroup2"),
        (V1.format("memory", "rw") + V1.format("pids", "rw"), 1000, {}, "only root", "as root"),
        (V1.format("memory", "ro") + V1.format("pids", "ro"), 0, {}, "read-only", "writable"),
        (V2.format("ro"), 1000, {}, "read-only", "writable cgroup"),
        (V2.format("rw"), 1000, {"sys/fs/cgroup/cgroup.controllers": "cpu pids"},
         "without the controller memory", "cgroup_enable=memory"),
        (V2.format("rw"), 1000, {}, "not its own", "chown"),
        (V2.format("rw"), 0, {"run/systemd/system/x": ""}, "systemd",
         "systemd-run --scope -p Delegate=yes -- COMMAND"),
        (V2.format("rw"), 1000, {"run/systemd/system/x": ""}, "no systemd user manager",
         "enable-linger"),
        (V2.format("rw"), 1000, {"run/systemd/system/x": "", "run/user/1000/systemd/x": ""},
         "delegated nothing", "systemd-run --user --scope -p Delegate=yes -- COMMAND"),
        (V2.format("rw"), 1000, {
            "run/systemd/system/x": "", "run/user/1000/systemd/x": "",
            "sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/cgroup.controllers": "pids",
         }, "no memory", "safeconduct setup"),
    ],
)  # fmt: skip
def test_a_missing_cgroup_names_the_exact_command(
    tmp_path: Path, mounts: str, uid: int, files: dict[str, str], note: str, get: str
) -> None:
    given = {"proc/self/mountinfo": mounts, "sys/fs/cgroup/cgroup.controllers": "memory pids"}
    for name, text in {**given, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    cause = delegation.why_none(root=tmp_path, uid=uid)
    assert note in cause.note
    assert get in cause.get


def test_a_launcher_that_cannot_start_says_why(tmp_path: Path) -> None:
    assert executable.trouble(executable.launcher_path()) is None
    copy = tmp_path / "launcher"
    gone = executable.unavailable(copy)
    assert (gone.missing, "missing" in gone.message, "make setup" in gone.hint) == (
        "launcher", True, True,
    )  # fmt: skip
    copy.write_bytes(executable.launcher_path().read_bytes())
    copy.chmod(0o644)
    assert "chmod 755" in executable.unavailable(copy).hint
    copy.chmod(0o755)
    assert executable.trouble(copy) is None
    copy.write_bytes(b"#!/bin/sh\n")
    assert "not a program for this machine" in executable.unavailable(copy).message


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_a_noexec_mount_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:
        code = f"""
import shutil, subprocess, sys
from pathlib import Path
from safeconduct.runtime.sandbox import executable
copy = shutil.copy(executable.launcher_path(), {folder!r} + "/launcher")
assert executable.trouble(Path(copy)) is None
subprocess.run(["mount", "--bind", {folder!r}, {folder!r}], check=True)
subprocess.run(["mount", "-o", "remount,bind,noexec", {folder!r}], check=True)
print(executable.trouble(Path(copy)).note)
"""
        argv = ["unshare", "--mount", sys.executable, "-c", code]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
        assert "noexec" in done.stdout


def test_ids_count_only_where_all_are_mapped() -> None:
    whole = f"{OWN_ID_FIRST} {OWN_ID_FIRST} {OWN_ID_COUNT}"
    assert maps_own_ids("0 0 4294967295")
    assert maps_own_ids(f"0 100000 65536\n{whole}")
    for text in ("0 1000 1", "0 100000 65536", f"{OWN_ID_FIRST} 5 {OWN_ID_COUNT - 1}"):
        assert not maps_own_ids(text)


def test_a_machine_without_tiers_says_each_reason_once() -> None:
    machine = Machine(
        tiers=dict.fromkeys(Tier, "No seccomp."), landlock_abi=7, cgroups=None, root=False
    )
    with pytest.raises(SandboxUnavailable) as caught:
        machine.choose(None)
    assert caught.value.message.count("No seccomp.") == 1
    assert "safeconduct doctor" in caught.value.hint
