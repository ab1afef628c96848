"""Step "sandbox": a program runs, is bounded, and leaves nothing, in both tiers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safeconduct.call import Limits, Outcome, Profile, Tier
from safeconduct.errors import SandboxFailed, ToolFailed
from safeconduct.runtime.sandbox.cgroup import Cgroups
from safeconduct.runtime.sandbox.native import NativeSandbox
from safeconduct.runtime.sandbox.running import Running
from safeconduct.runtime.sandbox.shield import Shield

if TYPE_CHECKING:
    from tests.conftest import Box

SHORT = Limits(wall_ms=1000)


def processes(marker: str) -> list[int]:
    """Return the processes whose command line holds ``marker``."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def gone(marker: str, seconds: float = 5.0) -> bool:
    """Wait, within a bound, until no process carries ``marker``."""
    deadline = time.monotonic() + seconds
    while processes(marker):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_program_runs_and_is_accounted(box: Box) -> None:
    outcome = box.run("sh", "-c", "cat; echo err >&2; exit 3", stdin=b"in")
    assert (outcome.stdout, outcome.stderr, outcome.exit_code) == (b"in", b"err\n", 3)
    assert outcome.confinement.tier is box.tier
    assert outcome.limit is None
    assert not outcome.ok


def test_a_signal_is_told(box: Box) -> None:
    assert box.run("sh", "-c", "kill -SEGV $$").signal == 11


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("no-such-program",), "tool.not_found"),
        (("",), "tool.not_found"),
        (("/usr",), "tool.not_found"),
        ((), "tool.not_found"),
        (("echo", "x" * 200_000), "tool.not_found"),
    ],
    ids=["missing", "empty-name", "folder", "no-argv", "argument-too-long"],
)
def test_what_cannot_be_executed_is_the_tools_failure(
    box: Box, argv: tuple[str, ...], code: str
) -> None:
    with pytest.raises(ToolFailed) as caught:
        box.run(*argv)
    assert caught.value.code == code


@pytest.mark.parametrize("text", ["a\0b", "\ud800"], ids=["nul", "lone-surrogate"])
def test_text_that_is_no_argument_is_refused(box: Box, text: str) -> None:
    with pytest.raises(SandboxFailed):
        box.run("echo", text)


def test_a_request_too_large_is_refused_and_the_next_call_runs(box: Box) -> None:
    with pytest.raises(SandboxFailed):
        box.run("echo", *["x" * 100_000] * 50)
    assert box.run("true").ok


def test_arguments_are_bytes(box: Box) -> None:
    assert box.run("printf", "%s", "\udcff-é-漢").stdout == b"\xff-\xc3\xa9-\xe6\xbc\xa2"


def test_sixteen_mebibytes_of_stdin(box: Box) -> None:
    assert box.run("wc", "-c", stdin=b"x" * (16 << 20)).stdout == b"16777216\n"


def test_stdin_can_be_neither_changed_nor_executed(box: Box) -> None:
    code = """
import fcntl, os
for attempt in (
    lambda: os.write(0, b"x"),
    lambda: os.ftruncate(0, 0),
    lambda: os.fchmod(0, 0o777),
    lambda: fcntl.fcntl(0, fcntl.F_ADD_SEALS, 0),
    lambda: os.execve(0, ["x"], {}),
    lambda: os.execve("/proc/self/fd/0", ["x"], {}),
):
    try:
        print("ESCAPED", attempt())
    except OSError:
        pass
"""
    outcome = box.run("python3", "-c", code, stdin=Path("/bin/true").read_bytes())
    assert (outcome.stdout, outcome.exit_code) == (b"", 0)


