"""What is closed is not absent: an ordinary user's program takes the right to look from its
supervisor, which has the same user, and comes back for what was overlooked.

Each attack succeeds on a folder that nothing guards, and fails on one that is guarded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from safeconduct.call import Tier

TESTS = Path(__file__).resolve().parents[1]
ORDINARY = 64_017
POLICY = """version: 1
profiles:
  base:
    read: ["BASE/**"]
    write: ["BASE/**"]
    hide: [HIDE]
    workspace: direct
    limits: {wall: 20s, memory: 256MiB, pids: 24, disk: 16MiB, inodes: 500, depth: 30}
tools:
  shell.run: {allow: any, profile: base}
"""
# Not to be listed, not to be entered, or neither.
MODES = (0, 0o100, 0o300, 0o600)


@dataclass(frozen=True)
class Desk:
    """A Runtime of an ordinary user that runs Python texts, over a folder with all it guards."""

    base: Path
    tier: Tier
    ask: Callable[[list[str]], dict[str, str]]

    @property
    def workspace(self) -> Path:
        return self.base / "ws"

    def python(self, text: str) -> dict[str, str]:
        return self.ask(["python3", "-c", f"import os\n{text}"])

    def open_all(self) -> None:
        subprocess.run(["chmod", "-R", "u+rwX", str(self.base)], check=True)

    def lay_out(self) -> None:
        """Put everything that is attacked back as it was."""
        self.open_all()
        for made in (*(self.workspace / "data").iterdir(), *self.base.glob("too-deep-*")):
            subprocess.run(["rm", "-rf", str(made)], check=True)
        for name in (".git", "plain"):
            folder = self.workspace / name
            if folder.exists():
                shutil.rmtree(folder)
            (folder / "hooks").mkdir(parents=True)
            (folder / "info").mkdir()
            (folder / "config").write_text("[core]\n")
            (folder / "shown").write_text("SHOWN")
        (self.workspace / "config" / "below").mkdir(exist_ok=True)
        for name in (".env", "below/.env"):
            (self.workspace / "config" / name).write_text("SECRET")
        owner = self.base.stat()
        for name in (".git", "plain", "config"):
            who = f"{owner.st_uid}:{owner.st_gid}"
            subprocess.run(["chown", "-R", who, str(self.workspace / name)], check=True)


def as_ordinary(owner: int, argv: list[str]) -> list[str]:
    if owner == os.geteuid():
        return argv
    shown = [sys.prefix, sys.base_prefix, str(TESTS.parent)]
    script = str(TESTS / "as_user.py")
    return ["unshare", "--mount", sys.executable, script, str(owner), *shown, "--", *argv]


@pytest.fixture(scope="module", params=list(Tier), ids=str)
def started(request: pytest.FixtureRequest) -> Generator[Desk]:
    with start(Tier(request.param)) as desk:
        yield desk


@pytest.fixture(scope="module", params=list(Tier), ids=str)
def two(request: pytest.FixtureRequest) -> Generator[tuple[Desk, Desk]]:
    """One desk that hides nothing and one that does."""
    with start(Tier(request.param)) as bare, start(Tier(request.param), '"**/.env*"') as hiding:
        yield bare, hiding


@contextmanager
def start(tier: Tier, hide: str = "") -> Generator[Desk]:
    owner = ORDINARY if os.geteuid() == 0 else os.geteuid()
    if owner != os.geteuid() and shutil.which("unshare") is None:
        pytest.skip("needs unshare to start as an ordinary user")
    base = Path(os.path.realpath(tempfile.mkdtemp(prefix="modes-", dir="/var/tmp")))
    policy = base / "ws" / "conf" / "policy.yaml"
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["rm", "-rf", str(base)], check=True)
        stack.callback(subprocess.run, ["chmod", "-R", "u+rwX", str(base)], check=False)
        base.chmod(0o755)
        for name in ("ws/conf", "ws/config", "ws/data", "l", "home"):
            (base / name).mkdir(parents=True)
        policy.write_text(POLICY.replace("BASE", str(base)).replace("HIDE", hide))
        subprocess.run(["chown", "-R", f"{owner}:{owner}", str(base)], check=True)
        environment = {**os.environ, "HOME": str(base / "home")}
        environment |= {"XDG_STATE_HOME": str(base / "l"), "XDG_CONFIG_HOME": str(base / "home")}
        argv = [sys.executable, str(TESTS / "driver.py"), str(policy), str(base / "ws"), str(tier)]
        process = stack.enter_context(
            subprocess.Popen(
                as_ordinary(owner, argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env=environment, cwd="/",
            )
        )  # fmt: skip
        asking, answering = process.stdin, process.stdout
        assert asking is not None
        assert answering is not None
        stack.callback(process.wait, 60)
        stack.callback(asking.close)
        first = cast("dict[str, str]", json.loads(answering.readline() or '{"refused": "died"}'))
        if "refused" in first:
            pytest.skip(f"needs tier {tier}: {first['refused']}")

        def ask(argv: list[str]) -> dict[str, str]:
            asking.write(json.dumps(argv) + "\n")
            asking.flush()
            return cast("dict[str, str]", json.loads(answering.readline()))

        yield Desk(base=base, tier=tier, ask=ask)


@pytest.fixture
def desk(started: Desk) -> Desk:
    started.lay_out()
    return started


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("below", ["", "info/"])
def test_what_a_call_makes_in_a_folder_it_closes_is_set_aside(
    desk: Desk, mode: int, below: str
) -> None:
    name = {"": "commondir", "info/": "attributes"}[below]

    def attack(folder: str) -> dict[str, str]:
        return desk.python(
            f"open('{folder}/{below}{name}', 'w').write('evil')\n"
            f"os.chmod('{folder}/{below}', {mode}); os.chmod('{folder}', {mode})"
        )

    assert attack("plain")["end"] == "0"
    ended = attack(".git")
    # What the next program of the user meets, before anybody opens anything.
    desk.open_all()
    assert (desk.workspace / "plain" / below / name).exists()
    assert not (desk.workspace / ".git" / below / name).exists()
    if desk.tier is Tier.FULL:  # tier landlock makes no new names beside protected ones at all
        assert ended["end"] == "error sandbox.protected_made"
        assert list((desk.workspace / ".git" / below).glob(f"{name}.refused-*"))


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_closed_by_one_call_is_protected_in_the_next(desk: Desk, mode: int) -> None:
    for folder, wins in (("plain", True), (".git", False)):
        assert desk.python(f"os.chmod('{folder}', {mode})")["end"] == "0"
        desk.python(
            f"os.chmod('{folder}', 0o700)\n"
            "for name in ('hooks/pre-commit', 'config'):\n"
            f"    try: open(f'{folder}/{{name}}', 'a').write('evil')\n"
            "    except OSError: pass\n"
            f"os.chmod('{folder}', 0o300)"
        )
        desk.open_all()
        top = desk.workspace / folder
        assert (top / "hooks" / "pre-commit").exists() == wins
        assert ("evil" in (top / "config").read_text()) == wins


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [".git", "config", "l", "ws/conf"])
def test_a_closed_folder_stops_no_later_call(desk: Desk, mode: int, name: str) -> None:
    path = desk.base / name if "/" in name or name == "l" else desk.workspace / name
    assert desk.python(f"os.chmod('{path}', {mode})")["end"] == "0"
    assert desk.python("print('fine')") == {"output": "fine\n", "end": "0"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("deeper", ["", "below/"])
def test_what_is_hidden_is_not_found_in_a_closed_folder(
    two: tuple[Desk, Desk], mode: int, deeper: str
) -> None:
    def attack(desk: Desk) -> str:
        desk.lay_out()
        desk.python(f"os.chmod('config', {mode})")
        assert desk.python("print('fine')") == {"output": "fine\n", "end": "0"}
        return desk.python(
            "try: os.chmod('config', 0o700)\nexcept OSError: pass\n"
            f"print(open('config/{deeper}.env').read())"
        )["output"]

    bare, hiding = two
    assert "SECRET" in attack(bare)
    assert "SECRET" not in attack(hiding)


@pytest.mark.parametrize("mode", MODES)
def test_a_key_is_not_reached_below_a_closed_folder(desk: Desk, mode: int) -> None:
    key = desk.base / "l/safeconduct/keys/log.key"
    assert key.read_text().startswith("PRIVATE+KEY")

    def attack(folder: Path, path: Path) -> str:
        desk.python(f"os.chmod('{folder}', {mode})")
        return desk.python(
            f"try: os.chmod('{folder}', 0o700)\nexcept OSError: pass\nprint(open('{path}').read())"
        )["output"]

    plain = desk.workspace / "plain"
    assert "SHOWN" in attack(plain, plain / "shown")
    assert "PRIVATE" not in attack(desk.base / "l", key)


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_in_force_is_not_changed_in_a_closed_folder(desk: Desk, mode: int) -> None:
    for name, wins in (("plain/config", True), ("conf/policy.yaml", False)):
        path = desk.workspace / name
        before = path.read_bytes()
        desk.python(f"os.chmod('{path.parent}', {mode})")
        desk.python(f"os.chmod('{path.parent}', 0o700); open('{path}', 'a').write('# evil')")
        desk.open_all()
        assert (path.read_bytes() != before) == wins


_WAIT = """
import select, sys
for _ in range({rounds}): select.select([], [], [], 0.05)
print('ESCAPED')
"""
GROWN = {
    "disk": """
