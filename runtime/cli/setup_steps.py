"""The privileged steps that give a machine more, each as files to write and commands to run.

What a step is and whether it is needed is read below a root folder that is passed in, so it can be
tried on a folder that is no machine. Nothing here writes; setup.py does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from safeconduct.errors import Error
from safeconduct.runtime.sandbox import delegation
from safeconduct.runtime.sandbox.facts import read_knobs

# Every file of ours begins with it; one that does not is somebody else's and never touched.
MARK = "# Written by `safeconduct setup`; `safeconduct setup --undo` removes it.\n"
_BEFORE = "# before: "
# Common distributions allow tens of thousands; each sandbox needs one.
_WANTED = {"user.max_user_namespaces": "15000", "kernel.unprivileged_userns_clone": "1"}
# Read after Debian's 99-sysctl.conf, which is /etc/sysctl.conf; the last one counts, sysctl.d(5).
_SYSCTL = "/etc/sysctl.d/99-zz-safeconduct.conf"
_SYSCTL_FOLDERS = ("/etc/sysctl.d", "/run/sysctl.d", "/usr/local/lib/sysctl.d", "/usr/lib/sysctl.d")
# LIMIT: characters read of a file of settings.
_READ_MAX = 1 << 20
_APPARMOR = "kernel.apparmor_restrict_unprivileged_userns"
# A path that AppArmor would read as a pattern, apparmor.d(5), is refused, not escaped.
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._+/ -]+", re.ASCII)


class State(StrEnum):
    """How it stands with one step."""

    NEEDED = "needed"
    DONE = "done"
    NOT_NEEDED = "not needed"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: why, the file it writes, and the commands that make it count or take it back."""

    name: str
    state: State
    why: str
    file: str = ""
    text: str = ""
    apply: Sequence[Sequence[str]] = ()
    undo: Sequence[Sequence[str]] = ()
    warning: str = ""


def steps(root: Path, launcher: Path) -> list[Step]:
    """Return every step as it stands on the machine whose files lie below ``root``."""
    return [
        _namespaces(root, read_knobs(root)),
        _apparmor(root, read_knobs(root), launcher),
        _delegation(root),
    ]