def test_nothing_is_inherited(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTSIDE_TOKEN", "secret")
    with open("/etc/hostname", "rb") as secret:
        os.set_inheritable(secret.fileno(), True)
        code = """
import os
print(sorted(os.environ))
for fd in range(3, 512):
    try: os.fstat(fd)
    except OSError: continue
    print("inherited", fd)
"""
        outcome = box.python(code)
    assert b"OUTSIDE_TOKEN" not in outcome.stdout
    assert b"inherited" not in outcome.stdout


def test_wall_limit_holds_against_ignored_signals(box: Box) -> None:
    started = time.monotonic()
    outcome = box.run("sh", "-c", "trap '' TERM INT HUP QUIT; while :; do :; done", limits=SHORT)
    assert outcome.limit == "wall"
    assert time.monotonic() - started < 4


def test_wall_limit_holds_when_the_program_stops_itself(box: Box) -> None:
    assert box.run("sh", "-c", "kill -STOP $$; kill -STOP $PPID", limits=SHORT).limit == "wall"


def test_output_is_cut_and_not_collected(box: Box) -> None:
    limits = Limits(wall_ms=10_000, output_bytes=1000)
    outcome = box.run("sh", "-c", "yes | head -c 100000000", limits=limits)
    assert len(outcome.stdout) == 1000
    assert outcome.truncated
    assert outcome.exit_code == 0


def test_a_program_that_reads_its_own_output_loses_no_other(box: Box) -> None:
    # It may open its end of the pipe for reading and be faster than the supervisor, whose read
    # then finds nothing although it was told there is something.
    code = """
import os
try: own = os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
except OSError: own = -1
for _ in range(300):
    os.write(1, b"x" * 512)
    try: own >= 0 and os.read(own, 512)
    except BlockingIOError: pass
os.write(2, b"end" * 50000)
"""
    outcome = box.python(code)
    assert outcome.ok
    assert outcome.stderr == b"end" * 50000


def test_no_orphan_survives_the_call(box: Box) -> None:
    marker = f"orphan-{os.getpid()}-{box.tier}"
    code = f"setsid -f sh -c 'sleep 60; : {marker}' & (trap '' HUP TERM; sleep 60; : {marker}) &"
    assert box.run("sh", "-c", code).exit_code == 0
    assert gone(marker, 1.0)


def test_an_interrupt_right_after_the_program_was_told_ends_it(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callable[..., Running] = NativeSandbox._begin  # pyright: ignore[reportPrivateUsage]
    begun: list[Running] = []
    marker = f"told{os.getpid()}"

    def interrupted(*arguments: object, **options: object) -> Running:
        begun.append(whole(*arguments, **options))
        deadline = time.monotonic() + 5
        while not processes(marker):
            assert time.monotonic() < deadline
        raise KeyboardInterrupt

    monkeypatch.setattr(NativeSandbox, "_begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        box.run("sh", "-c", f"sleep 60; : {marker}")
    assert begun  # held on to, as a traceback does
    assert gone(marker)


def test_a_fork_bomb_is_contained(box: Box) -> None:
    marker = f"bomb{os.getpid()}"
    outcome = box.run("bash", "-c", f"{marker}(){{ {marker}|{marker}& }}; {marker}; sleep 30",
                      limits=Limits(wall_ms=1500, pids=32))  # fmt: skip
    assert outcome.limit == "wall" or outcome.exit_code is not None
    assert gone(marker, 1.0)
    assert box.run("true").ok


def test_a_program_cannot_end_its_init(box: Box) -> None:
    outcome = box.run("sh", "-c", "kill -9 $PPID; kill -9 -1; kill -9 1; echo alive")
    assert outcome.stdout == b"alive\n"


def test_memory_limit_is_named(box: Box, cgroups: Cgroups | None) -> None:
    if cgroups is None:
        pytest.skip("needs cgroups")
    limits = Limits(wall_ms=10_000, memory_bytes=128 << 20)
    assert box.python("bytearray(400 << 20)", limits=limits).limit == "memory"


def test_a_missing_working_folder_is_not_made_on_the_host(box: Box) -> None:
    missing = box.workspace / "gone" / "deeper"
    with pytest.raises(SandboxFailed):
        box.run("true", cwd=str(missing))
    with pytest.raises(SandboxFailed):
        box.run("true", cwd="/usr/safeconduct-missing")
    assert not missing.parent.exists()
    assert not os.path.exists("/usr/safeconduct-missing")


def test_a_grant_that_does_not_exist_is_refused(box: Box) -> None:
    profile = Profile(name="test", read=(str(box.workspace), "/nonexistent/folder"))
    with pytest.raises(SandboxFailed) as missing:
        box.run("true", profile=profile)
    if box.sandbox.tier is Tier.FULL:
        assert missing.value.code == "sandbox.missing_grant"


def test_no_disk_at_all_is_not_a_disk_without_end(box: Box) -> None:
    """tmpfs(5) takes a size of 0 for no limit, and tells no size then."""
    if box.sandbox.tier is Tier.LANDLOCK:
        pytest.skip("tier landlock has no tmpfs of its own")
    code = "import os; print(*(os.statvfs(name).f_blocks for name in ('/tmp', '/dev/shm')))"
    told = box.run("python3", "-S", "-c", code, limits=Limits(disk_bytes=0))
    assert told.stdout == b"1 1\n"


def test_one_file_can_be_granted(box: Box, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = Path("/usr/share/doc")
    alone = box.workspace / "granted.txt"
    alone.write_text("granted")
    (box.workspace / "other.txt").write_text("other")
    profile = Profile(name="test", read=(str(alone),))
    outcome = box.run("sh", "-c", "cat granted.txt; cat other.txt", profile=profile)
    assert outcome.stdout == b"granted"
    assert file.exists()


WEIRD = (b"new\nline", b"\xff\xfe", b'quo"te\\', b"\xc3\xa9", b"-rf", b" \t")


def test_names_in_any_bytes_can_be_hidden(box: Box) -> None:
    folder = box.workspace / "names"
    folder.mkdir()
    paths = [os.path.join(folder, os.fsdecode(name)) for name in WEIRD]
    for path in paths:
        Path(path).write_text("secret")
    outcome = box.run("sh", "-c", "cat names/* 2>/dev/null", shield=Shield(hidden=tuple(paths[:3])))
    assert outcome.stdout == b"secret" * 3


def test_git_commits_in_a_repository_of_its_own(box: Box) -> None:
    code = """
        git init -q made && cd made && git config user.email a@b && git config user.name a &&
        echo x > f && git add f && git commit -qm first && git log --format=%s
    """
    outcome = box.run("sh", "-euc", code)
    assert (outcome.stdout, outcome.exit_code) == (b"first\n", 0), outcome.stderr


def test_thirty_two_calls_at_once(box: Box) -> None:
    def one(number: int) -> Outcome:
        return box.run("sh", "-c", f"sleep 0.1; echo {number}")

    with ThreadPoolExecutor(32) as pool:
        outcomes = list(pool.map(one, range(64)))
    assert [outcome.stdout for outcome in outcomes] == [b"%d\n" % n for n in range(64)]
