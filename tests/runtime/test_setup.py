"""``safeconduct setup`` on folders that look like a machine: what it needs, does and takes back."""

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

from safeconduct.errors import Error, Exit
from safeconduct.runtime.cli.setup_apply import perform, take_back
from safeconduct.runtime.cli.setup_steps import MARK, State, Step, steps

LAUNCHER = Path("/opt/safeconduct/bin/safeconduct-launcher")
KNOBS = {
    "user.max_user_namespaces": "96000",
    "kernel.unprivileged_userns_clone": "1",
    "kernel.apparmor_restrict_unprivileged_userns": "0",
}


@dataclass(frozen=True)
class Scratch:
    """A folder in the place of a machine's root."""

    root: Path

    def write(self, file: str, text: str) -> Path:
        path = self.root / file.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def knob(self, name: str, value: str) -> None:
        self.write("/proc/sys/" + name.replace(".", "/"), value + "\n")

    def files(self) -> dict[str, str]:
        """Return every file below /etc."""
        found = (self.root / "etc").rglob("*")
        return {
            str(path.relative_to(self.root)): path.read_text() for path in found if path.is_file()
        }

    def steps(self) -> dict[str, Step]:
        return {step.name: step for step in steps(self.root, LAUNCHER)}

    def run(self, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "safeconduct", "setup", "--root", str(self.root), *options]
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        environment = {**kept, "LANG": "C.UTF-8", **variables}
        return subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=60)

    def json(self, *options: str) -> Any:  # noqa: ANN401 - a parse boundary
        done = self.run("--json", *options)
        assert done.returncode == Exit.OK, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    """A machine with systemd and cgroup v2 on which nothing is missing."""
    made = Scratch(tmp_path)
    for name, value in KNOBS.items():
        made.knob(name, value)
    made.write("/proc/self/uid_map", "         0          0 4294967295\n")
    made.write("/run/systemd/system/.keep", "")
    made.write("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")
    made.write(manager(1000), "cpu memory pids\n")
    (tmp_path / "etc").mkdir()
    return made


def manager(uid: int) -> str:
    folder = f"/sys/fs/cgroup/user.slice/user-{uid}.slice/user@{uid}.service"
    return f"{folder}/cgroup.controllers"


def test_where_nothing_is_missing_nothing_is_offered_and_nothing_done(scratch: Scratch) -> None:
    assert {step.state for step in scratch.steps().values()} == {State.NOT_NEEDED}
    assert scratch.json("--apply")["changed"] == []
    assert scratch.files() == {}
    assert "no privileged step" in scratch.run().stderr


def test_without_apply_it_shows_everything_and_changes_nothing(scratch: Scratch) -> None:
    scratch.knob("user.max_user_namespaces", "0")
    shown = scratch.run()
    assert shown.returncode == Exit.OK
    for text in (
        "/etc/sysctl.d/99-zz-safeconduct.conf",
        "sysctl -p",
        "user.max_user_namespaces = ",
    ):
        assert text in shown.stdout
    assert "setup --apply" in shown.stderr
    assert scratch.files() == {}


def test_apparmor_gets_a_profile_for_the_launcher_alone(scratch: Scratch) -> None:
    scratch.knob("kernel.apparmor_restrict_unprivileged_userns", "1")
    step = scratch.steps()["AppArmor profile"]
    assert step.state is State.NEEDED
    assert f'"{LAUNCHER}" flags=(unconfined)' in step.text
    assert "userns," in step.text
    assert perform(step, scratch.root, real=False)[1].startswith("would run apparmor_parser -r")
    assert scratch.files() == {"etc/apparmor.d/safeconduct-launcher": step.text}
    assert scratch.steps()["AppArmor profile"].state is State.DONE
    # The setting that would open user namespaces to every program is never offered.
    assert "sysctl" not in json.dumps(scratch.json())
    assert (scratch.root / step.file.lstrip("/")).stat().st_mode & 0o777 == 0o644


def test_a_profile_is_written_anew_where_the_launcher_moved(scratch: Scratch) -> None:
    scratch.knob("kernel.apparmor_restrict_unprivileged_userns", "1")
    old = steps(scratch.root, Path("/opt/old/launcher"))
    for step in old:
        perform(step, scratch.root, real=False)
    moved = scratch.steps()["AppArmor profile"]
    assert moved.state is State.NEEDED
    perform(moved, scratch.root, real=False)
    assert scratch.steps()["AppArmor profile"].state is State.DONE


