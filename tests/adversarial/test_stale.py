"""What waits is made before the call: a workspace that changes in between must not open it.

Whoever replaces a file outside takes away what is mounted on it in every other mount namespace,
mount_namespaces(7), so a mask or a read-only mount may be gone when the program starts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Limits, Outcome, Profile, Tier
from safeconduct.errors import SandboxFailed
from safeconduct.runtime.sandbox.launcher import Launcher
from safeconduct.runtime.sandbox.layout import Layout
from safeconduct.runtime.sandbox.native import NativeSandbox, Program
from safeconduct.runtime.sandbox.plan import Plan, Setting
from safeconduct.runtime.sandbox.pool import AHEAD, Pool
from safeconduct.runtime.sandbox.running import Running
from safeconduct.runtime.sandbox.shield import Shield, Shields

if TYPE_CHECKING:
    from tests.conftest import Box

SECRET, EVIL = b"SECRET", "evil"
PROTECTED = (".git/hooks/", ".claude/", ".mcp.json")
Swap = Callable[[Path], None]


class Interrupted(NativeSandbox):
    """One in which something happens after a call was planned and before it is told its program."""

    def __init__(self, launcher: Launcher, tier: Tier, *, checked: bool) -> None:
        super().__init__(launcher, tier=tier, cgroups=None)
        self.happens: Callable[[], None] | None = None
        self.rounds = 0
        self._checked = checked

    def _take(
        self,
        held: ExitStack,
        pool: Pool,
        program: Program,
        setting: Setting,
        given: Mapping[int, int],
        *,
        bound: bool,
    ) -> Running:
        self.rounds += 1
        happens, self.happens = self.happens, None
        if happens is not None:
            happens()
        return super()._take(held, pool, program, setting, given, bound=bound)

    def plan(
        self,
        profile: Profile,
        layout: Layout,
        ids: Mapping[str, object],
        *,
        explain: bool = False,
    ) -> Plan:
        plan = super().plan(profile, layout, ids, explain=explain)
        if self._checked:
            return plan
        unchecked = [
            {name: value for name, value in mount.items() if name != "held"}
            for mount in plan.mounts
        ]
        return replace(plan, mounts=unchecked)


def hides(path: str) -> bool:
    return os.path.basename(path) == ".env"


def profile_of(workspace: Path) -> Profile:
    folder, limits = str(workspace), Limits(wall_ms=10_000)
    hide = ("**/.env",)
    return Profile(name="test", read=(folder,), write=(folder,), hide=hide, limits=limits)


def call(sandbox: NativeSandbox, workspace: Path, code: str, *, late: bool = False) -> Outcome:
    """Run one shell command as the tools do: shielded anew for each call."""
    shields, profile = Shields(str(workspace), PROTECTED), profile_of(workspace)
    try:
        with shields.raised(profile, hides) as shield:
            program = Program(argv=["sh", "-c", code], cwd=str(workspace))
            return sandbox.run(
                "call", program, profile, workspace=str(workspace), shield=shield, late=late
            )
    finally:
        shields.close()


def furnish(workspace: Path) -> None:
    for folder in (".git/hooks", ".claude", "sub"):
        (workspace / folder).mkdir(parents=True)
    for path in (".mcp.json", ".claude/settings.json", ".git/hooks/commit-msg"):
        (workspace / path).write_text("mine")
    for path in (".env", "sub/.env"):
        (workspace / path).write_bytes(SECRET)
    _open(workspace)


def _open(workspace: Path) -> None:
    """Let every user read and write: tier landlock has no id-mapped mounts."""
    for path in workspace.rglob("*"):
        path.chmod(0o777)


def _saved(name: str, content: bytes) -> Swap:
    """Replace a file as editors save: a new one is renamed over it."""

    def swap(workspace: Path) -> None:
        (workspace / "new").write_bytes(content)
        (workspace / "new").chmod(0o666)
        (workspace / "new").rename(workspace / name)

    return swap


def _removed_and_made(name: str) -> Swap:
    """Remove a file or folder and make one of that name again: the inode may be the same."""

    def swap(workspace: Path) -> None:
        path = workspace / name
        if path.is_dir():
            shutil.rmtree(path)
            path.mkdir()
        else:
            path.unlink()
            path.write_bytes(SECRET)
        path.chmod(0o777)

    return swap


def _folder_replaced(workspace: Path) -> None:
    """Replace the folder around a hidden file, which itself stays what it is."""
    (workspace / "sub").rename(workspace / "old")
    (workspace / "sub").mkdir()
    (workspace / "old/.env").rename(workspace / "sub/.env")
    shutil.rmtree(workspace / "old")


ATTACKS: dict[str, tuple[Swap, str]] = {
    "hidden file saved": (_saved(".env", SECRET), "cat .env"),
    "hidden file made anew": (_removed_and_made(".env"), "cat .env"),
    "hidden file below a new folder": (_folder_replaced, "cat sub/.env"),
    "protected file saved": (_saved(".mcp.json", b"mine"), f"echo {EVIL} > .mcp.json"),
    "protected folder made anew": (
        _removed_and_made(".git/hooks"),
        f"echo {EVIL} > .git/hooks/pre-commit",
    ),
    "anchor made anew": (
        _removed_and_made(".claude"),
        f"echo {EVIL} > .claude/settings.json",
    ),
}


def escaped(workspace: Path, outcome: Outcome) -> bool:
    files = [path for path in workspace.rglob("*") if path.is_file() and path.name != ".env"]
    planted = any(EVIL in path.read_text() for path in files)
    return SECRET in outcome.stdout or planted


def all_wait(launcher: Launcher, sandbox: NativeSandbox) -> None:
    """Wait until what shall wait for the next call does: a stub below each init."""
    deadline = time.monotonic() + 10
    while _stubs(launcher.pid) < AHEAD:
        assert time.monotonic() < deadline, "nothing waits"
        time.sleep(0.01)


def _stubs(pid: int, depth: int = 0) -> int:
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    # launcher, template, init, stub
    return (depth == 3) + sum(_stubs(int(child), depth + 1) for child in below)


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> tuple[Swap, str]:
    return ATTACKS[request.param]


def swapped_while_it_waits(
    workspace: Path, attack: tuple[Swap, str], *, checked: bool
) -> tuple[bool, int]:
    """Change the workspace once sandboxes for it wait; say whether the program got through."""
    swap, code = attack
    furnish(workspace)
    launcher = Launcher()
    sandbox = Interrupted(launcher, Tier.FULL, checked=checked)
    try:
        assert not escaped(workspace, call(sandbox, workspace, code))
        all_wait(launcher, sandbox)
        sandbox.happens, sandbox.rounds = lambda: swap(workspace), 0
        try:
            through = escaped(workspace, call(sandbox, workspace, code))
        except SandboxFailed:
            through = False
        assert sandbox.happens is None
        # Whatever happened, the next call is planned for what is there now.
        assert through or not escaped(workspace, call(sandbox, workspace, code))
        return through, sandbox.rounds
    finally:
        sandbox.close()
        launcher.close()


@pytest.fixture
def full(box: Box) -> Path:
    if box.tier is not Tier.FULL:
        pytest.skip("tier landlock mounts nothing")
    return box.workspace


def test_a_sandbox_that_waited_is_checked_before_its_program_starts(
    full: Path, attack: tuple[Swap, str]
) -> None:
    through, rounds = swapped_while_it_waits(full, attack, checked=True)
    assert not through
    assert rounds >= 2, "the sandbox that waited was used"


def test_without_that_check_the_attack_works(full: Path, attack: tuple[Swap, str]) -> None:
    through, _ = swapped_while_it_waits(full, attack, checked=False)
    assert through


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "late"])
def test_what_changes_between_calls_counts_for_the_next(
    box: Box, attack: tuple[Swap, str], late: bool
) -> None:
    swap, code = attack
    furnish(box.workspace)
    late_here = late and box.tier is Tier.FULL
    for _ in range(3):
        assert not escaped(box.workspace, call(box.sandbox, box.workspace, code, late=late_here))
        swap(box.workspace)
    assert not escaped(box.workspace, call(box.sandbox, box.workspace, code, late=late_here))


def test_a_hidden_file_that_appears_is_hidden_from_the_next_call(box: Box) -> None:
    (box.workspace / "b").mkdir()
    assert call(box.sandbox, box.workspace, "true").ok
    for name in (".env", "b/.env"):
        (box.workspace / name).write_bytes(SECRET)
        _open(box.workspace)
        assert call(box.sandbox, box.workspace, f"cat {name}").stdout == b""


def test_a_file_made_between_calls_is_seen_by_the_next(box: Box) -> None:
    furnish(box.workspace)
    assert call(box.sandbox, box.workspace, "true").ok
    for name in ("made", "sub/made"):
        (box.workspace / name).write_text("new")
        _open(box.workspace)
        assert call(box.sandbox, box.workspace, f"cat {name}").stdout == b"new"


def test_a_granted_folder_that_became_a_link_is_refused(box: Box, outside: Path) -> None:
    inner = box.workspace / "granted"
    inner.mkdir()
    (inner / "secret").write_text("mine")
    _open(box.workspace)
    assert call(box.sandbox, inner, "cat secret").stdout == b"mine"
    for late in (False, box.tier is Tier.FULL):
        shutil.rmtree(inner, ignore_errors=True)
        inner.unlink(missing_ok=True) if inner.is_symlink() else None
        inner.symlink_to(outside)
        try:
            shown = call(box.sandbox, inner, f"cat {inner}/secret secret", late=late).stdout
        except (SandboxFailed, OSError):
            shown = b""
        assert SECRET not in shown


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "late"])
def test_a_writer_outside_that_never_rests_opens_nothing(
    box: Box, outside: Path, late: bool
) -> None:
    """A granted folder becomes a link to somewhere else and back while calls are planned."""
    granted = box.workspace / "granted"
    (granted / "sub").mkdir(parents=True)
    (granted / "sub/secret").write_text("mine")
    _open(box.workspace)
    link, other = box.workspace / "link", box.workspace / "other"
    link.symlink_to(outside)
    stop = threading.Event()

    def never_rest() -> None:
        while not stop.is_set():
            for real in (granted / "sub", granted):
                real.rename(other)
                link.rename(real)
                real.rename(link)
                other.rename(real)

    writer = threading.Thread(target=never_rest)
    writer.start()
    inner = replace(profile_of(granted), write=(f"{granted}/sub",), hide=())
    program = Program(argv=["cat", f"{outside}/secret", f"{granted}/sub/secret"], cwd="/tmp")
    try:
        for _ in range(100):
            try:
                outcome = box.sandbox.run(
                    "call",
                    program,
                    inner,
                    workspace=str(granted),
                    shield=Shield(),
                    late=late and box.tier is Tier.FULL,
                )
            except (SandboxFailed, OSError):
                continue  # refused: what was planned is not what is there
            assert SECRET not in outcome.stdout
    finally:
        stop.set()
        writer.join()
    # It may have been refused each time; now it is not.
    outcome = box.sandbox.run(
        "call", program, inner, workspace=str(granted), shield=Shield(), late=False
    )
    assert outcome.stdout == b"mine"


def test_a_shield_that_is_remembered_is_raised_anew_after_any_change(
    box: Box, attack: tuple[Swap, str]
) -> None:
    """One ``Shields`` for all calls, as a runtime has it; the second call finds all unchanged."""
    swap, code = attack
    furnish(box.workspace)
    shields, profile = Shields(str(box.workspace), PROTECTED), profile_of(box.workspace)
    program = Program(argv=["sh", "-c", f"{code}; cat late/.env"], cwd=str(box.workspace))

    def run() -> Outcome:
        with shields.raised(profile, hides) as shield:
            return box.sandbox.run(
                "call", program, profile, workspace=str(box.workspace), shield=shield
            )

    try:
        for _ in range(2):
            assert not escaped(box.workspace, run())
        swap(box.workspace)
        assert not escaped(box.workspace, run())
        (box.workspace / "late").mkdir()
        (box.workspace / "late/.env").write_bytes(SECRET)
        _open(box.workspace)
        assert not escaped(box.workspace, run())
    finally:
        shields.close()


def test_a_clone_for_a_late_call_is_never_of_what_a_link_leads_to(
    box: Box, launcher: Launcher, outside: Path
) -> None:
    if box.tier is not Tier.FULL:
        pytest.skip("tier landlock mounts nothing")
    above = box.workspace / "above"
    (above / "sub").mkdir(parents=True)
    (outside / "sub").mkdir()
    link, other = box.workspace / "link", box.workspace / "other"
    link.symlink_to(outside)
    real, stop = (above / "sub").stat().st_ino, threading.Event()

    def never_rest() -> None:
        while not stop.is_set():
            above.rename(other)
            link.rename(above)
            above.rename(link)
            other.rename(above)

    ids = {"uid": os.geteuid(), "gid": os.getegid(), "inside": 1000, "owner": None}
    mount = {"kind": "bind", "source": f"{above}/sub", "target": "/sub"}
    writer = threading.Thread(target=never_rest)
    writer.start()
    plain, cloned, tries = set[int](), set[int](), 0
    deadline = time.monotonic() + 10
    try:
        while time.monotonic() < deadline and (tries < 500 or len(plain) < 2 or not cloned):
            with suppress(FileNotFoundError):
                plain.add((above / "sub").stat().st_ino)
            tries += 20
            for _ in range(20):
                with suppress(SandboxFailed):
                    for tree in launcher.clone(ids, [mount], 10):
                        cloned.add(os.fstat(tree).st_ino)
                        os.close(tree)
    finally:
        stop.set()
        writer.join()
    assert plain == {real, (outside / "sub").stat().st_ino}, "a plain open is led astray"
    assert cloned == {real}


@pytest.fixture
def coarse(tmp_path: Path) -> Iterator[Path]:
    """A file system that keeps whole seconds only: ext4 with small inodes."""
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    image.write_bytes(bytes(16 << 20))
    try:
        subprocess.run(["mkfs.ext4", "-q", "-I", "128", image], capture_output=True, check=True)
        subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs mkfs.ext4 and a loop device: {error}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_change_in_the_second_of_the_last_one_is_noticed(coarse: Path) -> None:
    shields, profile = Shields(str(coarse), ()), profile_of(coarse)
    try:
        for number in range(3):
            (coarse / ".env").unlink(missing_ok=True)
            until_next = 1 - time.time() % 1
            time.sleep(until_next)  # a second begins, in which all of it happens
            (coarse / f"any-{number}").touch()
            time.sleep(0.05)  # longer than a tick of the clock that a folder's time comes from
            with shields.raised(profile, hides) as shield:
                assert not shield.hidden
            (coarse / ".env").touch()
            with shields.raised(profile, hides) as shield:
                assert shield.hidden == (f"{coarse}/.env",)
    finally:
        shields.close()