os.mkdir('blind'); os.chmod('blind', 0o300); os.chdir('blind')
for number in range(48):
    with open(f'f{number}', 'wb') as file: file.write(os.urandom(1 << 20)); os.fsync(file.fileno())
""",
    "inodes": """
os.mkdir('blind'); os.chmod('blind', 0o300); os.chdir('blind')
for number in range(3000): os.close(os.open(f'i{number}', os.O_CREAT | os.O_WRONLY))
""",
    "depth": """
for number in range(1500): os.mkdir('q'); os.chmod('q', 0o300); os.chdir('q')
""",
}


@pytest.mark.parametrize("place", ["workspace", "scratch"])
@pytest.mark.parametrize("limit", GROWN)
def test_limits_hold_in_folders_that_cannot_be_listed(desk: Desk, limit: str, place: str) -> None:
    if place == "scratch" and desk.tier is Tier.FULL:
        pytest.skip("the scratch folder of tier full is a file system with limits of its own")
    with tempfile.TemporaryDirectory(prefix="unconfined-") as folder:
        text = f"import os\nos.chdir('{folder}')\n{GROWN[limit]}{_WAIT.format(rounds=0)}"
        free = subprocess.run([sys.executable, "-c", text], capture_output=True, check=False)
        assert b"ESCAPED" in free.stdout
        subprocess.run(["rm", "-rf", folder], check=True)  # rmtree calls itself for each level
        os.mkdir(folder)
    data = desk.workspace / "data"
    there = repr(str(data)) if place == "workspace" else "os.environ['TMPDIR']"
    outcome = desk.python(f"os.chdir({there}){GROWN[limit]}{_WAIT.format(rounds=200)}")
    assert "ESCAPED" not in outcome["output"]
    assert outcome["end"] == limit, outcome
    if place == "workspace":
        desk.open_all()
        levels = max(
            len(Path(top).relative_to(desk.base).parts) for top, _, _ in os.walk(desk.base)
        )
        assert levels <= 30 + 1
        for made in (*data.iterdir(), *desk.base.glob("too-deep-*")):
            if made.is_dir():
                shutil.rmtree(made)  # calls itself for each level


def test_a_folder_that_is_closed_again_and_again_ends_the_call(desk: Desk) -> None:
    """Whoever opens it loses races against the one who closes it: what may be in it is unknown."""
    outcome = desk.python(
        "import threading\n"
        f"os.chdir('{desk.workspace}/data'); os.mkdir('blind')\n"
        "def close():\n    while True: os.chmod('blind', 0)\n"
        "for _ in range(3): threading.Thread(target=close, daemon=True).start()\n"
        "for number in range(3000):\n"
        "    os.close(os.open(f'i{number}', os.O_CREAT | os.O_WRONLY))\n" + _WAIT.format(rounds=200)
    )
    assert "ESCAPED" not in outcome["output"]
    assert outcome["end"] in ("disk", "inodes")
    desk.open_all()


def test_the_place_of_scratch_folders_does_not_stay_closed(desk: Desk) -> None:
    if desk.tier is Tier.FULL:
        pytest.skip("a program of tier full sees no folder of the host above its scratch folder")
    assert desk.python("os.chmod(os.path.dirname(os.environ['TMPDIR']), 0)")["end"] == "0"
    for _ in range(3):
        desk.python("pass")  # what waits was made before
    told = desk.python("open(os.environ['TMPDIR'] + '/x', 'w').write('x'); print('fine')")
    assert told == {"output": "fine\n", "end": "0"}