@pytest.mark.parametrize("path", ["/opt/*/launcher", '/opt/a" {} /launcher', "/opt/@{HOME}/x"])
def test_a_path_that_apparmor_reads_as_a_pattern_is_refused(scratch: Scratch, path: str) -> None:
    scratch.knob("kernel.apparmor_restrict_unprivileged_userns", "1")
    with pytest.raises(Error) as caught:
        steps(scratch.root, Path(path))
    assert caught.value.code == "setup.path"


def test_a_launcher_that_others_can_replace_is_said(scratch: Scratch, tmp_path: Path) -> None:
    scratch.knob("kernel.apparmor_restrict_unprivileged_userns", "1")
    launcher = scratch.write("/opt/launcher", "")
    launcher.chmod(0o777)
    [step] = [one for one in steps(scratch.root, launcher) if one.name == "AppArmor profile"]
    assert "can be changed by others" in step.warning


def test_delegation_is_for_users_whose_manager_lacks_a_controller(scratch: Scratch) -> None:
    scratch.write(manager(1001), "pids\n")
    step = scratch.steps()["cgroup delegation"]
    assert (step.state, "user 1001 has no memory" in step.why) == (State.NEEDED, True)
    perform(step, scratch.root, real=False)
    drop_in = "etc/systemd/system/user@.service.d/50-safeconduct.conf"
    assert "\nDelegate=cpu cpuset io memory pids\n" in scratch.files()[drop_in]
    assert scratch.steps()["cgroup delegation"].state is State.DONE


def test_systemd_reads_the_drop_in(scratch: Scratch) -> None:
    analyze = shutil.which("systemd-analyze")
    template = Path("/lib/systemd/system/user@.service")
    if analyze is None or not template.exists():
        pytest.skip("needs systemd-analyze and the unit user@.service")
    scratch.write(manager(1001), "pids\n")
    perform(scratch.steps()["cgroup delegation"], scratch.root, real=False)
    folder = scratch.root / "etc/systemd/system"
    shutil.copy(template, folder)
    drop_in = folder / "user@.service.d" / "50-safeconduct.conf"

    def complaints() -> str:
        done = subprocess.run(
            [analyze, "verify", "--man=no", "--recursive-errors=no", str(folder / template.name)],
            capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"},
        )  # fmt: skip
        return done.stdout + done.stderr

    assert drop_in.name not in complaints()
    drop_in.write_text(drop_in.read_text().replace("memory", "no-such-controller"))
    assert drop_in.name in complaints()


@pytest.mark.parametrize(
    ("gone", "said"),
    [("run/systemd", "no systemd"), ("sys/fs/cgroup/cgroup.controllers", "cgroup v1")],
)
def test_delegation_that_no_step_gives_says_so(scratch: Scratch, gone: str, said: str) -> None:
    path = scratch.root / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    step = scratch.steps()["cgroup delegation"]
    assert (step.state, said in step.why) == (State.IMPOSSIBLE, True)
    assert perform(step, scratch.root, real=False) == []


def test_a_refused_knob_is_set_and_put_back_as_it_was(scratch: Scratch) -> None:
    before = scratch.files()
    for knob in ("user.max_user_namespaces", "kernel.unprivileged_userns_clone"):
        scratch.knob(knob, "0")
    assert any("would run sysctl -p" in line for line in scratch.json("--apply")["changed"])
    text = scratch.files()["etc/sysctl.d/99-zz-safeconduct.conf"]
    assert "kernel.unprivileged_userns_clone = 1\n" in text
    for knob in ("user.max_user_namespaces", "kernel.unprivileged_userns_clone"):
        scratch.knob(knob, "1")  # what the command would have done
    assert scratch.json("--apply")["changed"] == []
    changed = scratch.json("--undo")["changed"]
    assert "would run sysctl -w user.max_user_namespaces=0" in changed
    assert "would run sysctl -w kernel.unprivileged_userns_clone=0" in changed
    assert scratch.files() == before
    assert scratch.json("--undo")["changed"] == []


def test_what_is_set_already_stays_set(scratch: Scratch) -> None:
    knobs = ("user.max_user_namespaces", "kernel.unprivileged_userns_clone")
    for knob in knobs:
        scratch.knob(knob, "0")
    scratch.json("--apply")
    scratch.knob(knobs[0], "15000")  # and the other one was changed back by somebody
    scratch.json("--apply")
    text = scratch.files()["etc/sysctl.d/99-zz-safeconduct.conf"]
    assert all(f"{knob} = " in text for knob in knobs)
    undone = scratch.json("--undo")["changed"]
    assert [f"would run sysctl -w {knob}=0" for knob in knobs] == sorted(undone[1:], reverse=True)