def is_ours(root: Path, file: str) -> bool:
    """Tell whether a file is there and begins with our mark. Follows no link."""
    try:
        fd = os.open(_below(root, file), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(fd, encoding="utf-8", errors="replace") as opened:
        return opened.read(len(MARK)) == MARK


def _below(root: Path, file: str) -> Path:
    return root / file.lstrip("/")


def _namespaces(root: Path, knobs: dict[str, str]) -> Step:
    name = "user namespaces"
    refused = [knob for knob in _WANTED if knobs.get(knob) == "0"]
    noted = _noted(root)
    # What a file of ours holds already stays in it, with what was there before it.
    before = {**{knob: knobs[knob] for knob in refused}, **noted}
    undo = [("sysctl", "-w", f"{knob}={value}") for knob, value in before.items()]
    again = _forbidden_later(root, before)
    if not refused and not is_ours(root, _SYSCTL):
        return Step(name=name, state=State.NOT_NEEDED, why="no setting forbids them to everybody")
    if not refused:
        why = "; ".join(["a setting of ours allows them", *again])
        text = _below(root, _SYSCTL).read_text()
        return Step(name=name, state=State.DONE, why=why, file=_SYSCTL, text=text, undo=undo)
    why = ", ".join(f"{knob} = {knobs[knob]}" for knob in refused)
    if not _first_namespace(root):
        why += ": inside a user namespace; only the machine around can change it"
        return Step(name=name, state=State.IMPOSSIBLE, why=why)
    lines = [f"{_BEFORE}{knob}={value}" for knob, value in before.items()]
    lines += [f"{knob} = {_WANTED[knob]}" for knob in before]
    return Step(
        name=name,
        state=State.NEEDED,
        why=why,
        file=_SYSCTL,
        text=MARK + "\n".join(lines) + "\n",
        apply=[("sysctl", "-p", _SYSCTL)],
        undo=undo,
        warning="; ".join(["every program of every user may then make user namespaces", *again]),
    )


def _noted(root: Path) -> dict[str, str]:
    """Return what a file of ours says was set before it, by name."""
    if not is_ours(root, _SYSCTL):
        return {}
    lines = _below(root, _SYSCTL).read_text().splitlines()
    said = (line.removeprefix(_BEFORE) for line in lines if line.startswith(_BEFORE))
    pairs = (pair.partition("=") for pair in said)
    return {knob: value for knob, _, value in pairs if knob in _WANTED}


def _forbidden_later(root: Path, knobs: Iterable[str]) -> list[str]:
    """Say which files are read after ours when the machine starts, and forbid again.

    systemd reads /etc/sysctl.conf only by a link in its place in the order, sysctl.d(5); other
    systems read it last, sysctl(8).
    """
    found: list[Path] = []
    if not (root / "run/systemd/system").is_dir():
        found.append(_below(root, "/etc/sysctl.conf"))
    for folder in _SYSCTL_FOLDERS:
        found += sorted(_below(root, folder).glob("*.conf"))
    names = "|".join(re.escape(knob).replace(r"\.", "[./]") for knob in knobs)
    forbids = re.compile(rf"^\s*-?\s*(?:{names})\s*=\s*0\s*$", re.MULTILINE)
    said: list[str] = []
    for path in found:
        last = path.name == "sysctl.conf" or path.name > os.path.basename(_SYSCTL)
        if names and last and forbids.search(_start_of(path)):
            said.append(f"{path} forbids them again at the next start: take it out there")
    return said


def _start_of(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_READ_MAX)
    except OSError:
        return ""


def _first_namespace(root: Path) -> bool:
    try:
        fields = (root / "proc/self/uid_map").read_text().split()
    except OSError:
        return True
    return fields == ["0", "0", "4294967295"]


def _apparmor(root: Path, knobs: dict[str, str], launcher: Path) -> Step:
    name, file = "AppArmor profile", "/etc/apparmor.d/safeconduct-launcher"
    loaded = _loaded(root)
    # Taking out what is not loaded fails, and would keep the file from being removed.
    undo = [("apparmor_parser", "-R", file)] if loaded else []
    if knobs.get(_APPARMOR) != "1":
        if is_ours(root, file):
            why = f"{_APPARMOR} is not 1 any more; --undo removes it"
            return Step(name=name, state=State.DONE, why=why, file=file, undo=undo)
        why = f"{_APPARMOR} is not 1 here"
        return Step(name=name, state=State.NOT_NEEDED, why=why)
    text = _profile(launcher)
    written = is_ours(root, file) and _below(root, file).read_text() == text
    return Step(
        name=name,
        state=State.DONE if written and loaded is not False else State.NEEDED,
        why=f"{_APPARMOR} = 1: only programs with a profile may use user namespaces",
        file=file,
        text=text,
        apply=[("apparmor_parser", "-r", file)],
        undo=undo,
        warning=_replaceable(launcher),
    )


def _loaded(root: Path) -> bool | None:
    """Tell whether the kernel has our profile; None where only root is told, or AppArmor is off."""
    try:
        text = (root / "sys/kernel/security/apparmor/profiles").read_text()
    except OSError:
        return None
    return any(line.startswith("safeconduct-launcher ") for line in text.splitlines())


def _profile(launcher: Path) -> str:
    path = str(launcher)
    if not _PLAIN_PATH.fullmatch(path):
        raise Error(
            f"AppArmor would read {path} as a pattern.",
            code="setup.path",
            hint="install safeconduct under a path of letters, digits, '.', '_', '+', '-'",
        )
    return (
        f"{MARK}abi <abi/4.0>,\ninclude <tunables/global>\n\n"
        f'profile safeconduct-launcher "{path}" flags=(unconfined) {{\n  userns,\n}}\n'
    )


def _replaceable(launcher: Path) -> str:
    """Warn where others than root can put another program into the launcher's place."""
    for path in (launcher, *launcher.parents):
        try:
            status = path.stat()
        except OSError:
            continue
        if status.st_uid != 0 or status.st_mode & 0o022:
            return (
                f"{path} can be changed by others than root: whatever is put in the launcher's "
                "place may use user namespaces too; a copy that only root can write is safer"
            )
    return ""


def _delegation(root: Path) -> Step:
    name, file = "cgroup delegation", "/etc/systemd/system/user@.service.d/50-safeconduct.conf"
    text = f"{MARK}[Service]\nDelegate=cpu cpuset io memory pids\n"
    reload = [("systemctl", "daemon-reload")]
    if is_ours(root, file):
        why = "handed to every user manager that starts from now on"
        return Step(name=name, state=State.DONE, why=why, file=file, text=text, undo=reload)
    if not (root / "run/systemd/system").is_dir():
        why = "no systemd runs here; `safeconduct doctor` says what helps"
        return Step(name=name, state=State.IMPOSSIBLE, why=why)
    if not (root / "sys/fs/cgroup/cgroup.controllers").exists():
        why = "cgroup v1 cannot be handed to users: boot with systemd.unified_cgroup_hierarchy=1"
        return Step(name=name, state=State.IMPOSSIBLE, why=why)
    lacking = {
        uid: delegation.manager_lacks(uid, root=root) for uid in delegation.managers(root=root)
    }
    short = {uid: lacks for uid, lacks in lacking.items() if lacks}
    if not short:
        why = "systemd hands memory and pids to users already" if lacking else "nobody is logged in"
        return Step(name=name, state=State.NOT_NEEDED, why=why)
    said = "; ".join(f"user {uid} has no {' and '.join(lacks)}" for uid, lacks in short.items())
    return Step(
        name=name,
        state=State.NEEDED,
        why=f"{said}: memory, and in tier landlock pids, hold only per process",
        file=file,
        text=text,
        apply=reload,
        undo=reload,
        warning="it counts from the next login of each user",
    )