def test_what_forbids_it_again_at_the_next_start_is_told(scratch: Scratch) -> None:
    scratch.knob("user.max_user_namespaces", "0")
    line = "-user/max_user_namespaces=0\n"
    earlier = scratch.write("/etc/sysctl.d/99-sysctl.conf", line)
    later = scratch.write("/usr/lib/sysctl.d/99-zzz.conf", f"# hardened\n{line}")
    other = scratch.write("/etc/sysctl.d/99-zzz.conf", "user.max_user_namespaces = 10\n")
    classic = scratch.write("/etc/sysctl.conf", line)

    def told() -> str:
        return scratch.steps()["user namespaces"].warning

    assert f"{later} forbids them again" in told()
    assert not any(f"{path} forbids" in told() for path in (earlier, other, classic))
    shutil.rmtree(scratch.root / "run/systemd")
    assert f"{classic} forbids them again" in told()
    scratch.json("--apply")
    scratch.knob("user.max_user_namespaces", "15000")
    step = scratch.steps()["user namespaces"]
    assert (step.state, f"{later} forbids" in step.why) == (State.DONE, True)


def test_an_interrupt_does_not_leave_a_file_that_passes_for_done(
    scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    step = Step(name="x", state=State.NEEDED, why="", file="/etc/x", text=MARK, apply=[("true",)])
    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        perform(step, scratch.root, real=True)
    assert scratch.files() == {}


def test_inside_a_user_namespace_a_knob_is_not_ours_to_set(scratch: Scratch) -> None:
    scratch.knob("user.max_user_namespaces", "0")
    scratch.write("/proc/self/uid_map", "0 1000 1\n")
    step = scratch.steps()["user namespaces"]
    assert (step.state, "machine around" in step.why) == (State.IMPOSSIBLE, True)


def test_a_file_of_somebody_else_is_never_touched(scratch: Scratch) -> None:
    scratch.knob("user.max_user_namespaces", "0")
    file = scratch.write("/etc/sysctl.d/99-zz-safeconduct.conf", "kernel.sysrq = 0\n")
    refused = scratch.run("--apply")
    assert (refused.returncode, "[setup.foreign_file]" in refused.stderr) == (Exit.FAILURE, True)
    assert scratch.json("--undo")["changed"] == []
    assert file.read_text() == "kernel.sysrq = 0\n"


def test_a_link_in_the_way_is_not_followed(scratch: Scratch) -> None:
    scratch.knob("user.max_user_namespaces", "0")
    victim = scratch.write("/elsewhere", MARK + "mine\n")
    link = scratch.write("/etc/sysctl.d/99-zz-safeconduct.conf", "")
    link.unlink()
    link.symlink_to(victim)
    assert scratch.run("--apply").returncode == Exit.FAILURE
    assert scratch.run("--undo").returncode == Exit.OK
    assert (victim.read_text(), link.is_symlink()) == (MARK + "mine\n", True)


def test_a_command_that_fails_leaves_the_files_as_they_were(scratch: Scratch) -> None:
    step = Step(
        name="x", state=State.NEEDED, why="", file="/etc/new.service.d/x", text=MARK,
        apply=[("false",)], undo=[("true",)],
    )  # fmt: skip
    with pytest.raises(Error) as caught:
        perform(step, scratch.root, real=True)
    assert caught.value.code == "setup.command"
    assert scratch.files() == {}
    scratch.write(step.file, MARK + "older\n")
    with pytest.raises(Error):
        perform(step, scratch.root, real=True)
    assert scratch.files() == {"etc/new.service.d/x": MARK + "older\n"}
    assert take_back(step, scratch.root, real=True)[-1] == "ran true"
    assert not (scratch.root / "etc/new.service.d").exists()


def test_a_missing_command_is_said(scratch: Scratch) -> None:
    step = Step(
        name="x", state=State.NEEDED, why="", file="/etc/x", text=MARK, apply=[("no-such-program",)]
    )
    with pytest.raises(Error, match="no such program"):
        perform(step, scratch.root, real=True)


def test_it_refuses_inside_a_sandbox(scratch: Scratch) -> None:
    for options in ((), ("--apply",), ("--undo",)):
        refused = scratch.run(*options, SAFECONDUCT_SANDBOX="full")
        assert (refused.returncode, "[sandbox.inside]" in refused.stderr) == (Exit.DENIED, True)


def test_apply_and_undo_exclude_each_other(scratch: Scratch) -> None:
    assert scratch.run("--apply", "--undo").returncode == Exit.USAGE


def test_the_real_machine_needs_root() -> None:
    # In a process of its own: it gives up being root, if it is.
    code = """
import os
from safeconduct.errors import Error
from safeconduct.runtime.cli.setup import setup
if os.geteuid() == 0: os.seteuid(65534)
try: setup(apply=True)
except Error as error: print(error.code, error.hint)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("setup.root run it as: sudo "), done.stderr
